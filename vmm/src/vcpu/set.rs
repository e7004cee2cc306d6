//! All vCPUs of a VM: made one by one, also while others run, and ended together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::Error;
use super::exits::ExitCounts;
use super::state::{self, Entry};
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
        Ok(PreparedVcpu { index, fd })
    }
}

/// A vCPU whose thread runs.
struct Running {
    kicker: Arc<Kicker>,
    counts: Arc<ExitCounts>,
    thread: Option<JoinHandle<()>>,
}

/// The running vCPUs. Dropping it ends nothing: the VM's end is reported elsewhere, then
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
    pub fn start(&mut self, vcpu: PreparedVcpu) -> Result<(), Error> {
        let kicker = Arc::new(Kicker::default());
        let counts = Arc::new(ExitCounts::default());
        let thread = thread::spawn(
            vcpu.index,
            vcpu.fd,
            Arc::clone(&self.surroundings),
            Arc::clone(&kicker),
            Arc::clone(&counts),
        )?;
        self.running.insert(
            vcpu.index,
            Running {
                kicker,
                counts,
                thread: Some(thread),
            },
        );
        Ok(())
    }

    /// How many run.
    pub fn len(&self) -> usize {
        self.running.len()
    }

    /// Whether none runs.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
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
            vcpu.kicker.kick();
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
