//! All vCPUs of a VM: made one by one, also while others run, and ended together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::Error;
use super::exits::ExitCounts;
use super::gate::Gate;
use super::state::{self, Birth, Entry};
use super::thread::{self, Kicker, Surroundings};

/// Makes vCPUs of one VM.
pub struct VcpuFactory {
    kvm: Kvm,
    vm: Arc<VmFd>,
    supported: Vec<kvm_cpuid_entry2>,
    cores: u8,
}

/// A vCPU that has its first state and no thread yet.
pub struct PreparedVcpu {
    index: u8,
    fd: VcpuFd,
    birth: Birth,
}

impl VcpuFactory {
    /// A factory for a guest that is told of `cores` vCPUs at most.
    ///
    /// # Errors
    ///
    /// If KVM does not say what CPUID it supports.
    pub fn new(kvm: Kvm, vm: Arc<VmFd>, cores: u8) -> Result<Self, Error> {
        let supported = state::supported_cpuid(&kvm)?;
        Ok(Self {
            kvm,
            vm,
            supported,
            cores,
        })
    }

    /// The first guest-physical address that this host's processor cannot reach.
    pub fn physical_addresses(&self) -> u64 {
        let bits = self
            .supported
            .iter()
            .find(|leaf| leaf.function == 0x8000_0008)
            .map_or(36, |leaf| leaf.eax & 0xff);
        1u64.checked_shl(bits).unwrap_or(u64::MAX)
    }

    /// Makes the vCPU `index` (its APIC id too) that begins at `entry`.
    ///
    /// # Errors
    ///
    /// If KVM refuses.
    pub fn prepare(&self, index: u8, entry: Entry) -> Result<PreparedVcpu, Error> {
        let fd = self
            .vm
            .create_vcpu(u64::from(index))
            .map_err(|source| Error::Setup {
                what: "make the KVM side",
                vcpu: index,
                source,
            })?;
        state::set_up(&fd, &self.kvm, &self.supported, index, self.cores, entry)?;
        let birth = Birth::of(&fd, index)?;
        Ok(PreparedVcpu { index, fd, birth })
    }
}

/// What others do to one vCPU.
#[derive(Default)]
pub struct VcpuControl {
    kicker: Kicker,
    gate: Gate,
}

impl VcpuControl {
    /// Takes the vCPU out of the guest; its thread stands still until it is used again. Returns at once.
    pub fn park(&self) {
        self.gate.close();
        self.kicker.kick();
    }

    /// Gets the vCPU out of the guest for a moment, to look whether it is to stop.
    fn kick(&self) {
        self.kicker.kick();
        self.gate.wake();
    }

    /// For its thread.
    pub(super) fn parts(&self) -> (&Kicker, &Gate) {
        (&self.kicker, &self.gate)
    }
}

/// A vCPU whose thread runs, or stands still.
struct Running {
    control: Arc<VcpuControl>,
    counts: Arc<ExitCounts>,
    thread: Option<JoinHandle<()>>,
}

/// The vCPUs, those that stand still included. Dropping it ends nothing: the VM's end is reported elsewhere, then
/// [`Self::join`] collects the threads.
pub struct VcpuSet {
    surroundings: Arc<Surroundings>,
    running: BTreeMap<u8, Running>,
}

impl VcpuSet {
    /// An empty set.
    ///
    /// # Errors
    ///
    /// If the signal that stops vCPUs cannot be set up.
    pub fn new(surroundings: Surroundings) -> Result<Self, Error> {
        thread::install_kick_handler()?;
        Ok(Self {
            surroundings: Arc::new(surroundings),
            running: BTreeMap::new(),
        })
    }

    /// Starts a vCPU's thread.
    ///
    /// # Errors
    ///
    /// If the host has no thread left.
    pub fn start(&mut self, vcpu: PreparedVcpu) -> Result<Arc<VcpuControl>, Error> {
        let PreparedVcpu { index, fd, birth } = vcpu;
        let control = Arc::new(VcpuControl::default());
        let counts = Arc::new(ExitCounts::default());
        let thread = thread::spawn(
            index,
            (fd, birth),
            Arc::clone(&self.surroundings),
            Arc::clone(&control),
            Arc::clone(&counts),
        )?;
        self.running.insert(
            index,
            Running {
                control: Arc::clone(&control),
                counts,
                thread: Some(thread),
            },
        );
        Ok(control)
    }

    /// Lets a vCPU that stands still run again from its first state; `None` if there never was one of this index.
    ///
    /// # Errors
    ///
    /// If its thread has not come out of the guest.
    pub fn run_again(&self, index: u8) -> Option<Result<Arc<VcpuControl>, Error>> {
        let vcpu = self.running.get(&index)?;
        Some(if vcpu.control.gate.open() {
            Ok(Arc::clone(&vcpu.control))
        } else {
            Err(Error::Stuck(index))
        })
    }

    /// Exits of all vCPUs by reason.
    pub fn exits(&self) -> BTreeMap<&'static str, u64> {
        let mut table = BTreeMap::new();
        for vcpu in self.running.values() {
            vcpu.counts.add_to(&mut table);
        }
        table
    }

    /// Gets every vCPU out of the guest and waits for the threads, which end because the VM's end
    /// has been reported before.
    pub fn join(&mut self) {
        for vcpu in self.running.values() {
            vcpu.control.kick();
        }
        for (index, vcpu) in &mut self.running {
            if let Some(thread) = vcpu.thread.take()
                && thread.join().is_err()
            {
                tracing::error!(vcpu = index, "a vCPU thread ended by a panic");
            }
        }
    }
}
