//! What is configured is told whole, in an order in which it can be applied; what cannot be is named.

use std::net::IpAddr;

use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoMacVlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType,
    LinkMessage, MacVlanMode,
};
use netlink_packet_route::neighbour::NeighbourState;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteNextHop, RouteProtocol, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::bench::*;
use crate::describe::{Network, RouteKind};
use crate::link::{Fit, Link};
use crate::{Netns, mirror};

fn describe(netns: &Netns) -> Network {
    mirror(netns, &mut |_| Ok(())).unwrap().network().clone()
}

fn refusal(netns: &Netns) -> String {
    let before = dump(netns);
    let error = mirror(netns, &mut |_| panic!("noted"))
        .unwrap_err()
        .to_string();
    assert_eq!(dump(netns), before);
    error
}

fn with_eth0() -> (Netns, Netns) {
    let (here, there) = (Netns::create().unwrap(), Netns::create().unwrap());
    pair(&here, "eth0", 1, &there, 1500);
    (here, there)
}

#[test]
fn addresses_routes_and_neighbours_are_told() {
    let (here, there) = with_eth0();
    pair(&here, "net1", 2, &there, 1400);
    address(&here, "eth0", "10.88.0.2", 16);
    address(&here, "eth0", "10.88.0.3", 16);
    address(&here, "eth0", "fd00:1::2", 64);
    address(&here, "net1", "192.168.5.7", 30);
    route(
        &here,
        NewRoute {
            gateway: Some("10.88.0.1"),
            ..to("0.0.0.0", 0)
        },
    );
    route(
        &here,
        NewRoute {
            gateway: Some("fd00:1::1"),
            metric: Some(77),
            ..to("::", 0)
        },
    );
    route(
        &here,
        NewRoute {
            gateway: Some("192.168.5.5"),
            mtu: Some(1300),
            ..to("172.16.0.0", 12)
        },
    );
    route(
        &here,
        NewRoute {
            interface: Some("net1"),
            ..to("169.254.1.1", 32)
        },
    );
    route(
        &here,
        NewRoute {
            gateway: Some("9.9.9.9"),
            interface: Some("net1"),
            onlink: true,
            ..to("172.17.0.0", 16)
        },
    );
    route(
        &here,
        NewRoute {
            kind: RouteType::BlackHole,
            ..to("10.99.0.0", 16)
        },
    );
    route(
        &here,
        NewRoute {
            kind: RouteType::Unreachable,
            ..to("fd00:99::", 32)
        },
    );
    route(
        &here,
        NewRoute {
            gateway: Some("10.88.0.1"),
            table: 100,
            ..to("8.8.8.8", 32)
        },
    );
    let mac = [2, 0, 0, 0, 9, 9];
    for (address, state) in [
        ("10.88.0.1", NeighbourState::Stale),
        ("10.88.0.50", NeighbourState::Permanent),
        ("10.88.0.51", NeighbourState::Stale),
        ("fd00:1::1", NeighbourState::Permanent),
    ] {
        neighbour(&here, "eth0", address, mac, state);
    }
    let network = describe(&here);

    let [eth0, net1] = &network.interfaces[..] else {
        panic!("{network:?}");
    };
    assert_eq!((eth0.mac, eth0.mtu, eth0.carrier), (MAC, 1500, true));
    assert_eq!((net1.name.as_str(), net1.mtu), ("net1", 1400));
    let told = |interface: &crate::describe::Interface| -> Vec<String> {
        let all = interface.addresses.iter();
        all.map(|a| format!("{}/{} {}", a.address, a.prefix, a.scope))
            .collect()
    };
    assert_eq!(told(eth0)[..2], ["10.88.0.2/16 0", "10.88.0.3/16 0"]);
    assert!(
        told(eth0).contains(&"fd00:1::2/64 0".to_owned()),
        "{eth0:?}"
    );
    assert!(
        told(eth0).contains(&"fe80::ff:fe00:1/64 253".to_owned()),
        "{eth0:?}"
    );
    assert_eq!(told(net1)[0], "192.168.5.7/30 0");
    let global = eth0
        .addresses
        .iter()
        .find(|a| a.prefix == 64 && a.scope == 0);
    assert!(global.unwrap().unique);

    let routes: Vec<String> = network
        .routes
        .iter()
        .map(|route| {
            let hop = route.hops.first().map(|hop| {
                let gateway = hop
                    .gateway
                    .map_or("link".to_owned(), |gateway| gateway.to_string());
                format!(
                    "{gateway} {}{}",
                    hop.interface,
                    if hop.onlink { " onlink" } else { "" }
                )
            });
            let hop = hop.unwrap_or_default();
            format!(
                "{:?} {}/{} {hop}",
                route.kind, route.destination, route.prefix
            )
        })
        .collect();
    let at = |text: &str| {
        let found = routes.iter().position(|route| route == text);
        found.unwrap_or_else(|| panic!("no {text:?} in {routes:#?}"))
    };
    let connected = [
        at("Unicast 10.88.0.0/16 link eth0"),
        at("Unicast fd00:1::/64 link eth0"),
        at("Unicast fe80::/64 link eth0"),
        at("Unicast fe80::/64 link net1"),
        at("Unicast 192.168.5.4/30 link net1"),
        at("Unicast 169.254.1.1/32 link net1"),
        at("Unicast 172.17.0.0/16 9.9.9.9 net1 onlink"),
        at("Blackhole 10.99.0.0/16 "),
        at("Unreachable fd00:99::/32 "),
    ];
    let over = [
        at("Unicast 0.0.0.0/0 10.88.0.1 eth0"),
        at("Unicast ::/0 fd00:1::1 eth0"),
        at("Unicast 172.16.0.0/12 192.168.5.5 net1"),
    ];
    assert_eq!(routes.len(), connected.len() + over.len(), "{routes:#?}");
    assert!(connected.iter().max() < over.iter().min(), "{routes:#?}");
    let route = |at: usize| &network.routes[at];
    assert_eq!(
        route(connected[0]).source,
        Some("10.88.0.2".parse().unwrap())
    );
    assert_eq!(
        (route(connected[0]).protocol, route(connected[0]).scope),
        (2, 253)
    );
    assert_eq!(route(over[1]).metric, Some(77));
    assert_eq!(route(over[2]).mtu, Some(1300));
    assert_eq!(route(connected[8]).kind, RouteKind::Unreachable);

    let mut known: Vec<_> = network
        .neighbours
        .iter()
        .map(|n| (n.address.to_string(), n.permanent))
        .collect();
    known.sort();
    let wanted = [
        ("10.88.0.1", false),
        ("10.88.0.50", true),
        ("fd00:1::1", true),
    ];
    assert_eq!(
        known,
        wanted.map(|(address, permanent)| (address.to_owned(), permanent))
    );
    assert!(
        network
            .neighbours
            .iter()
            .all(|n| n.mac == mac && n.interface == "eth0")
    );

    let text = serde_json::to_string(&network).unwrap();
    assert_eq!(serde_json::from_str::<Network>(&text).unwrap(), network);
}

#[test]
fn what_is_down_or_a_port_is_passed_over() {
    let (here, there) = with_eth0();
    pair(&here, "down0", 2, &there, 1500);
    set_up(&here, "down0", false);
    pair(&here, "port0", 3, &there, 1500);
    add(
        &here,
        "br0",
        InfoKind::Bridge,
        None,
        vec![LinkAttribute::Address(vec![2, 0, 0, 0, 0, 7])],
    );
    set_up(&here, "br0", true);
    let mut join = LinkMessage::default();
    join.header.index = find(&here, "port0").index;
    join.attributes = vec![LinkAttribute::Controller(find(&here, "br0").index)];
    change(&here, RouteNetlinkMessage::SetLink(join), 0);
    let told = describe(&here).interfaces;
    let told: Vec<_> = told
        .iter()
        .map(|interface| interface.name.as_str())
        .collect();
    assert_eq!(told, ["eth0", "br0"]);
}

#[test]
fn a_link_without_carrier_is_told_so() {
    let (here, there) = with_eth0();
    set_up(&there, "peer-eth0", false);
    assert!(!describe(&here).interfaces[0].carrier);
}

#[test]
fn what_no_guest_can_have_is_named() {
    let (here, _there) = with_eth0();
    let macvlan = || {
        Some(InfoData::MacVlan(vec![InfoMacVlan::Mode(
            MacVlanMode::Bridge,
        )]))
    };
    let below = LinkAttribute::Link(find(&here, "eth0").index);
    add(&here, "mv0", InfoKind::MacVlan, macvlan(), vec![below]);
    set_up(&here, "mv0", true);
    let said = refusal(&here);
    assert!(
        said.contains("\"mv0\"") && said.contains("on top of \"eth0\""),
        "{said}"
    );
    delete(&here, "mv0");
    let tap = here
        .enter(|| Ok(nacre_vmm::virtio::net::Tap::open("vnet0")?))
        .unwrap();
    set_up(&here, "vnet0", true);
    let said = refusal(&here);
    assert!(
        said.contains("\"vnet0\"") && said.contains("TUN or TAP"),
        "{said}"
    );
    drop(tap);
    add(
        &here,
        "big0",
        InfoKind::Veth,
        None,
        vec![LinkAttribute::Mtu(65_535)],
    );
    set_up(&here, "big0", true);
    let said = refusal(&here);
    assert!(
        said.contains("its MTU is 65535 bytes; 68 to 65521 are possible"),
        "{said}"
    );
}

/// One that another namespace's interface is below has its own frames.
#[test]
fn a_macvlan_over_an_interface_elsewhere_is_mirrored() {
    let (here, there) = (Netns::create().unwrap(), Netns::create().unwrap());
    let far = Netns::create().unwrap();
    pair(&there, "eth9", 9, &far, 1500);
    let data = InfoData::MacVlan(vec![InfoMacVlan::Mode(MacVlanMode::Bridge)]);
    let fd = std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(&here));
    let more = vec![
        LinkAttribute::Link(find(&there, "eth9").index),
        LinkAttribute::Address(MAC.to_vec()),
        LinkAttribute::NetNsFd(fd),
    ];
    add(&there, "mv0", InfoKind::MacVlan, Some(data), more);
    set_up(&here, "mv0", true);
    let mut mirror = mirror(&here, &mut |_| Ok(())).unwrap();
    assert_eq!(mirror.network().interfaces[0].mac, MAC);
    let device = super::frames::Device(mirror.take_ports().remove(0));
    let wire = Packets::on(&far, "peer-eth9");
    super::frames::settle(&device, &wire);
    let frame = ethernet(MAC, 5, 200);
    wire.send(&frame);
    device.expect(&frame);
    device.send(&ethernet([0xff; 6], 6, 200));
    wire.expect(&ethernet([0xff; 6], 6, 200));
}

#[test]
fn routes_over_several_ways_and_addresses_with_a_peer_are_told() {
    let (here, there) = with_eth0();
    pair(&here, "net1", 2, &there, 1500);
    for (name, v4, v6) in [
        ("eth0", "10.1.0.2", "fd00:1::2"),
        ("net1", "10.2.0.2", "fd00:2::2"),
    ] {
        address(&here, name, v4, 24);
        address(&here, name, v6, 64);
    }
    let way = |name: &str, gateway: &str, more: u8| {
        let gateway: IpAddr = gateway.parse().unwrap();
        let mut hop = RouteNextHop::default();
        hop.interface_index = find(&here, name).index;
        hop.hops = more;
        hop.attributes = vec![RouteAttribute::Gateway(RouteAddress::from(gateway))];
        hop
    };
    for (family, gateways) in [
        (AddressFamily::Inet, ["10.1.0.1", "10.2.0.1"]),
        (AddressFamily::Inet6, ["fd00:1::1", "fd00:2::1"]),
    ] {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        message.header.protocol = RouteProtocol::Static;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.kind = RouteType::Unicast;
        let ways = vec![way("eth0", gateways[0], 0), way("net1", gateways[1], 4)];
        message.attributes = vec![RouteAttribute::MultiPath(ways)];
        change(&here, RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE);
    }
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = 32;
    message.header.index = find(&here, "net1").index;
    message.attributes = vec![
        AddressAttribute::Local("10.3.0.2".parse().unwrap()),
        AddressAttribute::Address("10.3.0.1".parse().unwrap()),
        AddressAttribute::Flags(AddressFlags::Noprefixroute),
    ];
    change(
        &here,
        RouteNetlinkMessage::NewAddress(message),
        NLM_F_CREATE,
    );

    let network = describe(&here);
    let defaults: Vec<String> = network
        .routes
        .iter()
        .filter(|route| route.prefix == 0)
        .flat_map(|route| &route.hops)
        .map(|hop| format!("{} {} {}", hop.gateway.unwrap(), hop.interface, hop.weight))
        .collect();
    let wanted = [
        "10.1.0.1 eth0 1",
        "10.2.0.1 net1 5",
        "fd00:1::1 eth0 1",
        "fd00:2::1 net1 5",
    ];
    assert_eq!(defaults, wanted);
    let over = network.routes.iter().filter(|route| route.prefix == 0);
    assert_eq!(over.count(), 2, "one of each family");
    let addresses = &network.interfaces[1].addresses;
    let peer = addresses
        .iter()
        .find(|address| address.prefix == 32)
        .unwrap();
    assert_eq!(peer.address.to_string(), "10.3.0.2");
    assert_eq!(peer.peer, Some("10.3.0.1".parse().unwrap()));
    assert!(peer.no_prefix_route);
    let on_link = network
        .routes
        .iter()
        .any(|route| route.destination == peer.peer.unwrap());
    assert!(!on_link, "{network:?}");
}

/// Kinds that not every kernel can make.
#[test]
fn each_kind_is_for_a_guest_or_is_refused_with_the_reason() {
    for (kind, layer, words) in [
        (InfoKind::Veth, LinkLayerType::Ether, None),
        (InfoKind::MacVlan, LinkLayerType::Ether, None),
        (InfoKind::Dummy, LinkLayerType::Ether, None),
        (InfoKind::Bond, LinkLayerType::Ether, None),
        (
            InfoKind::IpVlan,
            LinkLayerType::Ether,
            Some("ipvlan shares its parent's MAC"),
        ),
        (
            InfoKind::MacVtap,
            LinkLayerType::Ether,
            Some("character device"),
        ),
        (
            InfoKind::Vrf,
            LinkLayerType::Ether,
            Some("a table of its own"),
        ),
        (InfoKind::Tun, LinkLayerType::None, Some("TUN or TAP")),
        (
            InfoKind::Wireguard,
            LinkLayerType::None,
            Some("no Ethernet frames (kind wireguard)"),
        ),
        (
            InfoKind::Ipoib,
            LinkLayerType::Infiniband,
            Some("no Ethernet frames (kind ipoib)"),
        ),
    ] {
        let mut message = LinkMessage::default();
        message.header.index = 2;
        message.header.flags = LinkFlags::Up;
        message.header.link_layer_type = layer;
        message.attributes = vec![
            LinkAttribute::IfName("eth0".to_owned()),
            LinkAttribute::Address(MAC.to_vec()),
            LinkAttribute::Mtu(1500),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind.clone())]),
        ];
        match (Link::of(&message).fit(&[]), words) {
            (Fit::Yes, None) => {}
            (Fit::Refused(why), Some(words)) => assert!(why.contains(words), "{why}"),
            (fit, _) => panic!("{kind:?}: {fit:?}"),
        }
    }
}
