//! What the kernel's messages of addresses and routes say, in the description's terms.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
    RouteNextHopFlags, RouteProtocol, RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use tracing::{debug, warn};

use crate::Error;
use crate::describe::{Address, Hop, Interface, Route, RouteKind};
use crate::link::Link;
use crate::netlink::Socket;

pub(crate) const FAMILIES: [AddressFamily; 2] = [AddressFamily::Inet, AddressFamily::Inet6];

/// An interface without its addresses.
pub(crate) fn interface(link: &Link) -> Interface {
    Interface {
        name: link.name.clone(),
        mac: link.mac.unwrap_or_default(),
        mtu: u16::try_from(link.mtu).unwrap_or(u16::MAX),
        carrier: link.has_carrier(),
        addresses: Vec::new(),
    }
}

/// Adds the addresses of these interfaces to those of the same place.
pub(crate) fn addresses(
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
    // Kernels before 5.18 do not say who made it, but that it ends.
    let ends = address.is_ipv6() && !flags.contains(AddressFlags::Permanent);
    if advertised || temporary || ends {
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

/// All routes of a family.
pub(crate) fn route_messages(
    socket: &mut Socket,
    family: AddressFamily,
) -> Result<Vec<RouteMessage>, Error> {
    let mut request = RouteMessage::default();
    request.header.address_family = family;
    let request = RouteNetlinkMessage::GetRoute(request);
    let answers = socket.list("the routes", &request)?.into_iter();
    let routes = answers.filter_map(|answer| match answer {
        RouteNetlinkMessage::NewRoute(message) => Some(message),
        _ => None,
    });
    Ok(routes
        .filter(|message| message.header.address_family == family)
        .collect())
}

/// None if it is not for the guest.
pub(crate) fn route(message: &RouteMessage, links: &[Link]) -> Result<Option<Route>, Error> {
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
