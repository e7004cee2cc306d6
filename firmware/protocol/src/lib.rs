//! What nacre's shim and its guest agent say to each other: ttrpc services
//! over virtio-vsock, and the ports they use. Both sides build from this crate,
//! so that a mismatch can only come from two builds, which `Ready` finds.

/// Version of the protocol; both sides must have the same.
pub const PROTOCOL_VERSION: u32 = 1;

/// Port on the host (CID 2) that the agent dials to serve `Agent` on.
pub const PORT_CALLS: u32 = 1024;
/// Port on the host that the agent dials to call `Host` on.
pub const PORT_EVENTS: u32 = 1025;
/// Port on the host that takes the agent's log, lines of `LEVEL component message`.
pub const PORT_LOG: u32 = 1026;
/// The first port on the host for stdio streams.
pub const PORT_STDIO_FIRST: u32 = 65536;

/// I/O port that marks a boot phase with a byte.
pub const PHASE_PORT: u16 = 0x680;
/// Phase: the agent's `main` has begun.
pub const PHASE_INIT: u8 = 1;

#[allow(missing_docs, clippy::all, clippy::pedantic, rust_2018_idioms, unused)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub use generated::{agent, agent_ttrpc};
