//! virtio-vsock (virtio 1.3 section 5.10) whose host side, CID 2, is in this
//! process: no AF_VSOCK, no vhost. [`Vsock`] is the device that the guest sees;
//! [`VsockHost`] opens and accepts [`VsockStream`]s, which are tokio's
//! `AsyncRead` and `AsyncWrite`, and need no tokio runtime.
//!
//! `packet` knows wire and descriptors, `phase` and `connection` one connection's states and
//! credit, `ring` its bytes, `muxer` the table of connections, `device` the queues, `stream` the
//! host's end and the lock. Only streams of bytes are offered, no SEQPACKET.

mod connection;
mod device;
mod muxer;
mod packet;
mod phase;
mod ring;
mod stream;
#[cfg(test)]
mod tests;

pub use connection::{BUF_ALLOC, TX_BUFFER};
pub use device::Vsock;
pub use muxer::{BACKLOG, Counters, MAX_CONNECTIONS};
pub use packet::HOST_CID;
pub use stream::{VsockHost, VsockListener, VsockStream};

/// What lies under the device, for fuzzing.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod seam {
    pub(crate) use super::packet::Header;
    pub(crate) use super::stream::Shared;
}

/// CID of the guest.
pub const GUEST_CID: u64 = 3;

/// Why the host's side could not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is a listener on the port already.
    #[error("Cannot listen on vsock port {port}: it has a listener")]
    PortInUse {
        /// The port.
        port: u32,
    },
    /// 2^32-1 is no port.
    #[error("{port} is not a vsock port")]
    InvalidPort {
        /// The number that was given.
        port: u32,
    },
    /// Nobody listens in the guest.
    #[error("The guest refused the connection to vsock port {port}")]
    Refused {
        /// The guest's port.
        port: u32,
    },
    /// The guest broke the connection off while it was made.
    #[error("The guest broke off the connection to vsock port {port}")]
    BrokenOff {
        /// The guest's port.
        port: u32,
    },
    /// The table is full.
    #[error("Cannot open another vsock connection: there are {limit}, which is the limit")]
    TooManyConnections {
        /// [`MAX_CONNECTIONS`].
        limit: usize,
    },
    /// The VM has ended, or its driver has reset the device.
    #[error("The vsock device of the VM is gone")]
    Ended,
    /// The doorbell could not be made.
    #[error("Cannot make an eventfd for the vsock device")]
    Doorbell(#[source] std::io::Error),
}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        use std::io::ErrorKind;
        let kind = match &error {
            Error::PortInUse { .. } => ErrorKind::AddrInUse,
            Error::InvalidPort { .. } => ErrorKind::InvalidInput,
            Error::Refused { .. } => ErrorKind::ConnectionRefused,
            Error::BrokenOff { .. } | Error::Ended => ErrorKind::ConnectionReset,
            Error::TooManyConnections { .. } => ErrorKind::AddrNotAvailable,
            Error::Doorbell(source) => source.kind(),
        };
        Self::new(kind, error)
    }
}
