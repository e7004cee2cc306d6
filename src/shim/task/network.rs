//! The network of the VM, which all of its containers share: up with the first
//! Start, down with the last Delete, or with the shim.

use nacre_net::Netns;
use oci_spec::runtime::Spec;

use super::{Error, Shim};
use crate::sandbox::{Sandbox, chain};
use crate::shim::namespaces;

impl Shim {
    /// Whether the network that a spec wants is the VM's; takes note whether it wants one.
    pub(super) fn check_network(&self, id: &str, spec: &Spec) -> Result<(), Error> {
        let wanted = namespaces::Network::of(spec);
        if let Some(container) = self.lock().containers.get_mut(id) {
            container.has_network = wanted != namespaces::Network::Host;
        }
        match (&self.network, wanted) {
            (Some(network), namespaces::Network::At(path)) => {
                let netns = Netns::open(&path).map_err(|error| Error::Failed(chain(&error)))?;
                if netns.id() == network.netns().id() {
                    return Ok(());
                }
                Err(Error::Invalid(format!(
                    "Container {id:?} is to be in the network namespace {}, and its VM is in another one, {}: all containers of a VM share its network",
                    path.display(),
                    network.netns()
                )))
            }
            (None, namespaces::Network::At(path)) => Err(Error::Invalid(format!(
                "Container {id:?} is to be in the network namespace {}, and its VM has no network: it was started for a container with the host's",
                path.display()
            ))),
            (Some(_), namespaces::Network::Host) => {
                tracing::warn!(
                    container = id,
                    "the spec wants the host's network, which a guest cannot have: the container has loopback only"
                );
                Ok(())
            }
            (Some(_), namespaces::Network::Fresh) | (None, _) => Ok(()),
        }
    }

    /// Gives the guest its network, if it has none yet.
    pub(super) async fn bring_network_up(&self, sandbox: &Sandbox, id: &str) -> Result<(), Error> {
        let has_one = self
            .lock()
            .containers
            .get(id)
            .is_some_and(|container| container.has_network);
        let Some(network) = self.network.as_ref().filter(|_| has_one) else {
            return Ok(());
        };
        network.bring_up(sandbox, id).await.map_err(|error| {
            Error::Failed(format!(
                "Container {id:?} is not started, since its VM has no network: {}",
                chain(&error)
            ))
        })
    }

    /// With the last container its network goes, so that the addresses are free when Delete answers.
    pub(super) async fn end_network_of_the_last(&self, id: &str) {
        if self.lock().containers.len() > 1 {
            return;
        }
        let sandbox = self.sandbox_now();
        if let Err(error) = self.take_network_down(sandbox.as_ref()).await {
            tracing::warn!(container = id, error, "the network is not quite gone");
        }
    }

    /// Leaves the host's side as it was found; with a sandbox, takes the devices from its guest first.
    pub(super) async fn take_network_down(&self, sandbox: Option<&Sandbox>) -> Result<(), String> {
        let Some(network) = &self.network else {
            return Ok(());
        };
        let down = network.take_down(sandbox).await;
        down.map_err(|error| chain(&error))
    }
}
