//! What the host shows to the guest: a directory or a file, under a name in
//! the virtual root.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, Mode, OFlags, openat};
use rustix::io::Errno;

use crate::Error;
use crate::limits::{Access, Caching};
use crate::owners::{Owners, clone_tree};
use crate::stat::{Stat, stat};
use crate::sys::{self, FileHandle};

/// A detached clone of what `path` names, for [`FileServer::export`](crate::FileServer::export): a mount that is in no
/// namespace and goes away with its descriptors. It is nosuid and nodev, and read-only unless `access` says
/// otherwise; with `recursive` the mounts below come along, and the same holds for them. Later mounts
/// and unmounts on the host do not reach it.
///
/// # Errors
///
/// [`Error::Clone`] and [`Error::Attributes`]: nothing less strict is given instead.
pub fn open_export(path: &Path, access: Access, recursive: bool) -> Result<OwnedFd, Error> {
    let fd = clone_tree(path, recursive)?;
    let (what, read_only) = match access {
        Access::ReadOnly => ("read-only, nosuid and nodev", libc::MOUNT_ATTR_RDONLY),
        Access::ReadWrite => ("nosuid and nodev", 0),
    };
    let set = read_only | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    sys::set_mount_attributes(fd.as_fd(), set, recursive).map_err(|source| Error::Attributes {
        path: path.to_owned(),
        what,
        source,
    })?;
    Ok(fd)
}

/// The same with other owners: with `all` those of the mounts below as well, else theirs stay.
///
/// # Errors
///
/// As [`open_export`], and [`Error::Owners`] where a file system has no mapped mounts.
pub fn open_mapped_export(
    path: &Path,
    access: Access,
    recursive: bool,
    owners: &Owners,
    all: bool,
) -> Result<OwnedFd, Error> {
    let fd = open_export(path, access, recursive)?;
    owners.map()?.set(fd.as_fd(), path, recursive && all)?;
    Ok(fd)
}

/// One export. It lives as long as a node, a handle or a request of it does.
#[derive(Debug)]
pub(crate) struct Export {
    /// Its place in the order of exports, never used again.
    pub id: u64,
    pub name: CString,
    pub root: OwnedFd,
    pub access: Access,
    pub caching: Caching,
    /// The root's type and identity.
    pub stat: Stat,
    /// A file on each mount by which handles are opened, by the mount's id; `None` where there are no handles.
    mounts: Mutex<HashMap<u64, Option<Arc<OwnedFd>>>>,
    withdrawn: AtomicBool,
    /// Dropped with the export.
    gone: Mutex<Option<Sender<()>>>,
}

impl Export {
    pub fn new(
        id: u64,
        name: &str,
        root: OwnedFd,
        access: Access,
        caching: Caching,
    ) -> Result<Self, Error> {
        let valid = !matches!(name, "" | "." | "..") && name.len() <= 255 && !name.contains('/');
        let Some(c_name) = CString::new(name).ok().filter(|_| valid) else {
            return Err(Error::Name { name: name.into() });
        };
        let stat = stat(root.as_fd()).map_err(|source| Error::Look {
            name: name.into(),
            source,
        })?;
        if !matches!(
            stat.file_type(),
            FileType::Directory | FileType::RegularFile
        ) {
            return Err(Error::Kind {
                name: name.into(),
                mode: stat.attr.mode,
            });
        }
        Ok(Self {
            id,
            name: c_name,
            root,
            access,
            caching,
            stat,
            mounts: Mutex::default(),
            withdrawn: AtomicBool::new(false),
            gone: Mutex::default(),
        })
    }

    pub fn read_only(&self) -> bool {
        self.access == Access::ReadOnly
    }

    /// No new node of it is made from now on. What is returned is disconnected when the export is gone.
    pub fn withdraw(&self) -> Receiver<()> {
        self.withdrawn.store(true, Ordering::SeqCst);
        let (sender, receiver) = channel();
        *self.gone.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        receiver
    }

    pub fn is_withdrawn(&self) -> bool {
        self.withdrawn.load(Ordering::SeqCst)
    }

    /// A handle of the file behind `fd`, if a file on its mount can be had by which the handle is opened again.
    /// `directory` says whether `fd` is one.
    pub fn handle(
        &self,
        fd: BorrowedFd<'_>,
        mount: u64,
        directory: bool,
    ) -> Result<FileHandle, Errno> {
        let known = self.mounts().get(&mount).cloned();
        if matches!(known, Some(None)) {
            return Err(Errno::OPNOTSUPP);
        }
        let handle = FileHandle::of(fd).inspect_err(|error| {
            if *error == Errno::OPNOTSUPP {
                self.mounts().insert(mount, None);
            }
        })?;
        if known.is_none() {
            // Any directory on the mount will do.
            let from = if directory {
                fd
            } else if mount == self.stat.mount && self.stat.is_directory() {
                self.root.as_fd()
            } else {
                return Err(Errno::NOENT);
            };
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let file = openat(from, c".", flags, Mode::empty())?;
            self.mounts().insert(mount, Some(Arc::new(file)));
        }
        // Whether it can be opened is known only by doing it: a capability may be missing.
        match handle.open(self.mount(mount)?.as_fd()) {
            Ok(_) => Ok(handle),
            Err(error) => {
                if error == Errno::PERM {
                    self.mounts().insert(mount, None);
                }
                Err(error)
            }
        }
    }

    pub fn open_handle(&self, handle: &FileHandle, mount: u64) -> Result<OwnedFd, Errno> {
        handle.open(self.mount(mount)?.as_fd())
    }

    fn mount(&self, mount: u64) -> Result<Arc<OwnedFd>, Errno> {
        let found = self.mounts().get(&mount).cloned();
        found.flatten().ok_or(Errno::STALE)
    }

    fn mounts(&self) -> MutexGuard<'_, HashMap<u64, Option<Arc<OwnedFd>>>> {
        self.mounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
