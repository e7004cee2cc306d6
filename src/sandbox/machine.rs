//! The VM as the sandbox sees it. The trait keeps everything above it free of
//! KVM, so that the sandbox's own tests run against a machine in memory; the
//! one real implementation is over [`nacre_vmm::Vm`].

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use async_trait::async_trait;
use nacre_vmm::{DiskConfig, ExitReason};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::error::Error;
use super::phases::MachinePhases;

/// What the sandbox needs of a running VM.
#[async_trait]
pub(crate) trait Machine: Send + Sync {
    /// Completes when the VM has ended and its threads are joined.
    async fn ended(&self) -> ExitReason;
    /// The reason, if it has ended.
    fn exit_reason(&self) -> Option<ExitReason>;
    /// Ends the VM from the host; returns at once, idempotent.
    fn stop(&self);
    /// Listens for the guest's connections to a vsock port of the host.
    fn listen(&self, port: u32) -> Result<Box<dyn PortListener>, Error>;
    /// Puts a disk into a spare window and answers with the window.
    fn plug_disk(&self, disk: DiskConfig) -> Result<u8, Error>;
    /// Takes the device out of a window.
    fn unplug(&self, window: u8) -> Result<(), Error>;
    /// Boot phases reached so far.
    fn phases(&self) -> MachinePhases;
    /// Exits by reason, for inspection.
    fn exits(&self) -> Vec<(String, u64)>;
}

/// Accepts the guest's connections to one port; dropping it closes the port.
#[async_trait]
pub(crate) trait PortListener: Send {
    /// The next connection; an error when the VM is gone.
    async fn accept(&mut self) -> io::Result<GuestStream>;
}

trait Duplex: AsyncRead + AsyncWrite {}
impl<T: AsyncRead + AsyncWrite> Duplex for T {}

/// One connection from the guest. `poll_shutdown` half-closes our sending side;
/// dropping it closes both.
pub struct GuestStream(Pin<Box<dyn Duplex + Send + Sync>>);

impl GuestStream {
    /// Wraps a stream.
    pub fn new(stream: impl AsyncRead + AsyncWrite + Send + Sync + 'static) -> Self {
        Self(Box::pin(stream))
    }
}

impl fmt::Debug for GuestStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GuestStream")
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_read(cx, buf)
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.as_mut().poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.as_mut().poll_shutdown(cx)
    }
}
