//! nacre: a containerd shim that is its own virtual machine monitor.
//!
//! [`sandbox`] is one VM with its agent; [`shim`] serves containerd's task
//! service on it, [`hotplug`] makes it follow its load, [`network`] gives it the network of a namespace, [`vmctl`] runs VMs and containers by hand. The programs in
//! `src/bin` only call [`shim`], [`vmctl`] and [`bench`], which measures.

pub mod bench;
pub mod config;
pub mod control;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod hooks;
pub mod hotplug;
pub mod network;
mod origin;
pub mod record;
pub mod sandbox;
pub mod shim;
pub mod vmctl;

/// Version and build of this program, as the agent logs it at its hello.
pub const BUILD_ID: &str = env!("NACRE_BUILD_ID");
