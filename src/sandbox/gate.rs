//! Bounds on what the guest sends over a ttrpc connection. ttrpc takes frames of up to 4 MiB, which decode to
//! many times that: an answer or an event of the agent has a small part of it. And where we serve, ttrpc starts
//! a task for each request that it reads and lets each wait until its answer can be written: a guest that sends
//! requests and never reads the answers would grow the host's memory without bound. The gate counts frames both
//! ways, stops reading while too many requests are unanswered, and ends the connection at a frame that is too long.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

/// Requests that may be unanswered.
const IN_FLIGHT: u64 = 16;
/// Longest request of the agent, in bytes. The longest that ours sends, its hello, has a few hundred.
pub(crate) const LONGEST_REQUEST: usize = 64 << 10;
/// Longest answer of the agent, in bytes: the pids of some ten thousand processes.
pub(crate) const LONGEST_ANSWER: usize = 512 << 10;
/// ttrpc's frame header: length (4, big-endian), stream id (4), type (1), flags (1).
const HEADER: usize = 10;

/// The stream that ttrpc runs on.
pub(crate) struct Gate<S> {
    inner: S,
    received: FrameCounter,
    sent: FrameCounter,
    /// Frames that may have come beyond those that have gone.
    ahead: u64,
    longest: usize,
    reader: Option<Waker>,
    over: Option<oneshot::Sender<String>>,
}

impl<S> Gate<S> {
    /// For a connection on which the guest is served. `over` is told why the guest sends nothing more, when that is so.
    pub(crate) fn serving(inner: S, over: oneshot::Sender<String>) -> Self {
        Self::new(inner, IN_FLIGHT, LONGEST_REQUEST, Some(over))
    }

    /// For a connection on which the guest is called. What it sends besides answers is thrown away as it comes.
    pub(crate) fn calling(inner: S) -> Self {
        Self::new(inner, u64::MAX, LONGEST_ANSWER, None)
    }

    fn new(inner: S, ahead: u64, longest: usize, over: Option<oneshot::Sender<String>>) -> Self {
        Self {
            inner,
            received: FrameCounter::default(),
            sent: FrameCounter::default(),
            ahead,
            longest,
            reader: None,
            over,
        }
    }

    fn end(&mut self, why: &str) {
        if let Some(over) = self.over.take() {
            // Nobody waits for it while the VM ends.
            let _ = over.send(why.to_owned());
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
        if this.received.frames.saturating_sub(this.sent.frames) >= this.ahead {
            this.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        // Never read past the end of a frame, so that the count holds at each frame, nor past the end of its header.
        let limit = this.received.rest().min(buf.remaining());
        let mut part = ReadBuf::new(buf.initialize_unfilled_to(limit));
        if let Err(error) = std::task::ready!(Pin::new(&mut this.inner).poll_read(cx, &mut part)) {
            this.end(&error.to_string());
            return Poll::Ready(Err(error));
        }
        let count = part.filled().len();
        if count == 0 && limit > 0 {
            this.end("the guest closed it");
        }
        this.received.push(part.filled());
        if this.received.body_left > this.longest {
            let why = format!(
                "the guest sends a frame of {} bytes, over the limit of {}",
                this.received.body_left, this.longest
            );
            this.end(&why);
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, why)));
        }
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
        let before = this.sent.frames;
        this.sent.push(&data[..written]);
        if this.sent.frames != before
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
        let mut gate = Gate::serving(ours, oneshot::channel().0);
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
    #[tokio::test]
    async fn a_frame_over_the_limit_ends_the_connection_before_its_body_is_read() {
        let (over, why) = oneshot::channel();
        let (mut peer, ours) = tokio::io::duplex(1 << 20);
        let mut gate = Gate::serving(ours, over);
        peer.write_all(&frame(LONGEST_REQUEST)).await.unwrap();
        let mut longest = vec![0; HEADER + LONGEST_REQUEST];
        gate.read_exact(&mut longest).await.unwrap();
        peer.write_all(&frame(LONGEST_REQUEST + 1)).await.unwrap();
        let error = gate.read_exact(&mut longest).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let why = why.await.unwrap();
        assert!(
            why.contains("65537 bytes") && why.contains("65536"),
            "{why}"
        );
    }

    #[tokio::test]
    async fn answers_may_be_longer_and_come_unasked() {
        let (mut peer, ours) = tokio::io::duplex(1 << 20);
        let mut gate = Gate::calling(ours);
        let mut sent = frame(LONGEST_ANSWER);
        (0..4 * IN_FLIGHT).for_each(|_| sent.extend(frame(0)));
        peer.write_all(&sent).await.unwrap();
        let mut got = vec![0; sent.len()];
        gate.read_exact(&mut got).await.unwrap();
        assert_eq!(got, sent);
        peer.write_all(&u32::MAX.to_be_bytes()).await.unwrap();
        peer.write_all(&[0; HEADER - 4]).await.unwrap();
        gate.read_exact(&mut got[..HEADER]).await.unwrap_err();
    }

    #[tokio::test]
    async fn the_end_of_what_the_guest_sends_is_told() {
        let (over, why) = oneshot::channel();
        let (peer, ours) = tokio::io::duplex(1 << 10);
        let mut gate = Gate::serving(ours, over);
        drop(peer);
        assert_eq!(gate.read(&mut [0; 8]).await.unwrap(), 0);
        assert!(why.await.unwrap().contains("closed"));
    }
}
