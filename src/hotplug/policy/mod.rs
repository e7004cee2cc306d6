//! When vCPUs and memory come and go: pure functions of readings and of a
//! monotonic time that the caller passes in. No clock, no I/O, no panic
//! whatever the guest claims. [`CpuPolicy`] and [`MemoryPolicy`] decide;
//! `gate` has what both share, the waits between changes.
//!
//! The order of calls: each reading is given to `step`. A decision that is not
//! a hold starts the cooldowns at once; the caller carries it out, then says
//! `settled` with the size that there is, or `failed`. Sizes that others chose
//! are told by `set`, bounds by `set_bounds`.

mod cpu;
mod gate;
mod memory;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod simulation;

use std::fmt;
use std::time::Duration;

pub use cpu::{CpuPolicy, CpuReading};
pub use memory::{MemoryPolicy, MemoryReading, high_bytes};

/// What is to be done about a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision<T> {
    /// Nothing.
    Hold(Hold),
    /// Grow to this size, which is within the bounds.
    Up(T),
    /// Shrink to this size, which is within the bounds.
    Down(T),
}

/// Why nothing is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// The configuration has switched it off.
    Off,
    /// Counters say something only from the second reading on.
    FirstReading,
    /// No time has passed since the last reading.
    ClockStopped,
    /// The guest says what cannot be.
    Implausible,
    /// The guest has another size than was believed; from now on that one counts.
    Adopted,
    /// Neither much nor little is used.
    Steady,
    /// Much is used, but by containers that their own limits hold back.
    Throttled,
    /// Not enough readings in a row have said so yet.
    Counting {
        /// That have.
        have: u8,
        /// That are needed.
        need: u8,
    },
    /// A change was made not long ago.
    Cooldown {
        /// How long it takes still.
        left: Duration,
    },
    /// The last attempt failed.
    BackingOff {
        /// How long it is left alone still.
        left: Duration,
    },
    /// It would grow, but is as big as it may be.
    AtCeiling,
    /// Little is used, but too little would stay available if it shrank.
    KeepsAvailable,
    /// Containers stall, but not for want of the guest's memory: so much is available that a limit of their own must
    /// be the cause.
    Available,
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("switched off"),
            Self::FirstReading => f.write_str("first reading"),
            Self::ClockStopped => f.write_str("no time has passed"),
            Self::Implausible => f.write_str("the guest's reading is not possible"),
            Self::Adopted => f.write_str("the guest has another size than believed"),
            Self::Steady => f.write_str("steady"),
            Self::Throttled => f.write_str("containers are at their CPU limits"),
            Self::Counting { have, need } => write!(f, "{have} of {need} readings"),
            Self::Cooldown { left } => write!(f, "cooling down for {left:?}"),
            Self::BackingOff { left } => write!(f, "failed, not tried for {left:?}"),
            Self::AtCeiling => f.write_str("at the ceiling"),
            Self::KeepsAvailable => f.write_str("too little would stay available"),
            Self::Available => f.write_str("enough is available"),
        }
    }
}

/// `part` of `whole` in percent, compared with `percent` without rounding; a part of nothing equals every percentage.
fn compare_share(part: u64, whole: u64, percent: u8) -> std::cmp::Ordering {
    (u128::from(part) * 100).cmp(&(u128::from(whole) * u128::from(percent)))
}
