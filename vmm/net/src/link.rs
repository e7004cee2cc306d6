//! Interfaces: which there are, and changes to our own.

#[cfg(feature = "host")]
mod fit;

use std::fs::File;
use std::os::fd::AsRawFd;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkFlags, LinkInfo,
    LinkLayerType, LinkMessage,
};

#[cfg(feature = "host")]
pub(crate) use self::fit::Fit;
use crate::Error;
use crate::netlink::{Socket, says};

/// An interface as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub index: u32,
    pub name: String,
    pub mac: Option<[u8; 6]>,
    pub mtu: u32,
    flags: LinkFlags,
    layer: LinkLayerType,
    /// Without one it is a device of hardware.
    kind: Option<InfoKind>,
    /// The bridge, bond or VRF that it is a port of.
    controller: Option<u32>,
    /// The interface below it, if that is in the same namespace.
    lower: Option<u32>,
}

impl Link {
    pub fn of(message: &LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            mac: None,
            mtu: 0,
            flags: message.header.flags,
            layer: message.header.link_layer_type,
            kind: None,
            controller: None,
            lower: None,
        };
        let mut elsewhere = false;
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().ok(),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Controller(index) => link.controller = Some(*index),
                LinkAttribute::Link(index) => link.lower = Some(*index),
                LinkAttribute::LinkNetNsId(_) => elsewhere = true,
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = infos.iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.clone()),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        // The other end of a veth pair is beside it, not below it.
        if elsewhere || link.kind == Some(InfoKind::Veth) || link.lower == Some(link.index) {
            link.lower = None;
        }
        link
    }

    pub fn is_up(&self) -> bool {
        self.flags.contains(LinkFlags::Up)
    }

    /// Whether frames can go through it.
    pub fn has_carrier(&self) -> bool {
        self.flags.contains(LinkFlags::Up | LinkFlags::LowerUp)
    }

    pub fn is_loopback(&self) -> bool {
        self.flags.contains(LinkFlags::Loopback)
    }
}

/// All interfaces, in the order of their numbers, which is that of their making.
pub(crate) fn list(socket: &mut Socket) -> Result<Vec<Link>, Error> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let mut links: Vec<_> = socket
        .list("the interfaces", &request)?
        .iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(message) => Some(Link::of(message)),
            _ => None,
        })
        .collect();
    links.sort_by_key(|link| link.index);
    Ok(links)
}

fn of(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes;
    message
}

fn change(
    socket: &mut Socket,
    doing: &'static str,
    name: &str,
    message: LinkMessage,
) -> Result<(), Error> {
    let message = RouteNetlinkMessage::SetLink(message);
    socket.change((doing, &name), message, 0)
}

/// Sets an interface's MTU in bytes and brings it up, without addresses of its own.
pub(crate) fn bring_up(socket: &mut Socket, name: &str, index: u32, mtu: u16) -> Result<(), Error> {
    // First the MTU: one that is too small for IPv6 takes what IPv6 knows of the interface away.
    let mtu = of(index, vec![LinkAttribute::Mtu(mtu.into())]);
    change(socket, "set the MTU of", name, mtu)?;
    let inet6 = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    let quiet = of(index, vec![LinkAttribute::AfSpecUnspec(vec![inet6])]);
    match change(socket, "keep IPv6 addresses off", name, quiet) {
        // A kernel without IPv6 gives none.
        Err(error) if says(&error, libc::EAFNOSUPPORT) => {}
        result => result?,
    }
    set_up(socket, name, index, true)
}

/// Brings an interface up or takes it down, as it is.
pub(crate) fn set_up(socket: &mut Socket, name: &str, index: u32, up: bool) -> Result<(), Error> {
    let mut message = of(index, Vec::new());
    message.header.change_mask = LinkFlags::Up;
    let doing = if up {
        message.header.flags = LinkFlags::Up;
        "bring up"
    } else {
        "take down"
    };
    change(socket, doing, name, message)
}

/// Gives an interface that is down another name.
pub(crate) fn rename(socket: &mut Socket, link: &mut Link, name: &str) -> Result<(), Error> {
    let message = of(link.index, vec![LinkAttribute::IfName(name.to_owned())]);
    let message = RouteNetlinkMessage::SetLink(message);
    let what = format!("{} to {name}", link.name);
    socket.change(("rename", &what), message, 0)?;
    name.clone_into(&mut link.name);
    Ok(())
}

/// Moves an interface to another network namespace.
pub(crate) fn move_to(socket: &mut Socket, link: &Link, netns: &File) -> Result<(), Error> {
    let message = of(link.index, vec![LinkAttribute::NetNsFd(netns.as_raw_fd())]);
    change(
        socket,
        "move to the container's network namespace",
        &link.name,
        message,
    )
}

/// Deletes an interface. That it is gone already is well.
#[cfg(feature = "host")]
pub(crate) fn delete(socket: &mut Socket, name: &str, index: u32) -> Result<(), Error> {
    let message = RouteNetlinkMessage::DelLink(of(index, Vec::new()));
    match socket.change(("delete the interface", &name), message, 0) {
        Err(error) if says(&error, libc::ENODEV) => Ok(()),
        result => result,
    }
}
