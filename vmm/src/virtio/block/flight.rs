//! One request on its way: the guest memory that it holds, what of it is done, and what is next.
//!
//! A flight has at most one operation under way; a disk is kept busy by many flights. The guest's
//! memory stays mapped as long as the flight lives, whatever becomes of its slot.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::disk::{Disk, Place};
use super::engine::{Action, Operation, Vectors};
use super::request::{Erasure, Range, Refusal, Request, Target};
use crate::virtio::queue::{Buffers, Chain};

/// Most bytes moved by one operation, so that a reset is not kept waiting.
const CHUNK: u64 = 4 << 20;
/// Most vectors of one operation (IOV_MAX is 1024).
const VECTORS: usize = 256;

/// A request, from its chain to its answer.
#[derive(Debug)]
pub(super) struct Flight {
    head: u16,
    /// The status byte's place, if the driver has left one.
    status: Held,
    /// Bytes that the device may write before the status.
    room: u64,
    /// Data not yet moved.
    data: Held,
    /// Bytes of data written to the guest.
    written: u64,
    work: Work,
    write_through: bool,
    /// The operation under way, and its table of vectors.
    operation: Option<Operation>,
    vectors: Vec<libc::iovec>,
}

// SAFETY: all vectors are addresses in memory that `status` and `data` hold; any thread may use
// them.
unsafe impl Send for Flight {}

/// What is left to do.
#[derive(Debug)]
enum Work {
    /// Into all of `data`, from this offset of the disk on.
    Read { at: u64 },
    /// All of `data`, to this offset on.
    Write { at: u64 },
    /// These ranges.
    Erase { ranges: VecDeque<Range> },
    /// Syncing images from this one on.
    Sync { image: usize },
    /// Nothing but the answer: a status byte, VIRTIO_BLK_S_*.
    Answer(u32),
}

/// What a flight needs next.
#[derive(Debug)]
pub(super) enum Next {
    /// This operation, whose vectors stay until the flight is told of its completion or dropped.
    Start(Operation),
    /// The chain goes back: so many bytes were written from the start of its writable part.
    Answered {
        /// Head of the chain.
        head: u16,
        /// Bytes.
        len: u32,
    },
}

impl Flight {
    /// Reads and judges what the driver asks for.
    ///
    /// # Safety
    ///
    /// The chain's buffers are of `view`.
    pub unsafe fn begin(
        target: &Target<'_>,
        view: &Arc<GuestMemoryMmap>,
        head: u16,
        chain: Chain<'_>,
    ) -> Self {
        let Chain {
            mut readable,
            mut writable,
        } = chain;
        // Without room for a status there is no way to answer, and nothing is done.
        let room = writable.len().checked_sub(1);
        let mut data = writable.take(room.unwrap_or(0));
        let mut written = 0;
        let work = match room.map(|room| Request::parse(target, &mut readable, room)) {
            Some(Ok(Request::Read { offset })) => Work::Read { at: offset },
            Some(Ok(Request::Write { offset })) => {
                data = readable;
                Work::Write { at: offset }
            }
            Some(Ok(Request::Flush)) => Work::Sync { image: 0 },
            Some(Ok(Request::GetId)) => {
                written = data.write(target.id) as u64;
                Work::Answer(VIRTIO_BLK_S_OK)
            }
            Some(Ok(Request::Erase(ranges))) => Work::Erase {
                ranges: ranges.into(),
            },
            Some(Err(Refusal::Failed)) => Work::Answer(VIRTIO_BLK_S_IOERR),
            Some(Err(Refusal::Unsupported)) => Work::Answer(VIRTIO_BLK_S_UNSUPP),
            None => Work::Answer(VIRTIO_BLK_S_IOERR),
        };
        // SAFETY: the caller's promise: all of these are of `view`.
        let (status, data) = unsafe { (Held::new(view, &writable), Held::new(view, &data)) };
        Self {
            head,
            status,
            room: room.unwrap_or(0),
            data,
            written,
            work,
            write_through: !target.agreed.flush,
            operation: None,
            vectors: Vec::new(),
        }
    }

    /// Goes on, by what needs no file at once, to the next operation or to the answer. Not called
    /// while one is under way.
    pub fn next(&mut self, disk: &Disk) -> Next {
        loop {
            match self.step(disk) {
                Step::Again => {}
                Step::Start(operation) => {
                    self.operation = Some(operation);
                    return Next::Start(operation);
                }
                Step::Answer(status) => return self.answer(status),
            }
        }
    }

    fn step(&mut self, disk: &Disk) -> Step {
        match &mut self.work {
            Work::Answer(status) => return Step::Answer(*status),
            Work::Read { .. } if self.data.len == 0 => {
                self.work = Work::Answer(VIRTIO_BLK_S_OK);
            }
            Work::Read { at } => {
                let (place, left) = disk.place(*at);
                let len = left.min(self.data.len);
                let bytes = match place {
                    Place::Image { image, offset } => {
                        let vectors = self.data.table(&mut self.vectors, len);
                        return Step::Start(Operation {
                            image,
                            direct: disk.images()[image].goes_direct(offset, &self.vectors),
                            action: Action::Read { offset, vectors },
                        });
                    }
                    Place::Bytes(bytes) => Some(bytes),
                    Place::Zeros => None,
                };
                self.data.write(bytes, len);
                self.written += len;
                *at += len;
            }
            Work::Write { .. } if self.data.len == 0 => self.written_all(),
            Work::Write { at } => match disk.place(*at) {
                (Place::Image { image, offset }, left) => {
                    let vectors = self.data.table(&mut self.vectors, left);
                    return Step::Start(Operation {
                        image,
                        direct: disk.images()[image].goes_direct(offset, &self.vectors),
                        action: Action::Write { offset, vectors },
                    });
                }
                // The partition table is as it is.
                (Place::Bytes(_) | Place::Zeros, _) => {
                    self.work = Work::Answer(VIRTIO_BLK_S_IOERR);
                }
            },
            Work::Erase { ranges } => match ranges.front() {
                None => self.written_all(),
                Some(range) if range.start == range.end => {
                    ranges.pop_front();
                }
                Some(&Range { start, end, kind }) => match disk.place(start) {
                    (Place::Image { image, offset }, left) => {
                        let len = left.min(end - start);
                        return Step::Start(Operation {
                            image,
                            direct: false,
                            action: match kind {
                                Erasure::Discard => Action::Discard { offset, len },
                                Erasure::Zero { unmap } => Action::Zero { offset, len, unmap },
                            },
                        });
                    }
                    (Place::Bytes(_) | Place::Zeros, _) => {
                        self.work = Work::Answer(VIRTIO_BLK_S_IOERR);
                    }
                },
            },
            // What cannot be written needs no sync.
            Work::Sync { image } if disk.read_only() || *image == disk.images().len() => {
                self.work = Work::Answer(VIRTIO_BLK_S_OK);
            }
            Work::Sync { image } => {
                return Step::Start(Operation {
                    image: *image,
                    direct: false,
                    action: Action::Sync,
                });
            }
        }
        Step::Again
    }

    fn written_all(&mut self) {
        self.work = if self.write_through {
            Work::Sync { image: 0 }
        } else {
            Work::Answer(VIRTIO_BLK_S_OK)
        };
    }

    /// Takes notice of what came of the operation under way.
    pub fn completed(&mut self, disk: &Disk, result: io::Result<u64>) {
        let Some(operation) = self.operation.take() else {
            return;
        };
        let moved = match result {
            Ok(moved) => moved,
            // Once more.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return,
            Err(error) => {
                self.failed(disk, &operation, &error);
                return;
            }
        };
        match &mut self.work {
            // The file has become shorter than the disk.
            Work::Read { .. } | Work::Write { .. } if moved == 0 => {
                self.failed(disk, &operation, &io::ErrorKind::UnexpectedEof.into());
            }
            Work::Read { at } => {
                let moved = self.data.advance(moved);
                self.written += moved;
                *at += moved;
            }
            Work::Write { at } => *at += self.data.advance(moved),
            Work::Erase { ranges } => {
                if let Action::Discard { len, .. } | Action::Zero { len, .. } = operation.action
                    && let Some(range) = ranges.front_mut()
                {
                    range.start += len;
                }
            }
            Work::Sync { image } => *image += 1,
            Work::Answer(_) => {}
        }
    }

    fn failed(&mut self, disk: &Disk, operation: &Operation, error: &io::Error) {
        let unsupported = matches!(operation.action, Action::Discard { .. })
            && error.raw_os_error() == Some(libc::EOPNOTSUPP);
        self.work = Work::Answer(if unsupported {
            VIRTIO_BLK_S_UNSUPP
        } else {
            disk.complain(operation, error);
            VIRTIO_BLK_S_IOERR
        });
    }

    fn answer(&mut self, status: u32) -> Next {
        let answered = self.status.len;
        self.status.write(Some(&[status as u8]), answered);
        // All bytes that are counted were written (2.7.8.2), so the status counts only if there is
        // no gap before it.
        let len = if self.written == self.room {
            self.written + answered
        } else {
            self.written
        };
        Next::Answered {
            head: self.head,
            len: len as u32,
        }
    }
}

enum Step {
    Again,
    Start(Operation),
    Answer(u32),
}

/// Guest memory that stays mapped as long as this lives. Moving bytes takes them off the front.
#[derive(Debug)]
struct Held {
    /// Keeps the mappings.
    _view: Arc<GuestMemoryMmap>,
    vectors: VecDeque<libc::iovec>,
    len: u64,
}

impl Held {
    /// # Safety
    ///
    /// `buffers` are of `view`.
    unsafe fn new(view: &Arc<GuestMemoryMmap>, buffers: &Buffers<'_>) -> Self {
        let vector = |slice: &VolatileSlice<'_>| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        Self {
            _view: Arc::clone(view),
            vectors: buffers.slices().map(vector).collect(),
            len: buffers.len(),
        }
    }

    /// Fills `table` with the first vectors, as many as one operation takes: at most `most` bytes.
    fn table(&self, table: &mut Vec<libc::iovec>, most: u64) -> Vectors {
        table.clear();
        let mut left = most.min(CHUNK) as usize;
        for vector in self.vectors.iter().take(VECTORS) {
            let iov_len = vector.iov_len.min(left);
            if iov_len == 0 {
                break;
            }
            left -= iov_len;
            table.push(libc::iovec {
                iov_base: vector.iov_base,
                iov_len,
            });
        }
        Vectors {
            first: table.as_ptr(),
            count: table.len(),
        }
    }

    /// Writes `len` bytes, which are there: those of `bytes`, or zeros.
    fn write(&mut self, bytes: Option<&[u8]>, len: u64) {
        const ZEROS: [u8; 4096] = [0; 4096];
        let mut done = 0;
        while done < len
            && let Some(front) = self.vectors.front()
        {
            let source = match bytes {
                Some(bytes) => &bytes[done as usize..],
                None => &ZEROS[..(len - done).min(ZEROS.len() as u64) as usize],
            };
            let count = source.len().min(front.iov_len);
            // SAFETY: the range is part of guest memory that `_view` keeps mapped.
            let slice = unsafe { VolatileSlice::new(front.iov_base.cast(), count) };
            slice.copy_from(&source[..count]);
            done += self.advance(count as u64);
        }
    }

    /// Takes up to `count` bytes off the front; returns how many there were.
    fn advance(&mut self, count: u64) -> u64 {
        let total = count.min(self.len);
        let mut left = total as usize;
        while left > 0
            && let Some(front) = self.vectors.front_mut()
        {
            if front.iov_len <= left {
                left -= front.iov_len;
                self.vectors.pop_front();
            } else {
                front.iov_base = front.iov_base.cast::<u8>().wrapping_add(left).cast();
                front.iov_len -= left;
                left = 0;
            }
        }
        self.len -= total;
        total
    }
}
