//! How a VM ended: one typed reason, whoever noticed it first.

use std::fmt;

use serde::Serialize;

/// Why a VM is no longer running.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum ExitReason {
    /// The guest powered itself off through the ACPI sleep register.
    PowerOff,
    /// The guest asked for a reset through the ACPI reset register (or an equivalent).
    Reboot,
    /// The guest's kernel reported a panic through pvpanic.
    Panic,
    /// A vCPU shut down, which is what a triple fault does.
    TripleFault {
        /// Index of the vCPU.
        vcpu: u8,
    },
    /// KVM could not go on with a vCPU.
    KvmError {
        /// Index of the vCPU.
        vcpu: u8,
        /// What KVM said, with the instruction pointer where it is known.
        message: String,
    },
    /// Our own code failed: a vCPU or device thread ended by a panic or an error.
    Internal {
        /// What failed.
        message: String,
    },
    /// The host stopped it.
    Stopped,
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => write!(f, "the guest powered off"),
            Self::Reboot => write!(f, "the guest asked for a reboot"),
            Self::Panic => write!(f, "the guest's kernel panicked"),
            Self::TripleFault { vcpu } => write!(f, "vCPU {vcpu} took a triple fault"),
            Self::KvmError { vcpu, message } => write!(f, "KVM failed on vCPU {vcpu}: {message}"),
            Self::Internal { message } => write!(f, "the VMM failed: {message}"),
            Self::Stopped => write!(f, "stopped by the host"),
        }
    }
}
