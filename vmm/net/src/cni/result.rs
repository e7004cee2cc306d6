//! What ADD results in: the specification's section 5, versions 0.3.0 to 1.1.0.

use std::net::IpAddr;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// What the plugins have made. What they wrote is kept as it is, since they are given it again: serialised, it is that.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct AddResult {
    /// In the container's namespace and on the host.
    pub interfaces: Vec<Interface>,
    /// Addresses, in the order of the plugins.
    pub ips: Vec<Ip>,
    /// Routes in the container.
    pub routes: Vec<Route>,
    /// Name servers.
    pub dns: Dns,
    raw: Value,
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its MAC address as text, if it has one.
    #[serde(default, deserialize_with = "text")]
    pub mac: Option<String>,
    /// Bytes of the largest packet.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// The path of the network namespace that it is in; none if that is the host's.
    #[serde(default, deserialize_with = "text")]
    pub sandbox: Option<String>,
}

/// An address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ip {
    /// The address.
    pub address: IpAddr,
    /// Bits of its network, 0 to 32 or 128.
    pub prefix: u8,
    /// The network's router, if it has one.
    pub gateway: Option<IpAddr>,
    /// The interface that has it, by its place in [`AddResult::interfaces`]. There may be none at that place.
    pub interface: Option<usize>,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The network's address.
    pub destination: IpAddr,
    /// Bits of the network, 0 to 32 or 128.
    pub prefix: u8,
    /// The next router; without it, an address's gateway may be meant.
    pub gateway: Option<IpAddr>,
    /// The path's MTU, bytes.
    pub mtu: Option<u32>,
    /// TCP's largest segment to be told, bytes.
    pub advmss: Option<u32>,
    /// The lowest wins.
    pub priority: Option<u32>,
    /// The routing table.
    pub table: Option<u32>,
    /// As `rtm_scope` in include/uapi/linux/rtnetlink.h.
    pub scope: Option<u32>,
}

/// Name servers and how they are asked.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Dns {
    /// Addresses as text, the first to be asked first.
    #[serde(default, deserialize_with = "list")]
    pub nameservers: Vec<String>,
    /// The local domain.
    #[serde(default, deserialize_with = "text")]
    pub domain: Option<String>,
    /// Domains to look for short names in.
    #[serde(default, deserialize_with = "list")]
    pub search: Vec<String>,
    /// As in resolv.conf(5).
    #[serde(default, deserialize_with = "list")]
    pub options: Vec<String>,
}

#[derive(Deserialize)]
struct Wire {
    #[serde(default, deserialize_with = "list")]
    interfaces: Vec<Interface>,
    #[serde(default, deserialize_with = "list")]
    ips: Vec<WireIp>,
    #[serde(default, deserialize_with = "list")]
    routes: Vec<WireRoute>,
    #[serde(default)]
    dns: Option<Dns>,
}

#[derive(Deserialize)]
struct WireIp {
    address: String,
    #[serde(default, deserialize_with = "text")]
    gateway: Option<String>,
    #[serde(default)]
    interface: Option<i64>,
}

#[derive(Deserialize)]
struct WireRoute {
    dst: String,
    #[serde(default, deserialize_with = "text")]
    gw: Option<String>,
    #[serde(default)]
    mtu: Option<u32>,
    #[serde(default)]
    advmss: Option<u32>,
    #[serde(default)]
    priority: Option<u32>,
    #[serde(default)]
    table: Option<u32>,
    #[serde(default)]
    scope: Option<u32>,
}

/// Null is as good as empty: Go writes a list that it does not have so.
fn list<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// The empty text is none.
fn text<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(from)?.filter(|text| !text.is_empty()))
}

impl AddResult {
    /// What the last plugin wrote.
    pub fn raw(&self) -> &Value {
        &self.raw
    }

    /// The addresses of an interface, by its place in [`AddResult::interfaces`].
    pub fn ips_of(&self, interface: usize) -> impl Iterator<Item = &Ip> {
        self.ips
            .iter()
            .filter(move |ip| ip.interface == Some(interface))
    }
}

impl TryFrom<Value> for AddResult {
    type Error = String;

    /// Fields that are not known are kept, and not looked at.
    fn try_from(raw: Value) -> Result<Self, String> {
        let wire = Wire::deserialize(&raw).map_err(|error| error.to_string())?;
        let ips = wire.ips.into_iter().map(ip).collect::<Result<_, _>>()?;
        let routes = wire.routes.into_iter().map(route);
        Ok(Self {
            interfaces: wire.interfaces,
            ips,
            routes: routes.collect::<Result<_, _>>()?,
            dns: wire.dns.unwrap_or_default(),
            raw,
        })
    }
}

impl From<AddResult> for Value {
    fn from(result: AddResult) -> Self {
        result.raw
    }
}

fn ip(wire: WireIp) -> Result<Ip, String> {
    let (address, prefix) = network(&wire.address)?;
    Ok(Ip {
        address,
        prefix,
        gateway: wire.gateway.as_deref().map(address_of).transpose()?,
        interface: wire.interface.and_then(|index| index.try_into().ok()),
    })
}

fn route(wire: WireRoute) -> Result<Route, String> {
    let (destination, prefix) = network(&wire.dst)?;
    Ok(Route {
        destination,
        prefix,
        gateway: wire.gw.as_deref().map(address_of).transpose()?,
        mtu: wire.mtu,
        advmss: wire.advmss,
        priority: wire.priority,
        table: wire.table,
        scope: wire.scope,
    })
}

fn address_of(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| format!("{text:?} is no address"))
}

fn network(text: &str) -> Result<(IpAddr, u8), String> {
    let wrong = || format!("{text:?} is no address with the bits of its network");
    let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    if prefix > most {
        return Err(wrong());
    }
    Ok((address, prefix))
}
