//! What is described is what a guest then has; what cannot be is named.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_route::neighbour::NeighbourState;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteNextHop, RouteProtocol, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::bench::*;
use crate::describe::{Address, Hop, Interface, Neighbour, Network, Route, RouteKind};
use crate::{Error, Netns, apply, mirror};

const GATEWAY: [u8; 6] = [2, 0, 0, 0, 9, 9];

/// What a namespace has, in an order that does not depend on that of its making.
fn describe(netns: &Netns) -> Network {
    settled(netns);
    let network = mirror(netns, &mut |_| Ok(())).unwrap().network().clone();
    in_order(network)
}

fn assert_has(guest: &Netns, network: Network) {
    let (has, wanted) = (describe(guest), in_order(network));
    // One after the other, so that what differs can be found in the words.
    for (has, wanted) in has.routes.iter().zip(&wanted.routes) {
        assert_eq!(has, wanted);
    }
    assert_eq!(has.interfaces, wanted.interfaces);
    assert_eq!(has.routes, wanted.routes);
    assert_eq!(has.neighbours, wanted.neighbours);
}

fn in_order(mut network: Network) -> Network {
    network
        .interfaces
        .sort_by_key(|interface| interface.name.clone());
    network
        .routes
        .sort_by_key(|route| (route.destination, route.prefix, route.metric));
    network
        .neighbours
        .sort_by_key(|neighbour| (neighbour.interface.clone(), neighbour.address));
    network
}

/// A namespace with devices as a guest finds them, down; each has its MAC address' last byte beside its name.
fn guest(devices: &[(&str, u8)]) -> (Netns, Netns) {
    let (guest, wire) = (Netns::create().unwrap(), Netns::create().unwrap());
    for (name, last) in devices {
        pair(&guest, name, *last, &wire, 1500);
        set_up(&guest, name, false);
    }
    (guest, wire)
}

fn applied(guest: &Netns, network: &Network) {
    if let Err(error) = guest.enter(|| apply(network)) {
        let source = std::error::Error::source(&error);
        panic!("{error}: {source:?}");
    }
}

fn refused(guest: &Netns, network: &Network) -> Error {
    guest.enter(|| apply(network)).unwrap_err()
}

/// What the kernel said.
fn cause(error: &Error) -> String {
    std::error::Error::source(error).unwrap().to_string()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn at(text: &str) -> (IpAddr, u8) {
    let (address, prefix) = text.split_once('/').unwrap();
    (ip(address), prefix.parse().unwrap())
}

fn interface(name: &str, last: u8, mtu: u16, addresses: Vec<Address>) -> Interface {
    Interface {
        name: name.to_owned(),
        mac: [2, 0, 0, 0, 0, last],
        mtu,
        carrier: true,
        addresses,
    }
}

fn addr(text: &str) -> Address {
    let (address, prefix) = at(text);
    Address {
        address,
        prefix,
        peer: None,
        broadcast: None,
        scope: 0,
        no_prefix_route: false,
        unique: true,
        metric: None,
    }
}

fn hop(interface: &str, gateway: Option<&str>) -> Hop {
    Hop {
        interface: interface.to_owned(),
        gateway: gateway.map(ip),
        onlink: false,
        weight: 1,
    }
}

/// An administrator's.
fn way(text: &str, hops: Vec<Hop>) -> Route {
    let (destination, prefix) = at(text);
    Route {
        kind: RouteKind::Unicast,
        destination,
        prefix,
        source: None,
        scope: 0,
        protocol: 4,
        tos: 0,
        metric: destination.is_ipv6().then_some(1024),
        mtu: None,
        advmss: None,
        hops,
    }
}

/// The kernel's own, of an address.
fn connected(text: &str, source: Option<&str>, interface: &str) -> Route {
    let v6 = text.contains(':');
    Route {
        source: source.map(ip),
        scope: if v6 { 0 } else { 253 },
        protocol: 2,
        metric: v6.then_some(256),
        ..way(text, vec![hop(interface, None)])
    }
}

fn neighbour_of(interface: &str, address: &str, permanent: bool) -> Neighbour {
    Neighbour {
        interface: interface.to_owned(),
        address: ip(address),
        mac: GATEWAY,
        permanent,
    }
}

// In the kernel's order: by scope, and in one scope the newest first where it is IPv6.
fn eth0_addresses() -> Vec<Address> {
    vec![
        Address {
            scope: 253,
            ..addr("10.99.0.1/24")
        },
        Address {
            broadcast: Some("10.88.255.255".parse().unwrap()),
            ..addr("10.88.0.2/16")
        },
        addr("10.88.0.3/16"),
        addr("fd00:1::2/64"),
        Address {
            scope: 253,
            ..addr("fe80::ff:fe00:1/64")
        },
    ]
}

fn net1_addresses() -> Vec<Address> {
    vec![
        Address {
            metric: Some(300),
            ..addr("192.168.5.6/30")
        },
        Address {
            peer: Some(ip("10.3.0.1")),
            no_prefix_route: true,
            ..addr("10.3.0.2/32")
        },
        Address {
            metric: Some(500),
            ..addr("fd00:2::2/64")
        },
        Address {
            no_prefix_route: true,
            ..addr("fd00:3::2/64")
        },
        Address {
            peer: Some(ip("fd00:7::1")),
            no_prefix_route: true,
            ..addr("fd00:7::2/128")
        },
    ]
}

fn several() -> [Route; 3] {
    let weighed = |interface, gateway, weight| Hop {
        weight,
        ..hop(interface, Some(gateway))
    };
    [
        Route {
            advmss: Some(1200),
            ..way(
                "172.20.0.0/16",
                vec![
                    weighed("eth0", "10.88.0.1", 256),
                    weighed("net1", "192.168.5.5", 3),
                ],
            )
        },
        way(
            "fd00:99::/48",
            vec![
                weighed("eth0", "fd00:1::1", 1),
                weighed("net1", "fd00:2::1", 5),
            ],
        ),
        way(
            "172.21.0.0/16",
            vec![
                weighed("eth0", "fd00:1::1", 2),
                Hop {
                    onlink: true,
                    ..hop("net1", Some("9.9.9.8"))
                },
            ],
        ),
    ]
}

/// Something of everything, with the routes that the kernel makes of the addresses.
fn everything() -> Network {
    let nowhere = |text, kind| Route {
        kind,
        ..way(text, Vec::new())
    };
    let routes = vec![
        connected("10.88.0.0/16", Some("10.88.0.2"), "eth0"),
        connected("10.99.0.0/24", Some("10.99.0.1"), "eth0"),
        connected("fd00:1::/64", None, "eth0"),
        connected("fe80::/64", None, "eth0"),
        Route {
            metric: Some(300),
            ..connected("192.168.5.4/30", Some("192.168.5.6"), "net1")
        },
        Route {
            metric: Some(500),
            ..connected("fd00:2::/64", None, "net1")
        },
        Route {
            scope: 253,
            source: Some(ip("10.88.0.3")),
            ..way("169.254.1.1/32", vec![hop("net1", None)])
        },
        way(
            "172.17.0.0/16",
            vec![Hop {
                onlink: true,
                ..hop("net1", Some("9.9.9.9"))
            }],
        ),
        nowhere("10.98.0.0/16", RouteKind::Blackhole),
        nowhere("10.97.0.0/16", RouteKind::Prohibit),
        nowhere("fd00:98::/32", RouteKind::Unreachable),
        Route {
            protocol: 3,
            ..way("0.0.0.0/0", vec![hop("eth0", Some("10.88.0.1"))])
        },
        Route {
            metric: Some(400),
            tos: 16,
            ..way("172.18.0.0/16", vec![hop("eth0", Some("10.88.0.1"))])
        },
        Route {
            mtu: Some(1300),
            advmss: Some(1000),
            ..way("172.16.0.0/12", vec![hop("net1", Some("192.168.5.5"))])
        },
        way("172.19.0.0/16", vec![hop("eth0", Some("fd00:1::1"))]),
        Route {
            metric: Some(77),
            source: Some(ip("fd00:2::2")),
            ..way("::/0", vec![hop("eth0", Some("fd00:1::1"))])
        },
    ];
    Network {
        interfaces: vec![
            interface("eth0", 1, 1400, eth0_addresses()),
            interface("net1", 2, 9000, net1_addresses()),
        ],
        routes: routes.into_iter().chain(several()).collect(),
        neighbours: vec![
            neighbour_of("eth0", "10.88.0.1", false),
            neighbour_of("eth0", "10.88.0.50", true),
            neighbour_of("net1", "192.168.5.5", true),
            neighbour_of("eth0", "fd00:1::1", true),
            neighbour_of("net1", "fd00:2::1", false),
        ],
    }
}

#[test]
fn a_guest_has_what_is_described() {
    let (guest, _wire) = guest(&[("eth0", 2), ("eth1", 1)]);
    applied(&guest, &everything());
    assert_has(&guest, everything());
    assert!(format!("{:?}", find(&guest, "lo")).contains("Up"));
}

#[test]
fn it_is_well_a_second_time() {
    let (guest, _wire) = guest(&[("eth0", 2), ("eth1", 1)]);
    applied(&guest, &everything());
    applied(&guest, &everything());
    assert_has(&guest, everything());
}

/// A device's carrier may come later than its driver.
#[test]
fn an_interface_without_a_carrier_is_configured_too() {
    let (guest, wire) = guest(&[("eth0", 2), ("eth1", 1)]);
    for name in ["peer-eth0", "peer-eth1"] {
        set_up(&wire, name, false);
    }
    applied(&guest, &everything());
    let mut without = everything();
    for interface in &mut without.interfaces {
        interface.carrier = false;
    }
    assert_has(&guest, without);
    for name in ["peer-eth0", "peer-eth1"] {
        set_up(&wire, name, true);
    }
    until("carriers", || {
        ["eth0", "net1"]
            .iter()
            .all(|name| find(&guest, name).has_carrier())
    });
    assert_has(&guest, everything());
}

/// As the host tells it, which the kernel and not these tests' own description says.
#[test]
fn what_one_namespace_has_another_gets() {
    let (here, there) = (Netns::create().unwrap(), Netns::create().unwrap());
    pair(&here, "eth0", 1, &there, 1450);
    pair(&here, "net1", 2, &there, 1500);
    for (name, text, prefix) in [
        ("eth0", "10.1.0.2", 24),
        ("eth0", "10.1.0.3", 24),
        ("eth0", "fd00:1::2", 64),
        ("net1", "10.2.0.2", 24),
        ("net1", "fd00:2::2", 64),
    ] {
        address(&here, name, text, prefix);
    }
    for new in [
        NewRoute {
            gateway: Some("10.1.0.1"),
            ..to("0.0.0.0", 0)
        },
        NewRoute {
            gateway: Some("fd00:2::1"),
            metric: Some(12),
            ..to("::", 0)
        },
        NewRoute {
            gateway: Some("9.9.9.9"),
            interface: Some("net1"),
            onlink: true,
            mtu: Some(1280),
            ..to("172.17.0.0", 16)
        },
        NewRoute {
            kind: RouteType::BlackHole,
            ..to("10.99.0.0", 16)
        },
    ] {
        route(&here, new);
    }
    let next = |name: &str, gateway: &str| {
        let mut hop = RouteNextHop::default();
        hop.interface_index = find(&here, name).index;
        hop.hops = 6;
        hop.attributes = vec![RouteAttribute::Gateway(RouteAddress::from(ip(gateway)))];
        hop
    };
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.destination_prefix_length = 8;
    message.header.protocol = RouteProtocol::Static;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![
        RouteAttribute::Destination(RouteAddress::from(ip("11.0.0.0"))),
        RouteAttribute::MultiPath(vec![next("net1", "10.2.0.1"), next("eth0", "10.1.0.1")]),
    ];
    change(&here, RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE);
    for (address, state) in [
        ("10.1.0.1", NeighbourState::Stale),
        ("fd00:1::7", NeighbourState::Permanent),
    ] {
        neighbour(&here, "eth0", address, GATEWAY, state);
    }
    settled(&here);
    let told = mirror(&here, &mut |_| Ok(())).unwrap().network().clone();
    assert_eq!((told.routes.len(), told.neighbours.len()), (11, 2));

    let (guest, _wire) = guest(&[("net1", 1), ("eth0", 2)]);
    applied(&guest, &told);
    assert_has(&guest, told);
}

#[test]
fn names_are_swapped_and_go_round() {
    let (guest, _wire) = guest(&[("eth0", 1), ("eth1", 2), ("eth2", 3), ("eth3", 4)]);
    let names = |lasts: [u8; 4]| Network {
        interfaces: ["eth0", "eth1", "eth2", "eth3"]
            .into_iter()
            .zip(lasts)
            .map(|(name, last)| interface(name, last, 1500, Vec::new()))
            .collect(),
        ..Network::default()
    };
    // The second time they are up.
    for lasts in [[2, 1, 3, 4], [4, 3, 1, 2]] {
        applied(&guest, &names(lasts));
        let got = ["eth0", "eth1", "eth2", "eth3"].map(|name| find(&guest, name).mac);
        assert_eq!(got, lasts.map(|last| Some([2, 0, 0, 0, 0, last])));
        assert!(names(lasts).interfaces.iter().all(|interface| {
            let link = find(&guest, &interface.name);
            link.is_up()
        }));
    }
}

#[test]
fn an_interface_that_is_not_there_is_named() {
    let (guest, _wire) = guest(&[("eth0", 1)]);
    let network = Network {
        interfaces: vec![interface("net1", 7, 1500, Vec::new())],
        ..Network::default()
    };
    let before = dump(&guest);
    let said = refused(&guest, &network).to_string();
    assert_eq!(
        said,
        "Cannot configure the interface \"net1\": no interface has the MAC address 02:00:00:00:00:07; there are lo, eth0"
    );
    assert_eq!(dump(&guest), before);
}

#[test]
fn a_mac_address_that_two_have_is_refused() {
    let (guest, _wire) = guest(&[("eth0", 1), ("eth1", 1)]);
    let one = interface("eth0", 1, 1500, Vec::new());
    let network = Network {
        interfaces: vec![one.clone()],
        ..Network::default()
    };
    let said = refused(&guest, &network).to_string();
    assert!(
        said.ends_with("\"eth0\": both eth0 and eth1 have the MAC address 02:00:00:00:00:01"),
        "{said}"
    );
    let network = Network {
        interfaces: vec![
            one.clone(),
            Interface {
                name: "b".into(),
                ..one
            },
        ],
        ..Network::default()
    };
    let said = refused(&guest, &network).to_string();
    assert!(said.contains("is described for another one too"), "{said}");
}

/// As the plugin `ptp` leaves it: the network's own route leads over the gateway.
#[test]
fn a_route_of_the_kernels_that_is_not_described_goes() {
    let (guest, _wire) = guest(&[("eth0", 1)]);
    let through = Route {
        source: Some(ip("10.1.1.2")),
        ..way("10.1.1.0/24", vec![hop("eth0", Some("10.1.1.1"))])
    };
    let network = Network {
        interfaces: vec![interface(
            "eth0",
            1,
            1500,
            vec![addr("10.1.1.2/24"), addr("fd00:1::2/64")],
        )],
        routes: vec![
            Route {
                scope: 253,
                ..way("10.1.1.1/32", vec![hop("eth0", None)])
            },
            through,
        ],
        neighbours: Vec::new(),
    };
    for _ in 0..2 {
        applied(&guest, &network);
        assert_has(&guest, network.clone());
    }
}

#[test]
fn no_address_comes_by_itself() {
    let (guest, _wire) = guest(&[("eth0", 1)]);
    let network = Network {
        interfaces: vec![interface("eth0", 1, 1500, vec![addr("10.1.1.2/32")])],
        ..Network::default()
    };
    applied(&guest, &network);
    until("a carrier", || find(&guest, "eth0").has_carrier());
    // One that came by itself would be there at once, if tentative.
    std::thread::sleep(Duration::from_millis(100));
    let shown = dump(&guest).join("\n");
    assert!(shown.contains("10.1.1.2"), "{shown}");
    assert!(!shown.contains("fe80"), "{shown}");
}

/// An address that is still tested for duplicates is no route's source until that is over.
#[test]
fn a_route_waits_for_its_source() {
    let (guest, _wire) = guest(&[("eth0", 1)]);
    let tested = Address {
        unique: false,
        ..addr("fd00:1::2/64")
    };
    let mut network = Network {
        interfaces: vec![interface("eth0", 1, 1500, vec![tested])],
        routes: vec![
            connected("fd00:1::/64", None, "eth0"),
            Route {
                source: Some(ip("fd00:1::2")),
                ..way("::/0", vec![hop("eth0", Some("fd00:1::1"))])
            },
        ],
        neighbours: Vec::new(),
    };
    applied(&guest, &network);
    network.interfaces[0].addresses[0].unique = true;
    assert_has(&guest, network.clone());
    // What has become known of it makes no other address of it.
    network.interfaces[0].addresses[0].unique = false;
    applied(&guest, &network);
}

#[test]
fn what_differs_from_what_is_there_is_refused() {
    let (guest, _wire) = guest(&[("eth0", 1)]);
    let with = |addresses, gateway| Network {
        interfaces: vec![interface("eth0", 1, 1500, addresses)],
        routes: vec![
            connected("10.1.1.0/24", Some("10.1.1.2"), "eth0"),
            way("0.0.0.0/0", vec![hop("eth0", Some(gateway))]),
        ],
        neighbours: Vec::new(),
    };
    applied(&guest, &with(vec![addr("10.1.1.2/24")], "10.1.1.1"));
    let other = Address {
        scope: 253,
        ..addr("10.1.1.2/24")
    };
    let error = refused(&guest, &with(vec![other], "10.1.1.1"));
    assert_eq!(
        error.to_string(),
        "Cannot add the address 10.1.1.2/24 to eth0 by netlink"
    );
    assert!(cause(&error).contains("File exists"), "{error:?}");
    let error = refused(&guest, &with(vec![addr("10.1.1.2/24")], "10.1.1.9"));
    assert_eq!(
        error.to_string(),
        "Cannot add the route to 0.0.0.0/0 via 10.1.1.9 over eth0 by netlink"
    );
    assert!(cause(&error).contains("File exists"), "{error:?}");
}

#[test]
fn what_the_kernel_refuses_is_named_with_what_it_says() {
    let mut network = Network {
        interfaces: vec![interface("eth0", 1, 1500, vec![addr("10.1.1.2/24")])],
        ..Network::default()
    };
    network.routes = vec![way("9.0.0.0/8", vec![hop("eth0", Some("10.2.2.1"))])];
    let (guest, _wire) = guest(&[("eth0", 1), ("eth1", 2)]);
    let error = refused(&guest, &network);
    assert_eq!(
        error.to_string(),
        "Cannot add the route to 9.0.0.0/8 via 10.2.2.1 over eth0 by netlink"
    );
    // The number's words, and the kernel's own.
    let said = cause(&error);
    assert!(said.contains("Network is unreachable"), "{error:?}");
    assert!(said.ends_with(": Nexthop has invalid gateway"), "{error:?}");

    network.routes = vec![way("9.0.0.0/8", vec![hop("eth7", None)])];
    assert_eq!(
        refused(&guest, &network).to_string(),
        "Cannot configure the route to 9.0.0.0/8 over eth7: it is of the interface \"eth7\", which is not described"
    );

    network.routes.clear();
    network.neighbours = vec![
        neighbour_of("eth0", "224.0.0.1", true),
        neighbour_of("x", "10.1.1.1", true),
    ];
    let said = refused(&guest, &network).to_string();
    assert!(
        said.starts_with("Cannot configure the neighbour 10.1.1.1 at 02:00:00:00:09:09 to x: "),
        "{said}"
    );

    network.neighbours.clear();
    network.interfaces[0].name = "eth1".to_owned();
    let error = refused(&guest, &network);
    assert!(
        error.to_string().starts_with("Cannot rename nacre"),
        "{error}"
    );
    assert!(cause(&error).contains("File exists"), "{error:?}");
}

#[test]
fn an_ipv6_address_where_ipv6_is_disabled_is_refused_with_the_remedy() {
    let (guest, _wire) = guest(&[("eth0", 1)]);
    let file = Path::new("/proc/sys/net/ipv6/conf/eth0/disable_ipv6");
    guest
        .enter(|| {
            std::fs::write(file, "1").unwrap();
            Ok(())
        })
        .unwrap();
    let mut network = Network {
        interfaces: vec![interface("eth0", 1, 1500, vec![addr("10.1.1.2/24")])],
        ..Network::default()
    };
    applied(&guest, &network);
    network.interfaces[0].addresses.push(addr("fd00:1::2/64"));
    let error = refused(&guest, &network);
    assert!(matches!(error, Error::NoIpv6 { .. }), "{error:?}");
    let said = error.to_string();
    assert!(
        said.starts_with("Cannot add the address fd00:1::2/64 to eth0: the kernel has no IPv6"),
        "{said}"
    );
}
