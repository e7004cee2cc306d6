//! What others hold of a running VM.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};

use tokio::sync::watch;
use tokio::time::Instant;

use crate::config::{DiskConfig, VmConfig};
use crate::exit::ExitReason;
use crate::hotplug::SlotView;
use crate::hotplug::memory::{Area, UnitView};
use crate::platform::monotonic_ns;
use crate::virtio::balloon::BalloonHost;
use crate::virtio::mem::MemHost;
use crate::virtio::net::{NetConfig, NetHost, Tap};
use crate::virtio::vsock::VsockHost;
pub use crate::vm::{Counters, Error};
use crate::vm::{Machine, Progress, open_disk};

/// A running VM; clones share it. When the last clone is dropped the VM is stopped, and the drop
/// returns when its threads are joined and its memory is given back.
///
/// ```no_run
/// use nacre_vmm::config::{Console, DEFAULT_WINDOWS, PlugConfig, ReadyDevices, default_cmdline};
/// use nacre_vmm::{ExitReason, Vm, VmConfig};
///
/// let vm = Vm::start(VmConfig {
///     name: "example".to_owned(),
///     kernel: "vmlinux".into(),
///     initrd: Some("initrd".into()),
///     cmdline: default_cmdline(),
///     memory_mib: 256,
///     vcpus: 1,
///     disks: Vec::new(),
///     windows: DEFAULT_WINDOWS,
///     vsock: true,
///     rng: true,
///     devices: ReadyDevices::default(),
///     plug: PlugConfig::default(),
///     console: Console { output: Box::new(std::io::stdout()), input: None },
/// })?;
/// assert_eq!(vm.wait(), ExitReason::PowerOff);
/// # Ok::<(), nacre_vmm::handle::Error>(())
/// ```
#[derive(Clone)]
pub struct Vm {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm")
            .field("name", &self.shared.name)
            .field("exit_reason", &self.exit_reason())
            .finish_non_exhaustive()
    }
}

/// Host CLOCK_MONOTONIC, nanoseconds, of each phase of the boot that has been reached.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Phases {
    /// `Vm::start` was called.
    pub start_ns: u64,
    /// KVM's VM exists.
    pub kvm_ns: Option<u64>,
    /// Kernel and initrd are in guest memory.
    pub loaded_ns: Option<u64>,
    /// The first KVM_RUN.
    pub first_run_ns: Option<u64>,
    /// The guest's first access to a device (port or memory) that came to the VMM: the first sign of its kernel, which PVH
    /// enters with the first KVM_RUN.
    pub first_exit_ns: Option<u64>,
    /// Phases that the guest marked through the phase port, by number.
    pub marks: Vec<(u8, u64)>,
}

struct Shared {
    name: String,
    start_ns: u64,
    vcpus: u8,
    max_vcpus: u8,
    memory_mib: u64,
    vsock: Option<VsockHost>,
    progress: Arc<Progress>,
    state: Arc<Mutex<State>>,
    supervisor: Option<JoinHandle<()>>,
}

/// The machine while it runs, its last counters afterwards.
enum State {
    Running(Box<Machine>),
    /// The supervisor has the machine, or it is gone.
    Ended(Counters),
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vm {
    /// Checks the configuration, makes the VM and starts its vCPUs.
    ///
    /// # Errors
    ///
    /// [`enum@Error`] says what cannot be; nothing is left of the VM then.
    pub fn start(config: VmConfig) -> Result<Self, Error> {
        Self::start_with(config, |_| {})
    }

    /// [`Vm::start`] that calls `before_run` with the host side of the vsock device, if there is to be
    /// one, before the guest's first instruction: ports that listen then are there for all it dials.
    ///
    /// # Errors
    ///
    /// As [`Vm::start`].
    pub fn start_with(
        config: VmConfig,
        before_run: impl FnOnce(&VsockHost),
    ) -> Result<Self, Error> {
        let start_ns = monotonic_ns();
        let (name, vcpus, memory_mib) = (config.name.clone(), config.vcpus, config.memory_mib);
        let max_vcpus = config.plug.max_vcpus.max(vcpus);
        let progress = Arc::new(Progress::default());
        let (machine, vsock) = Machine::start(config, &progress, before_run)?;
        let state = Arc::new(Mutex::new(State::Running(Box::new(machine))));
        let supervisor = {
            let (progress, state) = (Arc::clone(&progress), Arc::clone(&state));
            thread::Builder::new()
                .name(format!("vm:{name}"))
                .spawn(move || supervise(&progress, &state))
        };
        let supervisor = match supervisor {
            Ok(supervisor) => supervisor,
            Err(error) => {
                progress.ending.report(ExitReason::Stopped);
                supervise(&progress, &state);
                return Err(Error::Supervisor(error));
            }
        };
        Ok(Self {
            shared: Arc::new(Shared {
                name,
                start_ns,
                vcpus,
                max_vcpus,
                memory_mib,
                vsock,
                progress,
                state,
                supervisor: Some(supervisor),
            }),
        })
    }

    /// Blocks until the VM has ended and all its threads are joined. Not to be called from the
    /// console's writer, on which the VM's threads wait.
    pub fn wait(&self) -> ExitReason {
        self.shared.progress.ending.wait_down()
    }

    /// Completes when the VM has ended and all its threads are joined; runs on any executor.
    pub async fn ended(&self) -> ExitReason {
        self.shared.progress.ending.down().await
    }

    /// The reason, once the VM ends; its threads may still be on their way out.
    pub fn exit_reason(&self) -> Option<ExitReason> {
        self.shared.progress.ending.reason()
    }

    /// Ends the VM from the host; returns at once, idempotent.
    pub fn stop(&self) {
        self.shared.progress.ending.report(ExitReason::Stopped);
    }

    /// The host side of the vsock device.
    pub fn vsock(&self) -> Option<VsockHost> {
        self.shared.vsock.clone()
    }

    /// Puts a disk into the first spare window; returns the window's index. The guest does not
    /// notice by itself: its agent binds the window's platform device.
    ///
    /// # Errors
    ///
    /// If the disk cannot be opened, no window is free (with their number), or the VM has ended.
    pub fn plug_disk(&self, disk: DiskConfig) -> Result<u8, Error> {
        // A file of a slow file system is opened while others use the machine.
        let events = self.with_machine(|machine| Ok(machine.events()))?;
        let device = open_disk(&disk, events)?;
        self.with_machine(|machine| machine.plug_block(device))
    }

    /// Puts a network device over a TAP interface into the first spare window; returns the window's index, and the host's
    /// hand on the device. The guest does not notice by itself, as with a disk.
    ///
    /// # Errors
    ///
    /// If the configuration cannot be, no window is free (with their number), or the VM has ended.
    pub fn plug_net(&self, config: NetConfig, tap: Tap) -> Result<(u8, NetHost), Error> {
        self.with_machine(|machine| machine.plug_net(config, tap))
    }

    /// Takes the disk or network device out of a window (the guest has unbound it).
    ///
    /// # Errors
    ///
    /// If there is no such window, no device in it, or the VM has ended.
    pub fn unplug(&self, window: u8) -> Result<(), Error> {
        self.with_machine(|machine| machine.unplug(window))
    }

    /// Makes a vCPU and announces it to the guest; its index, which is its ACPI `_UID` and APIC id. The guest brings it online.
    /// An unplugged vCPU is used again.
    ///
    /// # Errors
    ///
    /// If all that the VM may have are there, KVM or the host refuses, or the VM has ended.
    pub fn plug_vcpu(&self) -> Result<u8, Error> {
        self.with_machine(Machine::plug_vcpu)
    }

    /// Has the guest asked to eject a vCPU that it has taken offline. Its slot is empty when it has; then its thread stands
    /// still.
    ///
    /// # Errors
    ///
    /// For vCPU 0, one that is not there, or if the VM has ended.
    pub fn ask_vcpu(&self, index: u8) -> Result<(), Error> {
        self.with_machine(|machine| Ok(machine.plugs().ask_vcpu(index)?))
    }

    /// Takes back a vCPU, or a request to eject one, that the guest has not noticed.
    ///
    /// # Errors
    ///
    /// If it has noticed, or the VM has ended.
    pub fn withdraw_vcpu(&self, index: u8) -> Result<(), Error> {
        self.with_machine(|machine| Ok(machine.plugs().cpus().withdraw(index)?))
    }

    /// The vCPUs that are there, whether the guest has noticed them or not.
    ///
    /// # Errors
    ///
    /// If the VM has ended.
    pub fn vcpu_slots(&self) -> Result<Vec<SlotView>, Error> {
        self.with_machine(|machine| Ok(machine.plugs().cpus().views()))
    }

    /// Makes ACPI memory in free units, the lowest first, and announces it; the units, all of them or none. The guest brings
    /// it online.
    ///
    /// # Errors
    ///
    /// If `bytes` is not a whole number of units, too few are free, the host or KVM refuses, or the VM has ended.
    pub fn plug_memory(&self, bytes: u64) -> Result<Vec<UnitView>, Error> {
        self.with_machine(|machine| Ok(machine.plugs().plug_memory(bytes)?))
    }

    /// Has the guest asked to eject a unit of memory. When its slot is empty, the KVM slot and the mapping are gone.
    ///
    /// # Errors
    ///
    /// If it is not there or the VM has ended.
    pub fn ask_memory(&self, unit: u8) -> Result<(), Error> {
        self.with_machine(|machine| Ok(machine.plugs().ask_memory(unit)?))
    }

    /// Takes back a unit of memory, or a request to eject one, that the guest has not noticed.
    ///
    /// # Errors
    ///
    /// If it has noticed, or the VM has ended.
    pub fn withdraw_memory(&self, unit: u8) -> Result<(), Error> {
        self.with_machine(|machine| Ok(machine.plugs().memory().withdraw(unit)?))
    }

    /// The units of ACPI memory that are there.
    ///
    /// # Errors
    ///
    /// If the VM has ended.
    pub fn memory_units(&self) -> Result<Vec<UnitView>, Error> {
        self.with_machine(|machine| Ok(machine.plugs().memory().views()))
    }

    /// Where units of ACPI memory may be.
    ///
    /// # Errors
    ///
    /// If the VM has ended.
    pub fn memory_area(&self) -> Result<Area, Error> {
        self.with_machine(|machine| Ok(machine.plugs().memory().area()))
    }

    /// The host's end of the virtio-mem device, if the VM has one and has not ended.
    pub fn mem(&self) -> Option<MemHost> {
        self.with_machine(|machine| Ok(machine.mem().cloned()))
            .ok()
            .flatten()
    }

    /// The host's end of the balloon, if the VM has one and has not ended.
    pub fn balloon(&self) -> Option<BalloonHost> {
        self.with_machine(|machine| Ok(machine.balloon().cloned()))
            .ok()
            .flatten()
    }

    /// Ejects of vCPUs and memory that the guest was not asked for. 0 when the VM has ended.
    pub fn unasked_ejects(&self) -> u64 {
        self.with_machine(|machine| Ok(machine.plugs().registers().unasked()))
            .unwrap_or(0)
    }

    /// When the guest last ejected a vCPU or memory without having reported since that it is done. What is plugged before it
    /// has may be missed by it. `None` when the VM has ended.
    pub fn ejecting_since(&self) -> Option<Instant> {
        self.with_machine(|machine| Ok(machine.plugs().ejecting_since()))
            .ok()
            .flatten()
    }

    /// Tells of each change of a vCPU's or memory unit's slot.
    pub fn plug_changes(&self) -> watch::Receiver<u64> {
        self.shared.progress.plug_changes.subscribe()
    }

    /// Most vCPUs that this VM may have.
    pub fn max_vcpus(&self) -> u8 {
        self.shared.max_vcpus
    }

    /// When each phase of the boot was reached.
    pub fn phases(&self) -> Phases {
        let progress = &self.shared.progress;
        let reached = |ns: u64| (ns != 0).then_some(ns);
        Phases {
            start_ns: self.shared.start_ns,
            kvm_ns: reached(progress.kvm_ns.load(Ordering::Relaxed)),
            loaded_ns: reached(progress.loaded_ns.load(Ordering::Relaxed)),
            first_run_ns: reached(progress.first_run_ns.load(Ordering::Relaxed)),
            first_exit_ns: reached(progress.first_exit_ns.load(Ordering::Relaxed)),
            marks: progress.marks.all(),
        }
    }

    /// How busy it is, or was when it ended.
    pub fn counters(&self) -> Counters {
        match &*lock(&self.shared.state) {
            State::Running(machine) => machine.counters(),
            State::Ended(counters) => counters.clone(),
        }
    }

    /// vCPUs that are there, or were there at boot if it has ended.
    pub fn vcpus(&self) -> u8 {
        match &*lock(&self.shared.state) {
            State::Running(machine) => machine.vcpus() as u8,
            State::Ended(_) => self.shared.vcpus,
        }
    }

    /// Guest memory in MiB, or what was there at boot if it has ended.
    pub fn memory_mib(&self) -> u64 {
        match &*lock(&self.shared.state) {
            State::Running(machine) => machine.memory_bytes() >> 20,
            State::Ended(_) => self.shared.memory_mib,
        }
    }

    /// The name that it was given.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    fn with_machine<T>(
        &self,
        call: impl FnOnce(&mut Machine) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut state = lock(&self.shared.state);
        match (&mut *state, self.exit_reason()) {
            (State::Running(machine), None) => call(machine),
            (_, reason) => Err(Error::Ended(reason.unwrap_or(ExitReason::Stopped))),
        }
    }
}

/// Waits for the end, takes the machine down, and says so.
fn supervise(progress: &Progress, state: &Mutex<State>) {
    let reason = progress.ending.wait_reason();
    let machine = std::mem::replace(&mut *lock(state), State::Ended(Counters::default()));
    if let State::Running(machine) = machine {
        let counters = machine.take_down();
        *lock(state) = State::Ended(counters);
    }
    tracing::info!(%reason, "the VM has ended");
    progress.ending.finish();
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.progress.ending.report(ExitReason::Stopped);
        if let Some(supervisor) = self.supervisor.take()
            && !on_own_thread(supervisor.thread().id())
        {
            // What it runs catches the panics that it expects; there is nothing to add here.
            let _ = supervisor.join();
        }
    }
}

/// Whether this is the supervisor, which cannot join itself: it drops what the VM owned, and that
/// may be the last clone (a console's writer that holds one).
fn on_own_thread(supervisor: ThreadId) -> bool {
    thread::current().id() == supervisor
}
