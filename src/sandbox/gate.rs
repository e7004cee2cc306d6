//! A cap on what a peer can have in flight on a ttrpc connection that we serve.
//! ttrpc starts a task for each request that it reads and lets each wait until
//! its answer can be written: a guest that sends requests and never reads the
//! answers would grow the host's memory without bound. The gate counts frames
//! both ways and stops reading while too many requests are unanswered.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Requests that may be unanswered.
const IN_FLIGHT: u64 = 16;
/// ttrpc's frame header: length (4, big-endian), stream id (4), type (1), flags (1).
const HEADER: usize = 10;

/// The stream that ttrpc serves on.
pub(crate) struct Gate<S> {
    inner: S,
    requests: FrameCounter,
    answers: FrameCounter,
    reader: Option<Waker>,
}

impl<S> Gate<S> {
    pub(crate) fn new(inner: S) -> Self {
        Self {
            inner,
            requests: FrameCounter::default(),
            answers: FrameCounter::default(),
            reader: None,
        }
    }
}

/// Counts whole frames in a byte stream.
#[derive(Debug, Default)]
struct FrameCounter {
    header: [u8; HEADER],
    have: usize,
    body_left: usize,
    frames: u64,
}

impl FrameCounter {
    fn push(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.have < HEADER {
                let take = (HEADER - self.have).min(data.len());
                self.header[self.have..self.have + take].copy_from_slice(&data[..take]);
                self.have += take;
                data = &data[take..];
                if self.have < HEADER {
                    return;
                }
                let length = [
                    self.header[0],
                    self.header[1],
                    self.header[2],
                    self.header[3],
                ];
                self.body_left = u32::from_be_bytes(length) as usize;
            }
            let skip = self.body_left.min(data.len());
            self.body_left -= skip;
            data = &data[skip..];
            if self.body_left == 0 {
                self.frames += 1;
                self.have = 0;
            }
        }
    }

    /// Bytes until the current frame ends, as far as is known; at least 1.
    fn rest(&self) -> usize {
        if self.have < HEADER {
            HEADER - self.have
        } else {
            self.body_left
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gate<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.requests.frames.saturating_sub(this.answers.frames) >= IN_FLIGHT {
            this.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        // Never read past the end of a frame, so that the count holds at each frame.
        let limit = this.requests.rest().min(buf.remaining());
        let mut part = ReadBuf::new(buf.initialize_unfilled_to(limit));
        std::task::ready!(Pin::new(&mut this.inner).poll_read(cx, &mut part))?;
        let count = part.filled().len();
        this.requests.push(part.filled());
        buf.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gate<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let written = std::task::ready!(Pin::new(&mut this.inner).poll_write(cx, data))?;
        let before = this.answers.frames;
        this.answers.push(&data[..written]);
        if this.answers.frames != before
            && let Some(waker) = this.reader.take()
        {
            waker.wake();
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn frame(body: usize) -> Vec<u8> {
        let mut frame = (body as u32).to_be_bytes().to_vec();
        frame.resize(HEADER + body, 0);
        frame
    }

    #[test]
    fn frames_are_counted_however_they_are_cut() {
        let bytes: Vec<u8> = [frame(0), frame(5), frame(300)].concat();
        for step in 1..bytes.len() {
            let mut counter = FrameCounter::default();
            bytes.chunks(step).for_each(|part| counter.push(part));
            assert_eq!(counter.frames, 3, "in steps of {step}");
        }
    }

    #[tokio::test]
    async fn reading_stops_at_the_cap_and_goes_on_after_an_answer() {
        let (mut peer, ours) = tokio::io::duplex(1 << 20);
        let mut gate = Gate::new(ours);
        for _ in 0..2 * IN_FLIGHT {
            peer.write_all(&frame(3)).await.unwrap();
        }
        let mut buffer = vec![0; 1 << 16];
        let mut got = 0;
        let size = HEADER + 3;
        while got < size * IN_FLIGHT as usize {
            got += gate.read(&mut buffer).await.unwrap();
        }
        assert_eq!(got, size * IN_FLIGHT as usize);
        let wait = std::time::Duration::from_millis(20);
        assert!(
            tokio::time::timeout(wait, gate.read(&mut buffer))
                .await
                .is_err()
        );
        gate.write_all(&frame(1)).await.unwrap();
        assert!(gate.read(&mut buffer).await.unwrap() > 0);
    }
}
