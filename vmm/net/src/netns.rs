//! A network namespace, and work in it: always on a thread that is made for it
//! and ends with it, so that no thread of the process is ever in a wrong namespace.

use std::any::Any;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use serde::{Deserialize, Serialize};

use crate::Error;

// include/uapi/linux/nsfs.h: _IO(0xb7, 0x3)
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;

/// Which namespace it is, among those that exist at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NetnsId {
    /// The file system's device number.
    pub device: u64,
    /// The inode's number. The kernel gives it again to a new namespace when the old is gone.
    pub inode: u64,
}

/// A network namespace, which lives at least as long as this. Clones share it.
#[derive(Debug, Clone)]
pub struct Netns {
    file: Arc<File>,
    path: PathBuf,
    id: NetnsId,
}

impl Netns {
    /// Of its file: a bind mount such as CNI's `/run/netns/NAME`, or `/proc/PID/ns/net`.
    ///
    /// # Errors
    ///
    /// [`Error::Namespace`] if it cannot be opened, [`Error::NoNamespace`] if it is something else.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        // A FIFO in its place holds nobody up.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)
            .map_err(|source| Error::Namespace {
                doing: "open",
                what: path.display().to_string(),
                source,
            })?;
        Self::of(file, path.to_owned())
    }

    /// Of its open file.
    ///
    /// # Errors
    ///
    /// [`Error::NoNamespace`] if it is something else.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, Error> {
        let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let path = std::fs::read_link(&path).unwrap_or(path);
        Self::of(fd.into(), path)
    }

    /// That of a process.
    ///
    /// # Errors
    ///
    /// As [`Netns::open`].
    pub fn of_process(pid: u32) -> Result<Self, Error> {
        Self::open(format!("/proc/{pid}/ns/net"))
    }

    /// A new one with a loopback interface that is down. It is gone with the last that refers to it.
    ///
    /// # Errors
    ///
    /// [`Error::Namespace`]: the caller may not (CAP_SYS_ADMIN), or there are too many.
    pub fn create() -> Result<Self, Error> {
        let work = || {
            // SAFETY: the network namespace alone is unshared, by a thread that has opened no socket and ends at once.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
            File::open("/proc/thread-self/ns/net")
        };
        let made = std::thread::scope(|scope| scope.spawn(work).join());
        let file = match made {
            Ok(file) => file.map_err(|source| Error::Namespace {
                doing: "make",
                what: "for a VM".to_owned(),
                source,
            })?,
            Err(panic) => return Err(panicked("that is new", panic.as_ref())),
        };
        Self::from_fd(file.into())
    }

    fn of(file: File, path: PathBuf) -> Result<Self, Error> {
        // SAFETY: the request takes no argument, and one that is no namespace's file refuses it.
        let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
        if kind != libc::CLONE_NEWNET {
            return Err(Error::NoNamespace {
                is: what_else(kind, &file),
                path,
            });
        }
        let stat = rustix::fs::fstat(&file).map_err(|errno| Error::Namespace {
            doing: "look at",
            what: path.display().to_string(),
            source: errno.into(),
        })?;
        Ok(Self {
            file: Arc::new(file),
            path,
            id: NetnsId {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
        })
    }

    /// Where it was opened, or what the system calls it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which it is.
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// Runs `work` on a thread of its own in the namespace, and waits for it. What is opened there, such as a socket or a TAP
    /// interface, belongs to the namespace for good.
    ///
    /// # Errors
    ///
    /// [`Error::Namespace`] if it cannot be entered (CAP_SYS_ADMIN), [`Error::Panicked`], and those of `work`.
    pub fn enter<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, Error> + Send,
    ) -> Result<T, Error> {
        let failed = |doing| {
            move |source| Error::Namespace {
                doing,
                what: self.to_string(),
                source,
            }
        };
        let inside = || {
            move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|errno| failed("enter")(errno.into()))?;
            work()
        };
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("netns".to_owned())
                .spawn_scoped(scope, inside)
                .map_err(failed("start a thread for"))?
                .join()
                .unwrap_or_else(|panic| Err(panicked(&self.to_string(), panic.as_ref())))
        })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl fmt::Display for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

fn panicked(what: &str, panic: &(dyn Any + Send)) -> Error {
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    Error::Panicked {
        what: what.to_owned(),
        message: message.unwrap_or("it said nothing").to_owned(),
    }
}

/// What a file is that is no network namespace, in words.
fn what_else(kind: libc::c_int, file: &File) -> String {
    const KINDS: [(libc::c_int, &str); 7] = [
        (libc::CLONE_NEWNS, "mount"),
        (libc::CLONE_NEWPID, "PID"),
        (libc::CLONE_NEWUSER, "user"),
        (libc::CLONE_NEWUTS, "UTS"),
        (libc::CLONE_NEWIPC, "IPC"),
        (libc::CLONE_NEWCGROUP, "cgroup"),
        (libc::CLONE_NEWTIME, "time"),
    ];
    if kind > 0 {
        let known = KINDS.iter().find(|(number, _)| *number == kind);
        return format!("a {} namespace", known.map_or("strange", |(_, name)| name));
    }
    let is = match file.metadata().map(|metadata| metadata.file_type()) {
        Ok(kind) if kind.is_dir() => "a directory",
        // `ip netns` and CNI leave one when the mount on it is gone.
        Ok(kind) if kind.is_file() => "a plain file (is the namespace's mount on it gone?)",
        Ok(kind) if kind.is_fifo() => "a FIFO",
        Ok(kind) if kind.is_char_device() || kind.is_block_device() => "a device",
        _ => "another kind of file",
    };
    is.to_owned()
}
