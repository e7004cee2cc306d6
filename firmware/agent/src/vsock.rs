//! Connections to the host, all of them dialled from here.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use tracing::debug;

use crate::error::{Doing, Error};

#[cfg(feature = "unix-transport")]
pub use tokio::net::UnixStream as Stream;
#[cfg(not(feature = "unix-transport"))]
pub use tokio_vsock::VsockStream as Stream;

/// How often, and how long apart, the transport is tried while it is not there yet.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(20);

/// How long the host may take to accept. The kernel's own limit is 2 s, which a busy machine can miss.
#[cfg(not(feature = "unix-transport"))]
const CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// Of level `AF_VSOCK`, from linux/vm_sockets.h.
#[cfg(not(feature = "unix-transport"))]
const SO_VM_SOCKETS_CONNECT_TIMEOUT: libc::c_int = 6;

/// Dials a port of the host. A transport that is not there yet is waited for, 2 s at most; a host that
/// refuses is not.
///
/// # Errors
/// The port, and what the kernel said.
pub async fn dial(port: u32) -> Result<Stream, Error> {
    let mut tries = 0;
    loop {
        match connect(port).await {
            Ok(stream) => return Ok(stream),
            Err(error) if tries < TRIES && is_early(&error) => {
                debug!("port {port}: {error}; once more");
                tries += 1;
                tokio::time::sleep(PAUSE).await;
            }
            refused => return refused.doing(|| format!("dialling port {port} of the host")),
        }
    }
}

#[cfg(not(feature = "unix-transport"))]
async fn connect(port: u32) -> io::Result<Stream> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, getsockopt, sockopt};
    use std::os::fd::AsRawFd;

    let socket = nix::sys::socket::socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    let patience = libc::timeval {
        tv_sec: CONNECT_LIMIT.as_secs() as libc::time_t,
        tv_usec: 0,
    };
    // SAFETY: the option is read from one timeval, of the length that is given.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            SO_VM_SOCKETS_CONNECT_TIMEOUT,
            (&raw const patience).cast(),
            size_of_val(&patience) as libc::socklen_t,
        );
    }
    let host = VsockAddr::new(tokio_vsock::VMADDR_CID_HOST, port);
    match nix::sys::socket::connect(socket.as_raw_fd(), &host) {
        Ok(()) | Err(nix::Error::EINPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    // SAFETY: the socket stays open for as long as the registration, which gives it back below.
    let connecting = unsafe { tokio::io::unix::AsyncFd::register(socket) }?;
    connecting.writable().await?.clear_ready();
    let socket = connecting.into_inner();
    match getsockopt(&socket, sockopt::SocketError)? {
        0 => Ok(Stream::from(socket)),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

#[cfg(feature = "unix-transport")]
async fn connect(port: u32) -> io::Result<Stream> {
    Stream::connect(format!("/run/host/{port}")).await
}

/// Whether the transport, and not the host, is what is missing.
fn is_early(error: &io::Error) -> bool {
    let early = [
        libc::ENODEV,
        libc::EAFNOSUPPORT,
        libc::ENETUNREACH,
        libc::EADDRNOTAVAIL,
        #[cfg(feature = "unix-transport")]
        libc::ENOENT,
        #[cfg(feature = "unix-transport")]
        libc::ECONNREFUSED,
    ];
    error
        .raw_os_error()
        .is_some_and(|code| early.contains(&code))
}

/// A connection that tells when the other side has closed it, or when it broke.
pub struct Watched<S> {
    stream: S,
    ended: Option<oneshot::Sender<()>>,
}

impl<S> Watched<S> {
    /// The connection, and what completes at its end.
    pub fn new(stream: S) -> (Watched<S>, oneshot::Receiver<()>) {
        let (sender, receiver) = oneshot::channel();
        let ended = Some(sender);
        (Watched { stream, ended }, receiver)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let room = buffer.remaining();
        let answer = Pin::new(&mut self.stream).poll_read(context, buffer);
        let over = match &answer {
            Poll::Ready(Ok(())) => room > 0 && buffer.filled().len() == before,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        if over && let Some(ended) = self.ended.take() {
            let _ = ended.send(());
        }
        answer
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[test]
    fn a_refusal_is_not_tried_again() {
        assert!(is_early(&io::Error::from_raw_os_error(libc::ENODEV)));
        assert!(!is_early(&io::Error::from_raw_os_error(libc::ECONNRESET)));
    }

    #[tokio::test]
    async fn the_end_is_told_once_the_other_side_closes() {
        let (near, mut far) = tokio::io::duplex(64);
        let (mut watched, mut ended) = Watched::new(near);
        far.write_all(b"x").await.unwrap();
        let mut byte = [0];
        watched.read_exact(&mut byte).await.unwrap();
        assert!(ended.try_recv().is_err());
        drop(far);
        assert_eq!(watched.read(&mut byte).await.unwrap(), 0);
        assert_eq!(ended.try_recv(), Ok(()));
    }
}
