//! Network devices of a VM that runs: one for each interface of a network
//! namespace that is mirrored, plugged and then configured by the agent.

use std::fmt;
use std::sync::PoisonError;

use nacre_net::Mirror;
use nacre_net::describe::Network;
use nacre_protocol::agent::{ConfigureNetworkRequest, ReleaseNetworkRequest};
use nacre_vmm::virtio::net::{NetConfig, mac};

use super::agent::Agent;
use super::error::Error;
use super::machine::SetLink;
use super::{Sandbox, chain};
use crate::control::Device;

/// The network devices of a VM.
#[derive(Default)]
pub struct Nics {
    windows: Vec<u8>,
    links: Vec<(String, SetLink)>,
}

impl fmt::Debug for Nics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nics")
            .field("windows", &self.windows)
            .finish_non_exhaustive()
    }
}

impl Nics {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.windows.is_empty()
    }

    /// What tells the guest that the link of an interface, by its name, is up or down.
    pub fn link_setter(&self) -> impl Fn(&str, bool) + Send + 'static {
        let links = self.links.clone();
        move |interface, up| {
            for (_, set) in links.iter().filter(|(name, _)| name == interface) {
                set(up);
            }
        }
    }
}

impl Sandbox {
    /// Plugs a device for each interface of a mirrored namespace, and has the agent bind and configure them all, in the network namespace
    /// that this container has in the guest. Waits for the agent. What fails leaves the VM without them.
    ///
    /// # Errors
    /// [`Error::Machine`] that names the interface, and what the agent said.
    pub async fn attach_network(&self, mirror: &mut Mirror, id: &str) -> Result<Nics, Error> {
        let agent = self.agent().await?;
        let ports = mirror.take_ports();
        let network = mirror.network();
        let mut nics = Nics::default();
        for (port, interface) in ports.into_iter().zip(&network.interfaces) {
            let config = NetConfig {
                name: interface.name.clone(),
                mac: interface.mac,
                mtu: Some(interface.mtu),
                link: interface.carrier,
            };
            match self.0.machine.plug_net(config, port.tap) {
                Ok((window, set)) => {
                    nics.windows.push(window);
                    nics.links.push((interface.name.clone(), set));
                }
                Err(error) => {
                    self.unplug_all(&nics);
                    return Err(error);
                }
            }
        }
        if nics.is_empty() {
            return Ok(nics);
        }
        if let Err(error) = self.configure(&agent, &nics, network, id).await {
            // One that has answered has released them; one that has not is not to be asked again.
            self.unplug_all(&nics);
            return Err(error);
        }
        self.list_devices(&nics, network);
        Ok(nics)
    }

    async fn configure(
        &self,
        agent: &Agent,
        nics: &Nics,
        network: &Network,
        id: &str,
    ) -> Result<(), Error> {
        let mut request = ConfigureNetworkRequest::new();
        request.container_id = id.to_owned();
        request.windows = nics.windows.iter().copied().map(u32::from).collect();
        request.network_json = serde_json::to_vec(network)
            .map_err(|error| Error::machine("describe the network to the guest", &error))?;
        let names: Vec<&str> = nics.links.iter().map(|(name, _)| name.as_str()).collect();
        let name = format!("configuring the network of {id} ({})", names.join(", "));
        agent
            .call(name, self.0.timeouts.agent, |client, context| async move {
                client.configure_network(context, &request).await
            })
            .await
            .map(|_| ())
    }

    fn list_devices(&self, nics: &Nics, network: &Network) {
        let mut devices = self
            .0
            .devices
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for (window, interface) in nics.windows.iter().zip(&network.interfaces) {
            devices.push(Device {
                window: Some(*window),
                kind: "net".to_owned(),
                detail: format!(
                    "{}, {}, MTU {}",
                    interface.name,
                    mac(interface.mac),
                    interface.mtu
                ),
            });
        }
    }

    /// Has the agent release the devices, and unplugs them, whatever it says. Failures are logged.
    pub async fn detach_network(&self, nics: Nics) {
        if nics.is_empty() || self.0.machine.exit_reason().is_some() {
            return;
        }
        let mut request = ReleaseNetworkRequest::new();
        request.windows = nics.windows.iter().copied().map(u32::from).collect();
        let released = async {
            let agent = self.agent().await?;
            let name = "releasing the network devices".to_owned();
            agent
                .call(name, self.0.timeouts.agent, |client, context| async move {
                    client.release_network(context, &request).await
                })
                .await
        };
        if let Err(error) = released.await {
            tracing::warn!(
                error = chain(&error),
                "the guest did not let go of its network devices"
            );
        }
        self.unplug_all(&nics);
    }

    fn unplug_all(&self, nics: &Nics) {
        for window in nics.windows.iter().rev() {
            if let Err(error) = self.0.machine.unplug(*window) {
                tracing::warn!(%error, window, "cannot unplug a network device");
            }
        }
        let mut devices = self
            .0
            .devices
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        devices.retain(|device| {
            !device
                .window
                .is_some_and(|window| nics.windows.contains(&window))
        });
    }
}
