//! The host's end of the socket device: [`VsockHost`], [`VsockListener`] and
//! [`VsockStream`], over state that they share with the device.
//!
//! # The lock
//! There is one: the muxer's mutex, in `Shared`. It is held for one packet or
//! one poll at a time, never across an await, and no other lock is taken under
//! it. Wakers are woken and dropped, and the doorbell is rung, after it is let
//! go. A reader or writer registers its waker under the same lock under which it
//! found nothing to do, and whoever changes that holds it too, so no wake is lost.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Error;
use super::connection::{Deferred, Progress};
use super::muxer::{ConnectionId, Counters, Muxer};
use super::phase::Cause;

/// What the device and all handles of the host share.
#[derive(Debug)]
pub struct Shared {
    muxer: Mutex<Muxer>,
    /// Readable when the device has packets to fetch that it does not know of.
    pub doorbell: EventFd,
}

impl Shared {
    /// State for a guest with this CID.
    ///
    /// # Errors
    /// [`Error::Doorbell`].
    pub fn new(guest_cid: u64) -> Result<Arc<Self>, Error> {
        let doorbell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::Doorbell)?;
        Ok(Arc::new(Self {
            muxer: Mutex::new(Muxer::new(guest_cid)),
            doorbell,
        }))
    }

    /// The muxer, for the device: wakers gather in it until [`Shared::flush`].
    pub fn lock(&self) -> MutexGuard<'_, Muxer> {
        // A panic under the lock ends the VM; what is left must still let its tasks go.
        self.muxer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something under the lock and then what has gathered for after it.
    pub fn with<R>(&self, action: impl FnOnce(&mut Muxer) -> R) -> R {
        let mut muxer = self.lock();
        let result = action(&mut muxer);
        self.after(muxer);
        result
    }

    /// Wakes whom the packets so far concern.
    pub fn flush(&self) {
        self.after(self.lock());
    }

    fn after(&self, mut muxer: MutexGuard<'_, Muxer>) {
        let Deferred { wake, discard } = std::mem::take(&mut muxer.later);
        let ring = std::mem::take(&mut muxer.ring);
        drop(muxer);
        drop(discard);
        for waker in wake {
            waker.wake();
        }
        if ring {
            self.ring();
        }
    }

    /// Makes the device look for packets.
    pub fn ring(&self) {
        if let Err(error) = self.doorbell.write(1) {
            // A full counter is as good: the device will look.
            tracing::debug!(%error, "the vsock doorbell is full");
        }
    }
}

/// The host's end: opens and accepts streams. Clones share it, and it may outlive the VM.
#[derive(Debug, Clone)]
pub struct VsockHost {
    shared: Arc<Shared>,
}

impl VsockHost {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Opens `port` (0 to 2^32-2) for the guest to connect to, until the listener is dropped.
    /// It may be called before the guest has booted.
    ///
    /// # Errors
    /// [`Error::PortInUse`], [`Error::InvalidPort`], [`Error::Ended`].
    pub fn listen(&self, port: u32) -> Result<VsockListener, Error> {
        self.shared.with(|muxer| muxer.listen(port))?;
        Ok(VsockListener {
            shared: Arc::clone(&self.shared),
            port,
        })
    }

    /// Opens a port from 65536 to 2^30-1 that has not been used for a long time.
    ///
    /// # Errors
    /// [`Error::Ended`].
    pub fn listen_fresh(&self) -> Result<VsockListener, Error> {
        let port = self.shared.with(Muxer::listen_fresh)?;
        Ok(VsockListener {
            shared: Arc::clone(&self.shared),
            port,
        })
    }

    /// Connects to `port` of the guest. A guest that has not booted yet is waited for: how long is
    /// the caller's to say. Dropping the future gives the connection up.
    ///
    /// # Errors
    /// [`Error::Refused`] when nobody listens there, [`Error::BrokenOff`], [`Error::Ended`],
    /// [`Error::TooManyConnections`], [`Error::InvalidPort`].
    pub async fn connect(&self, port: u32) -> Result<VsockStream, Error> {
        let (id, host_port) = self.shared.with(|muxer| muxer.connect(port))?;
        let attempt = Attempt {
            shared: Arc::clone(&self.shared),
            id,
            made: false,
        };
        poll_fn(|cx| {
            self.shared
                .with(|muxer| muxer.poll_connected(id, cx.waker()))
                .map_or(Poll::Pending, Poll::Ready)
        })
        .await
        .map_err(|cause| match cause {
            Cause::Refused => Error::Refused { port },
            Cause::Reset | Cause::Violation | Cause::Finished => Error::BrokenOff { port },
            Cause::Ended => Error::Ended,
        })?;
        Ok(attempt.into_stream(host_port, port))
    }

    /// Ends the host's side: every stream is cut, every waiting task is woken, nothing new is
    /// opened. The device does it when it is dropped; idempotent.
    pub fn end(&self) {
        self.shared.with(Muxer::end);
    }

    /// What the guest has done that it should not have.
    pub fn counters(&self) -> Counters {
        self.shared.lock().counters
    }

    /// Connections in the table, those included that only wait for the guest's last word.
    pub fn connections(&self) -> usize {
        self.shared.lock().connections()
    }
}

/// A connection that is being made: given up when dropped.
struct Attempt {
    shared: Arc<Shared>,
    id: ConnectionId,
    made: bool,
}

impl Attempt {
    fn into_stream(mut self, host_port: u32, guest_port: u32) -> VsockStream {
        self.made = true;
        VsockStream {
            shared: Arc::clone(&self.shared),
            id: self.id,
            host_port,
            guest_port,
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if !self.made {
            self.shared.with(|muxer| muxer.abort(self.id));
        }
    }
}

/// Accepts the guest's connections to one port. Dropping it closes the port and resets those that
/// were not accepted.
#[derive(Debug)]
pub struct VsockListener {
    shared: Arc<Shared>,
    port: u32,
}

impl VsockListener {
    /// The next connection; cancel-safe. When the VM has ended, those that the guest had made and
    /// closed before still come.
    ///
    /// # Errors
    /// [`Error::Ended`] when the VM is gone.
    pub async fn accept(&mut self) -> Result<VsockStream, Error> {
        poll_fn(|cx| self.poll_accept(cx)).await
    }

    /// As [`VsockListener::accept`], for a `Stream` of connections.
    ///
    /// # Errors
    /// [`Error::Ended`] when the VM is gone.
    pub fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Result<VsockStream, Error>> {
        let accepted = self
            .shared
            .with(|muxer| muxer.poll_accept(self.port, cx.waker()));
        let Some(accepted) = accepted else {
            return Poll::Pending;
        };
        Poll::Ready(accepted.map(|(id, guest_port)| VsockStream {
            shared: Arc::clone(&self.shared),
            id,
            host_port: self.port,
            guest_port,
        }))
    }

    /// The port.
    pub fn port(&self) -> u32 {
        self.port
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        self.shared.with(|muxer| muxer.unlisten(self.port));
    }
}

/// A stream between host and guest.
///
/// `poll_shutdown` half-closes: what was written still goes out, then the guest reads the end,
/// and the other direction stays open. Dropping it closes both; what was written still goes out,
/// however slowly the guest takes it, until the VM ends. `poll_flush` waits for nothing.
/// Writes fail with `BrokenPipe` once the guest takes no more, reads and writes with
/// `ConnectionReset` once the connection is cut; what was received before can be read first.
#[derive(Debug)]
pub struct VsockStream {
    shared: Arc<Shared>,
    id: ConnectionId,
    host_port: u32,
    guest_port: u32,
}

impl VsockStream {
    /// Port of the host's side.
    pub fn host_port(&self) -> u32 {
        self.host_port
    }

    /// Port of the guest's side.
    pub fn guest_port(&self) -> u32 {
        self.guest_port
    }

    fn cut(&self, cause: Cause) -> io::Error {
        let (host, guest) = (self.host_port, self.guest_port);
        let why = match cause {
            Cause::Ended => "the VM has ended or reset its vsock device",
            Cause::Violation => "the guest broke the vsock protocol",
            Cause::Finished | Cause::Refused | Cause::Reset => "the guest reset it",
        };
        io::Error::new(
            io::ErrorKind::ConnectionReset,
            format!(
                "The vsock connection of host port {host} and guest port {guest} was cut: {why}"
            ),
        )
    }

    fn poll_write_buffers<'b>(
        &self,
        cx: &mut Context<'_>,
        buffers: impl IntoIterator<Item = &'b [u8]>,
    ) -> Poll<io::Result<usize>> {
        let progress = self
            .shared
            .with(|muxer| muxer.poll_write(self.id, buffers, cx.waker()));
        Poll::Ready(match progress {
            Progress::Moved(count) => Ok(count),
            Progress::Wait => return Poll::Pending,
            Progress::Broken => Err(io::ErrorKind::BrokenPipe.into()),
            Progress::Cut(cause) => Err(self.cut(cause)),
        })
    }
}

impl AsyncRead for VsockStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let limit = buf.remaining();
        if limit == 0 {
            return Poll::Ready(Ok(()));
        }
        let progress = self
            .shared
            .with(|muxer| muxer.poll_read(self.id, limit, cx.waker(), |part| buf.put_slice(part)));
        Poll::Ready(match progress {
            Progress::Moved(_) => Ok(()),
            Progress::Wait => return Poll::Pending,
            Progress::Broken => Err(io::ErrorKind::BrokenPipe.into()),
            Progress::Cut(cause) => Err(self.cut(cause)),
        })
    }
}

impl AsyncWrite for VsockStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(self.poll_write_buffers(cx, [buf]))?;
        Poll::Ready(Ok(count))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_buffers(cx, bufs.iter().map(|buf| &**buf))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.with(|muxer| muxer.shut_down_sending(self.id));
        Poll::Ready(Ok(()))
    }
}

impl Drop for VsockStream {
    fn drop(&mut self) {
        self.shared.with(|muxer| muxer.close(self.id));
    }
}
