//! virtio-balloon (virtio 1.3 section 5.5): pages that the guest lends to the
//! host, and free pages that it reports so that the host has their memory
//! until they are used again.
//!
//! `pages` is what the guest names, `stats` what it tells of itself, `host`
//! the host's end, `device` the device. Free page hinting and page poison are
//! not here.

mod device;
mod host;
mod pages;
mod stats;
#[cfg(test)]
mod tests;

pub use device::Balloon;
pub use host::{BalloonHost, BalloonStats, TargetError};
pub use stats::GuestStats;

/// Bytes of the pages that the guest names, whatever its own are (5.5.6).
pub const PAGE_BYTES: u64 = 4096;
