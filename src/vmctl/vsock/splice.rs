//! Bytes between a client and the guest. Each way ends by itself: at its end, when it breaks, or when nobody takes what it carries.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::sandbox::GuestStream;

/// Bytes on their way between the two, each way.
const BUFFER: usize = 64 << 10;
/// How often a way on which nothing comes is asked whether anybody would take it.
const ASKED: Duration = Duration::from_secs(1);
/// How long what a client has left when it went may wait for the guest to take some of it.
pub(super) const LEFT: Duration = Duration::from_secs(60);

/// Until both ways have ended.
pub(super) async fn splice(client: UnixStream, guest: GuestStream) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_guest, mut to_guest) = tokio::io::split(guest);
    // It went, or at least reads no more.
    let client_went = AtomicBool::new(false);
    let up = async {
        if let Err(error) = carry(&mut from_client, &mut to_guest, &client_went).await {
            tracing::debug!(%error, "a client's way to the guest broke");
            // The client learns it when it writes.
            let _ = shutdown(from_client.as_ref().as_raw_fd(), Shutdown::Read);
        }
    };
    let down = async {
        // A client that takes its time is the host's own: what the guest has left may wait for it.
        let stays = AtomicBool::new(false);
        if let Err(error) = carry(&mut from_guest, &mut to_client, &stays).await {
            tracing::debug!(%error, "the guest's way to a client broke");
            client_went.store(true, Ordering::Relaxed);
        }
    };
    tokio::join!(up, down);
}

/// Copies one way, and passes its end on. An error: it broke, on either side.
async fn carry(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    writer_went: &AtomicBool,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut asked = interval(ASKED);
    asked.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let read = loop {
        let count = tokio::select! {
            read = from.read(&mut buffer) => match read {
                Ok(count @ 1..) => count,
                ended => break ended,
            },
            _ = asked.tick() => {
                // Nothing, but refused where it could not be taken.
                let none = to.write(&[]).await?;
                debug_assert_eq!(none, 0);
                continue;
            }
        };
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            match timeout(LEFT, to.write(rest)).await {
                Ok(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => rest = &rest[written?..],
                Err(_) if writer_went.load(Ordering::Relaxed) => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(_) => {}
            }
        }
    };
    let ended = to.shutdown().await;
    read.map(|_| ()).and(ended)
}
