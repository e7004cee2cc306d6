//! One file behind a disk: opened, locked, and the system calls on it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::Error;
use super::engine::{Action, Vectors};
use crate::config::DiskCache;

/// Most bytes of zeros written by one system call.
const ZEROS: usize = 1 << 20;
/// `_IO(0x12, 119)`: frees a range of a block device.
const BLKDISCARD: libc::Ioctl = 0x1277;
/// What O_DIRECT asks for at most where the file system does not say.
const CAUTIOUS_ALIGNMENT: u64 = 4096;

/// A raw image. The lock on it is held as long as this value lives: shared for reading, exclusive
/// for writing, so that no two VMs write one image and none reads what another writes.
#[derive(Debug)]
pub struct Image {
    file: File,
    direct: Option<Direct>,
    path: PathBuf,
    device: bool,
    bytes: u64,
    complained: AtomicBool,
}

/// The image once more, past the page cache. Linux keeps both ways coherent.
#[derive(Debug)]
struct Direct {
    file: File,
    memory_alignment: u64,
    offset_alignment: u64,
}

impl Image {
    /// Opens and locks the image at `path`, O_RDONLY if it is to be read only; it has at least
    /// `least` bytes. Its size is taken now and stays.
    ///
    /// # Errors
    ///
    /// [`Error`], with the path.
    pub fn open(path: &Path, read_only: bool, cache: DiskCache, least: u64) -> Result<Self, Error> {
        let path = path.to_owned();
        let mut file = match open(&path, read_only, 0) {
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
        if bytes < least {
            return Err(Error::Empty { path, bytes, least });
        }
        let direct = match cache {
            DiskCache::Host => None,
            DiskCache::Direct => match Direct::open(&file, read_only) {
                Ok(direct) => Some(direct),
                Err(source) => return Err(Error::Direct { path, source }),
            },
        };
        Ok(Self {
            file,
            direct,
            path,
            device: kind.is_block_device(),
            bytes,
            complained: AtomicBool::new(false),
        })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its file descriptor, and the one past the page cache if there is one.
    pub fn descriptors(&self) -> (RawFd, Option<RawFd>) {
        let direct = self.direct.as_ref().map(|direct| direct.file.as_raw_fd());
        (self.file.as_raw_fd(), direct)
    }

    /// Whether a transfer at `offset` goes past the page cache.
    pub fn goes_direct(&self, offset: u64, vectors: &[libc::iovec]) -> bool {
        self.direct.as_ref().is_some_and(|direct| {
            offset.is_multiple_of(direct.offset_alignment)
                && vectors.iter().all(|vector| {
                    (vector.iov_base as u64).is_multiple_of(direct.memory_alignment)
                        && (vector.iov_len as u64).is_multiple_of(direct.offset_alignment)
                })
        })
    }

    /// Carries out `action` by system calls that this thread waits for; returns how many bytes
    /// were moved. What takes several calls ends early with `cancelled`.
    ///
    /// # Safety
    ///
    /// What the action's vectors name is mapped, and their table is there.
    pub unsafe fn perform(
        &self,
        action: &Action,
        direct: bool,
        cancelled: &AtomicBool,
    ) -> io::Result<u64> {
        match *action {
            Action::Read { offset, vectors } => {
                let fd = self.descriptor(direct);
                let Vectors { first, count } = vectors;
                // SAFETY: the caller's promise; the kernel writes only where the vectors say, and
                // that memory is the guest's, of which Rust assumes nothing.
                moved(unsafe { libc::preadv(fd, first, count as libc::c_int, position(offset)?) })
            }
            Action::Write { offset, vectors } => {
                let fd = self.descriptor(direct);
                let Vectors { first, count } = vectors;
                // SAFETY: the caller's promise; the kernel only reads there.
                moved(unsafe { libc::pwritev(fd, first, count as libc::c_int, position(offset)?) })
            }
            Action::Sync => self.file.sync_data().map(|()| 0),
            Action::Discard { offset, len } => self.discard(offset, len).map(|()| 0),
            Action::Zero { offset, len, unmap } => {
                self.zero(offset, len, unmap, cancelled).map(|()| 0)
            }
        }
    }

    fn descriptor(&self, direct: bool) -> RawFd {
        match &self.direct {
            Some(past) if direct => past.file.as_raw_fd(),
            _ => self.file.as_raw_fd(),
        }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if !self.device {
            return self.allocate(libc::FALLOC_FL_PUNCH_HOLE, offset, len);
        }
        let range = [offset, len];
        // SAFETY: the call reads two u64, which live for it.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
        moved(result as libc::ssize_t).map(drop)
    }

    /// Makes the range read as zeros: as a hole if that may be, else as allocated zeros, else by
    /// writing them.
    fn zero(&self, offset: u64, len: u64, unmap: bool, cancelled: &AtomicBool) -> io::Result<()> {
        let modes: &[libc::c_int] = if unmap {
            &[libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE]
        } else {
            &[libc::FALLOC_FL_ZERO_RANGE]
        };
        for &mode in modes {
            match self.allocate(mode, offset, len) {
                // EINVAL: a range that is not whole blocks of a block device.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
                    ) => {}
                result => return result,
            }
        }
        self.write_zeros(offset, len, cancelled)
    }

    fn write_zeros(&self, offset: u64, len: u64, cancelled: &AtomicBool) -> io::Result<()> {
        let zeros = vec![0; ZEROS.min(len as usize)];
        let mut done = 0;
        while done < len {
            if cancelled.load(Ordering::SeqCst) {
                return Err(io::Error::from_raw_os_error(libc::ECANCELED));
            }
            let part = &zeros[..(len - done).min(ZEROS as u64) as usize];
            match std::os::unix::fs::FileExt::write_at(&self.file, part, offset + done) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => done += written as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn allocate(&self, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        let (offset, len) = (position(offset)?, position(len)?);
        loop {
            // SAFETY: the call takes integers and a descriptor that `self` owns.
            let result = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) };
            match moved(result as libc::ssize_t) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map(drop),
            }
        }
    }

    /// Says the first failure aloud; a guest that repeats it does not fill the log.
    pub fn complain(&self, what: &'static str, error: &io::Error) {
        if !self.complained.swap(true, Ordering::Relaxed) {
            tracing::warn!(path = %self.path.display(), %error, what, "disk I/O failed");
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // An io_uring that is gone may keep the file open for a while, and its lock with it.
        let _ = self.file.unlock();
    }
}

impl Direct {
    /// Opens the same file, whatever its path names by now.
    fn open(file: &File, read_only: bool) -> io::Result<Self> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let direct = open(Path::new(&path), read_only, libc::O_DIRECT)?;
        let (memory_alignment, offset_alignment) = alignments(&direct);
        Ok(Self {
            file: direct,
            memory_alignment,
            offset_alignment,
        })
    }
}

fn open(path: &Path, read_only: bool, flags: libc::c_int) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(!read_only)
        // Opening a pipe would wait for its other end.
        .custom_flags(libc::O_NONBLOCK | flags)
        .open(path)
}

/// What O_DIRECT asks of addresses, and of offsets and lengths. Kernels before 6.1 and some file
/// systems do not say.
fn alignments(file: &File) -> (u64, u64) {
    let mut about = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty string, so the call is about the descriptor; it writes one
    // `statx`, which `about` has room for.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            about.as_mut_ptr(),
        )
    };
    // SAFETY: all bits zero is a `statx`, and so is what the kernel made of it.
    let about = unsafe { about.assume_init() };
    let said = result == 0 && about.stx_mask & libc::STATX_DIOALIGN != 0;
    match (about.stx_dio_mem_align, about.stx_dio_offset_align) {
        (memory @ 1.., offset @ 1..) if said => (memory.into(), offset.into()),
        _ => (CAUTIOUS_ALIGNMENT, CAUTIOUS_ALIGNMENT),
    }
}

fn position(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge.into())
}

fn moved(result: libc::ssize_t) -> io::Result<u64> {
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn open(path: &Path, read_only: bool) -> Result<Image, Error> {
        Image::open(path, read_only, DiskCache::Host, 512)
    }

    fn image(bytes: usize) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("an image");
        file.write_all(&vec![7; bytes]).expect("written");
        file
    }

    #[test]
    fn a_missing_image_is_named_with_its_access() {
        let error = open(Path::new("/nowhere/disk.raw"), false).expect_err("missing");
        assert_eq!(
            error.to_string(),
            "Cannot open the disk image /nowhere/disk.raw for writing"
        );
    }

    #[test]
    fn directories_pipes_and_empty_files_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(matches!(open(folder.path(), true), Err(Error::Kind { .. })));
        assert!(matches!(
            open(Path::new("/dev/null"), true),
            Err(Error::Kind { .. })
        ));
        let file = image(511);
        let error = open(file.path(), true).expect_err("too short");
        assert!(
            error.to_string().contains("511 bytes; at least 512"),
            "{error}"
        );
    }

    #[test]
    fn one_writer_or_many_readers() {
        let file = image(512);
        let first = open(file.path(), true).expect("a reader");
        let second = open(file.path(), true).expect("another reader");
        let error = open(file.path(), false).expect_err("readers are there");
        assert!(
            matches!(error, Error::Locked { .. })
                && error.to_string().contains(&*file.path().to_string_lossy()),
            "{error}"
        );
        drop((first, second));
        let writer = open(file.path(), false).expect("a writer");
        for read_only in [true, false] {
            assert!(matches!(
                open(file.path(), read_only),
                Err(Error::Locked { .. })
            ));
        }
        drop(writer);
        open(file.path(), false).expect("unlocked by the drop");
    }

    #[test]
    fn zeros_are_written_where_nothing_else_makes_them_and_end_when_cancelled() {
        let file = image(3 << 20);
        let image = open(file.path(), false).expect("an image");
        let range = (1000, (2 << 20) + 7);
        let cancelled = AtomicBool::new(true);
        let result = image.write_zeros(range.0, range.1, &cancelled);
        let error = result.expect_err("cancelled");
        assert_eq!(error.raw_os_error(), Some(libc::ECANCELED));
        assert!(
            std::fs::read(file.path())
                .expect("read")
                .iter()
                .all(|&byte| byte == 7)
        );
        cancelled.store(false, Ordering::SeqCst);
        image
            .write_zeros(range.0, range.1, &cancelled)
            .expect("written");
        let bytes = std::fs::read(file.path()).expect("read");
        let zeros = bytes.iter().filter(|&&byte| byte == 0).count() as u64;
        assert_eq!((bytes.len(), zeros), (3 << 20, range.1));
        assert_eq!((bytes[999], bytes[1000]), (7, 0));
    }

    #[test]
    fn zeros_without_unmap_keep_their_blocks() {
        let file = image(1 << 20);
        file.as_file().sync_all().expect("synced");
        let image = open(file.path(), false).expect("an image");
        let blocks = || file.as_file().metadata().expect("metadata").blocks();
        let before = blocks();
        let cancelled = AtomicBool::new(false);
        image.zero(0, 1 << 19, false, &cancelled).expect("zeroed");
        assert!(blocks() >= before, "{before} blocks, then {}", blocks());
        image.zero(0, 1 << 19, true, &cancelled).expect("zeroed");
        assert!(
            blocks() <= before - 1000,
            "{before} blocks, then {}",
            blocks()
        );
        let bytes = std::fs::read(file.path()).expect("read");
        assert!(bytes[..1 << 19].iter().all(|&byte| byte == 0));
        assert!(bytes[1 << 19..].iter().all(|&byte| byte == 7));
    }

    #[test]
    fn only_what_is_aligned_goes_past_the_page_cache() {
        // Not /tmp, which may be a tmpfs without O_DIRECT.
        let file = tempfile::NamedTempFile::new_in("/var/tmp").expect("an image");
        file.as_file().set_len(1 << 20).expect("a length");
        let host = Image::open(file.path(), true, DiskCache::Host, 512).expect("an image");
        let direct = Image::open(file.path(), true, DiskCache::Direct, 512).expect("an image");
        let vector = |base: usize, iov_len| libc::iovec {
            iov_base: base as *mut libc::c_void,
            iov_len,
        };
        let page = [vector(0x10_0000, 4096), vector(0x20_0000, 8192)];
        assert!(!host.goes_direct(4096, &page));
        assert!(direct.goes_direct(4096, &page));
        assert!(!direct.goes_direct(4097, &page));
        assert!(!direct.goes_direct(0, &[page[0], vector(0x10_0001, 4096)]));
        assert!(!direct.goes_direct(0, &[page[0], vector(0x10_0000, 100)]));
        assert!(direct.descriptors().1.is_some());
    }
}
