//! The host's side: a TAP interface, by its descriptor.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use vm_memory::VolatileSlice;

use super::{Error, HEADER_BYTES};

// include/uapi/linux/if_tun.h
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;
const TUN_F_TSO_ECN: u32 = 8;

/// `struct ifreq` as far as TUNSETIFF reads and writes it.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// What the guest makes of frames by itself, so that the host need not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Offload {
    pub checksum: bool,
    pub tso4: bool,
    pub tso6: bool,
    pub ecn: bool,
}

/// Error codes, first one first.
#[cfg(test)]
pub(super) type Errors = std::sync::Arc<std::sync::Mutex<std::collections::VecDeque<i32>>>;

/// A descriptor that gives and takes one frame a call, with its header. Nonblocking.
#[derive(Debug)]
pub struct Tap {
    file: File,
    /// Whether it is a TAP interface, which makes offloads.
    offloads: bool,
    /// What the next reads fail with.
    #[cfg(test)]
    pub(super) errors: Errors,
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Tap {
    /// Makes the TAP interface `name`, or attaches to one that is there and persistent, in the calling thread's network namespace.
    /// It is gone with the descriptor, unless it is persistent.
    ///
    /// # Errors
    ///
    /// [`Error`], with the name: it is no name, /dev/net/tun is not there, the caller may not, or it is in use.
    pub fn open(name: &str) -> Result<Self, Error> {
        let failed = |doing| {
            let name = name.to_owned();
            move |source| Error::Tap {
                doing,
                name,
                source,
            }
        };
        let mut request = Request {
            name: [0; libc::IFNAMSIZ],
            flags: (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short,
            rest: [0; 22],
        };
        let usable = |byte: u8| byte > b' ' && byte != b'/' && byte != 0x7f;
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || !name.bytes().all(usable) {
            return Err(Error::Name {
                name: name.to_owned(),
            });
        }
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(failed("open /dev/net/tun for"))?;
        // SAFETY: the structure has the layout and size of an ifreq, and lives over the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
        check(result).map_err(failed("make"))?;
        let size = HEADER_BYTES as libc::c_int;
        // SAFETY: the argument is an integer that lives over the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) };
        check(result).map_err(failed("set the header's size of"))?;
        Ok(Self {
            file,
            offloads: true,
            #[cfg(test)]
            errors: Errors::default(),
        })
    }

    /// Of a nonblocking descriptor that keeps frames apart, such as a socket of type SOCK_SEQPACKET, with a header of
    /// [`HEADER_BYTES`] before each. Offloads are for whoever has its other end.
    pub fn of_frames(descriptor: OwnedFd) -> Self {
        Self {
            file: descriptor.into(),
            offloads: false,
            #[cfg(test)]
            errors: Errors::default(),
        }
    }

    pub(super) fn set_offload(&self, offload: Offload) -> io::Result<()> {
        if !self.offloads {
            return Ok(());
        }
        let mut flags = 0;
        for (wanted, flag) in [
            (offload.checksum, TUN_F_CSUM),
            (offload.tso4, TUN_F_TSO4),
            (offload.tso6, TUN_F_TSO6),
            (offload.ecn, TUN_F_TSO_ECN),
        ] {
            if wanted {
                flags |= flag;
            }
        }
        // SAFETY: the argument is an integer by value.
        let result = unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                TUNSETOFFLOAD,
                libc::c_ulong::from(flags),
            )
        };
        check(result)
    }

    /// One frame with its header; how many bytes. 0 if there is no other end any more.
    pub(super) fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        #[cfg(test)]
        if let Some(code) = self.errors.lock().expect("no panic").pop_front() {
            return Err(io::Error::from_raw_os_error(code));
        }
        retried(|| (&self.file).read(frame))
    }

    /// One frame, from guest memory, with its header.
    pub(super) fn write<'m>(
        &self,
        header: &[u8; HEADER_BYTES],
        frame: impl Iterator<Item = &'m VolatileSlice<'m>>,
    ) -> io::Result<usize> {
        let guards: Vec<_> = frame.map(|slice| slice.ptr_guard()).collect();
        let first = libc::iovec {
            iov_base: header.as_ptr().cast_mut().cast(),
            iov_len: header.len(),
        };
        let rest = guards.iter().map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast_mut().cast(),
            iov_len: guard.len(),
        });
        let parts: Vec<libc::iovec> = std::iter::once(first).chain(rest).collect();
        retried(|| {
            // SAFETY: the header, and each part, a slice of guest memory that stays mapped while its guard lives, are there, and the kernel only
            // reads it; there are as many as is said.
            let written = unsafe {
                libc::writev(
                    self.file.as_raw_fd(),
                    parts.as_ptr(),
                    parts.len() as libc::c_int,
                )
            };
            usize::try_from(written).map_err(|_| io::Error::last_os_error())
        })
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn retried<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
