//! The phases in which a shim ends, see [`super::super::cleanup`] for their order.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

use super::{Exit, Shim};
use crate::sandbox::chain;
use crate::shim::cleanup::{Phase, Steps};
use crate::shim::lifecycle;

/// Output of a process that still runs is waited for as long as it keeps coming, with pauses of up to this: it may be
/// about to exit. One that has just been started has its program to load first.
const OUTPUT_PAUSE: Duration = Duration::from_millis(1000);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// For the exits that are left to be queued, before the queue is waited for.
const LAST_EXITS: Duration = Duration::from_millis(100);

/// Does the phases for one shim.
pub struct Ending {
    shim: Arc<Shim>,
}

impl Ending {
    /// The ending of `shim`.
    pub fn of(shim: Arc<Shim>) -> Self {
        Self { shim }
    }

    /// Bytes moved by all processes, and how many of these run and how many drain.
    fn activity(&self) -> (u64, usize, usize) {
        let state = self.shim.lock();
        let processes = || {
            state
                .containers
                .values()
                .flat_map(|container| container.processes())
        };
        let moved = processes()
            .filter_map(|(_, process)| process.io.as_ref())
            .map(|io| io.moved())
            .sum();
        let running = processes()
            .filter(|(_, process)| process.life == lifecycle::Process::Running)
            .count();
        let draining = processes()
            .filter(|(_, process)| process.life == lifecycle::Process::Draining)
            .count();
        (moved, running, draining)
    }

    async fn stdio(&self) {
        let mut seen = self.activity();
        let mut since = Instant::now();
        loop {
            let (_, running, draining) = seen;
            if running + draining == 0 {
                return;
            }
            // An exit of all ends the wait at once; a pause in the output of what runs ends it too.
            let exits = tokio::time::timeout(LOOK, self.shim.all_exits()).await;
            if exits.is_ok() {
                return;
            }
            let now = self.activity();
            if now != seen || draining > 0 {
                (seen, since) = (now, Instant::now());
            } else if since.elapsed() >= OUTPUT_PAUSE {
                return;
            }
        }
    }
}

#[async_trait]
impl Steps for Ending {
    async fn run(&self, phase: Phase) -> Result<(), String> {
        let shim = &self.shim;
        if !matches!(phase, Phase::Hotplug | Phase::Stdio) {
            // All of it, or its time is over.
            shim.drained.send_replace(true);
        }
        match phase {
            Phase::Hotplug => {
                shim.stop_resizing().await;
                Ok(())
            }
            // Interfaces come with their feature.
            Phase::Network => Ok(()),
            Phase::Stdio => {
                self.stdio().await;
                Ok(())
            }
            Phase::Guest => {
                if let Some(sandbox) = shim.sandbox_now() {
                    let reason = sandbox.shutdown().await;
                    tracing::debug!(%reason, "the guest has ended");
                }
                Ok(())
            }
            Phase::Connections => {
                let served = shim
                    .control
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .take();
                drop(served);
                // The streams have ended with the guest; what they brought goes to readers that read.
                shim.all_exits().await;
                Ok(())
            }
            Phase::Vm => {
                if let Some(sandbox) = shim.sandbox_now() {
                    sandbox.stop();
                    sandbox.ended().await;
                }
                Ok(())
            }
            Phase::Mounts => {
                // Calls may be under way that make or free something.
                let record = shim.record.clone();
                let freed = tokio::task::spawn_blocking(move || record.clean_up()).await;
                match freed {
                    Ok(Ok(_)) => Ok(()),
                    Ok(Err(error)) => Err(chain(&error)),
                    Err(error) => Err(error.to_string()),
                }
            }
            Phase::Events => {
                self.leave_no_exit_out();
                // Without streams to drain they come at once; a queue that waits for containerd is another matter.
                let _ = tokio::time::timeout(LAST_EXITS, shim.all_exits()).await;
                shim.publisher.flushed().await;
                Ok(())
            }
        }
    }
}

impl Ending {
    /// Processes whose exit is still not known get one; their output has had its time.
    fn leave_no_exit_out(&self) {
        let left: Vec<(String, String)> = {
            let mut state = self.shim.lock();
            let mut left = Vec::new();
            for (id, container) in &mut state.containers {
                let unknown: Vec<String> = container
                    .ending_processes()
                    .filter(|(_, process)| process.exit.borrow().is_none())
                    .map(|(exec_id, _)| exec_id.to_owned())
                    .collect();
                for exec_id in unknown {
                    if let Some(process) = container.process_mut(&exec_id) {
                        // Closes its streams, so that the drain that is under way ends.
                        process.io = None;
                    }
                    left.push((id.clone(), exec_id));
                }
            }
            left
        };
        for (id, exec_id) in left {
            self.shim.process_ended(&id, &exec_id, Exit::killed());
        }
    }
}
