//! What a driver asks for (virtio 1.3 section 5.2.6): the header and the segments of a chain, read
//! once and judged. Doing it is `flight`'s.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::disk::Disk;
use super::{ID_BYTES, SECTOR};
use crate::virtio::queue::Buffers;

/// Most segments of one discard or write-zeroes request.
pub(super) const MAX_SEGMENTS: u32 = 16;
/// Most sectors of one segment: 1 GiB. A file system needs moments for one, and a reset waits.
pub(super) const MAX_SEGMENT_SECTORS: u32 = 1 << 21;

const HEADER_BYTES: usize = 16;
const SEGMENT_BYTES: usize = 16;

/// The disk as requests see it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target<'a> {
    pub disk: &'a Disk,
    pub id: &'a [u8; ID_BYTES],
    pub agreed: Agreed,
}

/// What driver and device agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Agreed {
    /// Without VIRTIO_BLK_F_FLUSH a write is durable when it is answered.
    pub flush: bool,
    /// VIRTIO_BLK_F_DISCARD.
    pub discard: bool,
    /// VIRTIO_BLK_F_WRITE_ZEROES.
    pub write_zeroes: bool,
}

/// A request that is sound: its ranges are byte offsets within the disk.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    Read { offset: u64 },
    Write { offset: u64 },
    Flush,
    GetId,
    Erase(Vec<Range>),
}

/// A range to discard or to zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub start: u64,
    pub end: u64,
    pub kind: Erasure,
}

/// What becomes of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Erasure {
    Discard,
    Zero { unmap: bool },
}

/// Why a request is not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// VIRTIO_BLK_S_IOERR.
    Failed,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
}

impl Request {
    /// Takes the header off the front of `readable`, and the segments if there are any; `room` is
    /// how many bytes of data the device may write.
    pub fn parse(
        target: &Target<'_>,
        readable: &mut Buffers<'_>,
        room: u64,
    ) -> Result<Self, Refusal> {
        let mut header = [0; HEADER_BYTES];
        readable
            .read_exact(&mut header)
            .map_err(|_| Refusal::Failed)?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let range = |len| target.disk.offset(sector, len).ok_or(Refusal::Failed);
        match u32::from_le_bytes([k0, k1, k2, k3]) {
            VIRTIO_BLK_T_IN => Ok(Self::Read {
                offset: range(room)?,
            }),
            VIRTIO_BLK_T_OUT => {
                // The file descriptor could not write either.
                if target.disk.read_only() {
                    return Err(Refusal::Failed);
                }
                Ok(Self::Write {
                    offset: range(readable.len())?,
                })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Self::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Self::GetId),
            VIRTIO_BLK_T_DISCARD if target.disk.read_only() => Err(Refusal::Failed),
            VIRTIO_BLK_T_WRITE_ZEROES if target.disk.read_only() => Err(Refusal::Failed),
            VIRTIO_BLK_T_DISCARD if target.agreed.discard => {
                erase(target.disk, readable, |unmap| {
                    (!unmap).then_some(Erasure::Discard)
                })
            }
            VIRTIO_BLK_T_WRITE_ZEROES if target.agreed.write_zeroes => {
                erase(target.disk, readable, |unmap| Some(Erasure::Zero { unmap }))
            }
            _ => Err(Refusal::Unsupported),
        }
    }
}

/// The segments of a discard or a write-zeroes (5.2.6.2); `kind` says what the unmap flag makes of
/// it, if that may be. All are judged before the first is carried out.
fn erase(
    disk: &Disk,
    readable: &mut Buffers<'_>,
    kind: impl Fn(bool) -> Option<Erasure>,
) -> Result<Request, Refusal> {
    let most = u64::from(MAX_SEGMENTS) * SEGMENT_BYTES as u64;
    if readable.len() > most || !readable.len().is_multiple_of(SEGMENT_BYTES as u64) {
        return Err(Refusal::Failed);
    }
    let mut ranges = Vec::with_capacity(MAX_SEGMENTS as usize);
    while !readable.is_empty() {
        let mut segment = [0; SEGMENT_BYTES];
        readable
            .read_exact(&mut segment)
            .map_err(|_| Refusal::Failed)?;
        let [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3, flags @ ..] = segment;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes(flags);
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
            return Err(Refusal::Unsupported);
        }
        let kind = kind(flags != 0).ok_or(Refusal::Unsupported)?;
        if count > MAX_SEGMENT_SECTORS {
            return Err(Refusal::Failed);
        }
        let len = u64::from(count) * SECTOR;
        let start = disk.offset(sector, len).ok_or(Refusal::Failed)?;
        ranges.push(Range {
            start,
            end: start + len,
            kind,
        });
    }
    Ok(Request::Erase(ranges))
}
