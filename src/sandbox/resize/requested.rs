//! Memory by the virtio-mem device: the guest's driver plugs and unplugs by itself what it is asked for.

use std::time::Duration;

use nacre_vmm::hotplug::memory::SMALLEST_UNIT;
use nacre_vmm::virtio::mem::MemStatus;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Step, us};
use crate::sandbox::Sandbox;
use crate::sandbox::error::chain;

/// How often the driver is told again what is asked for: one that could not do it all, for want of memory or since pages were in use, waits
/// for a minute and longer before it tries again, but not where it is told.
pub(super) const AGAIN: Duration = Duration::from_secs(2);
/// Memory that has the time of one step, as a unit of ACPI memory has: the smallest that one can be.
const STEP: u64 = SMALLEST_UNIT;

impl Sandbox {
    /// Where the device is, if there is one.
    pub(super) fn mem_status(&self) -> Option<MemStatus> {
        self.0
            .machine
            .requested_memory()
            .map(|status| *status.borrow())
    }

    /// Has the driver go to `bytes`, a multiple of 2 MiB, and waits until it is there. It is given more time as long as it gets
    /// on. What went wrong is in words, and it is asked to go back.
    pub(super) async fn request(&self, bytes: u64) -> Result<Vec<Step>, String> {
        let Some(mut status) = self.0.machine.requested_memory() else {
            return Err("the VM has no virtio-mem device".to_owned());
        };
        let before = *status.borrow_and_update();
        let began = Instant::now();
        self.0
            .machine
            .request_memory(bytes)
            .map_err(|error| chain(&error))?;
        let host_us = us(began);
        let mut first_us = 0;
        match self.follow(&mut status, bytes, began, &mut first_us).await {
            Ok(()) => Ok(vec![Step {
                what: format!("virtio-mem to {} MiB", bytes >> 20),
                host_us,
                noticed_us: first_us,
                online_us: us(began),
                total_us: us(began),
            }]),
            Err(why) => {
                let at = status.borrow().plugged;
                let mut why = format!(
                    "the guest's virtio-mem driver stopped at {} MiB of {} asked for: {why}",
                    at >> 20,
                    bytes >> 20
                );
                why.push_str(&self.go_back(&mut status, before.plugged).await);
                Err(why)
            }
        }
    }

    async fn go_back(&self, status: &mut watch::Receiver<MemStatus>, bytes: u64) -> String {
        if let Err(error) = self.0.machine.request_memory(bytes) {
            return format!("; it cannot be asked to go back: {}", chain(&error));
        }
        match self.follow(status, bytes, Instant::now(), &mut 0).await {
            Ok(()) => format!("; it is back at {} MiB", bytes >> 20),
            Err(why) => format!(
                "; asked to go back to {} MiB it is at {}: {why}",
                bytes >> 20,
                status.borrow().plugged >> 20
            ),
        }
    }

    /// Waits until the driver has plugged just so much, as long as it gets on: each bit of it gives it the time of a step anew,
    /// up to that of as many steps as there are [`STEP`]s to go, and of a change of some steps at least.
    async fn follow(
        &self,
        status: &mut watch::Receiver<MemStatus>,
        bytes: u64,
        began: Instant,
        first_us: &mut u64,
    ) -> Result<(), String> {
        let patience = self.0.timeouts.resize;
        let start = status.borrow().plugged;
        let mut best = start.abs_diff(bytes);
        let steps = u32::try_from(best.div_ceil(STEP)).unwrap_or(u32::MAX);
        let longest = patience.saturating_mul(steps).max(self.longest());
        let (asked, mut deadline) = (Instant::now(), Instant::now() + patience);
        let mut told = asked;
        loop {
            let seen = *status.borrow_and_update();
            if seen.plugged != start && *first_us == 0 {
                *first_us = us(began);
            }
            if seen.plugged == bytes {
                return Ok(());
            }
            if let Some(reason) = self.0.machine.exit_reason() {
                return Err(chain(&self.gone(reason)));
            }
            // Looked at here, since a driver that goes to and fro without end makes a change for every look.
            let now = Instant::now();
            if now >= deadline {
                return Err(if !seen.driver {
                    format!("in {patience:?} no driver has taken the device up")
                } else if now.duration_since(asked) >= longest {
                    format!("it was too slow, {longest:?} are over")
                } else {
                    format!("it did not get on for {patience:?}")
                });
            }
            // A driver that goes to and fro gets no further.
            let distance = seen.plugged.abs_diff(bytes);
            if distance < best {
                best = distance;
                deadline = (now + patience).min(asked + longest);
            }
            tokio::select! {
                changed = tokio::time::timeout_at(deadline, status.changed()) => {
                    if let Ok(Err(_)) = changed {
                        return Err("the device is gone".to_owned());
                    }
                }
                _ = self.0.machine.ended() => {}
                () = tokio::time::sleep_until(told + AGAIN) => {
                    told = Instant::now();
                    // It was taken before.
                    let _ = self.0.machine.request_memory(bytes);
                }
            }
        }
    }
}
