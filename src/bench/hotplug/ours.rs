//! A VM of ours that grows and shrinks, in this process: the library is called
//! as the control socket's server calls it, so that what is measured is the
//! plug itself and not a socket and a second program's start. No container is
//! needed for it, and no shim.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nacre_vmm::hotplug::SlotView;
use tokio::time::Instant;

use super::parts::{self, Parts};
use super::{Plugging, Setup, Way, What};
use crate::config::Config;
use crate::sandbox::resize::Resized;
use crate::sandbox::size::{self, BootSize};
use crate::sandbox::{MemoryWay, Sandbox, SandboxConfig, chain};

const MIB: u64 = 1 << 20;
/// How long a report of the guest's kernel may come after its agent's answer.
const LATE_REPORT: Duration = Duration::from_secs(2);
/// Lines of the console that are shown after a failure.
const CONSOLE_LINES: usize = 200;
/// Between two looks at the guest's memory.
const LOOK: Duration = Duration::from_millis(1);

/// The VM; it is stopped when this is dropped.
pub(super) struct Ours {
    sandbox: Sandbox,
    setup: Setup,
    patience: Duration,
    /// The guest's `uname -r`.
    pub kernel_release: String,
    _directory: tempfile::TempDir,
}

impl Ours {
    /// Boots the VM and waits for its agent.
    pub async fn boot(config: &Config, setup: &Setup, patience: Duration) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("nacre-bench-")
            .tempdir()
            .context("making a folder for the VM")?;
        let mut vm = SandboxConfig::new(
            config,
            "nacre-bench",
            "hotplug",
            directory.path().to_owned(),
        );
        let boot = BootSize {
            vcpus: 1,
            memory_mib: setup.boot_mib,
        };
        let most = BootSize {
            vcpus: 1 + setup.most_vcpus(),
            memory_mib: setup.boot_mib + setup.most_mib(),
        };
        vm.vcpus = boot.vcpus;
        vm.memory_mib = boot.memory_mib;
        vm.memory_way = match setup.way {
            Some(Way::VirtioMem) | None => MemoryWay::VirtioMem,
            Some(Way::Acpi) => MemoryWay::Acpi,
        };
        vm.plug = size::plug(boot, most, vm.memory_way);
        vm.timeouts.resize = patience;
        let sandbox = Sandbox::boot(vm)?;
        let ready = sandbox.ready().await.context("Booting the VM")?;
        Ok(Self {
            sandbox,
            setup: setup.clone(),
            patience,
            kernel_release: ready.kernel_release.clone(),
            _directory: directory,
        })
    }

    /// Ends the VM as it should end.
    pub async fn end(self) {
        self.sandbox.shutdown().await;
    }

    /// To the size at boot, whatever it is now.
    pub async fn back(&self, what: What) -> Result<Resized> {
        let resized = match what {
            What::Vcpus(_) => self.sandbox.resize_vcpus(1).await,
            What::Memory(..) => self.sandbox.resize_memory(self.setup.boot_mib).await,
        };
        resized.map_err(|error| anyhow!("{}", chain(&error)))
    }

    /// What the guest's kernel said last, for people; empty if it said nothing.
    pub fn console(&self) -> String {
        let text = self.sandbox.console_tail();
        let lines: Vec<&str> = text.lines().collect();
        let last = lines.iter().skip(lines.len().saturating_sub(CONSOLE_LINES));
        last.map(|line| format!("  guest: {line}\n")).collect()
    }

    async fn guest_bytes(&self) -> Result<u64> {
        Ok(self.sandbox.resources().await?.memory_total_bytes)
    }

    async fn has_grown(&self, to: u64, began: Instant) -> Result<()> {
        loop {
            let seen = self.guest_bytes().await?;
            if seen >= to {
                return Ok(());
            }
            ensure!(
                began.elapsed() < self.patience,
                "the device has plugged it all, and the guest's kernel has {} MiB of {}",
                seen / MIB,
                to / MIB
            );
            tokio::time::sleep(LOOK).await;
        }
    }
}

impl Plugging for Ours {
    async fn plug(&mut self, what: What) -> Result<Parts> {
        match what {
            What::Vcpus(count) => {
                let mut reports = Reports::begin(&self.sandbox, what);
                let began = Instant::now();
                let resized = reports.beside(self.sandbox.resize_vcpus(1 + count)).await?;
                let total = us(began);
                let waited = reports.all(usize::from(count)).await;
                // One after another: each from its announcement to its report.
                let each =
                    waited.map(|all| all.map(|(announced, reported)| reported - announced).sum());
                Ok(parts::plugged(
                    &resized.steps,
                    total,
                    with_host(&resized, each),
                ))
            }
            What::Memory(mib, Way::Acpi) => {
                let mut reports = Reports::begin(&self.sandbox, what);
                let began = Instant::now();
                let resized = reports
                    .beside(self.sandbox.resize_memory(self.setup.boot_mib + mib))
                    .await?;
                let total = us(began);
                let waited = reports.all(resized.steps.len()).await;
                // Announced at once.
                let last = waited.and_then(|all| {
                    let (announced, reported): (Vec<Instant>, Vec<Instant>) = all.unzip();
                    Some(*reported.iter().max()? - *announced.iter().min()?)
                });
                Ok(parts::plugged(
                    &resized.steps,
                    total,
                    with_host(&resized, last),
                ))
            }
            What::Memory(mib, Way::VirtioMem) => {
                let before = self.guest_bytes().await?;
                let began = Instant::now();
                let resized = self
                    .sandbox
                    .resize_memory(self.setup.boot_mib + mib)
                    .await?;
                // The driver has taken the last block, and its kernel has it a little later.
                self.has_grown(before + mib * MIB / 16 * 15, began).await?;
                Ok(parts::requested(&resized.steps, us(began)))
            }
        }
    }

    async fn unplug(&mut self, what: What) -> Result<Parts> {
        let began = Instant::now();
        let resized = self.back(what).await?;
        let total = us(began);
        ensure!(
            !resized.steps.is_empty(),
            "nothing was there to be unplugged"
        );
        Ok(match what {
            What::Memory(_, Way::VirtioMem) => parts::requested(&resized.steps, total),
            What::Vcpus(_) | What::Memory(_, Way::Acpi) => parts::unplugged(&resized.steps, total),
        })
    }
}

/// The host's part belongs to the time until the report.
fn with_host(resized: &Resized, guest: Option<Duration>) -> Option<u64> {
    let host: u64 = resized.steps.iter().map(|step| step.host_us).sum();
    Some(host + u64::try_from(guest?.as_micros()).ok()?)
}

fn us(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// When slots were announced to the guest, and when its kernel reported success (`_OST`). Only those that were empty before.
struct Reports<'s> {
    sandbox: &'s Sandbox,
    what: What,
    known: BTreeSet<u8>,
    seen: Seen,
}

/// By slot: when it was announced, and when it was reported.
#[derive(Default)]
struct Seen(BTreeMap<u8, (Instant, Option<Instant>)>);

impl Seen {
    fn look(&mut self, slots: &[SlotView], known: &BTreeSet<u8>, now: Instant) {
        for slot in slots.iter().filter(|slot| !known.contains(&slot.index)) {
            let (_, reported) = self.0.entry(slot.index).or_insert((now, None));
            if slot.ost.is_some_and(|ost| ost.status == 0) {
                reported.get_or_insert(now);
            }
        }
    }

    fn reported(&self) -> impl Iterator<Item = (Instant, Instant)> {
        self.0
            .values()
            .filter_map(|(announced, reported)| Some((*announced, (*reported)?)))
    }
}

impl<'s> Reports<'s> {
    fn begin(sandbox: &'s Sandbox, what: What) -> Self {
        let mut this = Self {
            sandbox,
            what,
            known: BTreeSet::new(),
            seen: Seen::default(),
        };
        this.known = this.slots().iter().map(|slot| slot.index).collect();
        this
    }

    fn slots(&self) -> Vec<SlotView> {
        let (vcpus, units) = self.sandbox.slots();
        match self.what {
            What::Vcpus(_) => vcpus,
            What::Memory(..) => units,
        }
    }

    async fn follow(&mut self, until: impl Fn(&Seen) -> bool) {
        let mut changes = self.sandbox.slot_changes();
        loop {
            let slots = self.slots();
            self.seen.look(&slots, &self.known, Instant::now());
            if until(&self.seen) || changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Looks on while something is done.
    async fn beside<T, E: std::error::Error + Send + Sync + 'static>(
        &mut self,
        doing: impl Future<Output = Result<T, E>>,
    ) -> Result<T> {
        tokio::pin!(doing);
        let done = tokio::select! {
            done = &mut doing => done,
            // The VM's slots have nothing more to tell: it has ended.
            () = self.follow(|_| false) => doing.await,
        };
        done.map_err(|error| anyhow!("{}", chain(&error)))
    }

    /// What was announced and reported, if all `count` of it is.
    async fn all(&mut self, count: usize) -> Option<impl Iterator<Item = (Instant, Instant)>> {
        let enough = |seen: &Seen| seen.reported().count() >= count;
        let _late = tokio::time::timeout(LATE_REPORT, self.follow(enough)).await;
        enough(&self.seen).then(|| self.seen.reported())
    }
}

#[cfg(test)]
mod tests {
    use nacre_vmm::hotplug::{Ost, State};

    use super::*;

    #[test]
    fn slots_are_told_from_those_that_were_there_and_reports_from_failures() {
        let slot = |index, status: Option<u32>| SlotView {
            index,
            state: State::Present,
            ost: status.map(|status| Ost { event: 1, status }),
        };
        let known = BTreeSet::from([0]);
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let mut seen = Seen::default();
        seen.look(&[slot(0, Some(0)), slot(1, None)], &known, at(1));
        assert_eq!(seen.reported().count(), 0);
        seen.look(&[slot(1, Some(0)), slot(2, Some(0x81))], &known, at(5));
        // What was reported once is not reported later.
        seen.look(&[slot(1, Some(0)), slot(2, Some(0x80))], &known, at(9));
        assert_eq!(seen.reported().collect::<Vec<_>>(), [(at(1), at(5))]);
    }
}
