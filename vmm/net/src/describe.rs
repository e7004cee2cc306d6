//! What a guest has to configure so that its network is that of the namespace:
//! plain types, without a word of netlink, for who writes them down and who applies them.
//!
//! Applied in the order given, each thing finds what it needs: interfaces first, each with its addresses; then
//! routes, connected ones before those over gateways; then neighbours.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// The network of one namespace. Empty if there is loopback only, which is the guest's own to bring up.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Network {
    /// All but loopback, in the order in which they were made.
    pub interfaces: Vec<Interface>,
    /// Those of the main table, of both families. Those that come of router advertisements are not here: the router
    /// tells the guest by itself.
    pub routes: Vec<Route>,
    /// Permanent ones, and what is known of gateways, so that the first packet need not wait.
    pub neighbours: Vec<Neighbour>,
}

/// One interface: in the guest, a network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Such as `eth0`; 1 to 15 bytes.
    pub name: String,
    /// The device's MAC address, by which the guest finds it.
    pub mac: [u8; 6],
    /// Bytes of the largest packet, without the link's header; 68 to 65521.
    pub mtu: u16,
    /// Whether the link was up.
    pub carrier: bool,
    /// Of both families, in the kernel's order: of IPv4, a subnet's primary address is before its secondary ones; of
    /// IPv6, the newest of a scope is first, so they are made in reverse. The IPv6 link-local address is among them.
    /// Those made of router advertisements are not.
    pub addresses: Vec<Address>,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// Bits of its network, 0 to 32 or 128.
    pub prefix: u8,
    /// The other end, where the link is point to point.
    pub peer: Option<IpAddr>,
    /// The broadcast address, if it has one.
    pub broadcast: Option<std::net::Ipv4Addr>,
    /// How far it is valid, as `rtm_scope` in include/uapi/linux/rtnetlink.h: 0 everywhere, 253 on the link, 254 on the host.
    pub scope: u8,
    /// IFA_F_NOPREFIXROUTE: no route to its network comes with it.
    pub no_prefix_route: bool,
    /// IFA_F_NODAD, or detection of duplicates has ended well: the guest need not repeat it.
    pub unique: bool,
    /// The metric of its network's route, if it is not the kernel's own choice.
    pub metric: Option<u32>,
}

/// A route of the main table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// What becomes of a packet.
    pub kind: RouteKind,
    /// The network's address; of a default route, `0.0.0.0` or `::`. It tells the family.
    pub destination: IpAddr,
    /// Bits of the network, 0 to 32 or 128.
    pub prefix: u8,
    /// The address that packets have as source if the sender says nothing.
    pub source: Option<IpAddr>,
    /// As `rtm_scope` in include/uapi/linux/rtnetlink.h: 0 everywhere, 253 on the link, 254 on the host.
    pub scope: u8,
    /// Who made it, as `rtm_protocol` there: 2 the kernel with an address, 3 and 4 an administrator.
    pub protocol: u8,
    /// Type of service; 0 for any.
    pub tos: u8,
    /// Priority; the lowest wins.
    pub metric: Option<u32>,
    /// The path's MTU in bytes.
    pub mtu: Option<u32>,
    /// TCP's largest segment in bytes.
    pub advmss: Option<u32>,
    /// Ways to go: one, or several that share the load; none if the packet goes nowhere.
    pub hops: Vec<Hop>,
}

/// What becomes of a packet that takes a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouteKind {
    /// It is sent on.
    Unicast,
    /// It is dropped without a word.
    Blackhole,
    /// The sender is told that there is no such host.
    Unreachable,
    /// The sender is told that it may not.
    Prohibit,
}

/// One way of a route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hop {
    /// The name of an [`Interface`].
    pub interface: String,
    /// The next router, which may be of the other family; none if the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// RTNH_F_ONLINK: the gateway is on the link though no route says so.
    pub onlink: bool,
    /// Its share among several, 1 to 256.
    pub weight: u16,
}

/// A neighbour's MAC address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// The name of an [`Interface`].
    pub interface: String,
    /// Its address.
    pub address: IpAddr,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Whether it stays so; others are what was last known, for the guest to check in time.
    pub permanent: bool,
}
