//! What others hold of a running VM.

/// A running VM; clones share it. The VM stops when the last clone is dropped.
#[derive(Clone)]
pub struct Vm {
    // C1
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
    /// Phases that the guest marked through the phase port, by number.
    pub marks: Vec<(u8, u64)>,
}

// impl Vm {
//     /// Checks the configuration, makes the VM and starts its vCPUs.
//     pub fn start(config: VmConfig) -> Result<Self, Error> { /* C1 */ }
//     /// Blocks until the VM has ended and all its threads are joined.
//     pub fn wait(&self) -> ExitReason { }
//     /// Completes when the VM has ended; runtime-agnostic.
//     pub async fn ended(&self) -> ExitReason { }
//     /// The reason, if it has ended.
//     pub fn exit_reason(&self) -> Option<ExitReason> { }
//     /// Ends the VM from the host; returns at once, idempotent.
//     pub fn stop(&self) { }
//     /// The host side of the vsock device.
//     pub fn vsock(&self) -> Option<VsockHost> { }
//     /// Puts a disk into a spare window; returns the window's index. No free window: an error with the number.
//     pub fn plug_disk(&self, disk: DiskConfig) -> Result<u8, Error> { }
//     /// Takes the device out of a window (the guest has unbound it).
//     pub fn unplug(&self, window: u8) -> Result<(), Error> { }
//     pub fn phases(&self) -> Phases { }
//     // also: vcpus(), memory_mib(), exits by reason counters
// }
