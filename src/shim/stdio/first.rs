//! When the first byte of a process's output came from the guest.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

use crate::sandbox::monotonic_ns;

/// The time of the first byte, shared by all output streams of a process; 0 before.
#[derive(Debug, Clone, Default)]
pub(super) struct First(Arc<AtomicU64>);

impl First {
    /// CLOCK_MONOTONIC in nanoseconds.
    pub fn ns(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|ns| *ns != 0)
    }

    /// A stream to be, whose first byte is noted.
    pub fn note<S: Send + 'static>(
        &self,
        stream: impl Future<Output = Option<S>> + Send + 'static,
    ) -> impl Future<Output = Option<Noting<S>>> + Send + 'static {
        let first = self.clone();
        async move {
            let stream = stream.await?;
            Some(Noting { stream, first })
        }
    }
}

/// A stream whose first byte is noted.
pub(super) struct Noting<S> {
    stream: S,
    first: First,
}

impl<S: AsyncRead + Unpin> AsyncRead for Noting<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        if buffer.filled().len() > before && self.first.ns().is_none() {
            // Another stream of the process may be first by a hair.
            let _ = self.first.0.compare_exchange(
                0,
                monotonic_ns(),
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn the_first_byte_is_noted_once_and_an_end_is_none() {
        let first = First::default();
        let mut text = String::new();
        let none = first.note(async { Some(&b""[..]) }).await;
        none.unwrap().read_to_string(&mut text).await.unwrap();
        assert_eq!(first.ns(), None);
        let some = first.note(async { Some(&b"abc"[..]) }).await;
        some.unwrap().read_to_string(&mut text).await.unwrap();
        let noted = first.ns();
        assert!(noted.is_some());
        let more = first.note(async { Some(&b"def"[..]) }).await;
        more.unwrap().read_to_string(&mut text).await.unwrap();
        assert_eq!((&*text, first.ns()), ("abcdef", noted));
    }
}
