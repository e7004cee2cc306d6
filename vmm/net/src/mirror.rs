//! A namespace's interfaces, each with a TAP interface beside it.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;

use nacre_vmm::virtio::net::Tap;
use tracing::{debug, warn};

use crate::describe::Network;
use crate::link::{Fit, Link};
use crate::netlink::Socket;
use crate::{Error, LinkChange, Made, MadePort, Netns, Watch, filter, link, survey};

/// How the names of TAP interfaces begin; ten digits come after it, which makes them as long as a name may be.
const PREFIX: &str = "nacre";

/// One interface's frames, for one device of the guest.
#[derive(Debug)]
pub struct Port {
    /// The interface's name, which [`Network`] describes.
    pub interface: String,
    /// The descriptor that gives and takes its frames.
    pub tap: Tap,
}

/// A mirrored namespace. Dropping it leaves the namespace as it was found; devices that still have a [`Port`] get no
/// more frames.
#[derive(Debug)]
#[must_use = "dropping it undoes it"]
pub struct Mirror {
    netns: Netns,
    network: Network,
    ports: Vec<Port>,
    made: Option<Made>,
}

/// Mirrors each interface of a namespace that is up, but for loopback and for ports of bridges and bonds. `note` is given what
/// will be made before any of it is, for a durable record; it is not called if there is nothing to make.
///
/// # Errors
///
/// [`Error::Hosts`] if the namespace is init's: the host would hear nothing any more.
/// [`Error::Interface`] names an interface that no guest can have: one without Ethernet frames, TUN and TAP, ipvlan, macvtap,
/// VRF, one on top of another in the same namespace, an MTU that is too large, or someone else's filters on what comes in.
/// [`Error::Route`] names such a route. Others tell what the system refused. After any of them all is as it was.
pub fn mirror(
    netns: &Netns,
    note: &mut dyn FnMut(&Made) -> io::Result<()>,
) -> Result<Mirror, Error> {
    if is_hosts(netns) {
        return Err(Error::Hosts {
            what: netns.to_string(),
        });
    }
    let (links, network, ports) = netns.enter(plan)?;
    let made = Made {
        path: netns.path().to_owned(),
        netns: netns.id(),
        ports,
    };
    if !made.ports.is_empty() {
        note(&made).map_err(|source| Error::Note {
            what: netns.to_string(),
            source,
        })?;
    }
    let mut mirror = Mirror {
        netns: netns.clone(),
        network,
        ports: Vec::new(),
        made: Some(made),
    };
    // Where it fails, the drop undoes it.
    let Mirror { made, ports, .. } = &mut mirror;
    let wanted = made.as_ref().map_or(&[][..], |made| &made.ports);
    netns.enter(|| make(&links, wanted, ports))?;
    Ok(mirror)
}

fn is_hosts(netns: &Netns) -> bool {
    Netns::of_process(1).is_ok_and(|init| init.id() == netns.id())
}

/// What there is, and what is to be made. Changes nothing.
fn plan() -> Result<(Vec<Link>, Network, Vec<MadePort>), Error> {
    let mut socket = Socket::open()?;
    let all = link::list(&mut socket)?;
    let mut links = Vec::new();
    let mut ports = Vec::new();
    for link in &all {
        match link.fit(&all) {
            Fit::Yes => {}
            Fit::Skipped(why) => {
                debug!(interface = link.name, why, "an interface is not mirrored");
                continue;
            }
            Fit::Refused(why) => {
                return Err(Error::Interface {
                    interface: link.name.clone(),
                    why,
                });
            }
        }
        let discipline = filter::survey(&mut socket, link, PREFIX)?;
        ports.push(MadePort {
            interface: link.name.clone(),
            index: link.index,
            mac: link.mac.unwrap_or_default(),
            tap: tap_name(),
            discipline,
        });
        links.push(link.clone());
    }
    let network = survey::network(&mut socket, &links)?;
    Ok((links, network, ports))
}

/// A name that no other mirror has, so that each undoes its own even where two come to a namespace at once.
fn tap_name() -> String {
    // Seeded by the system's randomness, anew each time.
    let random = RandomState::new().build_hasher().finish();
    format!("{PREFIX}{:010x}", random >> 24)
}

fn make(links: &[Link], wanted: &[MadePort], ports: &mut Vec<Port>) -> Result<(), Error> {
    let mut socket = Socket::open()?;
    for (link, made) in links.iter().zip(wanted) {
        let tap = Tap::open(&made.tap)?;
        ports.push(Port {
            interface: made.interface.clone(),
            tap,
        });
        let all = link::list(&mut socket)?;
        let tap = all
            .iter()
            .find(|link| link.name == made.tap)
            .ok_or_else(|| Error::Interface {
                interface: made.interface.clone(),
                why: format!("its TAP interface {:?} was taken away", made.tap),
            })?;
        let mtu = u16::try_from(link.mtu).unwrap_or(u16::MAX);
        link::bring_up(&mut socket, &made.tap, tap.index, mtu)?;
        // First the way out, so that no frame comes before it can be answered.
        filter::add_discipline(&mut socket, tap)?;
        filter::redirect(&mut socket, tap, link, &made.tap)?;
        if made.discipline {
            filter::add_discipline(&mut socket, link)?;
        }
        filter::redirect(&mut socket, link, tap, &made.tap)?;
    }
    Ok(())
}

/// Whether this host can do what [`mirror`] does, by a redirect between two TAP interfaces in a namespace that is gone afterwards.
///
/// # Errors
///
/// What the system refuses, or lacks: /dev/net/tun, and the kernel's sch_ingress, cls_u32 and act_mirred.
pub fn try_out() -> Result<(), Error> {
    Netns::create()?.enter(|| {
        let names = [tap_name(), tap_name()];
        let _taps = [Tap::open(&names[0])?, Tap::open(&names[1])?];
        let mut socket = Socket::open()?;
        let all = link::list(&mut socket)?;
        let find = |name: &String| all.iter().find(|link| link.name == *name);
        let [Some(from), Some(to)] = [find(&names[0]), find(&names[1])] else {
            return Ok(());
        };
        filter::add_discipline(&mut socket, from)?;
        filter::redirect(&mut socket, from, to, &names[0])
    })
}

impl Mirror {
    /// What the guest has to configure.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// What was made: none once it was removed.
    pub fn made(&self) -> Option<&Made> {
        self.made.as_ref()
    }

    /// The TAP interfaces in the order of [`Network::interfaces`], for the guest's devices. The second time none.
    pub fn take_ports(&mut self) -> Vec<Port> {
        std::mem::take(&mut self.ports)
    }

    /// Tells of links that go up and down; see [`crate::watch()`].
    ///
    /// # Errors
    ///
    /// As [`crate::watch()`].
    pub fn watch(&self, tell: impl FnMut(LinkChange) + Send + 'static) -> Result<Watch, Error> {
        let ports = self.made.as_ref().map_or(&[][..], |made| &made.ports);
        crate::watch(&self.netns, ports, tell)
    }

    /// Leaves the namespace as it was found.
    ///
    /// # Errors
    ///
    /// As [`Made::remove`].
    pub fn remove(mut self) -> Result<(), Error> {
        self.undo()
    }

    /// Leaves all as it is but for the TAP interfaces that nobody has taken, and hands over what there is to undo.
    pub fn leave(mut self) -> Option<Made> {
        self.made.take()
    }

    fn undo(&mut self) -> Result<(), Error> {
        let result = match self.made.take() {
            Some(made) => made.remove(&self.netns),
            None => Ok(()),
        };
        self.ports.clear();
        result
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        if let Err(error) = self.undo() {
            warn!(netns = %self.netns, error = &error as &dyn std::error::Error, "a network namespace is not as it was");
        }
    }
}
