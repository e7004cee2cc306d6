//! The virtual machine monitor of nacre: guest memory as KVM slots, vCPUs,
//! PVH boot, ACPI and virtio devices, as a library that runs inside the
//! process that wants a VM. It knows nothing of containers.
//!
//! [`Vm::start`](handle::Vm::start) takes a [`VmConfig`] and
//! gives a [`Vm`]; everything else is reached from there.

pub mod boot;
pub mod bus;
pub mod config;
pub mod event_loop;
pub mod exit;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod handle;
pub mod hotplug;
pub mod interrupt;
pub mod kvm;
pub mod memory;
pub mod platform;
pub mod serial;
pub mod vcpu;
pub mod virtio;
pub mod vm;
mod windows;

pub use config::{DiskCache, DiskConfig, DiskFormat, DiskIo, DiskPart, DiskSource, VmConfig};
pub use exit::ExitReason;
pub use handle::Vm;
