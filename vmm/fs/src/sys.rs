//! System calls that no crate wraps, and those on guest memory.

use std::ffi::CStr;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use nacre_vmm::virtio::queue::Buffers;
use rustix::io::Errno;
use vm_memory::VolatileSlice;

/// Segments of one vectored call, at most (`UIO_MAXIOV`).
const MAX_SEGMENTS: usize = 1024;

/// The error of the last failed call of libc.
fn last() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn check(result: libc::c_int) -> Result<libc::c_int, Errno> {
    if result < 0 { Err(last()) } else { Ok(result) }
}

/// A file handle, by which the kernel finds a file again (`struct file_handle`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileHandle {
    kind: i32,
    bytes: Box<[u8]>,
}

/// `struct file_handle` with room for the largest.
#[repr(C)]
struct RawHandle {
    bytes: u32,
    kind: i32,
    handle: [u8; 128],
}

impl FileHandle {
    /// Of the file behind an O_PATH descriptor; fails where the file system gives none.
    pub fn of(fd: BorrowedFd<'_>) -> Result<Self, Errno> {
        let mut raw = RawHandle {
            bytes: 128,
            kind: 0,
            handle: [0; 128],
        };
        let mut mount = 0;
        // SAFETY: the path is an empty C string; the structure has the layout of `file_handle` and as much
        // room as it says; `mount` is an integer to be written.
        check(unsafe {
            libc::name_to_handle_at(
                fd.as_raw_fd(),
                c"".as_ptr(),
                ptr::from_mut(&mut raw).cast(),
                &mut mount,
                libc::AT_EMPTY_PATH,
            )
        })?;
        let bytes = raw.handle.get(..raw.bytes as usize).ok_or(Errno::IO)?;
        Ok(Self {
            kind: raw.kind,
            bytes: bytes.into(),
        })
    }

    /// Opens the file, without following it if it is a symbolic link. `mount` is any file on the mount, not O_PATH.
    pub fn open(&self, mount: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
        let mut raw = RawHandle {
            bytes: self.bytes.len() as u32,
            kind: self.kind,
            handle: [0; 128],
        };
        raw.handle[..self.bytes.len()].copy_from_slice(&self.bytes);
        // SAFETY: the structure has the layout of `file_handle` and holds as many bytes as it says.
        let fd = check(unsafe {
            libc::open_by_handle_at(
                mount.as_raw_fd(),
                ptr::from_mut(&mut raw).cast(),
                libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC,
            )
        })?;
        // SAFETY: the call has made the descriptor, and no one else has it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// Sets this thread's user and group for new files.
pub fn set_fs_ids(uid: u32, gid: u32) -> Result<(), Errno> {
    // SAFETY: no memory is involved. glibc changes the calling thread only. -1 is no id, which makes the second
    // calls a question.
    let now = unsafe {
        libc::setfsgid(gid);
        libc::setfsuid(uid);
        (
            libc::setfsuid(u32::MAX).cast_unsigned(),
            libc::setfsgid(u32::MAX).cast_unsigned(),
        )
    };
    if now == (uid, gid) {
        Ok(())
    } else {
        Err(Errno::PERM)
    }
}

/// Sets attributes of the mount behind a descriptor, and with `recursive` of those below it.
pub fn set_mount_attributes(mount: BorrowedFd<'_>, set: u64, recursive: bool) -> Result<(), Errno> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    mount_setattr(mount, &attributes, recursive)
}

/// Has the mount behind a descriptor, and with `recursive` those below it, show other owners: those of a user namespace.
pub fn map_mount_owners(
    mount: BorrowedFd<'_>,
    namespace: BorrowedFd<'_>,
    recursive: bool,
) -> Result<(), Errno> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: namespace.as_raw_fd() as u64,
    };
    mount_setattr(mount, &attributes, recursive)
}

fn mount_setattr(
    mount: BorrowedFd<'_>,
    attributes: &libc::mount_attr,
    recursive: bool,
) -> Result<(), Errno> {
    let flags = if recursive {
        libc::AT_EMPTY_PATH | libc::AT_RECURSIVE
    } else {
        libc::AT_EMPTY_PATH
    };
    let path: &CStr = c"";
    // SAFETY: the path is an empty C string, and the structure is the one that the call reads, of the size that is said.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            path.as_ptr(),
            flags,
            ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(last()) } else { Ok(()) }
}

/// Blocks all signals of this thread: they are for others, and a write beyond RLIMIT_FSIZE fails
/// instead of killing the process.
pub fn block_signals() {
    // SAFETY: the set is filled before it is used, and lives until both calls have returned.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigfillset(&mut set);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut());
    }
}

/// Which way [`transfer`] goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the file into guest memory.
    Read,
    /// From guest memory into the file, at the offset.
    Write,
    /// From guest memory to the end of the file.
    Append,
}

/// Moves bytes between a file and all of `buffers` without a copy of them; how many. Less than
/// asked for only at the end of the file, or when a later part fails.
pub fn transfer(
    file: impl AsFd,
    direction: Direction,
    buffers: &Buffers<'_>,
    offset: u64,
) -> Result<u64, Errno> {
    let slices: Vec<&VolatileSlice<'_>> = buffers.slices().collect();
    let mut total = 0_u64;
    for part in slices.chunks(MAX_SEGMENTS) {
        let wanted: u64 = part.iter().map(|slice| slice.len() as u64).sum();
        let at = offset.checked_add(total).ok_or(Errno::INVAL)?;
        match transfer_part(file.as_fd(), direction, part, at) {
            Ok(done) => {
                total += done;
                if done < wanted {
                    break;
                }
            }
            Err(error) if total == 0 => return Err(error),
            Err(_) => break,
        }
    }
    Ok(total)
}

fn transfer_part(
    file: BorrowedFd<'_>,
    direction: Direction,
    slices: &[&VolatileSlice<'_>],
    offset: u64,
) -> Result<u64, Errno> {
    let offset = i64::try_from(offset).map_err(|_| Errno::INVAL)?;
    let guards: Vec<_> = slices.iter().map(|slice| slice.ptr_guard_mut()).collect();
    let segments: Vec<libc::iovec> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let count = segments.len() as libc::c_int;
    let fd = file.as_raw_fd();
    loop {
        // SAFETY: each segment is a slice of guest memory, which its guard keeps mapped until the calls have returned;
        // no Rust reference into guest memory exists, so it may change at any time.
        let done = unsafe {
            match direction {
                Direction::Read => libc::preadv(fd, segments.as_ptr(), count, offset),
                Direction::Write => libc::pwritev(fd, segments.as_ptr(), count, offset),
                Direction::Append => {
                    libc::pwritev2(fd, segments.as_ptr(), count, offset, libc::RWF_APPEND)
                }
            }
        };
        match u64::try_from(done) {
            Ok(done) => return Ok(done),
            Err(_) => match last() {
                Errno::INTR => {}
                error => return Err(error),
            },
        }
    }
}

/// Reads entries of an open directory from its position on, as `struct linux_dirent64`; how many bytes.
pub fn read_directory(directory: impl AsFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: the buffer is as long as is said, and what is written are plain bytes.
    let done = unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            directory.as_fd().as_raw_fd(),
            buffer.as_mut_ptr(),
            buffer.len(),
        )
    };
    usize::try_from(done).map_err(|_| last())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use rustix::fs::{Mode, OFlags};

    use super::*;

    #[test]
    fn a_file_is_found_again_by_its_handle() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a");
        std::fs::write(&path, "text").expect("written");
        let fd = rustix::fs::open(&path, OFlags::PATH, Mode::empty()).expect("opened");
        let mount = File::open(folder.path()).expect("opened");
        let handle = FileHandle::of(fd.as_fd()).expect("the file system gives handles");
        std::fs::rename(&path, folder.path().join("b")).expect("renamed");
        let again = handle.open(mount.as_fd()).expect("found");
        let ino = |fd: &OwnedFd| rustix::fs::fstat(fd).expect("stat").st_ino;
        assert_eq!(ino(&fd), ino(&again));
        drop((fd, again));
        std::fs::remove_file(folder.path().join("b")).expect("removed");
        assert_eq!(handle.open(mount.as_fd()).expect_err("gone"), Errno::STALE);
    }
}
