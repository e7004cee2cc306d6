//! What nacre's shim and its guest agent say to each other: ttrpc services
//! over virtio-vsock, and the ports they use. Both sides build from this crate,
//! so that a mismatch can only come from two builds, which `Ready` finds.
//!
//! # Connections
//! The agent dials all of them; the host (CID 2) only listens.
//!
//! | port | who serves | what for |
//! | --- | --- | --- |
//! | [`PORT_CALLS`] | the agent | [`agent_ttrpc::Agent`], dialled once; this connection is the agent's readiness |
//! | [`PORT_EVENTS`] | the host | [`agent_ttrpc::Host`], dialled once: `Ready`, then an `Event` for each thing that happens |
//! | [`PORT_LOG`] | nobody | the agent's log, lines of `LEVEL component message` |
//! | from [`PORT_STDIO_FIRST`] | nobody | one connection for each stdio stream, on the port that the host named in the call |
//!
//! A stdout or stderr connection is half-closed by the agent after the last byte; a stdin connection is
//! half-closed by the host to say end-of-file. An agent that loses CALLS or EVENTS powers the guest off.
//!
//! # Ends
//! Each init, and each exec that was started, has exactly one Exit event, also when its Start failed: that
//! exec's pid is 0 if it could not even be made. An exec that was never started has none. When an init ends,
//! all that is left in its container is killed, and the init's Exit comes after those of its execs.
//!
//! # Errors
//! The agent answers a call that failed with one of these ttrpc codes; the message says what was being
//! done to which container, process or device.
//!
//! | code | meaning |
//! | --- | --- |
//! | `INVALID_ARGUMENT` | the request itself is wrong: an id that is empty, too long or has a path separator, a spec or a network that does not parse, a signal number out of range |
//! | `NOT_FOUND` | no such container, process, or device window; also a signal to a process that has ended; a CPU or memory that did not appear in time, or is gone |
//! | `ALREADY_EXISTS` | a container, or an exec of this container, of this id is there already |
//! | `FAILED_PRECONDITION` | the thing is in another state than the call needs: a second Start, Delete of what runs, Exec when init has ended, a signal to an exec that was not started; a CPU or memory that cannot go offline now; a kernel without the feature |
//! | `INTERNAL` | the guest could not do it; the message carries the cause, for Start also the executable's name |

/// Version of the protocol; both sides must have the same.
pub const PROTOCOL_VERSION: u32 = 4;

/// Port on the host (CID 2) that the agent dials to serve `Agent` on.
pub const PORT_CALLS: u32 = 1024;
/// Port on the host that the agent dials to call `Host` on.
pub const PORT_EVENTS: u32 = 1025;
/// Port on the host that takes the agent's log, lines of `LEVEL component message`.
pub const PORT_LOG: u32 = 1026;
/// The first port on the host for stdio streams.
pub const PORT_STDIO_FIRST: u32 = 65536;

/// Tag of the virtio-fs device whose root holds what the host shares with the guest, an entry each.
pub const SHARE_TAG: &str = "nacre";
/// Where the agent mounts it, before it makes the first container.
pub const SHARES: &str = "/run/nacre/share";

/// I/O port that marks a boot phase with a byte.
pub const PHASE_PORT: u16 = 0x680;
/// Phase: the agent's `main` has begun.
pub const PHASE_INIT: u8 = 1;

#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks,
    rust_2018_idioms,
    unused
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/stubs.rs"));
}

pub use generated::{agent, agent_ttrpc};
