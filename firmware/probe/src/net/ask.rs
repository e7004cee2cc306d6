//! The one who connects: sends, receives, or asks, and checks what comes back.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use serde::Serialize;

use super::address::Address;
use super::wire::{Content, Direction, Header, TALLY, Tally, take};

/// How long an answer to a datagram may take before it is sent again.
const RESEND: Duration = Duration::from_secs(1);
/// How often a datagram is sent at most.
const SENDS: u32 = 10;
/// Requests whose late answers are known as such.
const LATE: u64 = 64;
/// The longest datagram over IPv4, which has less room than over IPv6.
pub const DATAGRAM: u32 = 65_507;

/// What streams carried.
#[derive(Debug, PartialEq, Serialize)]
pub struct Carried {
    /// Bytes of all streams.
    pub bytes: u64,
    /// From when all were connected until the last had been checked.
    pub seconds: f64,
}

/// What requests took.
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct Answered {
    /// From when each was first sent until all of its answer had come.
    pub microseconds: Vec<f64>,
    /// Datagrams that were sent once more.
    #[serde(skip_serializing_if = "is_none")]
    pub resent: u64,
}

fn is_none(count: &u64) -> bool {
    *count == 0
}

/// Streams of `bytes` bytes each at once, in writes of `block` bytes.
///
/// # Errors
/// No connection, a connection that broke or stood still for a minute, bytes that were lost or changed: with the stream's number.
pub fn carry(
    to: &Address,
    direction: Direction,
    streams: u32,
    bytes: u64,
    block: u32,
) -> Result<Carried> {
    let content = Content::new();
    let stream_of = |number: u32| format!("stream {number} of {streams}");
    let connected = (1..=streams).map(|number| {
        let header = Header {
            direction,
            block,
            stream: number.into(),
            bytes,
        };
        Ok((header, to.connect().with_context(|| stream_of(number))?))
    });
    let connected = connected.collect::<Result<Vec<_>>>()?;
    let began = Instant::now();
    std::thread::scope(|scope| {
        let content = &content;
        let threads: Vec<_> = connected
            .iter()
            .map(|(header, stream)| scope.spawn(move || one(stream, header, content)))
            .collect();
        let ended = (1..).zip(threads).map(|(number, thread)| {
            let ended = thread
                .join()
                .unwrap_or_else(|_| Err(anyhow!("it panicked")));
            ended.with_context(|| stream_of(number))
        });
        // All are waited for, and the first that failed is told of.
        ended.fold(Ok(()), Result::and)
    })?;
    Ok(Carried {
        bytes: bytes * u64::from(streams),
        seconds: began.elapsed().as_secs_f64(),
    })
}

fn one(stream: &File, header: &Header, content: &Content) -> Result<()> {
    let (mut reader, mut writer) = (stream, stream);
    let mut tally = Tally::default();
    let moved = writer.write_all(&header.to_bytes()).map_err(Error::from);
    let moved = moved.and_then(|()| match header.direction {
        Direction::Receive => take(reader, header.bytes, |bytes| {
            content.check(bytes, header.stream, tally.count())?;
            tally.add(bytes);
            Ok(())
        }),
        _ => {
            while tally.count() < header.bytes {
                let block = content.next(header, tally.count());
                writer.write_all(block)?;
                tally.add(block);
            }
            Ok(())
        }
    });
    moved.map_err(|error| still(error, tally.count()))?;
    ensure!(
        tally.count() == header.bytes,
        "it ended after {} of {} bytes",
        tally.count(),
        header.bytes
    );
    let mut theirs = [0; TALLY];
    reader
        .read_exact(&mut theirs)
        .map_err(|error| still(error.into(), tally.count()))
        .context("reading what the other end counted")?;
    tally.is(&theirs)
}

/// An error of a stream, in which a time that ran out is called so.
fn still(error: Error, after: u64) -> Error {
    let kind = error.downcast_ref().map(std::io::Error::kind);
    match kind {
        Some(ErrorKind::WouldBlock) => anyhow!("it stood still for a minute after {after} bytes"),
        _ => error.context(format!("after {after} bytes")),
    }
}

/// Requests over one stream, one after another.
///
/// # Errors
/// No connection, a connection that broke, an answer that is no echo: with the request's number.
pub fn ask(to: &Address, count: u32, size: u32) -> Result<Answered> {
    let content = Content::new();
    let stream = to.connect()?;
    let (mut reader, mut writer) = (&stream, &stream);
    let header = Header {
        direction: Direction::Ask,
        block: size,
        stream: 0,
        bytes: 0,
    };
    writer.write_all(&header.to_bytes())?;
    let mut answer = vec![0; size as usize];
    let mut answered = Answered::default();
    for number in 0..u64::from(count) {
        let request = content.at(number, 0, size as usize);
        let began = Instant::now();
        let asked = writer
            .write_all(request)
            .and_then(|()| reader.read_exact(&mut answer));
        answered.microseconds.push(microseconds(began));
        asked
            .map_err(|error| still(error.into(), number * u64::from(size)))
            .and_then(|()| content.check(&answer, number, 0))
            .with_context(|| format!("request {} of {count}", number + 1))?;
    }
    Ok(answered)
}

fn microseconds(began: Instant) -> f64 {
    began.elapsed().as_nanos() as f64 / 1e3
}

/// Requests by datagrams, one after another, each sent again after a second without an answer, ten times at most.
///
/// # Errors
/// Nobody listens, no answer came, or one that is no echo: with the request's number.
pub fn ask_by_datagrams(to: SocketAddr, count: u32, size: u32) -> Result<Answered> {
    let content = Content::new();
    let any = match to {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let socket = UdpSocket::bind(any).context("making a socket")?;
    socket
        .connect(to)
        .with_context(|| format!("connecting to {to}"))?;
    let mut answered = Answered::default();
    for number in 0..u64::from(count) {
        let began = Instant::now();
        let sends = by_datagram(&socket, &content, number, size as usize)
            .with_context(|| format!("request {} of {count} to {to}", number + 1))?;
        answered.microseconds.push(microseconds(began));
        answered.resent += u64::from(sends - 1);
    }
    Ok(answered)
}

/// How often it was sent.
fn by_datagram(socket: &UdpSocket, content: &Content, number: u64, size: usize) -> Result<u32> {
    let request = content.at(number, 0, size);
    // One more than is expected, so that a longer one shows.
    let mut answer = vec![0; size + 1];
    for sends in 1..=SENDS {
        socket.send(request)?;
        let deadline = Instant::now() + RESEND;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            socket.set_read_timeout(Some(left))?;
            let length = match socket.recv(&mut answer) {
                Ok(length) => length,
                Err(error) if is_late(error.kind()) => break,
                Err(error) => return Err(error.into()),
            };
            let came = &answer[..length];
            if came == request {
                return Ok(sends);
            }
            let late =
                (1..=LATE.min(number)).any(|back| came == content.at(number - back, 0, size));
            ensure!(late, "{length} bytes came that are no echo of it");
        }
    }
    bail!("no answer came, though it was sent {SENDS} times")
}

fn is_late(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}
