//! What a controller needs of a VM: to be read, and to be resized.

use std::fmt;
use std::future::Future;

/// What a VM has and how busy it is. Counters are since the guest's boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readings {
    /// CPUs that are online, by the guest.
    pub vcpus_online: u8,
    /// Time that all CPUs together were not idle, in µs.
    pub cpu_busy_us: u64,
    /// Time that all CPUs together were online, in µs.
    pub cpu_total_us: u64,
    /// Time that all containers together were throttled by their CPU limits, in µs.
    pub throttled_us: u64,
    /// Boot memory and all that is plugged, in MiB, by the VMM: what `resize_memory` would answer.
    pub memory_mib: u64,
    /// MemTotal in bytes, by the guest.
    pub memory_total_bytes: u64,
    /// MemAvailable in bytes, by the guest.
    pub memory_available_bytes: u64,
}

/// Kinds of failures. Each is logged once until what failed works again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// The VM has ended. Nothing is read or resized from then on.
    Gone,
    /// The guest or the VMM lacks what it takes.
    Unsupported,
    /// The guest or the host has refused.
    Refused,
    /// The guest has not done it in time.
    Timeout,
}

/// A VM could not be read or resized.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind of failure.
    pub kind: FailureKind,
    /// What was being done to what, why it failed and what to do: printable, and of bounded length.
    pub message: String,
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gone => "the VM is gone",
            Self::Unsupported => "not supported",
            Self::Refused => "refused",
            Self::Timeout => "out of time",
        })
    }
}

/// A VM as its controller sees it.
///
/// Calls come one after another, never two at once, and each must have a time limit of its own. The controller awaits
/// each to its end, with one exception: at [`stop`](super::Controller::stop) the future of a call in flight is dropped,
/// since the VM is about to end. An implementation must then leave nothing behind that ends badly with the VM.
///
/// The sizes answered are believed until the next reading says otherwise. What the guest says is not trusted: values
/// that cannot be are ignored, those that can be lead to no size out of the bounds.
pub trait Actuator: Send + Sync + 'static {
    /// Reads the VM.
    fn read(&self) -> impl Future<Output = Result<Readings, Failure>> + Send;

    /// Makes the guest have `to` CPUs online, and answers when it has: with how many it really has, also if these are
    /// fewer or more. Nothing is to be done if it has them already.
    fn resize_vcpus(&self, to: u8) -> impl Future<Output = Result<u8, Failure>> + Send;

    /// Makes the VM have `to_mib` MiB of memory, and answers when the guest has it or has given it back: with what the
    /// VM really has. Sizes that cannot be had are rounded to the next one towards the present size. Nothing is to be
    /// done if it has that size already.
    fn resize_memory(&self, to_mib: u64) -> impl Future<Output = Result<u64, Failure>> + Send;

    /// Tells the guest how many bytes all containers may use together before they are slowed down and it says
    /// `MemoryPressure`; 0: never, which is what it does until it is told.
    fn watch_memory(&self, high_bytes: u64) -> impl Future<Output = Result<(), Failure>> + Send;
}
