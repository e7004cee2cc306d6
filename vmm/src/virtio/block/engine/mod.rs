//! Carries out operations on a disk's files while their requests wait: by io_uring (`ring`), or by
//! threads (`pool`) where the host has none. Knows nothing of queues or guests.

mod pool;
mod ring;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use pool::Pool;
pub(super) use ring::Ring;

use super::disk::Disk;
use crate::config::DiskIo;

/// Threads for what io_uring does not do: enough to keep a file system busy.
const THREADS: usize = 4;

/// Something to do with one file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operation {
    /// The file's index among the disk's.
    pub image: usize,
    /// Past the page cache.
    pub direct: bool,
    /// What.
    pub action: Action,
}

/// What to do, at offsets in the file.
#[derive(Debug, Clone, Copy)]
pub(super) enum Action {
    /// Reads into the vectors; may move less than all.
    Read { offset: u64, vectors: Vectors },
    /// Writes from the vectors; may move less than all.
    Write { offset: u64, vectors: Vectors },
    /// Makes durable what was written (fdatasync).
    Sync,
    /// Frees the range; what it reads as then is not defined.
    Discard { offset: u64, len: u64 },
    /// Makes the range read as zeros, and frees it if `unmap`.
    Zero { offset: u64, len: u64, unmap: bool },
}

/// A table of I/O vectors that someone else keeps.
#[derive(Debug, Clone, Copy)]
pub(super) struct Vectors {
    pub first: *const libc::iovec,
    pub count: usize,
}

// SAFETY: they are addresses and lengths of memory that whoever starts the operation keeps for it
// (see `Engine::start`), on whichever thread it is used.
unsafe impl Send for Vectors {}

/// The end of an operation.
#[derive(Debug)]
pub(super) struct Completion {
    /// As given to [`Engine::start`].
    pub token: usize,
    /// Bytes moved.
    pub result: io::Result<u64>,
}

/// Carries out operations, many at a time and in any order. When it is dropped all have ended or
/// will never begin: those under way are waited for, the others are cancelled.
pub(super) trait Engine: Send {
    /// For logs.
    fn name(&self) -> &'static str;

    /// Descriptors of which one is readable when there are completions.
    fn descriptors(&self) -> Vec<RawFd>;

    /// Takes an operation on, which may wait for [`submit`](Self::submit). `token` is below the
    /// depth that the engine was made for, and of no other operation under way.
    ///
    /// # Errors
    ///
    /// If the engine cannot go on.
    ///
    /// # Safety
    ///
    /// The operation's table of vectors and the memory that they name stay until its completion
    /// was given out or the engine was dropped.
    unsafe fn start(&mut self, token: usize, operation: Operation) -> io::Result<()>;

    /// Sets all that was started to work.
    ///
    /// # Errors
    ///
    /// If the engine cannot go on.
    fn submit(&mut self) -> io::Result<()>;

    /// Fills `completions`, which is empty, with those that there are.
    fn completions(&mut self, completions: &mut Vec<Completion>);
}

/// An engine for `depth` operations at a time on `disk`'s files, of the kind that `io` says.
///
/// # Errors
///
/// If it was to be io_uring, and the host has or allows none.
pub(super) fn choose(io: DiskIo, disk: &Arc<Disk>, depth: u16) -> io::Result<Box<dyn Engine>> {
    match io {
        DiskIo::IoUring => Ok(Box::new(Ring::new(disk, depth)?)),
        DiskIo::Threads => Ok(Box::new(Pool::new(disk, THREADS)?)),
        DiskIo::Auto => match Ring::new(disk, depth) {
            Ok(ring) => Ok(Box::new(ring)),
            Err(error) => {
                tracing::debug!(disk = disk.name(), %error, "no io_uring, so threads do the disk's I/O");
                Ok(Box::new(Pool::new(disk, THREADS)?))
            }
        },
    }
}

#[cfg(test)]
mod tests;
