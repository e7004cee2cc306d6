//! What the agent is asked to do: disks, containers, processes. Each call waits
//! for the agent, has its deadline, and names its thing in its error.

use std::sync::{Arc, PoisonError};

use nacre_protocol::agent::{
    BindDiskRequest, CreateContainerRequest, DeleteContainerRequest, GuestMount, PidsRequest,
    Process, ResizePtyRequest, SignalRequest, StartRequest, Stdio, UnbindDiskRequest,
};
use nacre_vmm::DiskConfig;

use super::error::Error;
use super::host::bounded;
use super::{AttachedDisk, Sandbox};
use crate::control::Device;

impl Sandbox {
    /// Plugs the image as a disk, has the agent bind it, and answers with the guest's device path.
    /// Waits for the agent. A disk that the agent cannot bind is unplugged again.
    /// The answer waits for its `partitions`, too.
    pub async fn attach_disk(
        &self,
        disk: DiskConfig,
        partitions: u32,
    ) -> Result<AttachedDisk, Error> {
        let agent = self.agent().await?;
        let name = format!("the disk {}", disk.source);
        let detail = disk.source.to_string();
        let machine = Arc::clone(&self.0.machine);
        let window = tokio::task::spawn_blocking(move || machine.plug_disk(disk))
            .await
            .unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
        let mut request = BindDiskRequest::new();
        request.window = u32::from(window);
        request.partitions = partitions;
        let bound = agent
            .call(
                format!("binding {name} in window {window}"),
                self.0.timeouts.agent,
                |client, context| async move { client.bind_disk(context, &request).await },
            )
            .await;
        match bound {
            Ok(answer) => {
                let device = bounded(&answer.device, 256);
                let mut disks = self
                    .0
                    .devices
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                disks.push(Device {
                    window: Some(window),
                    kind: "block".to_owned(),
                    detail,
                    traffic: None,
                });
                Ok(AttachedDisk { window, device })
            }
            Err(error) => {
                // A driver that holds the window would keep it from the next disk.
                if error.code().is_some() {
                    let mut request = UnbindDiskRequest::new();
                    request.window = u32::from(window);
                    let name = format!("releasing {name} in window {window}");
                    let _ = agent
                        .call(name, self.0.timeouts.agent, |client, context| async move {
                            client.unbind_disk(context, &request).await
                        })
                        .await;
                }
                if let Err(error) = self.0.machine.unplug(window) {
                    tracing::warn!(%error, window, "cannot unplug a disk that the guest did not bind");
                }
                Err(error)
            }
        }
    }

    /// Has the agent release the disk in a window, and unplugs it. It is unplugged whatever the
    /// agent says; the agent's error comes back.
    pub async fn detach_disk(&self, window: u8) -> Result<(), Error> {
        let mut request = UnbindDiskRequest::new();
        request.window = u32::from(window);
        let unbound = match self.agent().await {
            Ok(agent) => {
                let name = format!("releasing the disk in window {window}");
                agent
                    .call(name, self.0.timeouts.agent, |client, context| async move {
                        client.unbind_disk(context, &request).await
                    })
                    .await
                    .map(|_| ())
            }
            Err(error) => Err(error),
        };
        let unplugged = self.0.machine.unplug(window);
        let mut disks = self
            .0
            .devices
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        disks.retain(|device| device.window != Some(window));
        unbound.and(unplugged)
    }

    /// Makes a container; nothing of it runs yet. Answers with the guest pid of its init. `shares`: its
    /// specification mounts what the host shares. Events of this container are passed on from now until it is deleted.
    pub async fn create_container(
        &self,
        id: &str,
        spec_json: Vec<u8>,
        rootfs: Vec<GuestMount>,
        shares: bool,
        stdio: Stdio,
    ) -> Result<u32, Error> {
        let agent = self.agent().await?;
        self.containers().insert(id.to_owned());
        let mut request = CreateContainerRequest::new();
        request.container_id = id.to_owned();
        request.spec_json = spec_json;
        request.rootfs = rootfs;
        request.shares = shares;
        request.stdio = Some(stdio).into();
        let created = agent
            .call(
                format!("creating container {id}"),
                self.0.timeouts.create,
                |client, context| async move { client.create_container(context, &request).await },
            )
            .await;
        match created {
            Ok(answer) => Ok(answer.pid),
            Err(error) => {
                if error.code() != Some(ttrpc::Code::ALREADY_EXISTS) {
                    self.containers().remove(id);
                }
                Err(error)
            }
        }
    }

    /// Runs the user's program of a created container. Answers with the guest pid.
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<u32, Error> {
        let mut request = StartRequest::new();
        request.container_id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        let agent = self.agent().await?;
        let answer = agent
            .call(
                format!("starting {}", process_name(id, exec_id)),
                self.0.timeouts.agent,
                |client, context| async move { client.start(context, &request).await },
            )
            .await?;
        Ok(answer.pid)
    }

    /// Sends a signal to a process, or to all processes of the container.
    pub async fn signal(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        let mut request = SignalRequest::new();
        request.container_id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        request.signal = signal;
        request.all = all;
        let agent = self.agent().await?;
        agent
            .call(
                format!("sending signal {signal} to {}", process_name(id, exec_id)),
                self.0.timeouts.agent,
                |client, context| async move { client.signal(context, &request).await },
            )
            .await?;
        Ok(())
    }

    /// Guest pids in the container's cgroup.
    pub async fn pids(&self, id: &str) -> Result<Vec<Process>, Error> {
        let mut request = PidsRequest::new();
        request.container_id = id.to_owned();
        let agent = self.agent().await?;
        let answer = agent
            .call(
                format!("listing the processes of container {id}"),
                self.0.timeouts.agent,
                |client, context| async move { client.pids(context, &request).await },
            )
            .await?;
        Ok(answer.processes)
    }

    /// Sets the size of a process's terminal.
    pub async fn resize_pty(
        &self,
        id: &str,
        exec_id: &str,
        columns: u32,
        rows: u32,
    ) -> Result<(), Error> {
        let mut request = ResizePtyRequest::new();
        request.container_id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        request.columns = columns;
        request.rows = rows;
        let agent = self.agent().await?;
        agent
            .call(
                format!("resizing the terminal of {}", process_name(id, exec_id)),
                self.0.timeouts.agent,
                |client, context| async move { client.resize_pty(context, &request).await },
            )
            .await?;
        Ok(())
    }

    /// Frees a container whose init is gone. Its events are no longer passed on.
    pub async fn delete_container(&self, id: &str) -> Result<(), Error> {
        let mut request = DeleteContainerRequest::new();
        request.container_id = id.to_owned();
        let agent = self.agent().await?;
        agent
            .call(
                format!("deleting container {id}"),
                self.0.timeouts.agent,
                |client, context| async move { client.delete_container(context, &request).await },
            )
            .await?;
        self.containers().remove(id);
        Ok(())
    }
}

pub(super) fn process_name(id: &str, exec_id: &str) -> String {
    if exec_id.is_empty() {
        format!("container {id}")
    } else {
        format!("exec {exec_id} of container {id}")
    }
}
