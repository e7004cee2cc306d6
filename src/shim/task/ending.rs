//! The phases in which a shim ends, see [`super::super::cleanup`] for their order.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

use super::{Exit, Shim};
use crate::sandbox::chain;
use crate::shim::cleanup::{Phase, Steps};
use crate::shim::lifecycle;

/// Output of a process that still runs is waited for as long as it keeps coming, with pauses of up to this: it may be
/// about to exit.
const OUTPUT_PAUSE: Duration = Duration::from_millis(1000);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// A pause counts as one if the guest has said so often in it that its containers stand still: a program that loads, or
/// gets no CPU time of a busy machine, prints nothing either.
const STILL: u32 = 3;
/// How often it is asked, and how long an answer is waited for.
const ASKS: Duration = Duration::from_millis(250);
const ANSWER: Duration = Duration::from_millis(500);
/// CPU time between two answers, microseconds, with which a container stands still.
const STILL_US: u64 = 1000;
/// Beyond the phase's share, what a process that still runs prints has to come at this rate: bytes within [`FLOW_TIME`],
/// each of them counted when it leaves the guest and when its reader takes it.
const FLOW: u64 = 512 << 10;
const FLOW_TIME: Duration = Duration::from_secs(3);
/// And not more than this of it in all, counted likewise: one that prints for ever is not waited for.
const BURST: u64 = 32 << 20;

/// For the exits that are left to be queued, before the queue is waited for.
const LAST_EXITS: Duration = Duration::from_millis(100);

/// Does the phases for one shim.
pub struct Ending {
    shim: Arc<Shim>,
    /// The guest has not answered once while output was waited for.
    mute: AtomicBool,
}

impl Ending {
    /// The ending of `shim`.
    pub fn of(shim: Arc<Shim>) -> Self {
        Self {
            shim,
            mute: AtomicBool::new(false),
        }
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

    /// Waits for output that is on its way. On a busy machine that may be longer than the phase's share: as long as
    /// it goes on coming.
    async fn stdio(&self) -> Result<(), String> {
        let began = Instant::now();
        // The share's end, and later each end of what was granted.
        let mut limit = began + Phase::Stdio.share();
        let mut seen = self.activity();
        let before = seen.0;
        // Since when nothing has changed, and how often the guest has said the same meanwhile.
        let (mut since, mut still) = (began, 0);
        let mut usage: Option<u64> = None;
        let mut samples = VecDeque::from([(began, before)]);
        let mut asking = Box::pin(self.usage());
        loop {
            let (_, running, draining) = seen;
            if running + draining == 0 {
                return Ok(());
            }
            // An exit of all ends the wait at once; a pause in the output of what runs ends it too.
            tokio::select! {
                () = self.shim.all_exits() => return Ok(()),
                () = tokio::time::sleep(LOOK) => {}
                () = tokio::time::sleep_until(limit) => {}
                answer = &mut asking => {
                    match (answer, usage) {
                        (Some(_), None) => {}
                        (Some(now), Some(before)) if now.saturating_sub(before) <= STILL_US => {
                            still += 1;
                        }
                        _ => (since, still) = (Instant::now(), 0),
                    }
                    usage = answer.or(usage);
                    asking = Box::pin(self.usage());
                }
            }
            let now = self.activity();
            if now != seen || draining > 0 {
                (seen, since, still) = (now, Instant::now(), 0);
            } else if still >= STILL && since.elapsed() >= OUTPUT_PAUSE {
                return Ok(());
            }
            let moved = seen.0;
            samples.push_back((Instant::now(), moved));
            while samples
                .get(1)
                .is_some_and(|(at, _)| at.elapsed() >= FLOW_TIME)
            {
                samples.pop_front();
            }
            if Instant::now() < limit {
                continue;
            }
            let flow = moved.saturating_sub(samples.front().map_or(before, |(_, moved)| *moved));
            if flow == 0 {
                self.mute.store(usage.is_none(), Ordering::Relaxed);
                return Ok(());
            }
            // What has ended has only so much left; its streams have bounds of their own.
            let enough = flow < FLOW || moved.saturating_sub(before) >= BURST;
            if enough && draining == 0 {
                return Err(format!(
                    "processes have not ended, and printed {flow} bytes at last"
                ));
            }
            tracing::debug!(flow, "output keeps coming, and is waited for");
            self.shim.cleanup.grant(OUTPUT_PAUSE);
            limit = Instant::now() + OUTPUT_PAUSE;
        }
    }

    /// After a while, the CPU time that the guest says all containers have used, microseconds; None if it does not answer
    /// in time.
    async fn usage(&self) -> Option<u64> {
        tokio::time::sleep(ASKS).await;
        let ids: Vec<String> = {
            let state = self.shim.lock();
            let containers = state.containers.iter();
            let made = containers.filter(|(_, container)| container.is_made());
            made.map(|(id, _)| id.clone()).collect()
        };
        let sandbox = self.shim.sandbox_now()?;
        let ask = async {
            let mut sum: u64 = 0;
            for id in &ids {
                // One that is gone meanwhile uses nothing.
                let used = sandbox.stats(id).await.ok();
                let used = used.and_then(|stats| stats.cpu.get("usage_usec").copied());
                sum = sum.saturating_add(used.unwrap_or(0));
            }
            sum
        };
        tokio::time::timeout(ANSWER, ask).await.ok()
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
            Phase::Network => shim.take_network_down(None).await,
            Phase::Stdio => self.stdio().await,
            Phase::Guest => {
                if let Some(sandbox) = shim.sandbox_now() {
                    if self.mute.load(Ordering::Relaxed) {
                        // It has had its time, and takes no other's.
                        tracing::warn!("the guest does not answer; the VM is stopped");
                        sandbox.stop();
                    }
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
