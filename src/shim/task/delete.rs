//! Delete: frees a container whose init has ended, in the guest and on the host.

use std::sync::Arc;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::events::task::TaskDelete;

use super::storage::Storage;
use super::{AGENT_PATIENCE, Error, Exit, Shim, no_container};
use crate::sandbox::monotonic_ns;
use crate::shim::events::{TaskEvent, timestamp};
use crate::shim::lifecycle::{self, ContainerEvent, Process};

const SIGKILL: u32 = libc::SIGKILL as u32;

impl Shim {
    /// Frees a container, or an exec of one.
    pub(super) async fn delete(
        self: Arc<Self>,
        id: &str,
        exec_id: &str,
    ) -> Result<DeleteResponse, Error> {
        if !exec_id.is_empty() {
            return self.delete_exec(id, exec_id).await;
        }
        let begun_ns = monotonic_ns();
        let exit = self.ended_or_never_started(id).await?;
        let held = {
            let mut state = self.lock();
            let container = state
                .containers
                .get_mut(id)
                .ok_or_else(|| no_container(id))?;
            container.keep_first_output();
            // Late readers of its output have had their time.
            container.init.io = None;
            // And what is left of its execs goes with it.
            container.execs.clear();
            if container.life == lifecycle::Container::ShuttingDown {
                // The shim ends and frees all there is.
                None
            } else {
                container.life = container.life.after(ContainerEvent::Delete)?;
                Some((container.storage.take(), container.share.take()))
            }
        };
        if let Some((storage, share)) = held {
            self.free(id, storage).await;
            drop(share);
            self.end_network_of_the_last(id).await;
            self.run_poststop_hooks(id).await;
        }
        let (timings, storage) = {
            let mut state = self.lock();
            let mut container = state
                .containers
                .remove(id)
                .ok_or_else(|| no_container(id))?;
            // Allowed in both states that lead here.
            container.life = container
                .life
                .after(ContainerEvent::Deleted)
                .unwrap_or(container.life);
            tracing::debug!(container = id, life = %container.life, "freed");
            let mut event = TaskDelete::new();
            event.container_id = id.to_owned();
            event.pid = self.identity.pid;
            event.exit_status = exit.status;
            event.exited_at = timestamp(exit.at);
            self.publisher.publish(&TaskEvent::Delete(event));
            (container.timings, container.storage)
        };
        // Of a shim that ends.
        if let Some(storage) = storage {
            storage.withdraw().await;
        }
        self.note_delete(timings, begun_ns);
        self.fit_later();
        Ok(self.answer(exit))
    }

    pub(super) fn answer(&self, exit: Exit) -> DeleteResponse {
        let mut response = DeleteResponse::new();
        response.pid = self.identity.pid;
        response.exit_status = exit.status;
        response.exited_at = timestamp(exit.at);
        response
    }

    /// The exit of a container's init: known, about to be, or made so because it was never started.
    async fn ended_or_never_started(self: &Arc<Self>, id: &str) -> Result<Exit, Error> {
        let (life, mut exit) = {
            let state = self.lock();
            let container = state.containers.get(id).ok_or_else(|| no_container(id))?;
            if !matches!(
                container.life,
                lifecycle::Container::Running
                    | lifecycle::Container::Paused
                    | lifecycle::Container::ShuttingDown
            ) {
                return Err(Error::Precondition(format!(
                    "Container {id:?} is {}",
                    container.life
                )));
            }
            (container.init.life, container.init.exit.subscribe())
        };
        match life {
            Process::Adding | Process::Starting | Process::Running => {
                return Err(Error::Precondition(format!(
                    "Container {id:?} is {life}: kill it before it is deleted"
                )));
            }
            Process::Created => self.end_unstarted(id).await,
            Process::Draining | Process::Stopped => {}
        }
        let exit = exit
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|exit| *exit);
        exit.ok_or_else(|| no_container(id))
    }

    /// Ends an init that waits for a Start that never came.
    async fn end_unstarted(self: &Arc<Self>, id: &str) {
        if let Some(sandbox) = self.sandbox_now() {
            let killed =
                tokio::time::timeout(AGENT_PATIENCE, sandbox.signal(id, "", SIGKILL, true)).await;
            if !matches!(killed, Ok(Ok(()))) {
                tracing::warn!(
                    container = id,
                    "the guest did not kill a container that was not started"
                );
            }
        }
        // Nothing ran in it, so there is no exit of its own to wait for.
        self.process_ended(id, "", Exit::killed());
    }

    /// Frees what a container holds, whatever of it fails. A guest that does not answer is stopped.
    async fn free(&self, id: &str, storage: Option<Storage>) {
        let mut storage = storage.unwrap_or_default();
        if let Some(sandbox) = self
            .sandbox_now()
            .filter(|sandbox| sandbox.exit_reason().is_none())
        {
            let in_guest = async {
                if let Err(error) = sandbox.delete_container(id).await {
                    tracing::warn!(container = id, %error, "the guest did not delete a container");
                }
                storage.detach(&sandbox, id).await;
            };
            if tokio::time::timeout(AGENT_PATIENCE, in_guest)
                .await
                .is_err()
            {
                tracing::error!(
                    container = id,
                    "the guest does not free a container; the VM is stopped"
                );
                sandbox.stop();
            }
        }
        storage.withdraw().await;
    }
}
