//! What is configured on interfaces, read for the guest.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteNextHopFlags, RouteProtocol, RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use tracing::{debug, warn};

use crate::Error;
use crate::describe::{Address, Hop, Interface, Neighbour, Network, Route, RouteKind};
use crate::link::Link;
use crate::netlink::Socket;
use crate::watch::LinkState;

const FAMILIES: [AddressFamily; 2] = [AddressFamily::Inet, AddressFamily::Inet6];

/// What is configured on these interfaces.
pub(crate) fn network(socket: &mut Socket, links: &[Link]) -> Result<Network, Error> {
    let mut network = Network {
        interfaces: links.iter().map(interface).collect(),
        ..Network::default()
    };
    for family in FAMILIES {
        addresses(socket, family, links, &mut network.interfaces)?;
        routes(socket, family, links, &mut network.routes)?;
    }
    // Routers must be within reach when routes over them are made.
    network.routes.sort_by_key(|route| {
        let over = |hop: &Hop| hop.gateway.is_some() && !hop.onlink;
        (route.hops.iter().any(over), u8::MAX - route.prefix)
    });
    for family in FAMILIES {
        neighbours(socket, family, links, &mut network)?;
    }
    Ok(network)
}

fn interface(link: &Link) -> Interface {
    Interface {
        name: link.name.clone(),
        mac: link.mac.unwrap_or_default(),
        mtu: u16::try_from(link.mtu).unwrap_or(u16::MAX),
        carrier: link.state() == LinkState::Up,
        addresses: Vec::new(),
    }
}

fn addresses(
    socket: &mut Socket,
    family: AddressFamily,
    links: &[Link],
    interfaces: &mut [Interface],
) -> Result<(), Error> {
    let mut request = AddressMessage::default();
    request.header.family = family;
    let request = RouteNetlinkMessage::GetAddress(request);
    for answer in socket.list("the addresses", &request)? {
        let RouteNetlinkMessage::NewAddress(message) = answer else {
            continue;
        };
        // A kernel without the family answers for all others.
        if message.header.family != family {
            continue;
        }
        let at = links
            .iter()
            .position(|link| link.index == message.header.index);
        if let Some(at) = at
            && let Some(address) = address(&message, &links[at].name)
        {
            interfaces[at].addresses.push(address);
        }
    }
    Ok(())
}

/// None if it is not for the guest.
fn address(message: &AddressMessage, interface: &str) -> Option<Address> {
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    let (mut of, mut local, mut broadcast, mut metric) = (None, None, None, None);
    let mut advertised = false;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(address) => of = Some(*address),
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Broadcast(address) => broadcast = Some(*address),
            AddressAttribute::RoutePriority(priority) => metric = Some(*priority),
            AddressAttribute::Flags(all) => flags = *all,
            AddressAttribute::Protocol(AddressProtocol::RouterAnnouncement) => advertised = true,
            _ => {}
        }
    }
    // IFA_LOCAL is the interface's own and IFA_ADDRESS the peer's, or there is but one of them and it is the interface's own.
    let address = local.or(of)?;
    let peer = of.filter(|of| *of != address);
    let temporary = address.is_ipv6()
        && flags.intersects(AddressFlags::Secondary | AddressFlags::Managetempaddr);
    if advertised || temporary {
        debug!(interface, %address, "an address of router advertisements is left to the guest");
        return None;
    }
    if flags.contains(AddressFlags::Dadfailed) {
        warn!(interface, %address, "an address is not mirrored: another host on the link has it");
        return None;
    }
    let checked = !flags.intersects(AddressFlags::Tentative | AddressFlags::Optimistic);
    Some(Address {
        address,
        prefix: message.header.prefix_len,
        peer,
        broadcast,
        scope: message.header.scope.into(),
        no_prefix_route: flags.contains(AddressFlags::Noprefixroute),
        unique: checked || flags.contains(AddressFlags::Nodad),
        metric: metric.filter(|metric| *metric != 0),
    })
}

fn routes(
    socket: &mut Socket,
    family: AddressFamily,
    links: &[Link],
    routes: &mut Vec<Route>,
) -> Result<(), Error> {
    let mut request = RouteMessage::default();
    request.header.address_family = family;
    let request = RouteNetlinkMessage::GetRoute(request);
    for answer in socket.list("the routes", &request)? {
        if let RouteNetlinkMessage::NewRoute(message) = answer
            && message.header.address_family == family
            && let Some(route) = route(&message, links)?
        {
            routes.push(route);
        }
    }
    Ok(())
}

/// None if it is not for the guest.
fn route(message: &RouteMessage, links: &[Link]) -> Result<Option<Route>, Error> {
    let header = &message.header;
    let table = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        });
    let kind = match header.kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::BlackHole => RouteKind::Blackhole,
        RouteType::Unreachable => RouteKind::Unreachable,
        RouteType::Prohibit => RouteKind::Prohibit,
        _ => return Ok(None),
    };
    if table.unwrap_or(header.table.into()) != u32::from(RouteHeader::RT_TABLE_MAIN)
        || header.flags.contains(RouteFlags::Cloned)
        || header.protocol == RouteProtocol::Ra
    {
        return Ok(None);
    }
    let v4 = header.address_family == AddressFamily::Inet;
    let mut route = Route {
        kind,
        destination: if v4 {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        },
        prefix: header.destination_prefix_length,
        source: None,
        scope: header.scope.into(),
        protocol: header.protocol.into(),
        tos: header.tos,
        metric: None,
        mtu: None,
        advmss: None,
        hops: Vec::new(),
    };
    let mut encapsulated = false;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                route.destination = ip(address).unwrap_or(route.destination);
            }
            RouteAttribute::PrefSource(address) => route.source = ip(address),
            RouteAttribute::Priority(metric) => route.metric = Some(*metric).filter(|m| *m != 0),
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    match metric {
                        RouteMetric::Mtu(bytes) => route.mtu = Some(*bytes),
                        RouteMetric::Advmss(bytes) => route.advmss = Some(*bytes),
                        _ => {}
                    }
                }
            }
            RouteAttribute::MultiPath(hops) => {
                for next in hops {
                    let onlink = next.flags.contains(RouteNextHopFlags::Onlink);
                    encapsulated |= next.attributes.iter().any(is_tunnel);
                    route.hops.extend(hop(
                        (next.interface_index, links),
                        &next.attributes,
                        onlink,
                        u16::from(next.hops) + 1,
                    ));
                }
            }
            RouteAttribute::Oif(index) if kind == RouteKind::Unicast => {
                let onlink = header.flags.contains(RouteFlags::Onlink);
                route
                    .hops
                    .extend(hop((*index, links), &message.attributes, onlink, 1));
            }
            attribute => encapsulated |= is_tunnel(attribute),
        }
    }
    if kind == RouteKind::Unicast && route.hops.is_empty() {
        debug!(destination = %route.destination, "a route leads to no interface of the guest's");
        return Ok(None);
    }
    let why = if encapsulated {
        "it encapsulates packets; do that at the other end of the link"
    } else if header.source_prefix_length != 0 {
        "it is for some senders only; make it one of its own table with a rule, in the guest"
    } else {
        return Ok(Some(route));
    };
    Err(Error::Route {
        destination: format!("{}/{}", route.destination, route.prefix),
        why: why.to_owned(),
    })
}

fn is_tunnel(attribute: &RouteAttribute) -> bool {
    matches!(attribute, RouteAttribute::Encap(_))
}

/// None if it does not go over these interfaces.
fn hop(
    (index, links): (u32, &[Link]),
    attributes: &[RouteAttribute],
    onlink: bool,
    weight: u16,
) -> Option<Hop> {
    let link = links.iter().find(|link| link.index == index)?;
    let gateway = attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(address) => ip(address),
        RouteAttribute::Via(RouteVia::Inet(address)) => Some((*address).into()),
        RouteAttribute::Via(RouteVia::Inet6(address)) => Some((*address).into()),
        _ => None,
    });
    Some(Hop {
        interface: link.name.clone(),
        gateway,
        onlink,
        weight,
    })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn neighbours(
    socket: &mut Socket,
    family: AddressFamily,
    links: &[Link],
    network: &mut Network,
) -> Result<(), Error> {
    let mut request = NeighbourMessage::default();
    request.header.family = family;
    let request = RouteNetlinkMessage::GetNeighbour(request);
    for answer in socket.list("the neighbours", &request)? {
        if let RouteNetlinkMessage::NewNeighbour(message) = answer
            && message.header.family == family
            && let Some(link) = links
                .iter()
                .find(|link| link.index == message.header.ifindex)
            && let Some(neighbour) = neighbour(&message, link, &network.routes)
        {
            network.neighbours.push(neighbour);
        }
    }
    Ok(())
}

/// None if it is not for the guest.
fn neighbour(message: &NeighbourMessage, link: &Link, routes: &[Route]) -> Option<Neighbour> {
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) => {
                address = Some(IpAddr::from(*found));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(found)) => {
                address = Some(IpAddr::from(*found));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    let (address, mac) = (address?, mac?);
    let permanent = match message.header.state {
        NeighbourState::Permanent => true,
        NeighbourState::Reachable
        | NeighbourState::Stale
        | NeighbourState::Delay
        | NeighbourState::Probe => false,
        _ => return None,
    };
    let leads = |hop: &Hop| hop.gateway == Some(address) && hop.interface == link.name;
    let gateway = routes.iter().flat_map(|route| &route.hops).any(leads);
    (permanent || gateway).then(|| Neighbour {
        interface: link.name.clone(),
        address,
        mac,
        permanent,
    })
}
