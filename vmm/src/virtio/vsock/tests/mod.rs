//! Tests of the socket device as a whole. A hostile or well-behaved guest is played
//! against the muxer packet by packet (`protocol`, `host`, `random`), against the
//! device through queues (`queues`), and as a small driver with sockets of its
//! own under real tasks (`streams`, on `peer`).

mod host;
mod peer;
mod protocol;
mod queues;
mod random;
mod streams;

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::connection::BUF_ALLOC;
use super::packet::{
    HOST_CID, Header, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW, OP_SHUTDOWN, TYPE_STREAM,
};
use super::stream::{Shared, VsockHost, VsockListener, VsockStream};
use super::{Error, GUEST_CID};

/// Room of the guest's receive buffers, as Linux posts them.
const ROOM: u32 = 4096;
/// What [`Guest::ops`] gives when the host has no packet.
const NOTHING: [u16; 0] = [];

/// Counts how often it was woken.
#[derive(Default)]
struct Alarm(AtomicUsize);

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Alarm {
    fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// A guest that sends any packet it likes.
struct Guest {
    shared: Arc<Shared>,
    host: VsockHost,
}

impl Guest {
    fn new() -> Self {
        let shared = Shared::new(GUEST_CID).unwrap();
        let host = VsockHost::new(Arc::clone(&shared));
        Self { shared, host }
    }

    fn header(op: u16, host_port: u32, guest_port: u32) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: guest_port,
            dst_port: host_port,
            kind: TYPE_STREAM,
            op,
            buf_alloc: BUF_ALLOC,
            ..Header::default()
        }
    }

    fn send(&self, header: Header) {
        self.send_with(header, &[]);
    }

    fn send_with(&self, header: Header, mut payload: &[u8]) {
        self.shared
            .with(|muxer| muxer.receive(&header, &mut payload));
        self.check();
    }

    fn op(&self, op: u16, host_port: u32, guest_port: u32) {
        self.send(Self::header(op, host_port, guest_port));
    }

    fn data(&self, host_port: u32, guest_port: u32, payload: &[u8]) {
        let mut header = Self::header(OP_RW, host_port, guest_port);
        header.len = payload.len() as u32;
        self.send_with(header, payload);
    }

    fn shutdown(&self, host_port: u32, guest_port: u32, flags: u32) {
        let mut header = Self::header(OP_SHUTDOWN, host_port, guest_port);
        header.flags = flags;
        self.send(header);
    }

    /// The host's next packet.
    fn receive(&self) -> Option<(Header, Vec<u8>)> {
        let packet = self
            .shared
            .with(|muxer| muxer.next_packet(ROOM, |header, payload| (*header, payload.concat())));
        if let Some((header, payload)) = &packet {
            assert_eq!(header.len as usize, payload.len());
            assert!(header.len <= ROOM);
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
        }
        self.check();
        packet
    }

    /// The operations of all packets that the host has.
    fn ops(&self) -> Vec<u16> {
        std::iter::from_fn(|| self.receive())
            .map(|(header, _)| header.op)
            .collect()
    }

    fn check(&self) {
        self.shared.with(|muxer| muxer.check());
    }

    /// Connects from `guest_port` to a listener and takes the stream.
    fn connect(&self, listener: &mut VsockListener, guest_port: u32) -> VsockStream {
        let mut request = Self::header(OP_REQUEST, listener.port(), guest_port);
        request.buf_alloc = BUF_ALLOC;
        self.connect_by(listener, request)
    }

    fn connect_by(&self, listener: &mut VsockListener, request: Header) -> VsockStream {
        self.send(request);
        let (response, _) = self.receive().expect("a response");
        assert_eq!(response.op, OP_RESPONSE);
        assert_eq!(response.buf_alloc, BUF_ALLOC);
        assert_eq!(
            (response.src_port, response.dst_port),
            (request.dst_port, request.src_port)
        );
        let stream = ready(listener.accept()).unwrap();
        assert_eq!(stream.guest_port(), request.src_port);
        assert_eq!(stream.host_port(), request.dst_port);
        stream
    }
}

fn alarm() -> (Arc<Alarm>, Waker) {
    let alarm = Arc::new(Alarm::default());
    let waker = Waker::from(Arc::clone(&alarm));
    (alarm, waker)
}

/// Polls once; the future must be ready.
fn ready<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("not ready"),
    }
}

/// Reads what is there, at most `limit` bytes; `None` when there is nothing yet.
fn try_read(stream: &mut VsockStream, limit: usize, waker: &Waker) -> Option<io::Result<Vec<u8>>> {
    let mut memory = vec![0; limit];
    let mut buf = ReadBuf::new(&mut memory);
    match Pin::new(stream).poll_read(&mut Context::from_waker(waker), &mut buf) {
        Poll::Ready(result) => Some(result.map(|()| buf.filled().to_vec())),
        Poll::Pending => None,
    }
}

/// Reads what must be there; empty at the end of the stream.
fn read(stream: &mut VsockStream, limit: usize) -> io::Result<Vec<u8>> {
    try_read(stream, limit, Waker::noop()).expect("something to read")
}

fn try_write(stream: &mut VsockStream, data: &[u8], waker: &Waker) -> Option<io::Result<usize>> {
    match Pin::new(stream).poll_write(&mut Context::from_waker(waker), data) {
        Poll::Ready(result) => Some(result),
        Poll::Pending => None,
    }
}

fn write(stream: &mut VsockStream, data: &[u8]) -> io::Result<usize> {
    try_write(stream, data, Waker::noop()).expect("room to write")
}

fn half_close(stream: &mut VsockStream) {
    let done = Pin::new(stream).poll_shutdown(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(done, Poll::Ready(Ok(()))));
}

/// Bytes whose order can be told.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251) as u8).collect()
}

fn kind(result: io::Result<impl std::fmt::Debug>) -> io::ErrorKind {
    result.expect_err("an error").kind()
}
