//! The file behind a disk: opened, locked, read and written at sector offsets.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::volatile_memory::{PtrGuard, PtrGuardMut};

use super::{Error, SECTOR};
use crate::config::DiskConfig;
use crate::virtio::queue::Buffers;

/// Most bytes moved by one system call, so that a reset is not kept waiting.
const CHUNK: u64 = 4 << 20;
/// Most slices handed to one system call (IOV_MAX is 1024).
const SLICES: usize = 256;

/// A raw image. The lock on it is held as long as this value lives: shared for reading, exclusive
/// for writing, so that no two VMs write one image and none reads what another writes.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    read_only: bool,
    sectors: u64,
    complained: AtomicBool,
}

/// A transfer that ended early.
#[derive(Debug)]
pub(super) struct Partial {
    /// Bytes moved before.
    pub done: u64,
    /// Why it ended; `None` if it was cancelled.
    pub error: Option<io::Error>,
}

impl Disk {
    /// Opens and locks the image that `config` names: O_RDONLY if it is to be read only. Its size
    /// is taken now and stays; a last part of a sector is left out.
    ///
    /// # Errors
    ///
    /// [`Error`], with the path.
    pub fn open(config: &DiskConfig) -> Result<Self, Error> {
        let path = config.path.clone();
        let read_only = config.read_only;
        let mut file = match OpenOptions::new()
            .read(true)
            .write(!read_only)
            // Opening a pipe would wait for its other end.
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
        {
            Ok(file) => file,
            Err(source) => {
                return Err(Error::Open {
                    path,
                    read_only,
                    source,
                });
            }
        };
        let kind = match file.metadata() {
            Ok(metadata) => metadata.file_type(),
            Err(source) => return Err(Error::Size { path, source }),
        };
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Kind { path });
        }
        let locked = if read_only {
            file.try_lock_shared()
        } else {
            file.try_lock()
        };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Locked { path, read_only }),
            Err(TryLockError::Error(source)) => return Err(Error::Lock { path, source }),
        }
        // A block device's metadata has no size; its end is where seeking ends.
        let bytes = match file.seek(SeekFrom::End(0)) {
            Ok(bytes) => bytes,
            Err(source) => return Err(Error::Size { path, source }),
        };
        if bytes < SECTOR {
            return Err(Error::Empty { path, bytes });
        }
        if bytes % SECTOR != 0 {
            tracing::warn!(
                path = %path.display(),
                bytes,
                "the disk image ends within a sector; the guest does not see that part"
            );
        }
        Ok(Self {
            file,
            path,
            read_only,
            sectors: bytes / SECTOR,
            complained: AtomicBool::new(false),
        })
    }

    /// Size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether it was opened for reading only.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The byte offset of `len` bytes at `sector`, if they are whole sectors of this disk.
    pub(super) fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        let end = sector.checked_add(len / SECTOR)?;
        (len.is_multiple_of(SECTOR) && end <= self.sectors).then(|| sector * SECTOR)
    }

    /// Reads from `offset` into all of `data`.
    pub(super) fn read(
        &self,
        offset: u64,
        data: Buffers<'_>,
        cancelled: &AtomicBool,
    ) -> Result<(), Partial> {
        transfer(offset, data, cancelled, |data, offset| {
            let (_guards, vectors) = writable_vectors(data);
            // SAFETY: each vector is a slice of guest memory that `data` borrows and `_guards`
            // keeps mapped for the call; the kernel writes only there, at most their lengths, and
            // guest memory is not Rust's to assume anything about.
            let moved = unsafe {
                libc::preadv(
                    self.file.as_raw_fd(),
                    vectors.as_ptr(),
                    vectors.len() as libc::c_int,
                    offset,
                )
            };
            result(moved)
        })
        .inspect_err(|partial| {
            if let Some(error) = &partial.error {
                self.complain("reading", error);
            }
        })
    }

    /// Writes all of `data` at `offset`.
    pub(super) fn write(
        &self,
        offset: u64,
        data: Buffers<'_>,
        cancelled: &AtomicBool,
    ) -> Result<(), Partial> {
        transfer(offset, data, cancelled, |data, offset| {
            let (_guards, vectors) = readable_vectors(data);
            // SAFETY: each vector is a slice of guest memory that `data` borrows and `_guards`
            // keeps mapped for the call; the kernel only reads there.
            let moved = unsafe {
                libc::pwritev(
                    self.file.as_raw_fd(),
                    vectors.as_ptr(),
                    vectors.len() as libc::c_int,
                    offset,
                )
            };
            result(moved)
        })
        .inspect_err(|partial| {
            if let Some(error) = &partial.error {
                self.complain("writing", error);
            }
        })
    }

    /// Makes all that was written durable (fdatasync).
    pub(super) fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.file
            .sync_data()
            .inspect_err(|error| self.complain("flushing", error))
    }

    /// Says the first failure aloud; a guest that repeats it does not fill the log.
    fn complain(&self, what: &'static str, error: &io::Error) {
        if !self.complained.swap(true, Ordering::Relaxed) {
            tracing::warn!(path = %self.path.display(), %error, what, "disk I/O failed");
        }
    }
}

fn result(moved: libc::ssize_t) -> io::Result<u64> {
    u64::try_from(moved).map_err(|_| io::Error::last_os_error())
}

/// Moves all of `data`, some at a time, by `call`, which gets what is next and its offset.
fn transfer(
    offset: u64,
    mut data: Buffers<'_>,
    cancelled: &AtomicBool,
    mut call: impl FnMut(&Buffers<'_>, libc::off_t) -> io::Result<u64>,
) -> Result<(), Partial> {
    let mut done = 0;
    while !data.is_empty() {
        let partial = |error| Partial { done, error };
        if cancelled.load(Ordering::Relaxed) {
            return Err(partial(None));
        }
        let at = libc::off_t::try_from(offset + done)
            .map_err(|_| partial(Some(io::ErrorKind::FileTooLarge.into())))?;
        match call(&data, at) {
            // The file has become shorter than the disk.
            Ok(0) => return Err(partial(Some(io::ErrorKind::UnexpectedEof.into()))),
            Ok(moved) => {
                data.take(moved);
                done += moved;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(partial(Some(error))),
        }
    }
    Ok(())
}

/// The lengths to use of the first slices: at most [`SLICES`], at most [`CHUNK`] bytes.
fn lengths(data: &Buffers<'_>) -> impl Iterator<Item = usize> {
    let mut room = CHUNK as usize;
    data.slices().take(SLICES).map_while(move |slice| {
        let len = slice.len().min(room);
        room -= len;
        (len > 0).then_some(len)
    })
}

fn writable_vectors(data: &Buffers<'_>) -> (Vec<PtrGuardMut>, Vec<libc::iovec>) {
    data.slices()
        .zip(lengths(data))
        .map(|(slice, iov_len)| {
            let guard = slice.ptr_guard_mut();
            let iov_base = guard.as_ptr().cast();
            (guard, libc::iovec { iov_base, iov_len })
        })
        .unzip()
}

fn readable_vectors(data: &Buffers<'_>) -> (Vec<PtrGuard>, Vec<libc::iovec>) {
    data.slices()
        .zip(lengths(data))
        .map(|(slice, iov_len)| {
            let guard = slice.ptr_guard();
            let iov_base = guard.as_ptr().cast_mut().cast();
            (guard, libc::iovec { iov_base, iov_len })
        })
        .unzip()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn config(path: impl Into<PathBuf>, read_only: bool) -> DiskConfig {
        DiskConfig {
            path: path.into(),
            read_only,
            id: String::new(),
        }
    }

    fn image(bytes: usize) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("an image");
        file.write_all(&vec![7; bytes]).expect("written");
        file
    }

    #[test]
    fn a_missing_image_is_named_with_its_access() {
        let error = Disk::open(&config("/nowhere/disk.raw", false)).expect_err("missing");
        assert_eq!(
            error.to_string(),
            "Cannot open the disk image /nowhere/disk.raw for writing"
        );
    }

    #[test]
    fn directories_pipes_and_empty_files_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(matches!(
            Disk::open(&config(folder.path(), true)),
            Err(Error::Kind { .. })
        ));
        assert!(matches!(
            Disk::open(&config("/dev/null", true)),
            Err(Error::Kind { .. })
        ));
        let file = image(511);
        assert!(matches!(
            Disk::open(&config(file.path(), true)),
            Err(Error::Empty { bytes: 511, .. })
        ));
    }

    #[test]
    fn one_writer_or_many_readers() {
        let file = image(512);
        let first = Disk::open(&config(file.path(), true)).expect("a reader");
        let second = Disk::open(&config(file.path(), true)).expect("another reader");
        let error = Disk::open(&config(file.path(), false)).expect_err("readers are there");
        assert!(
            matches!(error, Error::Locked { .. })
                && error.to_string().contains(&*file.path().to_string_lossy()),
            "{error}"
        );
        drop((first, second));
        let writer = Disk::open(&config(file.path(), false)).expect("a writer");
        for read_only in [true, false] {
            assert!(matches!(
                Disk::open(&config(file.path(), read_only)),
                Err(Error::Locked { .. })
            ));
        }
        drop(writer);
        Disk::open(&config(file.path(), false)).expect("unlocked by the drop");
    }

    #[test]
    fn ranges_are_whole_sectors_within_the_disk() {
        let file = image(4 * 512 + 100);
        let disk = Disk::open(&config(file.path(), true)).expect("a disk");
        assert_eq!(disk.sectors(), 4);
        for (sector, len, offset) in [
            (0, 512, Some(0)),
            (3, 512, Some(3 * 512)),
            (0, 2048, Some(0)),
            (4, 0, Some(2048)),
            (5, 0, None),
            (4, 512, None),
            (3, 1024, None),
            (0, 2560, None),
            (0, 511, None),
            (0, 513, None),
            (u64::MAX, 512, None),
            (u64::MAX, 0, None),
            (u64::MAX / 512 + 1, 512, None),
        ] {
            assert_eq!(disk.offset(sector, len), offset, "{len} at {sector}");
        }
    }
}
