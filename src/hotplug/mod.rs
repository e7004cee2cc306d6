//! VMs that follow their load: vCPUs and memory come and go.
//!
//! [`policy`] decides by readings, without a clock and without I/O; a
//! [`Controller`] takes the readings and carries the decisions out through an
//! [`Actuator`], one change at a time; [`bounds`] says how small and how big a
//! VM may be. The rules for users are in `docs/hotplug.md`.

pub mod actuator;
pub mod bounds;
pub mod controller;
pub mod policy;

pub use actuator::{Actuator, Failure, FailureKind, Readings};
pub use bounds::{Bounds, Host, Room};
pub use controller::{Change, Controller, Pressure, SetError, Sizes, Wish};
pub use policy::{CpuPolicy, CpuReading, Decision, Hold, MemoryPolicy, MemoryReading};
