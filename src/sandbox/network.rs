//! Network devices of a VM that runs: one for each interface of a network
//! namespace that is mirrored, plugged and then configured by the agent.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, MutexGuard, PoisonError};

use nacre_net::Mirror;
use nacre_net::describe::Network;
use nacre_protocol::agent::{ConfigureNetworkRequest, ReleaseNetworkRequest};
use nacre_vmm::virtio::net::{NetConfig, mac};

use super::agent::Agent;
use super::error::Error;
use super::machine::Nic;
use super::{Sandbox, chain};
use crate::control::Device;

/// The network devices of a VM.
#[derive(Default)]
pub struct Nics {
    windows: Vec<u8>,
    links: Vec<(String, Arc<dyn Nic>)>,
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
            for (_, nic) in links.iter().filter(|(name, _)| name == interface) {
                nic.set_link(up);
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
                Ok((window, nic)) => {
                    nics.windows.push(window);
                    nics.links.push((interface.name.clone(), nic));
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
            // Devices come one after another, and detection of duplicates takes its time.
            .call(name, self.0.timeouts.create, |client, context| async move {
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
                traffic: None,
            });
        }
        let hands = nics.links.iter().map(|(_, nic)| Arc::clone(nic));
        self.nics().extend(nics.windows.iter().copied().zip(hands));
    }

    /// What is listed, network devices with what has gone through them.
    pub(super) fn devices(&self) -> Vec<Device> {
        let devices = self
            .0
            .devices
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut devices = devices.clone();
        let nics = self.nics();
        for device in &mut devices {
            let nic = device.window.and_then(|window| nics.get(&window));
            device.traffic = nic.map(|nic| nic.traffic());
        }
        devices
    }

    fn nics(&self) -> MutexGuard<'_, BTreeMap<u8, Arc<dyn Nic>>> {
        self.0.nics.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.nics()
            .retain(|window, _| !nics.windows.contains(window));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Traffic;
    use crate::sandbox::tests::boot;
    use nacre_net::describe::Interface;
    use nacre_vmm::virtio::net::Tap;

    #[tokio::test(start_paused = true)]
    async fn network_devices_are_listed_with_their_traffic_until_they_are_unplugged() {
        let (sandbox, _fake, _) = boot();
        let mut nics = Nics::default();
        let mut network = Network::default();
        for name in ["eth0", "eth1"] {
            let interface = Interface {
                name: name.to_owned(),
                mac: [2, 0, 0, 0, 0, 1],
                mtu: 1500,
                carrier: true,
                addresses: Vec::new(),
            };
            let config = NetConfig {
                name: name.to_owned(),
                mac: interface.mac,
                mtu: None,
                link: true,
            };
            let (end, _) = std::os::unix::net::UnixDatagram::pair().unwrap();
            let tap = Tap::of_frames(end.into());
            let (window, nic) = sandbox.0.machine.plug_net(config, tap).unwrap();
            nics.windows.push(window);
            nics.links.push((name.to_owned(), nic));
            network.interfaces.push(interface);
        }
        sandbox.list_devices(&nics, &network);
        nics.link_setter()("eth1", true);
        let traffic = |received| {
            Some(Traffic {
                link_up: received > 0,
                received,
                ..Traffic::default()
            })
        };
        let devices = sandbox.inspect().devices;
        let told: Vec<_> = devices.iter().map(|device| device.traffic).collect();
        assert_eq!(told, [traffic(0), traffic(1)]);
        assert_eq!(devices[1].detail, "eth1, 02:00:00:00:00:01, MTU 1500");
        sandbox.unplug_all(&nics);
        assert!(sandbox.inspect().devices.is_empty());
        assert!(sandbox.nics().is_empty());
    }
}
