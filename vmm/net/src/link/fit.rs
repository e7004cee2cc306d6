//! Which interfaces a guest can have.

use netlink_packet_route::link::{InfoKind, LinkLayerType};

use super::Link;

/// Bytes of packet that a TAP interface can take: 64 KiB less one and the Ethernet header, which the kernel counts.
const MTU: std::ops::RangeInclusive<u32> = 68..=65_521;

/// Whether a guest can have an interface.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fit {
    Yes,
    /// It is not for a guest; why.
    Skipped(&'static str),
    /// The workload would miss it; why it cannot have it.
    Refused(String),
}

impl Link {
    /// Whether it is one that `/dev/net/tun` makes.
    pub fn is_tap(&self) -> bool {
        self.kind == Some(InfoKind::Tun)
    }

    fn is_candidate(&self) -> bool {
        self.is_up() && !self.is_loopback() && self.controller.is_none()
    }

    /// Whether a guest can have it, among all that are there.
    pub fn fit(&self, all: &[Link]) -> Fit {
        if self.is_loopback() {
            return Fit::Skipped("the guest has a loopback interface of its own");
        }
        if !self.is_up() {
            return Fit::Skipped("it is down");
        }
        if self.controller.is_some() {
            return Fit::Skipped("it is a port of another, which has its frames");
        }
        let kind = self.kind.as_ref().map(InfoKind::to_string);
        let why = match &self.kind {
            Some(InfoKind::Tun) => {
                "it is a TUN or TAP interface, whose frames are for the program that made it; if it is left of another \
                 VM, remove what that made"
            }
            Some(InfoKind::IpVlan) => {
                "ipvlan shares its parent's MAC address and sorts by IP addresses, which the guest may change; use macvlan, \
                 veth or ptp"
            }
            Some(InfoKind::MacVtap | InfoKind::IpVtap) => {
                "its frames are for the program that opens its character device; use macvlan or veth"
            }
            Some(InfoKind::Vrf) => {
                "a VRF's routes are in a table of its own, and only main is mirrored"
            }
            _ if self.layer != LinkLayerType::Ether || self.mac.is_none() => {
                return Fit::Refused(format!(
                    "it carries no Ethernet frames (kind {})",
                    kind.as_deref().unwrap_or("unknown")
                ));
            }
            _ if !MTU.contains(&self.mtu) => {
                return Fit::Refused(format!(
                    "its MTU is {} bytes; {} to {} are possible",
                    self.mtu,
                    MTU.start(),
                    MTU.end()
                ));
            }
            _ => {
                let below = all
                    .iter()
                    .find(|link| Some(link.index) == self.lower && link.is_candidate());
                let Some(below) = below else {
                    return Fit::Yes;
                };
                return Fit::Refused(format!(
                    "it is on top of {:?} in the same network namespace, whose frames would go to the guest before \
                     this one sees them; take {:?} down or make this one in the guest",
                    below.name, below.name
                ));
            }
        };
        Fit::Refused(why.to_owned())
    }
}
