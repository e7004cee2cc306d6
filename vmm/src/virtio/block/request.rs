//! One request (virtio 1.3 section 5.2.6): a header of 16 bytes, data, and a
//! status byte at the end of what the device writes.

use std::sync::atomic::AtomicBool;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use super::ID_BYTES;
use super::backend::{Disk, Partial};
use crate::virtio::queue::{Buffers, Chain};

const HEADER_BYTES: usize = 16;

/// What the driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    Read { sector: u64 },
    Write { sector: u64 },
    Flush,
    GetId,
    Unsupported,
}

impl Request {
    fn parse(header: [u8; HEADER_BYTES]) -> Self {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => Self::Read { sector },
            VIRTIO_BLK_T_OUT => Self::Write { sector },
            VIRTIO_BLK_T_FLUSH => Self::Flush,
            VIRTIO_BLK_T_GET_ID => Self::GetId,
            _ => Self::Unsupported,
        }
    }
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Ok, with so many bytes of data written to the guest.
    Done(u64),
    /// VIRTIO_BLK_S_IOERR, with so many bytes of data written before.
    Failed(u64),
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
    /// The device is being reset; there is no answer.
    Cancelled,
}

/// The disk as a request sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target<'a> {
    pub disk: &'a Disk,
    pub id: &'a [u8; ID_BYTES],
    /// Without VIRTIO_BLK_F_FLUSH a write is durable when it is answered.
    pub write_through: bool,
    /// Set while the device is being reset.
    pub cancelled: &'a AtomicBool,
}

impl Target<'_> {
    /// Carries out one request. Returns how many bytes were written from the start of the chain's
    /// writable part, or `None` if the device is being reset.
    pub fn execute(self, chain: Chain<'_>) -> Option<u32> {
        let Chain {
            mut readable,
            mut writable,
        } = chain;
        // Without room for a status there is no way to answer.
        let Some(room) = writable.len().checked_sub(1) else {
            return Some(0);
        };
        let data = writable.take(room);
        let mut header = [0; HEADER_BYTES];
        let outcome = match readable.read_exact(&mut header) {
            Ok(()) => self.perform(Request::parse(header), readable, data),
            Err(_) => Outcome::Failed(0),
        };
        let (status, written) = match outcome {
            Outcome::Done(written) => (VIRTIO_BLK_S_OK, written),
            Outcome::Failed(written) => (VIRTIO_BLK_S_IOERR, written),
            Outcome::Unsupported => (VIRTIO_BLK_S_UNSUPP, 0),
            Outcome::Cancelled => return None,
        };
        writable.write(&[status as u8]);
        // All bytes that are counted were written (2.7.8.2), so the status counts only if there is
        // no gap before it.
        Some(if written == room {
            written + 1
        } else {
            written
        } as u32)
    }

    fn perform(self, request: Request, readable: Buffers<'_>, mut data: Buffers<'_>) -> Outcome {
        match request {
            Request::Read { sector } => {
                let len = data.len();
                match self.disk.offset(sector, len) {
                    Some(offset) => match self.disk.read(offset, data, self.cancelled) {
                        Ok(()) => Outcome::Done(len),
                        Err(partial) => failed(&partial, partial.done),
                    },
                    None => Outcome::Failed(0),
                }
            }
            Request::Write { sector } => {
                // The file descriptor could not write either.
                if self.disk.read_only() {
                    return Outcome::Failed(0);
                }
                match self.disk.offset(sector, readable.len()) {
                    Some(offset) => match self.disk.write(offset, readable, self.cancelled) {
                        Ok(()) if self.write_through => self.flush(),
                        Ok(()) => Outcome::Done(0),
                        Err(partial) => failed(&partial, 0),
                    },
                    None => Outcome::Failed(0),
                }
            }
            Request::Flush => self.flush(),
            Request::GetId => Outcome::Done(data.write(self.id) as u64),
            Request::Unsupported => Outcome::Unsupported,
        }
    }

    fn flush(self) -> Outcome {
        match self.disk.flush() {
            Ok(()) => Outcome::Done(0),
            Err(_) => Outcome::Failed(0),
        }
    }
}

fn failed(partial: &Partial, written: u64) -> Outcome {
    match partial.error {
        Some(_) => Outcome::Failed(written),
        None => Outcome::Cancelled,
    }
}
