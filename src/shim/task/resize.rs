//! The VM's size while it runs: it follows its load, and what the limits of its
//! containers add up to. All changes go through the one controller; how
//! a change is made is the sandbox's.

use std::sync::{Arc, Mutex, PoisonError};

use crate::control::{Changed, Wanted};
use crate::hotplug::{
    Actuator, Change, Controller, Failure, FailureKind, Host, Pressure, Readings, Room, Wish,
};
use crate::sandbox::cgroup::VmCgroup;
use crate::sandbox::resize::{Resized, Rounding};
use crate::sandbox::size::{BootSize, Limits};
use crate::sandbox::{self, Sandbox, WeakSandbox, chain};

use super::{Error, Shim};

const MIB: u64 = 1 << 20;

/// What the limits of all containers of a VM come to. `None`: one of them has no such limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sum {
    /// Whole vCPUs.
    pub vcpus: Option<u64>,
    /// MiB, without what the guest itself needs.
    pub memory_mib: Option<u64>,
}

impl Sum {
    /// Over containers; that of none is no limit.
    pub(super) fn of<'a>(limits: impl Iterator<Item = &'a Limits>) -> Self {
        let limits: Vec<&Limits> = limits.collect();
        if limits.is_empty() {
            return Self {
                vcpus: None,
                memory_mib: None,
            };
        }
        // Shares of CPUs are added before they are rounded up: two halves are one.
        let thousandths = |limits: &&Limits| limits.cpu_thousandths();
        let vcpus: Option<Vec<u64>> = limits.iter().map(thousandths).collect();
        let bytes: Option<Vec<u64>> = limits.iter().map(|limits| limits.memory_bytes()).collect();
        let total = |parts: Vec<u64>| parts.into_iter().fold(0, u64::saturating_add);
        Self {
            vcpus: vcpus.map(|parts| total(parts).div_ceil(1000).max(1)),
            memory_mib: bytes.map(|parts| total(parts).div_ceil(MIB)),
        }
    }
}

/// The steps of the last change of each kind.
pub(super) type LastSteps = Arc<Mutex<Changed>>;

/// The VM as its controller sees it.
struct Vm {
    sandbox: WeakSandbox,
    cgroup: Option<Arc<VmCgroup>>,
    /// What the shim needs beside the guest's memory, bytes.
    host_memory: u64,
    last: LastSteps,
}

impl Vm {
    fn sandbox(&self) -> Result<Sandbox, Failure> {
        self.sandbox.upgrade().ok_or_else(|| Failure {
            kind: FailureKind::Gone,
            message: "The VM has ended".to_owned(),
        })
    }

    /// The cgroup's maximum for a guest of so much memory.
    fn hold(&self, memory_mib: u64) -> Result<(), String> {
        let Some(cgroup) = &self.cgroup else {
            return Ok(());
        };
        let most = memory_mib
            .saturating_mul(MIB)
            .saturating_add(self.host_memory);
        cgroup.resize(most).map_err(|error| chain(&error))
    }

    fn keep(&self, change: impl FnOnce(&mut Changed)) {
        change(&mut self.last.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// A failure of the sandbox's; a VM that has ended fails everything, in whatever words.
fn failure(sandbox: &Sandbox, error: &sandbox::Error) -> Failure {
    let kind = match error {
        _ if sandbox.exit_reason().is_some() => FailureKind::Gone,
        sandbox::Error::Gone { .. } => FailureKind::Gone,
        sandbox::Error::Timeout { .. } => FailureKind::Timeout,
        _ => FailureKind::Refused,
    };
    Failure {
        kind,
        message: chain(error),
    }
}

impl Actuator for Vm {
    async fn read(&self) -> Result<Readings, Failure> {
        let sandbox = self.sandbox()?;
        let seen = sandbox
            .resources()
            .await
            .map_err(|error| failure(&sandbox, &error))?;
        Ok(Readings {
            vcpus_online: u8::try_from(seen.online_uids.len()).unwrap_or(u8::MAX),
            cpu_busy_us: seen.cpu_busy_us,
            cpu_total_us: seen.cpu_total_us,
            throttled_us: seen.throttled_us,
            memory_mib: sandbox.memory_mib(),
            memory_total_bytes: seen.memory_total_bytes,
            memory_available_bytes: seen.memory_available_bytes,
        })
    }

    async fn resize_vcpus(&self, to: u8) -> Result<u8, Failure> {
        let sandbox = self.sandbox()?;
        let resized = sandbox
            .resize_vcpus(to)
            .await
            .map_err(|error| failure(&sandbox, &error))?;
        let now = resized.now;
        self.keep(|last| last.vcpus = Some(resized));
        Ok(u8::try_from(now).unwrap_or(u8::MAX))
    }

    async fn resize_memory(&self, to_mib: u64) -> Result<u64, Failure> {
        let sandbox = self.sandbox()?;
        let before = sandbox.memory_mib();
        if to_mib > before {
            self.hold(to_mib).map_err(|message| Failure {
                kind: FailureKind::Refused,
                message,
            })?;
        }
        let resized = sandbox
            .resize_memory_rounded(to_mib, Rounding::Towards)
            .await;
        // Whatever came of it is what may be used from now on.
        if let Err(error) = self.hold(sandbox.memory_mib()) {
            tracing::warn!(error, "the VM's cgroup keeps the maximum that it had");
        }
        let resized = resized.map_err(|error| failure(&sandbox, &error))?;
        let now = resized.now;
        self.keep(|last| last.memory = Some(resized));
        Ok(now)
    }

    async fn watch_memory(&self, high_bytes: u64) -> Result<(), Failure> {
        let sandbox = self.sandbox()?;
        sandbox
            .watch_memory(high_bytes)
            .await
            .map_err(|error| failure(&sandbox, &error))
    }
}

/// Bounds that a change of limits leads to, and the size to have at once.
fn change(sum: Sum, ceiling: BootSize, guest_mib: u64, boot: BootSize, most: BootSize) -> Change {
    let vcpus = sum.vcpus.map(|vcpus| {
        let vcpus = u8::try_from(vcpus).unwrap_or(u8::MAX);
        vcpus.clamp(boot.vcpus, most.vcpus)
    });
    let memory_mib = sum.memory_mib.map(|mib| {
        mib.saturating_add(guest_mib)
            .clamp(boot.memory_mib, most.memory_mib)
    });
    Change {
        vcpus: Wish {
            floor: None,
            ceiling: Some(vcpus.unwrap_or(ceiling.vcpus.min(most.vcpus))),
            size: vcpus,
        },
        memory_mib: Wish {
            floor: None,
            ceiling: Some(memory_mib.unwrap_or(ceiling.memory_mib.min(most.memory_mib))),
            size: memory_mib,
        },
    }
}

impl Shim {
    /// Starts the controller of a VM that boots; it waits for the guest by itself.
    pub(super) fn control_size(&self, sandbox: &Sandbox) {
        let boot = boot_size(sandbox);
        let room = Room::of(boot, &self.identity.limits, &self.config.size, Host::read());
        let most = most(sandbox);
        // What was announced to the guest at boot is the most, whatever else would be allowed.
        let room = Room {
            vcpus: room
                .vcpus
                .moved(None, Some(room.vcpus.ceiling().min(most.vcpus))),
            memory_mib: room
                .memory_mib
                .moved(None, Some(room.memory_mib.ceiling().min(most.memory_mib))),
        };
        let vm = Vm {
            sandbox: sandbox.downgrade(),
            cgroup: self.cgroup.clone(),
            host_memory: self.config.size.host_memory.0,
            last: self.last_steps.clone(),
        };
        let controller = Controller::start(&self.config.hotplug, room, vm);
        // Only one sandbox is ever booted.
        let _ = self.controller.set(controller);
    }

    /// Containers stall for want of memory.
    pub(super) fn pressed(&self, total_bytes: u64, available_bytes: u64) {
        if let Some(controller) = self.controller.get() {
            controller.pressure(Pressure {
                total_bytes,
                available_bytes,
            });
        }
    }

    /// Ends all resizing.
    pub(super) async fn stop_resizing(&self) {
        if let Some(controller) = self.controller.get() {
            controller.stop().await;
        }
    }

    /// What the limits of all containers come to; with these limits for one of them.
    pub(super) fn sum(&self, instead: Option<(&str, &Limits)>) -> Sum {
        let state = self.lock();
        let others = state
            .containers
            .iter()
            .filter(|(id, _)| instead.is_none_or(|(changed, _)| changed != id.as_str()))
            .filter_map(|(_, container)| container.limits.as_ref());
        Sum::of(others.chain(instead.map(|(_, limits)| limits)))
    }

    /// Brings the VM to what the limits of its containers come to; where one has none, the VM stays, and follows its load.
    /// Answers when the guest has it.
    pub(super) async fn fit(&self, sandbox: &Sandbox, sum: Sum) -> Result<(), String> {
        let Some(controller) = self.controller.get() else {
            return Ok(());
        };
        let unlimited = Room::ceiling(&Limits::default(), &self.config.size, Host::read());
        let guest_mib = self.config.size.guest_memory.mib();
        let change = change(sum, unlimited, guest_mib, boot_size(sandbox), most(sandbox));
        let sizes = controller
            .set(change)
            .await
            .map_err(|error| chain(&error))?;
        tracing::debug!(?sum, ?sizes, "the VM fits its containers");
        Ok(())
    }

    /// A container has gone: what was there for it goes too, in its own time.
    pub(super) fn fit_later(self: &Arc<Self>) {
        let Some(sandbox) = self.sandbox_now() else {
            return;
        };
        let sum = self.sum(None);
        let none_left = self.lock().containers.is_empty();
        // The VM ends with its last container.
        if none_left {
            return;
        }
        let shim = Arc::downgrade(self);
        tokio::spawn(async move {
            if let Some(shim) = shim.upgrade()
                && let Err(error) = shim.fit(&sandbox, sum).await
            {
                tracing::info!(error, "the VM stays larger than its containers need");
            }
        });
    }

    /// Refuses limits that the VM can never have.
    pub(super) fn check_most(&self, sandbox: &Sandbox, sum: Sum) -> Result<(), Error> {
        let most = most(sandbox);
        if let Some(vcpus) = sum.vcpus.filter(|vcpus| *vcpus > u64::from(most.vcpus)) {
            return Err(Error::Invalid(format!(
                "The CPU limits of the VM's containers come to {vcpus} CPUs, and the VM can have {}: that is fixed when it starts, by size.max_vcpus or the host's CPUs",
                most.vcpus
            )));
        }
        let guest = self.config.size.guest_memory.mib();
        if let Some(mib) = sum.memory_mib
            && mib.saturating_add(guest) > most.memory_mib
        {
            return Err(Error::Invalid(format!(
                "The memory limits of the VM's containers come to {mib} MiB, the guest itself needs {guest}, and the VM can have {} MiB: that is fixed when it starts, by size.max_memory or half of the host's memory",
                most.memory_mib
            )));
        }
        Ok(())
    }

    /// Another size by hand, within what the limits of the containers allow. What went wrong is in words.
    pub(in crate::shim) async fn resize_vm(&self, wanted: Wanted) -> Result<Changed, String> {
        let controller = self
            .controller
            .get()
            .ok_or("The VM is not made yet: try again")?;
        let sandbox = self.sandbox_now().ok_or("There is no VM")?;
        let before = (sandbox.vcpus(), sandbox.memory_mib());
        *self
            .last_steps
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Changed::default();
        let wish = |size| Wish {
            size,
            ..Wish::default()
        };
        let change = Change {
            vcpus: wish(wanted.vcpus),
            memory_mib: Wish {
                size: wanted.memory_mib,
                ..Wish::default()
            },
        };
        let sizes = controller
            .set(change)
            .await
            .map_err(|error| chain(&error))?;
        let mut changed = std::mem::take(
            &mut *self
                .last_steps
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        // A size that it had already took no step.
        let same = |before: u64, now: u64| Resized {
            before,
            now,
            steps: Vec::new(),
        };
        changed.vcpus = wanted.vcpus.map(|_| {
            let same = || same(before.0.into(), sizes.vcpus.into());
            changed.vcpus.take().unwrap_or_else(same)
        });
        changed.memory = wanted.memory_mib.map(|_| {
            let same = || same(before.1, sizes.memory_mib);
            changed.memory.take().unwrap_or_else(same)
        });
        Ok(changed)
    }
}

/// What the VM began with.
fn boot_size(sandbox: &Sandbox) -> BootSize {
    BootSize {
        vcpus: sandbox.boot_vcpus(),
        memory_mib: sandbox.boot_memory_mib(),
    }
}

/// The most that it can have.
fn most(sandbox: &Sandbox) -> BootSize {
    BootSize {
        vcpus: sandbox.max_vcpus(),
        memory_mib: sandbox.max_memory_mib(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(quota: Option<i64>, memory_mib: Option<i64>) -> Limits {
        Limits {
            quota,
            period: Some(100_000),
            cpuset: None,
            memory: memory_mib.map(|mib| mib << 20),
        }
    }

    #[test]
    fn limits_add_up_and_one_without_makes_the_sum_unlimited() {
        let half = limits(Some(50_000), Some(100));
        let more = limits(Some(120_000), Some(64));
        let none = limits(None, None);
        let table: [(&[&Limits], Option<u64>, Option<u64>); 6] = [
            (&[], None, None),
            (&[&half], Some(1), Some(100)),
            (&[&half, &half], Some(1), Some(200)),
            (&[&half, &more], Some(2), Some(164)),
            (&[&half, &none], None, None),
            (&[&limits(Some(-1), Some(7)), &more], None, Some(71)),
        ];
        for (parts, vcpus, memory_mib) in table {
            let sum = Sum::of(parts.iter().copied());
            assert_eq!(sum, Sum { vcpus, memory_mib }, "{parts:?}");
        }
        let huge = limits(Some(i64::MAX), Some(i64::MAX >> 21));
        let sum = Sum::of([&huge, &huge, &huge].into_iter());
        assert!(sum.vcpus.is_some_and(|vcpus| vcpus > 1 << 40), "{sum:?}");
    }

    #[test]
    fn a_sum_is_the_size_at_once_and_no_sum_is_a_ceiling() {
        let size = |vcpus, memory_mib| BootSize { vcpus, memory_mib };
        let (boot, most, unlimited) = (size(1, 256), size(8, 4096), size(16, 8192));
        let sum = |vcpus, memory_mib| Sum { vcpus, memory_mib };
        let table = [
            // sum → ceiling, size; of vCPUs and of memory
            (sum(None, None), (8, None), (4096, None)),
            (sum(Some(2), Some(512)), (2, Some(2)), (640, Some(640))),
            (sum(Some(1), Some(1)), (1, Some(1)), (256, Some(256))),
            (
                sum(Some(99), Some(1 << 40)),
                (8, Some(8)),
                (4096, Some(4096)),
            ),
            (sum(Some(3), None), (3, Some(3)), (4096, None)),
        ];
        for (sum, vcpus, memory) in table {
            let change = change(sum, unlimited, 128, boot, most);
            assert_eq!(
                (change.vcpus.ceiling, change.vcpus.size),
                (Some(vcpus.0), vcpus.1),
                "{sum:?}"
            );
            let wish = change.memory_mib;
            assert_eq!(
                (wish.ceiling, wish.size),
                (Some(memory.0), memory.1),
                "{sum:?}"
            );
        }
    }
}
