//! What goes over a stream: a header from the one who connects, then content. Both ends make the same content from a stream's number.
//!
//! - *send*: the header, as many bytes as it says, and back a [`Tally`] of what came.
//! - *receive*: the header, and back as many bytes as it says and a [`Tally`] of what was sent.
//! - *ask*: the header, then requests of `block` bytes, each answered by itself, until the one who asks ends the stream.

use std::io::{self, Read};

use anyhow::{Result, bail, ensure};

use crate::lots::Lots;

/// Bytes of a header: magic, direction, block, stream, bytes.
pub const HEADER: usize = 32;
/// Bytes of a tally: count, checksum.
pub const TALLY: usize = 12;
/// The longest block, 1 MiB.
pub const LARGEST: usize = 1 << 20;
const MAGIC: [u8; 8] = *b"nacrenet";
/// Bytes after which content begins anew: a prime, so that what is lost between two blocks shows.
const CYCLE: usize = 1_048_573;
/// From the place of one stream's beginning to that of the next.
const APART: u64 = 65_537;

/// Who sends content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The one who connects.
    Send,
    /// The one who listens.
    Receive,
    /// Both in turn.
    Ask,
}

/// What a stream begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Who sends.
    pub direction: Direction,
    /// Bytes of one write, or of a request: 1 to [`LARGEST`].
    pub block: u32,
    /// Which content.
    pub stream: u64,
    /// Bytes in all; of no meaning for [`Direction::Ask`].
    pub bytes: u64,
}

impl Header {
    /// As it goes over the stream, integers little-endian.
    pub fn to_bytes(self) -> [u8; HEADER] {
        let direction: u32 = match self.direction {
            Direction::Send => 1,
            Direction::Receive => 2,
            Direction::Ask => 3,
        };
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&direction.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.block.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.stream.to_le_bytes());
        bytes[24..].copy_from_slice(&self.bytes.to_le_bytes());
        bytes
    }

    /// The reverse.
    ///
    /// # Errors
    /// It is no header.
    pub fn from_bytes(bytes: &[u8; HEADER]) -> Result<Self> {
        ensure!(bytes[..8] == MAGIC, "what came first is no header");
        let direction = match le(&bytes[8..12]) {
            1 => Direction::Send,
            2 => Direction::Receive,
            3 => Direction::Ask,
            other => bail!("a header has the direction {other}"),
        };
        let block = u32::try_from(le(&bytes[12..16]))?;
        ensure!(
            (1..=LARGEST).contains(&(block as usize)),
            "a header has blocks of {block} bytes"
        );
        Ok(Self {
            direction,
            block,
            stream: le(&bytes[16..24]),
            bytes: le(&bytes[24..]),
        })
    }
}

/// Up to 8 bytes, little-endian.
fn le(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// How much went one way, and its CRC-32.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    count: u64,
    checksum: crc32fast::Hasher,
}

impl Tally {
    /// Adds what went.
    pub fn add(&mut self, bytes: &[u8]) {
        self.count += bytes.len() as u64;
        self.checksum.update(bytes);
    }

    /// Bytes so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// As it goes over the stream: 8 bytes and 4, little-endian.
    pub fn to_bytes(&self) -> [u8; TALLY] {
        let mut bytes = [0; TALLY];
        bytes[..8].copy_from_slice(&self.count.to_le_bytes());
        bytes[8..].copy_from_slice(&self.checksum.clone().finalize().to_le_bytes());
        bytes
    }

    /// Compares it with what the other end says.
    ///
    /// # Errors
    /// The other end has another count, or another checksum.
    pub fn is(&self, other: &[u8; TALLY]) -> Result<()> {
        let theirs = le(&other[..8]);
        ensure!(
            theirs == self.count,
            "here it is {} bytes, at the other end {theirs}",
            self.count
        );
        ensure!(
            *other == self.to_bytes(),
            "the checksum of {theirs} bytes is another at the other end"
        );
        Ok(())
    }
}

/// The content of all streams, made once.
#[derive(Debug)]
pub struct Content(Vec<u8>);

impl Content {
    /// Makes it: some 2 MiB.
    pub fn new() -> Self {
        let mut cycle = vec![0; CYCLE];
        Lots(4).fill(&mut cycle);
        let bytes = cycle.into_iter().cycle().take(CYCLE + LARGEST).collect();
        Self(bytes)
    }

    /// What a stream has from a position on: `length` bytes, at most [`LARGEST`].
    pub fn at(&self, stream: u64, position: u64, length: usize) -> &[u8] {
        let cycle = CYCLE as u64;
        let begin = (stream % cycle * APART + position % cycle) % cycle;
        &self.0[begin as usize..][..length]
    }

    /// The next block of a stream of `bytes` bytes, of which `position` have gone; shorter at the end.
    pub fn next(&self, header: &Header, position: u64) -> &[u8] {
        let left = header.bytes - position;
        let length = left.min(header.block.into()) as usize;
        self.at(header.stream, position, length)
    }

    /// Whether bytes are what a stream has from a position on.
    ///
    /// # Errors
    /// They are something else.
    pub fn check(&self, bytes: &[u8], stream: u64, position: u64) -> Result<()> {
        ensure!(
            bytes == self.at(stream, position, bytes.len()),
            "what came as byte {position} to {} is something else",
            position + bytes.len() as u64
        );
        Ok(())
    }
}

impl Default for Content {
    fn default() -> Self {
        Self::new()
    }
}

/// Reads until a number of bytes has come, or the stream ends.
pub(super) fn take(
    mut stream: impl Read,
    bytes: u64,
    mut each: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut piece = vec![0; 64 << 10];
    let mut left = bytes;
    while left > 0 {
        let most = left.min(piece.len() as u64) as usize;
        match stream.read(&mut piece[..most]) {
            Ok(0) => return Ok(()),
            Ok(length) => {
                each(&piece[..length])?;
                left -= length as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_as_it_went() {
        for direction in [Direction::Send, Direction::Receive, Direction::Ask] {
            let header = Header {
                direction,
                block: 65_536,
                stream: u64::MAX,
                bytes: 1 << 40,
            };
            assert_eq!(Header::from_bytes(&header.to_bytes()).unwrap(), header);
        }
    }

    #[test]
    fn what_is_no_header_is_refused() {
        let header = Header {
            direction: Direction::Send,
            block: 1,
            stream: 0,
            bytes: 0,
        };
        for (at, value) in [(0, b'N'), (8, 0), (8, 4), (12, 0), (15, 1)] {
            let mut bytes = header.to_bytes();
            bytes[at] = value;
            assert!(Header::from_bytes(&bytes).is_err(), "{at}: {value}");
        }
    }

    #[test]
    fn content_goes_round_and_differs_by_stream() {
        let content = Content::new();
        let cycle = CYCLE as u64;
        assert_eq!(content.at(1, cycle - 5, 10)[5..], *content.at(1, 0, 5));
        assert_eq!(content.at(3, cycle + 7, LARGEST), content.at(3, 7, LARGEST));
        let whole = content.at(2, 0, LARGEST);
        assert_eq!(whole[CYCLE..], whole[..LARGEST - CYCLE]);
        for stream in 1..64 {
            assert_ne!(content.at(0, 0, 64), content.at(stream, 0, 64));
        }
        content.check(content.at(9, 100, 50), 9, 100).unwrap();
        assert!(content.check(content.at(9, 100, 50), 9, 101).is_err());
    }

    #[test]
    fn tallies_are_the_same_if_count_and_checksum_are() {
        let (mut whole, mut parts) = (Tally::default(), Tally::default());
        whole.add(b"no space");
        parts.add(b"no ");
        assert!(whole.is(&parts.to_bytes()).is_err());
        parts.add(b"space");
        whole.is(&parts.to_bytes()).unwrap();
        let mut other = Tally::default();
        other.add(b"no spice");
        let error = whole.is(&other.to_bytes()).unwrap_err().to_string();
        assert!(error.contains("checksum of 8 bytes"), "{error}");
    }
}
