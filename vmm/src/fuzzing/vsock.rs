//! Packets of a guest at the muxer, with a host that listens, connects, reads,
//! writes and goes away in between. After every step the table of connections
//! must hold what it promises; at the end nothing may be left.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use arbitrary::{Result, Unstructured};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::virtio::vsock::seam::{Header, Shared};
use crate::virtio::vsock::{Error, GUEST_CID, HOST_CID, VsockHost, VsockListener, VsockStream};

/// Ports that the host listens on.
const LISTENING: [u32; 2] = [1024, 1025];
/// The first port that the host connects from.
const CONNECTING: u32 = 1 << 30;
/// Largest payload of a packet.
const MOST: usize = 64 * 1024;
/// Streams and connects that the host holds at once.
const HELD: usize = 8;
const STREAM: u16 = 1;

type Connect = Pin<Box<dyn Future<Output = std::result::Result<VsockStream, Error>>>>;

struct Stage {
    shared: Arc<Shared>,
    host: VsockHost,
    listeners: Vec<Option<VsockListener>>,
    streams: Vec<VsockStream>,
    connects: Vec<Connect>,
    bytes: Vec<u8>,
}

pub(super) fn run(data: &[u8]) {
    let shared = Shared::new(GUEST_CID).expect("an eventfd");
    let host = VsockHost::new(Arc::clone(&shared));
    let mut stage = Stage {
        listeners: LISTENING.map(|port| host.listen(port).ok()).into(),
        shared,
        host,
        streams: Vec::new(),
        connects: Vec::new(),
        bytes: vec![7; MOST + 16],
    };
    let mut input = Unstructured::new(data);
    while !input.is_empty() && stage.step(&mut input).is_ok() {
        stage.shared.with(|muxer| muxer.check());
    }
    let Stage {
        shared,
        host,
        listeners,
        streams,
        connects,
        ..
    } = stage;
    drop((streams, connects, listeners));
    shared.with(|muxer| muxer.check());
    host.end();
    assert_eq!(host.connections(), 0, "connections are left");
}

impl Stage {
    fn step(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let mut cx = Context::from_waker(Waker::noop());
        match input.arbitrary::<u8>()? % 16 {
            0..=6 => self.packet(input)?,
            7 => {
                let room = 1 + u32::from(input.arbitrary::<u16>()?);
                let fetched = self.shared.with(|muxer| {
                    muxer.next_packet(room, |header, data| (header.len, data.concat().len()))
                });
                if let Some((len, there)) = fetched {
                    assert_eq!(len as usize, there);
                    assert!(len <= room);
                }
            }
            8 => {
                let index = usize::from(input.arbitrary::<bool>()?);
                if self.streams.len() < HELD
                    && let Some(listener) = &mut self.listeners[index]
                    && let Poll::Ready(Ok(stream)) = listener.poll_accept(&mut cx)
                {
                    self.streams.push(stream);
                }
            }
            9 => {
                let port = u32::from(input.arbitrary::<u8>()? % 4);
                if self.connects.len() < HELD {
                    let host = self.host.clone();
                    self.connects
                        .push(Box::pin(async move { host.connect(port).await }));
                }
            }
            10 => {
                let streams = &mut self.streams;
                self.connects
                    .retain_mut(|connect| match connect.as_mut().poll(&mut cx) {
                        Poll::Ready(Ok(stream)) => {
                            streams.push(stream);
                            false
                        }
                        Poll::Ready(Err(_)) => false,
                        Poll::Pending => true,
                    });
            }
            11 => {
                let limit = usize::from(input.arbitrary::<u16>()?);
                if let Some(stream) = pick(&mut self.streams, input)? {
                    let mut memory = vec![0; limit];
                    let mut buf = ReadBuf::new(&mut memory);
                    if let Poll::Ready(Ok(())) = Pin::new(stream).poll_read(&mut cx, &mut buf) {
                        assert!(buf.filled().iter().all(|byte| *byte == 7), "bytes changed");
                    }
                }
            }
            12 => {
                let len = usize::from(input.arbitrary::<u16>()?);
                if let Some(stream) = pick(&mut self.streams, input)? {
                    let _ = Pin::new(stream).poll_write(&mut cx, &self.bytes[..len]);
                }
            }
            13 => {
                if let Some(stream) = pick(&mut self.streams, input)? {
                    let done = pin!(stream).poll_shutdown(&mut cx);
                    assert!(done.is_ready());
                }
            }
            14 => {
                let index = usize::from(input.arbitrary::<u8>()?);
                if index < self.streams.len() {
                    self.streams.remove(index);
                } else {
                    self.connects.pop();
                }
            }
            _ => {
                if input.arbitrary::<bool>()? {
                    self.listeners[0] = None;
                    self.listeners[0] = self.host.listen(LISTENING[0]).ok();
                } else {
                    self.shared.with(|muxer| muxer.cut_all());
                }
            }
        }
        Ok(())
    }

    /// Any header, though most often one that means something.
    fn packet(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let shape: u8 = input.arbitrary()?;
        let mut header = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: u32::from(input.arbitrary::<u8>()? % 4),
            dst_port: match input.arbitrary::<u8>()? {
                port @ 0..128 => LISTENING[usize::from(port % 2)],
                port => CONNECTING + u32::from(port % 8),
            },
            kind: STREAM,
            op: u16::from(input.arbitrary::<u8>()? % 9),
            flags: u32::from(input.arbitrary::<u8>()? % 5),
            len: u32::from(input.arbitrary::<u16>()?),
            buf_alloc: input.arbitrary()?,
            fwd_cnt: input.arbitrary()?,
        };
        let mut there = header.len as usize;
        match shape {
            0 => header.src_cid = input.arbitrary()?,
            1 => header.dst_cid = input.arbitrary()?,
            2 => header.kind = input.arbitrary()?,
            3 => header.len = input.arbitrary()?,
            4 => there = usize::from(input.arbitrary::<u16>()?),
            5 => header.dst_port = input.arbitrary()?,
            6 => header.op = input.arbitrary()?,
            // Such as a guest grants and counts.
            7..200 => {
                header.buf_alloc = 256 << 10;
                header.fwd_cnt &= 0xffff;
            }
            _ => {}
        }
        let mut payload = &self.bytes[..there.min(self.bytes.len())];
        self.shared
            .with(|muxer| muxer.receive(&header, &mut payload));
        Ok(())
    }
}

fn pick<'s>(
    streams: &'s mut [VsockStream],
    input: &mut Unstructured<'_>,
) -> Result<Option<&'s mut VsockStream>> {
    let index = usize::from(input.arbitrary::<u8>()?);
    Ok(streams.get_mut(index % HELD))
}

/// A packet of the guest in the form that [`Stage::packet`] reads.
fn packet(op: u8, guest_port: u8, host_port: u8, flags: u8, len: u16) -> Vec<u8> {
    let mut bytes = vec![0, 100, guest_port, host_port, op, flags];
    bytes.extend(len.to_le_bytes());
    bytes.extend([0; 8]);
    bytes
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    const FETCH: [u8; 3] = [7, 0, 16];
    const READ: [u8; 4] = [11, 0, 64, 0];
    const WRITE: [u8; 4] = [12, 0, 64, 0];
    let accepted = [packet(1, 1, 0, 0, 0), FETCH.to_vec(), vec![8, 0]].concat();
    let talk = [
        accepted.clone(),
        packet(5, 1, 0, 0, 1000),
        READ.to_vec(),
        WRITE.to_vec(),
        FETCH.to_vec(),
        packet(6, 1, 0, 0, 0),
        packet(7, 1, 0, 0, 0),
        packet(4, 1, 0, 3, 0),
        READ.to_vec(),
        vec![13, 0],
        FETCH.to_vec(),
        vec![14, 0],
        packet(3, 1, 0, 0, 0),
    ]
    .concat();
    let connected = [
        vec![9, 2, 10],
        FETCH.to_vec(),
        packet(2, 2, 128, 0, 0),
        vec![10],
        WRITE.to_vec(),
        FETCH.to_vec(),
        packet(5, 2, 128, 0, 60_000),
        READ.to_vec(),
        vec![15, 0],
    ]
    .concat();
    vec![accepted, talk, connected]
}
