//! The record of what was made in a namespace, by which any process can undo it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::netlink::Socket;
use crate::{Error, Netns, NetnsId, filter, link};

/// What there is to undo in a network namespace. Written down before any of it is made, so parts may not exist.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// Where the namespace was opened.
    pub path: PathBuf,
    /// Which it is.
    pub netns: NetnsId,
    /// Each interface that has a TAP interface.
    pub ports: Vec<MadePort>,
}

/// An interface and what was made for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadePort {
    /// Its name.
    pub interface: String,
    /// Its number in its namespace, which a new name leaves.
    pub index: u32,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// The TAP interface's name.
    pub tap: String,
    /// Whether the queueing discipline for what comes in is ours too, beside the redirect.
    pub discipline: bool,
}

impl Made {
    /// Removes redirects, disciplines and TAP interfaces, and nothing else. What is gone already is well, also the namespace:
    /// another one than was recorded is left alone. May be repeated.
    ///
    /// # Errors
    ///
    /// [`Error::Namespace`] and [`Error::Netlink`]; the rest is removed all the same.
    pub fn remove(&self, netns: &Netns) -> Result<(), Error> {
        if netns.id() != self.netns || self.ports.is_empty() {
            return Ok(());
        }
        netns.enter(|| {
            let mut socket = Socket::open()?;
            let links = link::list(&mut socket)?;
            let mut result = Ok(());
            for port in &self.ports {
                let link = links
                    .iter()
                    .find(|link| link.index == port.index && link.mac == Some(port.mac));
                if let Some(link) = link {
                    let removed = filter::remove(&mut socket, link, &port.tap, port.discipline);
                    result = result.and(removed);
                }
                let tap = links
                    .iter()
                    .find(|link| link.name == port.tap && link.is_tap());
                if let Some(tap) = tap {
                    result = result.and(link::delete(&mut socket, &tap.name, tap.index));
                }
            }
            result
        })
    }

    /// As [`Made::remove`], in the namespace that is at the recorded path. None there any more is well.
    ///
    /// # Errors
    ///
    /// As [`Made::remove`].
    pub fn remove_at_path(&self) -> Result<(), Error> {
        match Netns::open(&self.path) {
            Ok(netns) => self.remove(&netns),
            Err(Error::NoNamespace { .. }) => Ok(()),
            Err(Error::Namespace { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}
