//! What the tests build networks of, and look at them with.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::tc::TcMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::link::{self, Link};
use crate::netlink::Socket;
use crate::{Error, Netns};

pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const EXPERIMENT: u16 = 0x88b5;

pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{what} did not come"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Does something in a namespace by netlink.
pub fn inside<T: Send>(
    netns: &Netns,
    work: impl FnOnce(&mut Socket) -> Result<T, Error> + Send,
) -> T {
    netns.enter(|| work(&mut Socket::open()?)).unwrap()
}

pub fn change(netns: &Netns, message: RouteNetlinkMessage, flags: u16) {
    inside(netns, |socket| {
        socket.change(("make", &"a test"), message, flags)
    });
}

fn links(netns: &Netns) -> Vec<Link> {
    inside(netns, link::list)
}

pub fn find(netns: &Netns, name: &str) -> Link {
    let all = links(netns);
    let link = all.iter().find(|link| link.name == name);
    link.unwrap_or_else(|| panic!("no {name} in {all:?}"))
        .clone()
}

pub fn names(netns: &Netns) -> Vec<String> {
    links(netns).into_iter().map(|link| link.name).collect()
}

/// A new interface of a kind, down.
pub fn add(
    netns: &Netns,
    name: &str,
    kind: InfoKind,
    data: Option<InfoData>,
    mut more: Vec<LinkAttribute>,
) {
    let mut message = LinkMessage::default();
    let info = [LinkInfo::Kind(kind)]
        .into_iter()
        .chain(data.map(LinkInfo::Data));
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::LinkInfo(info.collect()),
    ];
    message.attributes.append(&mut more);
    change(
        netns,
        RouteNetlinkMessage::NewLink(message),
        NLM_F_CREATE | NLM_F_EXCL,
    );
}

/// Two ends of a wire, both up: `name` with the MAC address that ends in `last` here, `peer-NAME` there.
pub fn pair(here: &Netns, name: &str, last: u8, there: &Netns, mtu: u32) {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(format!("peer-{name}")),
        LinkAttribute::Mtu(mtu),
        LinkAttribute::NetNsFd(std::os::fd::AsFd::as_fd(there).as_raw_fd()),
    ];
    let mac = [2, 0, 0, 0, 0, last].to_vec();
    let more = vec![LinkAttribute::Address(mac), LinkAttribute::Mtu(mtu)];
    let data = InfoData::Veth(InfoVeth::Peer(peer));
    add(here, name, InfoKind::Veth, Some(data), more);
    set_up(there, &format!("peer-{name}"), true);
    set_up(here, name, true);
    // A carrier that has just come lets frames through when the kernel has said so, not before.
    for (netns, name) in [(here, name), (there, &format!("peer-{name}"))] {
        until("a carrier", || {
            format!("{:?}", find(netns, name)).contains("Running")
        });
    }
}

pub fn set_up(netns: &Netns, name: &str, up: bool) {
    let mut message = LinkMessage::default();
    message.header.index = find(netns, name).index;
    message.header.change_mask = LinkFlags::Up;
    if up {
        message.header.flags = LinkFlags::Up;
    }
    change(netns, RouteNetlinkMessage::SetLink(message), 0);
}

pub fn delete(netns: &Netns, name: &str) {
    let index = find(netns, name).index;
    inside(netns, |socket| link::delete(socket, name, index));
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// An address, without detection of duplicates, so that it is there at once.
pub fn address(netns: &Netns, name: &str, address: &str, prefix: u8) {
    let address: IpAddr = address.parse().unwrap();
    let mut message = AddressMessage::default();
    message.header.family = family(address);
    message.header.prefix_len = prefix;
    message.header.index = find(netns, name).index;
    message.attributes = vec![
        AddressAttribute::Local(address),
        AddressAttribute::Address(address),
    ];
    if address.is_ipv6() {
        let nodad = AddressAttribute::Flags(AddressFlags::Nodad);
        message.attributes.push(nodad);
    }
    change(
        netns,
        RouteNetlinkMessage::NewAddress(message),
        NLM_F_CREATE | NLM_F_EXCL,
    );
}

/// A route of an administrator; by `kind`, without a way.
pub struct NewRoute<'a> {
    pub to: (&'a str, u8),
    pub gateway: Option<&'a str>,
    pub interface: Option<&'a str>,
    pub kind: RouteType,
    pub onlink: bool,
    pub metric: Option<u32>,
    pub mtu: Option<u32>,
    pub table: u8,
}

pub fn to<'a>(destination: &'a str, prefix: u8) -> NewRoute<'a> {
    NewRoute {
        to: (destination, prefix),
        gateway: None,
        interface: None,
        kind: RouteType::Unicast,
        onlink: false,
        metric: None,
        mtu: None,
        table: RouteHeader::RT_TABLE_MAIN,
    }
}

pub fn route(netns: &Netns, new: NewRoute<'_>) {
    let destination: IpAddr = new.to.0.parse().unwrap();
    let mut message = RouteMessage::default();
    message.header.address_family = family(destination);
    message.header.destination_prefix_length = new.to.1;
    message.header.protocol = RouteProtocol::Static;
    message.header.table = new.table;
    message.header.kind = new.kind;
    if new.gateway.is_none() && new.interface.is_some() {
        message.header.scope = RouteScope::Link;
    }
    if new.onlink {
        message.header.flags = RouteFlags::Onlink;
    }
    if new.to.1 > 0 {
        let destination = RouteAttribute::Destination(RouteAddress::from(destination));
        message.attributes.push(destination);
    }
    if let Some(gateway) = new.gateway {
        let gateway: IpAddr = gateway.parse().unwrap();
        let gateway = RouteAttribute::Gateway(RouteAddress::from(gateway));
        message.attributes.push(gateway);
    }
    if let Some(name) = new.interface {
        let oif = RouteAttribute::Oif(find(netns, name).index);
        message.attributes.push(oif);
    }
    if let Some(metric) = new.metric {
        message.attributes.push(RouteAttribute::Priority(metric));
    }
    if let Some(mtu) = new.mtu {
        let metrics = RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]);
        message.attributes.push(metrics);
    }
    change(
        netns,
        RouteNetlinkMessage::NewRoute(message),
        NLM_F_CREATE | NLM_F_APPEND,
    );
}

pub fn neighbour(netns: &Netns, name: &str, address: &str, mac: [u8; 6], state: NeighbourState) {
    let address: IpAddr = address.parse().unwrap();
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = find(netns, name).index;
    message.header.state = state;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::from(address)),
        NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
    ];
    change(
        netns,
        RouteNetlinkMessage::NewNeighbour(message),
        NLM_F_CREATE,
    );
}

/// All that a CNI plugin could have made, as text that two looks can be compared by.
pub fn dump(netns: &Netns) -> Vec<String> {
    let mut lines = inside(netns, |socket| {
        let mut lines = Vec::new();
        for link in link::list(socket)? {
            lines.push(format!("{link:?}"));
            for parent in [0xffff_fff2, 0xffff_fff3, 0_u32] {
                let mut request = TcMessage::with_index(link.index.cast_signed());
                request.header.parent = parent.into();
                let request = RouteNetlinkMessage::GetTrafficFilter(request);
                let dump = socket.dump("filters", &request)?;
                let shown = dump.messages.iter().map(|message| match message {
                    RouteNetlinkMessage::NewTrafficFilter(filter) => format!("{:?}", filter.header),
                    other => format!("{other:?}"),
                });
                lines.extend(shown);
            }
        }
        let disciplines = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        for message in socket.dump("disciplines", &disciplines)?.messages {
            if let RouteNetlinkMessage::NewQueueDiscipline(message) = message {
                lines.push(format!(
                    "{:?} {:?}",
                    message.header,
                    message.attributes.first()
                ));
            }
        }
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut of = AddressMessage::default();
            of.header.family = family;
            for message in socket.list("addresses", &RouteNetlinkMessage::GetAddress(of))? {
                if let RouteNetlinkMessage::NewAddress(mut message) = message {
                    // Ages.
                    let ages = |attribute: &AddressAttribute| {
                        !matches!(attribute, AddressAttribute::CacheInfo(_))
                    };
                    message.attributes.retain(ages);
                    lines.push(format!("{message:?}"));
                }
            }
            let mut of = RouteMessage::default();
            of.header.address_family = family;
            for message in socket.list("routes", &RouteNetlinkMessage::GetRoute(of))? {
                if let RouteNetlinkMessage::NewRoute(mut message) = message {
                    let ages = |attribute: &RouteAttribute| {
                        !matches!(attribute, RouteAttribute::CacheInfo(_))
                    };
                    message.attributes.retain(ages);
                    lines.push(format!("{message:?}"));
                }
            }
            let mut of = NeighbourMessage::default();
            of.header.family = family;
            for message in socket.list("neighbours", &RouteNetlinkMessage::GetNeighbour(of))? {
                if let RouteNetlinkMessage::NewNeighbour(message) = message
                    && message.header.state == NeighbourState::Permanent
                {
                    lines.push(format!("{:?}", message.header));
                }
            }
        }
        Ok(lines)
    });
    lines.sort();
    lines
}

/// Waits until detection of duplicates has ended, which shows in dumps.
pub fn settled(netns: &Netns) {
    until("settled addresses", || {
        !dump(netns).iter().any(|line| line.contains("Tentative"))
    });
}

/// A socket that sees an interface's frames and sends some.
pub struct Packets(OwnedFd);

impl Packets {
    pub fn on(netns: &Netns, interface: &str) -> Self {
        let index = find(netns, interface).index.cast_signed();
        let protocol = EXPERIMENT.to_be();
        netns
            .enter(|| {
                // SAFETY: takes integers.
                let fd = unsafe {
                    libc::socket(
                        libc::AF_PACKET,
                        libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
                        i32::from(protocol),
                    )
                };
                assert!(fd >= 0, "{}", std::io::Error::last_os_error());
                // SAFETY: the descriptor is new and nobody else's.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                // SAFETY: zeroes are a good value, and the structure lives over the call with the size that is said.
                let bound = unsafe {
                    let mut address: libc::sockaddr_ll = std::mem::zeroed();
                    address.sll_family = libc::AF_PACKET as u16;
                    address.sll_protocol = protocol;
                    address.sll_ifindex = index;
                    let size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
                    libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size)
                };
                assert_eq!(bound, 0, "{}", std::io::Error::last_os_error());
                Ok(Self(fd))
            })
            .unwrap()
    }

    pub fn send(&self, bytes: &[u8]) {
        let sent = rustix::io::write(&self.0, bytes);
        assert_eq!(sent, Ok(bytes.len()));
    }

    pub fn receive(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 70_000];
        let got = rustix::io::read(&self.0, &mut bytes[..]).ok()?;
        bytes.truncate(got);
        Some(bytes)
    }

    /// Waits for a frame of the tests' own type.
    pub fn expect(&self, frame: &[u8]) {
        let mut got = None;
        until("the frame", || {
            got = self.receive();
            got.is_some()
        });
        assert_eq!(got.as_deref(), Some(frame));
    }
}

/// Of a type that nobody else uses, of this many bytes with its header.
pub fn ethernet(to: [u8; 6], payload: u8, len: usize) -> Vec<u8> {
    let mut bytes = to.to_vec();
    bytes.extend([2, 0, 0, 0, 0, 9]);
    bytes.extend(EXPERIMENT.to_be_bytes());
    bytes.resize(len, payload);
    bytes
}
