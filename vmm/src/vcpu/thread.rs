//! The thread of one vCPU: runs the guest, answers its exits, and says why it stopped.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::{
    KVM_EXIT_IO_IN, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};
use vmm_sys_util::signal;

use super::Error;
use super::exits::{ExitCounts, ExitKind};
use super::gate::Gate;
use super::set::VcpuControl;
use super::state::Birth;
use crate::bus::Bus;
use crate::event_loop::panic_message;
use crate::exit::{Ending, ExitReason};
use crate::platform::monotonic_ns;
use crate::virtio::device::GuestRam;

/// What all vCPUs of a VM share.
pub struct Surroundings {
    /// Names the VM in thread names.
    pub name: String,
    /// I/O ports.
    pub ports: Arc<Bus>,
    /// Device memory.
    pub mmio: Arc<Bus>,
    /// Guest memory, for saying what went wrong.
    pub memory: GuestRam,
    /// How the VM ends.
    pub ending: Arc<Ending>,
    /// CLOCK_MONOTONIC of the first KVM_RUN in nanoseconds, 0 before.
    pub first_run_ns: Arc<AtomicU64>,
    /// CLOCK_MONOTONIC of the guest's first access to a device in nanoseconds, 0 before.
    pub first_exit_ns: Arc<AtomicU64>,
}

impl Surroundings {
    /// Stamps the guest's first access to a device; of all others it is a look at a number.
    fn stamp_exit(&self) {
        if self.first_exit_ns.load(Ordering::Relaxed) == 0 {
            stamp(&self.first_exit_ns);
        }
    }
}

/// Writes the time down, unless there is one.
fn stamp(first: &AtomicU64) {
    let _ = first.compare_exchange(0, monotonic_ns(), Ordering::Relaxed, Ordering::Relaxed);
}

/// Gets a vCPU out of the guest, from any thread.
///
/// Holds the address of `immediate_exit` in the vCPU's shared page while, and only while, the
/// vCPU's thread runs: with it set, a signal that comes just before KVM_RUN is not lost.
#[derive(Default)]
pub struct Kicker(Mutex<Option<Target>>);

struct Target {
    immediate_exit: NonNull<AtomicU8>,
    thread: libc::pthread_t,
}

// SAFETY: the pointer is to memory shared with the kernel that stays mapped while the target is
// set (`Kicker`'s lock is held to use it and to clear it), and is only used atomically.
unsafe impl Send for Target {}

impl Kicker {
    /// Makes the vCPU's thread look at the VM's state soon. Without effect once it has ended.
    pub fn kick(&self) {
        if let Some(target) = &*self.lock() {
            // SAFETY: see `Target`; the thread cannot unmap the page while we hold the lock.
            unsafe { target.immediate_exit.as_ref() }.store(1, Ordering::SeqCst);
            // SAFETY: the thread clears the target before it ends, so it is alive; a signal with
            // a handler that does nothing only interrupts it.
            unsafe { libc::pthread_kill(target.thread, kick_signal()) };
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Target>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Clears the kicker however the thread ends.
struct Registered<'a>(&'a Kicker);

impl<'a> Registered<'a> {
    fn new(kicker: &'a Kicker, vcpu: &mut VcpuFd) -> Self {
        let flag = &raw mut vcpu.get_kvm_run().immediate_exit;
        *kicker.lock() = NonNull::new(flag.cast::<AtomicU8>()).map(|immediate_exit| Target {
            immediate_exit,
            // SAFETY: takes no argument and always succeeds.
            thread: unsafe { libc::pthread_self() },
        });
        Self(kicker)
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}

fn kick_signal() -> libc::c_int {
    signal::SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Gives the kick's signal its handler, for the whole process.
///
/// # Errors
///
/// If the system refuses.
pub fn install_kick_handler() -> Result<(), Error> {
    signal::register_signal_handler(kick_signal(), on_kick)
        .map_err(|error| Error::Signal(error.to_string()))
}

/// Starts the thread of a vCPU that has been set up.
///
/// # Errors
///
/// If the host has no thread left.
pub fn spawn(
    index: u8,
    (mut vcpu, birth): (VcpuFd, Birth),
    surroundings: Arc<Surroundings>,
    control: Arc<VcpuControl>,
    counts: Arc<ExitCounts>,
) -> Result<JoinHandle<()>, Error> {
    std::thread::Builder::new()
        .name(format!("vcpu{index}:{}", surroundings.name))
        .spawn(move || {
            if let Err(error) = signal::unblock_signal(kick_signal()) {
                tracing::warn!(vcpu = index, %error, "cannot unblock the signal that stops vCPUs");
            }
            let ending = &surroundings.ending;
            let (kicker, gate) = control.parts();
            let outcome = {
                let _registered = Registered::new(kicker, &mut vcpu);
                catch_unwind(AssertUnwindSafe(|| {
                    live(index, (&mut vcpu, &birth), &surroundings, gate, &counts)
                }))
            };
            if let Ok(regs) = vcpu.get_regs() {
                let rip = format_args!("{:#x}", regs.rip);
                tracing::debug!(vcpu = index, rip, "left the guest");
            }
            match outcome {
                Ok(Some(reason)) => {
                    ending.report(reason);
                }
                Ok(None) => {}
                Err(payload) => {
                    let message = format!("vCPU {index}: {}", panic_message(&*payload));
                    tracing::error!(%message, "a vCPU thread panicked");
                    ending.report(ExitReason::Internal { message });
                }
            }
        })
        .map_err(|source| Error::Thread {
            vcpu: index,
            source,
        })
}

/// What an exit asks for, once what it borrows is given back.
enum Step {
    Continue,
    /// A port access: its width is only in the shared page.
    Port,
    /// KVM cannot go on; the shared page says more.
    InternalError,
    End(ExitReason),
}

/// Runs the guest, and stands still while the vCPU is unplugged, until the VM ends; the reason if this vCPU is it.
fn live(
    index: u8,
    (vcpu, birth): (&mut VcpuFd, &Birth),
    around: &Surroundings,
    gate: &Gate,
    counts: &ExitCounts,
) -> Option<ExitReason> {
    loop {
        if let Some(reason) = run(index, vcpu, around, gate, counts) {
            return Some(reason);
        }
        if around.ending.is_ending() {
            return None;
        }
        match gate.stand(&around.ending, || birth.restore(vcpu, index)) {
            Ok(true) => {}
            Ok(false) => return None,
            Err(error) => {
                let mut message = error.to_string();
                if let Some(cause) = std::error::Error::source(&error) {
                    message = format!("{message}: {cause}");
                }
                return Some(ExitReason::KvmError {
                    vcpu: index,
                    message,
                });
            }
        }
    }
}

/// Runs the guest until the VM ends or the gate closes; the reason if this vCPU is it.
fn run(
    index: u8,
    vcpu: &mut VcpuFd,
    around: &Surroundings,
    gate: &Gate,
    counts: &ExitCounts,
) -> Option<ExitReason> {
    let failed = |message: String| ExitReason::KvmError {
        vcpu: index,
        message,
    };
    stamp(&around.first_run_ns);
    while !around.ending.is_ending() && !gate.is_closed() {
        let step = match vcpu.run() {
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => Step::Port,
            Ok(VcpuExit::MmioRead(address, data)) => {
                around.stamp_exit();
                counts.count(ExitKind::MmioRead);
                around.mmio.read(address, data);
                Step::Continue
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                around.stamp_exit();
                counts.count(ExitKind::MmioWrite);
                around.mmio.write(address, data);
                Step::Continue
            }
            Ok(VcpuExit::Hlt) => {
                // With the local APIC in the kernel, HLT is waited out there.
                counts.count(ExitKind::Halt);
                Step::Continue
            }
            Ok(VcpuExit::Intr) => {
                counts.count(ExitKind::Interrupted);
                Step::Continue
            }
            Ok(VcpuExit::Shutdown) => Step::End(ExitReason::TripleFault { vcpu: index }),
            Ok(VcpuExit::SystemEvent(event, _)) => Step::End(system_event(index, event)),
            Ok(VcpuExit::InternalError) => Step::InternalError,
            Ok(VcpuExit::FailEntry(reason, cpu)) => Step::End(failed(format!(
                "entry into the guest failed on host CPU {cpu}: hardware reason {reason:#x}"
            ))),
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
                Step::End(failed(format!("memory fault at {gpa:#x}, {size} bytes")))
            }
            Ok(other) => Step::End(failed(format!("exit that is not known: {other:?}"))),
            Err(error) => match error.errno() {
                libc::EINTR => {
                    counts.count(ExitKind::Interrupted);
                    vcpu.set_kvm_immediate_exit(0);
                    Step::Continue
                }
                libc::EAGAIN => {
                    counts.count(ExitKind::Again);
                    Step::Continue
                }
                _ => Step::End(failed(format!("KVM_RUN: {error}"))),
            },
        };
        match step {
            Step::Continue => {}
            Step::Port => {
                around.stamp_exit();
                port_access(vcpu, &around.ports, counts);
            }
            Step::InternalError => {
                counts.count(ExitKind::Other);
                return Some(failed(internal_error(vcpu, &around.memory)));
            }
            Step::End(reason) => {
                counts.count(ExitKind::Other);
                return Some(reason);
            }
        }
    }
    None
}

fn system_event(vcpu: u8, event: u32) -> ExitReason {
    match event {
        KVM_SYSTEM_EVENT_SHUTDOWN => ExitReason::PowerOff,
        KVM_SYSTEM_EVENT_RESET => ExitReason::Reboot,
        KVM_SYSTEM_EVENT_CRASH => ExitReason::Panic,
        other => ExitReason::KvmError {
            vcpu,
            message: format!("system event {other} that is not known"),
        },
    }
}

/// Answers a port access. A string instruction brings many of one width to the same port.
fn port_access(vcpu: &mut VcpuFd, ports: &Bus, counts: &ExitCounts) {
    let run = vcpu.get_kvm_run();
    // SAFETY: the last exit was KVM_EXIT_IO, so this is the union's member.
    let io = unsafe { run.__bindgen_anon_1.io };
    let length = io.size as usize * io.count as usize;
    let start = (&raw mut *run).cast::<u8>();
    // SAFETY: KVM puts `size * count` bytes at `data_offset` from the start of the vCPU's shared
    // pages, all of which are mapped; nothing else refers to them now.
    let data =
        unsafe { std::slice::from_raw_parts_mut(start.add(io.data_offset as usize), length) };
    let port = u64::from(io.port);
    let width = usize::from(io.size.max(1));
    if u32::from(io.direction) == KVM_EXIT_IO_IN {
        counts.count(ExitKind::PortRead);
        for item in data.chunks_mut(width) {
            ports.read(port, item);
        }
    } else {
        counts.count(ExitKind::PortWrite);
        for item in data.chunks(width) {
            ports.write(port, item);
        }
    }
}

/// What KVM says of an internal error, with where the guest was.
fn internal_error(vcpu: &mut VcpuFd, memory: &GuestRam) -> String {
    let run = vcpu.get_kvm_run();
    // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, so this is the union's member.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let count = (internal.ndata as usize).min(internal.data.len());
    let data = &internal.data[..count];
    let kind = match internal.suberror {
        1 => "the instruction cannot be emulated",
        2 => "two faults at once",
        3 => "a fault during event delivery",
        4 => "an exit reason that KVM does not expect",
        _ => "a cause that is not known",
    };
    let place = vcpu.get_regs().map_or_else(
        |_| "an unknown place".to_owned(),
        |regs| place(vcpu, regs.rip, memory),
    );
    format!(
        "internal error, suberror {} ({kind}) at {place}, data {data:x?}",
        internal.suberror
    )
}

/// Where an instruction is; a guest may run into memory that was taken out from under it.
fn place(vcpu: &VcpuFd, rip: u64, memory: &GuestRam) -> String {
    match vcpu.translate_gva(rip) {
        Ok(translation)
            if translation.valid != 0
                && !memory
                    .memory()
                    .address_in_range(GuestAddress(translation.physical_address)) =>
        {
            format!(
                "{rip:#x}, which is at guest-physical {:#x}, where there is no memory",
                translation.physical_address
            )
        }
        _ => format!("{rip:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_events_are_ends() {
        assert_eq!(
            system_event(0, KVM_SYSTEM_EVENT_SHUTDOWN),
            ExitReason::PowerOff
        );
        assert_eq!(system_event(0, KVM_SYSTEM_EVENT_RESET), ExitReason::Reboot);
        assert_eq!(system_event(0, KVM_SYSTEM_EVENT_CRASH), ExitReason::Panic);
        assert!(matches!(
            system_event(3, 99),
            ExitReason::KvmError { vcpu: 3, .. }
        ));
    }

    #[test]
    fn a_kick_without_a_thread_does_nothing() {
        Kicker::default().kick();
    }
}
