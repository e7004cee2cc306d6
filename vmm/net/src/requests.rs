//! What is described, in the words of netlink's requests: the reverse of [`crate::messages`].

use std::net::IpAddr;

use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop,
    RouteNextHopFlags, RouteType, RouteVia,
};

use crate::describe::{Address, Hop, Neighbour, Route, RouteKind};

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// An address of the interface of this number.
pub(crate) fn address(address: &Address, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.address);
    message.header.prefix_len = address.prefix;
    message.header.scope = address.scope.into();
    message.header.index = index;
    let mut flags = AddressFlags::empty();
    flags.set(AddressFlags::Noprefixroute, address.no_prefix_route);
    // IPv4 has no detection of duplicates in the kernel.
    let unique = address.unique && address.address.is_ipv6();
    flags.set(AddressFlags::Nodad, unique);
    message.attributes = vec![
        AddressAttribute::Local(address.address),
        AddressAttribute::Address(address.peer.unwrap_or(address.address)),
        AddressAttribute::Flags(flags),
    ];
    let broadcast = address.broadcast.map(AddressAttribute::Broadcast);
    let metric = address.metric.map(AddressAttribute::RoutePriority);
    message
        .attributes
        .extend(broadcast.into_iter().chain(metric));
    message
}

/// A route; `indices` are the numbers of its hops' interfaces.
pub(crate) fn route(route: &Route, indices: &[u32]) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(route.destination);
    header.destination_prefix_length = route.prefix;
    header.tos = route.tos;
    header.table = RouteHeader::RT_TABLE_MAIN;
    header.protocol = route.protocol.into();
    header.scope = route.scope.into();
    header.kind = match route.kind {
        RouteKind::Unicast => RouteType::Unicast,
        RouteKind::Blackhole => RouteType::BlackHole,
        RouteKind::Unreachable => RouteType::Unreachable,
        RouteKind::Prohibit => RouteType::Prohibit,
    };
    let mut attributes = Vec::new();
    if route.prefix > 0 {
        let destination = RouteAddress::from(route.destination);
        attributes.push(RouteAttribute::Destination(destination));
    }
    let source = route.source.map(RouteAddress::from);
    attributes.extend(source.map(RouteAttribute::PrefSource));
    attributes.extend(route.metric.map(RouteAttribute::Priority));
    let mtu = route.mtu.map(RouteMetric::Mtu);
    let advmss = route.advmss.map(RouteMetric::Advmss);
    let metrics: Vec<_> = mtu.into_iter().chain(advmss).collect();
    if !metrics.is_empty() {
        attributes.push(RouteAttribute::Metrics(metrics));
    }
    match (&route.hops[..], indices) {
        ([hop], [index]) => {
            header.flags.set(RouteFlags::Onlink, hop.onlink);
            attributes.push(RouteAttribute::Oif(*index));
            attributes.extend(gateway(hop, route.destination));
        }
        ([], _) => {}
        (hops, indices) => {
            let hops = hops.iter().zip(indices);
            let hops = hops.map(|(hop, index)| next_hop(hop, *index, route.destination));
            attributes.push(RouteAttribute::MultiPath(hops.collect()));
        }
    }
    message.attributes = attributes;
    message
}

fn gateway(hop: &Hop, destination: IpAddr) -> Option<RouteAttribute> {
    let gateway = hop.gateway?;
    Some(if gateway.is_ipv4() == destination.is_ipv4() {
        RouteAttribute::Gateway(RouteAddress::from(gateway))
    } else {
        RouteAttribute::Via(RouteVia::from(gateway))
    })
}

fn next_hop(hop: &Hop, index: u32, destination: IpAddr) -> RouteNextHop {
    let mut next = RouteNextHop::default();
    next.interface_index = index;
    // rtnh_hops is the weight less one.
    next.hops = u8::try_from(hop.weight.saturating_sub(1)).unwrap_or(u8::MAX);
    next.flags.set(RouteNextHopFlags::Onlink, hop.onlink);
    next.attributes.extend(gateway(hop, destination));
    next
}

/// A neighbour over the interface of this number.
pub(crate) fn neighbour(neighbour: &Neighbour, index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.address);
    message.header.ifindex = index;
    message.header.state = if neighbour.permanent {
        NeighbourState::Permanent
    } else {
        NeighbourState::Stale
    };
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::from(neighbour.address)),
        NeighbourAttribute::LinkLayerAddress(neighbour.mac.to_vec()),
    ];
    message
}
