//! The guest's half: what is described becomes what is configured.

use std::fs::File;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::RouteMessage;
use tracing::debug;

use crate::Error;
use crate::describe::{Address, Interface, Neighbour, Network, Route, RouteKind};
use crate::link::{self, Link};
use crate::messages::{self, FAMILIES};
use crate::netlink::{Socket, says};
use crate::requests;

/// How long detection of duplicates may take where routes need its end; the kernel's own defaults give 1 to 2 s.
const SETTLE: Duration = Duration::from_secs(4);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// `rtm_protocol` of routes that the kernel makes with an address: include/uapi/linux/rtnetlink.h.
const RTPROT_KERNEL: u8 = 2;

/// Configures a network in the calling thread's network namespace: the interfaces, which are found by their MAC
/// addresses, get their names and all else; loopback is brought up.
///
/// What is there already and equal stays, so that applying the same again is well. What else is there stays too, but
/// for two things: a neighbour of the same address is replaced, and a route that the kernel makes with an address is
/// removed if it is not described. An interface that has to be renamed is taken down first, by which it loses its IPv6
/// addresses and its routes. After an error, what was done stays.
///
/// It waits up to 4 s for detection of duplicates where its end must be known: an IPv6 address that may not be unique
/// is a route's source or has a peer.
///
/// # Errors
///
/// [`Error::Configure`]: not exactly one interface has a described MAC address, or a route or a neighbour is of an
/// interface that is not described. [`Error::NoIpv6`]: there are IPv6 addresses, and the kernel has no IPv6.
/// [`Error::Netlink`] says what else the kernel refuses, such as a name that another interface has, or an address or a
/// route that is there already but differs.
pub fn apply(network: &Network) -> Result<(), Error> {
    let mut socket = Socket::open()?;
    let links = interfaces(&mut socket, &network.interfaces)?;
    addresses(&mut socket, network, &links)?;
    routes(&mut socket, network, &links)?;
    for neighbour in &network.neighbours {
        add_neighbour(&mut socket, neighbour, &links)?;
    }
    debug!(interfaces = links.len(), "the network is configured");
    Ok(())
}

/// Moves the described interfaces from the calling thread's network namespace to another one; those that are not here are left
/// out.
///
/// # Errors
///
/// [`Error::Netlink`]: the kernel refuses it, as where the other has one of the same name.
pub fn move_to(network: &Network, netns: &File) -> Result<(), Error> {
    let mut socket = Socket::open()?;
    let all = link::list(&mut socket)?;
    for interface in &network.interfaces {
        let here = all.iter().find(|link| link.mac == Some(interface.mac));
        if let Some(link) = here {
            link::move_to(&mut socket, link, netns)?;
        }
    }
    Ok(())
}

/// Finds, names and brings up the interfaces; in the order of the description.
fn interfaces(socket: &mut Socket, interfaces: &[Interface]) -> Result<Vec<Link>, Error> {
    let all = link::list(socket)?;
    let found = interfaces
        .iter()
        .map(|interface| find(interface, interfaces, &all).cloned());
    let mut links = found.collect::<Result<Vec<_>, _>>()?;
    name(socket, interfaces, &mut links, &all)?;
    for (interface, link) in interfaces.iter().zip(&links) {
        link::bring_up(socket, &interface.name, link.index, interface.mtu)?;
    }
    for loopback in all
        .iter()
        .filter(|link| link.is_loopback() && !link.is_up())
    {
        link::set_up(socket, &loopback.name, loopback.index, true)?;
    }
    Ok(links)
}

fn find<'a>(
    interface: &Interface,
    interfaces: &[Interface],
    all: &'a [Link],
) -> Result<&'a Link, Error> {
    let failed = |why| Error::Configure {
        what: format!("the interface {:?}", interface.name),
        why,
    };
    let mac = shown(interface.mac);
    let twins = interfaces.iter().filter(|other| other.mac == interface.mac);
    if twins.count() > 1 {
        return Err(failed(format!(
            "its MAC address {mac} is described for another one too; give each its own"
        )));
    }
    let is_it = |link: &&Link| link.mac == Some(interface.mac) && !link.is_loopback();
    let having: Vec<_> = all.iter().filter(is_it).collect();
    match having[..] {
        [link] => Ok(link),
        [] => {
            let others: Vec<_> = all.iter().map(|link| link.name.as_str()).collect();
            let others = others.join(", ");
            Err(failed(format!(
                "no interface has the MAC address {mac}; there are {others}"
            )))
        }
        [first, second, ..] => Err(failed(format!(
            "both {} and {} have the MAC address {mac}",
            first.name, second.name
        ))),
    }
}

fn shown(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Gives each interface its described name. Names may have to be swapped, so where one is taken, all that get another are
/// first given names that nobody has.
fn name(
    socket: &mut Socket,
    interfaces: &[Interface],
    links: &mut [Link],
    all: &[Link],
) -> Result<(), Error> {
    let pairs = interfaces.iter().zip(links);
    let mut wrong: Vec<_> = pairs
        .filter(|(interface, link)| interface.name != link.name)
        .collect();
    for (_, link) in &wrong {
        if link.is_up() {
            link::set_up(socket, &link.name, link.index, false)?;
        }
    }
    let taken = |name: &str| all.iter().any(|link| link.name == name);
    if wrong.iter().any(|(interface, _)| taken(&interface.name)) {
        for (_, link) in &mut wrong {
            // Ten digits at most: a name may have 15 bytes.
            let between = format!("nacre{}", link.index);
            link::rename(socket, link, &between)?;
        }
    }
    for (interface, link) in wrong {
        link::rename(socket, link, &interface.name)?;
    }
    Ok(())
}

/// What addresses the interfaces have now.
fn configured(socket: &mut Socket, links: &[Link]) -> Result<Vec<Interface>, Error> {
    let mut there: Vec<_> = links.iter().map(messages::interface).collect();
    for family in FAMILIES {
        messages::addresses(socket, family, links, &mut there)?;
    }
    Ok(there)
}

fn addresses(socket: &mut Socket, network: &Network, links: &[Link]) -> Result<(), Error> {
    let there = configured(socket, links)?;
    let mut peers = Vec::new();
    for ((interface, link), there) in network.interfaces.iter().zip(links).zip(&there) {
        // The kernel has the newest of IPv6 first, and prefers it as a source: the last is the first to be made.
        let (v4, v6): (Vec<_>, Vec<_>) = interface
            .addresses
            .iter()
            .partition(|address| address.address.is_ipv4());
        for address in v4.into_iter().chain(v6.into_iter().rev()) {
            if !there.addresses.iter().any(|other| same(other, address)) {
                add_address(socket, address, link)?;
                let peer = address.peer.filter(IpAddr::is_ipv6);
                peers.extend(peer.map(|peer| (interface.name.as_str(), peer)));
            }
        }
    }
    settle(socket, network, links, &peers)
}

/// Whether two are the same, whatever is known of duplicates.
fn same(one: &Address, other: &Address) -> bool {
    let unique = one.unique;
    *one == Address {
        unique,
        ..other.clone()
    }
}

fn add_address(socket: &mut Socket, address: &Address, link: &Link) -> Result<(), Error> {
    let shown = format!("{}/{}", address.address, address.prefix);
    let what = format!("the address {shown} to {}", link.name);
    let message = RouteNetlinkMessage::NewAddress(requests::address(address, link.index));
    match socket.change(("add", &what), message, NLM_F_CREATE | NLM_F_EXCL) {
        Err(error) if address.address.is_ipv6() && is_without_ipv6(&error) => match error {
            Error::Netlink { source, .. } => Err(Error::NoIpv6 {
                address: shown,
                interface: link.name.clone(),
                source,
            }),
            error => Err(error),
        },
        result => result,
    }
}

/// A kernel without it knows nobody who would take the request; one where it is disabled permits no address.
fn is_without_ipv6(error: &Error) -> bool {
    [libc::EOPNOTSUPP, libc::EAFNOSUPPORT, libc::EACCES]
        .iter()
        .any(|errno| says(error, *errno))
}

/// Waits for what the kernel does with IPv6 addresses in its own time. A route's source must be known to be unique when the
/// route is made, or is refused. A peer gets a route when its address is, which may not be described.
fn settle(
    socket: &mut Socket,
    network: &Network,
    links: &[Link],
    peers: &[(&str, IpAddr)],
) -> Result<(), Error> {
    let is_source = |address: &IpAddr| {
        let mut routes = network.routes.iter();
        routes.any(|route| route.source == Some(*address))
    };
    let all = network.interfaces.iter();
    let sources: Vec<IpAddr> = all
        .flat_map(|interface| &interface.addresses)
        .filter(|address| !address.unique && is_source(&address.address))
        .map(|address| address.address)
        .collect();
    let start = Instant::now();
    while !(is_unique(socket, links, &sources)? && is_routed(socket, links, peers)?)
        && start.elapsed() < SETTLE
    {
        std::thread::sleep(LOOK);
    }
    Ok(())
}

fn is_unique(socket: &mut Socket, links: &[Link], addresses: &[IpAddr]) -> Result<bool, Error> {
    if addresses.is_empty() {
        return Ok(true);
    }
    let there = configured(socket, links)?;
    let mut there = there.iter().flat_map(|interface| &interface.addresses);
    Ok(!there.any(|address| !address.unique && addresses.contains(&address.address)))
}

fn is_routed(socket: &mut Socket, links: &[Link], peers: &[(&str, IpAddr)]) -> Result<bool, Error> {
    if peers.is_empty() {
        return Ok(true);
    }
    let there = routed(socket, links)?;
    Ok(peers.iter().all(|(interface, peer)| {
        there.iter().any(|route| {
            (route.destination, route.prefix) == (*peer, 128)
                && route.hops.iter().any(|hop| hop.interface == *interface)
        })
    }))
}

/// The main table's routes over these interfaces, and those that lead nowhere.
fn routed(socket: &mut Socket, links: &[Link]) -> Result<Vec<Route>, Error> {
    let mut routes = Vec::new();
    for family in FAMILIES {
        let messages = messages::route_messages(socket, family)?;
        // One that cannot be described is not one of ours.
        let known = messages
            .iter()
            .filter_map(|message| messages::route(message, links).ok().flatten());
        routes.extend(known);
    }
    Ok(routes)
}

fn routes(socket: &mut Socket, network: &Network, links: &[Link]) -> Result<(), Error> {
    let there = routed(socket, links)?;
    let is_described = |route: &Route| network.routes.contains(route);
    let (left, mut strange): (Vec<_>, Vec<_>) = there.into_iter().partition(is_described);
    for route in strange.extract_if(.., |route| is_of_address(route, network)) {
        let message = RouteNetlinkMessage::DelRoute(request(&route, links)?);
        socket.change(("remove", &told(&route)), message, 0)?;
    }
    for route in network.routes.iter().filter(|route| !left.contains(route)) {
        // Several of the same destination are right if they are described; they keep their order.
        let flags = if strange.iter().any(|other| competes(route, other)) {
            NLM_F_EXCL
        } else {
            NLM_F_APPEND
        };
        let message = RouteNetlinkMessage::NewRoute(request(route, links)?);
        socket.change(("add", &told(route)), message, NLM_F_CREATE | flags)?;
    }
    Ok(())
}

/// Whether the kernel has made it with an address of the description. One that is not described was removed where the
/// description comes from, and would lead past the routes that replace it.
fn is_of_address(route: &Route, network: &Network) -> bool {
    let [hop] = &route.hops[..] else {
        return false;
    };
    let of = network
        .interfaces
        .iter()
        .filter(|interface| interface.name == hop.interface);
    let mut addresses = of.flat_map(|interface| &interface.addresses);
    route.protocol == RTPROT_KERNEL
        && route.kind == RouteKind::Unicast
        && hop.gateway.is_none()
        && addresses.any(|address| {
            let both = [Some(address.address), address.peer];
            both.into_iter()
                .flatten()
                .any(|address| contains(route, address))
        })
}

/// Whether a route's destination has an address in it.
fn contains(route: &Route, address: IpAddr) -> bool {
    let (network, address, bits) = match (route.destination, address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            let left = |address: u32| u128::from(address) << 96;
            (left(network.to_bits()), left(address.to_bits()), 32)
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => (network.to_bits(), address.to_bits(), 128),
        _ => return false,
    };
    let prefix = u32::from(route.prefix.min(bits));
    let differing = (network ^ address).leading_zeros();
    differing >= prefix
}

/// Whether the kernel would have to choose between two.
fn competes(one: &Route, other: &Route) -> bool {
    let key = |route: &Route| (route.destination, route.prefix, route.tos, route.metric);
    key(one) == key(other)
}

fn request(route: &Route, links: &[Link]) -> Result<RouteMessage, Error> {
    let hops = route.hops.iter();
    let indices = hops.map(|hop| index(&hop.interface, links, || told(route)));
    let indices = indices.collect::<Result<Vec<_>, _>>()?;
    Ok(requests::route(route, &indices))
}

/// The number of a described interface.
fn index(name: &str, links: &[Link], what: impl FnOnce() -> String) -> Result<u32, Error> {
    let link = links.iter().find(|link| link.name == name);
    let link = link.ok_or_else(|| Error::Configure {
        what: what(),
        why: format!("it is of the interface {name:?}, which is not described"),
    })?;
    Ok(link.index)
}

/// A route for messages.
fn told(route: &Route) -> String {
    let mut text = format!("the route to {}/{}", route.destination, route.prefix);
    for hop in &route.hops {
        if let Some(gateway) = hop.gateway {
            text += &format!(" via {gateway}");
        }
        text += &format!(" over {}", hop.interface);
    }
    if let Some(source) = route.source {
        text += &format!(" from {source}");
    }
    text
}

fn add_neighbour(socket: &mut Socket, neighbour: &Neighbour, links: &[Link]) -> Result<(), Error> {
    let what = format!(
        "the neighbour {} at {} to {}",
        neighbour.address,
        shown(neighbour.mac),
        neighbour.interface
    );
    let index = index(&neighbour.interface, links, || what.clone())?;
    let message = RouteNetlinkMessage::NewNeighbour(requests::neighbour(neighbour, index));
    socket.change(("add", &what), message, NLM_F_CREATE | NLM_F_REPLACE)
}
