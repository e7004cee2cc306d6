//! What is configured on interfaces, read for the guest.

use std::net::IpAddr;

use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::Error;
use crate::describe::{Hop, Neighbour, Network, Route};
use crate::link::Link;
use crate::messages::{FAMILIES, addresses, interface, route, route_messages};
use crate::netlink::Socket;

/// What is configured on these interfaces.
pub(crate) fn network(socket: &mut Socket, links: &[Link]) -> Result<Network, Error> {
    let mut network = Network {
        interfaces: links.iter().map(interface).collect(),
        ..Network::default()
    };
    for family in FAMILIES {
        addresses(socket, family, links, &mut network.interfaces)?;
        for message in route_messages(socket, family)? {
            network.routes.extend(route(&message, links)?);
        }
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
