//! Interfaces: which there are, which of them a guest can have, and changes to our own.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkFlags, LinkInfo,
    LinkLayerType, LinkMessage,
};

use crate::netlink::{Socket, says};
use crate::{Error, LinkState};

/// Bytes of packet that a TAP interface can take: 64 KiB less one and the Ethernet header, which the kernel counts.
const MTU: std::ops::RangeInclusive<u32> = 68..=65_521;

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

/// Whether a guest can have an interface.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fit {
    Yes,
    /// It is not for a guest; why.
    Skipped(&'static str),
    /// The workload would miss it; why it cannot have it.
    Refused(String),
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

    fn is_up(&self) -> bool {
        self.flags.contains(LinkFlags::Up)
    }

    pub fn state(&self) -> LinkState {
        if self.flags.contains(LinkFlags::Up | LinkFlags::LowerUp) {
            LinkState::Up
        } else {
            LinkState::Down
        }
    }

    /// Whether it is one that `/dev/net/tun` makes.
    pub fn is_tap(&self) -> bool {
        self.kind == Some(InfoKind::Tun)
    }

    fn is_candidate(&self) -> bool {
        self.is_up() && !self.flags.contains(LinkFlags::Loopback) && self.controller.is_none()
    }

    /// Whether a guest can have it, among all that are there.
    pub fn fit(&self, all: &[Link]) -> Fit {
        if self.flags.contains(LinkFlags::Loopback) {
            return Fit::Skipped("the guest has a loopback interface of its own");
        }
        if !self.is_up() {
            return Fit::Skipped("it is down");
        }
        if self.controller.is_some() {
            return Fit::Skipped("it is a port of another, which has its frames");
        }
        let kind = self.kind.as_ref().map(InfoKind::to_string);
        let why = match &self.kind {
            Some(InfoKind::Tun) => {
                "it is a TUN or TAP interface, whose frames are for the program that made it; if it is left of another \
                 VM, remove what that made"
            }
            Some(InfoKind::IpVlan) => {
                "ipvlan shares its parent's MAC address and sorts by IP addresses, which the guest may change; use macvlan, \
                 veth or ptp"
            }
            Some(InfoKind::MacVtap | InfoKind::IpVtap) => {
                "its frames are for the program that opens its character device; use macvlan or veth"
            }
            Some(InfoKind::Vrf) => {
                "a VRF's routes are in a table of its own, and only main is mirrored"
            }
            _ if self.layer != LinkLayerType::Ether || self.mac.is_none() => {
                return Fit::Refused(format!(
                    "it carries no Ethernet frames (kind {})",
                    kind.as_deref().unwrap_or("unknown")
                ));
            }
            _ if !MTU.contains(&self.mtu) => {
                return Fit::Refused(format!(
                    "its MTU is {} bytes; {} to {} are possible",
                    self.mtu,
                    MTU.start(),
                    MTU.end()
                ));
            }
            _ => {
                let below = all
                    .iter()
                    .find(|link| Some(link.index) == self.lower && link.is_candidate());
                let Some(below) = below else {
                    return Fit::Yes;
                };
                return Fit::Refused(format!(
                    "it is on top of {:?} in the same network namespace, whose frames would go to the guest before \
                     this one sees them; take {:?} down or make this one in the guest",
                    below.name, below.name
                ));
            }
        };
        Fit::Refused(why.to_owned())
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

/// Brings our TAP interface up with an MTU in bytes and without addresses of its own.
pub(crate) fn bring_up(socket: &mut Socket, name: &str, index: u32, mtu: u16) -> Result<(), Error> {
    let set = |message| RouteNetlinkMessage::SetLink(message);
    let inet6 = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    let quiet = of(index, vec![LinkAttribute::AfSpecUnspec(vec![inet6])]);
    match socket.change(("keep IPv6 addresses off", &name), set(quiet), 0) {
        // A kernel without IPv6 gives none.
        Err(error) if says(&error, libc::EAFNOSUPPORT) => {}
        result => result?,
    }
    let mtu = of(index, vec![LinkAttribute::Mtu(mtu.into())]);
    socket.change(("set the MTU of", &name), set(mtu), 0)?;
    let mut up = of(index, Vec::new());
    up.header.flags = LinkFlags::Up;
    up.header.change_mask = LinkFlags::Up;
    socket.change(("bring up", &name), set(up), 0)
}

/// Deletes an interface. That it is gone already is well.
pub(crate) fn delete(socket: &mut Socket, name: &str, index: u32) -> Result<(), Error> {
    let message = RouteNetlinkMessage::DelLink(of(index, Vec::new()));
    match socket.change(("delete the interface", &name), message, 0) {
        Err(error) if says(&error, libc::ENODEV) => Ok(()),
        result => result,
    }
}
