//! VMs that follow their load: vCPUs and memory come and go.
//!
//! [`policy`] decides by readings, without a clock and without I/O; [`bounds`]
//! says how small and how big a VM may be.

pub mod bounds;
pub mod policy;

pub use bounds::{Bounds, Host, Room};
pub use policy::{CpuPolicy, CpuReading, Decision, Hold, MemoryPolicy, MemoryReading};
