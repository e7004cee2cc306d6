//! vCPUs: the state that they begin with, the threads that run them, and the set of them.

pub mod exits;
pub mod gate;
pub mod set;
pub mod state;
pub mod thread;

use thiserror::Error;

/// A vCPU could not be made or started.
#[derive(Debug, Error)]
pub enum Error {
    /// An ioctl on it failed.
    #[error("cannot {what} of vCPU {vcpu}")]
    Setup {
        /// What was being done.
        what: &'static str,
        /// Index of the vCPU.
        vcpu: u8,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The host's CPUID could not be read from KVM.
    #[error("cannot read what CPUID this host's KVM supports")]
    Cpuid(#[source] kvm_ioctls::Error),
    /// The CPUID table for the guest is too large for KVM.
    #[error("the CPUID table of vCPU {0} has too many entries")]
    CpuidSize(u8),
    /// No thread for it.
    #[error("cannot start the thread of vCPU {vcpu}")]
    Thread {
        /// Index of the vCPU.
        vcpu: u8,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// Its thread does not come out of the guest.
    #[error(
        "cannot use vCPU {0} again: its thread has not come out of the guest since it was unplugged"
    )]
    Stuck(u8),
    /// The signal that kicks vCPUs could not be set up.
    #[error("cannot set up the signal that stops vCPUs: {0}")]
    Signal(String),
}
