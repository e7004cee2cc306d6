//! The server as its owner sees it, and what its threads share.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nacre_vmm::virtio::device::VirtioDevice;
use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::Error;
use crate::device::Device;
use crate::export::Export;
use crate::handles::Handles;
use crate::limits::{Access, Caching, Counters, Limits};
use crate::nodes::Nodes;
use crate::stat::InodeNumbers;

/// How long a withdrawal waits for requests that are under way.
const WITHDRAWAL: Duration = Duration::from_secs(1);

/// A file server for one guest. Clones share it. What it shows is a read-only directory whose entries are
/// the exports; they come and go while the guest runs.
#[derive(Clone)]
pub struct FileServer {
    core: Arc<Core>,
}

impl std::fmt::Debug for FileServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileServer")
            .field("counters", &self.counters())
            .finish_non_exhaustive()
    }
}

/// What all threads of a server share.
pub(crate) struct Core {
    pub limits: Limits,
    pub nodes: Nodes,
    pub handles: Handles,
    pub numbers: InodeNumbers,
    pub tally: Tally,
    /// `/proc/self/fd`, by which an O_PATH descriptor is opened.
    pub descriptors: OwnedFd,
    pub born: Duration,
    /// Whether SETXATTR has its longer form.
    pub setxattr_ext: AtomicBool,
    /// The protocol's minor version that the guest speaks; 0 before it has said so.
    pub minor: AtomicU32,
    exports: Mutex<Exports>,
    /// Devices that are active or could become so: one at most.
    device: AtomicBool,
}

#[derive(Default)]
struct Exports {
    by_name: BTreeMap<Vec<u8>, Arc<Export>>,
    last: u64,
}

/// What only ever grows.
#[derive(Default)]
pub(crate) struct Tally {
    pub requests: AtomicU64,
    pub errors: AtomicU64,
    pub malformed: AtomicU64,
    pub read_bytes: AtomicU64,
    pub written_bytes: AtomicU64,
}

impl FileServer {
    /// A server without exports, to be made in the process that serves: it finds its descriptors in this
    /// process's `/proc/self/fd`.
    ///
    /// # Errors
    ///
    /// [`Error::Limit`] and [`Error::Proc`].
    pub fn new(limits: Limits) -> Result<Self, Error> {
        limits.check()?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptors =
            openat(CWD, c"/proc/self/fd", flags, Mode::empty()).map_err(Error::Proc)?;
        Ok(Self {
            core: Arc::new(Core {
                limits,
                nodes: Nodes::new(limits.inodes, limits.kept, limits.pinned),
                handles: Handles::new(limits.handles),
                numbers: InodeNumbers::default(),
                tally: Tally::default(),
                descriptors,
                born: SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .unwrap_or_default(),
                setxattr_ext: AtomicBool::new(false),
                minor: AtomicU32::new(0),
                exports: Mutex::default(),
                device: AtomicBool::new(false),
            }),
        })
    }

    /// Shows what `root` names as the entry `name` of the virtual root, cached for a second at most: see
    /// [`export_cached`](Self::export_cached).
    ///
    /// # Errors
    ///
    /// As there.
    pub fn export(&self, name: &str, root: OwnedFd, access: Access) -> Result<(), Error> {
        self.export_cached(name, root, access, Caching::default())
    }

    /// Shows what `root` names, a directory or one regular file, as the entry `name` of the virtual root. `root` is
    /// O_PATH, and may be of a mount that is in no namespace ([`open_export`](crate::open_export)). The guest sees all
    /// that is below it, mounts included, and nothing else.
    ///
    /// # Errors
    ///
    /// [`Error::Name`], [`Error::Taken`], [`Error::Look`] and [`Error::Kind`].
    pub fn export_cached(
        &self,
        name: &str,
        root: OwnedFd,
        access: Access,
        caching: Caching,
    ) -> Result<(), Error> {
        let mut exports = self.core.exports();
        if exports.by_name.contains_key(name.as_bytes()) {
            return Err(Error::Taken { name: name.into() });
        }
        let id = exports.last + 1;
        let export = Export::new(id, name, root, access, caching)?;
        exports.last = id;
        exports
            .by_name
            .insert(name.as_bytes().to_vec(), Arc::new(export));
        tracing::debug!(name, ?access, ?caching, "exported");
        Ok(())
    }

    /// Takes an export away; whether there was one. The guest no longer finds it, what it has open of it is
    /// closed, and what it knows of it is stale. When this returns all of the export's descriptors are
    /// closed, unless a request to a slow file system takes longer than a second more.
    pub fn withdraw(&self, name: &str) -> bool {
        let Some(export) = self.core.exports().by_name.remove(name.as_bytes()) else {
            return false;
        };
        let gone = export.withdraw();
        let id = export.id;
        self.core.handles.clear(Some(id));
        self.core.nodes.clear(Some(id));
        drop(export);
        if gone.recv_timeout(WITHDRAWAL) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!(name, "a request still uses an export that was withdrawn");
        } else {
            tracing::debug!(name, "withdrawn");
        }
        true
    }

    /// The virtio-fs device by which the guest mounts it: `mount -t virtiofs TAG /where`. There is one
    /// for each server.
    ///
    /// # Errors
    ///
    /// [`Error::Tag`] and [`Error::Device`].
    pub fn device(&self, tag: &str) -> Result<Box<dyn VirtioDevice>, Error> {
        let device = Device::new(tag, Arc::clone(&self.core))?;
        if self.core.device.swap(true, Ordering::SeqCst) {
            return Err(Error::Device);
        }
        Ok(Box::new(device.owning()))
    }

    /// The names of what is exported, in their order.
    pub fn exports(&self) -> Vec<String> {
        let exports = self.core.exports();
        let names = exports.by_name.keys();
        names
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect()
    }

    /// What the guest has and has done.
    pub fn counters(&self) -> Counters {
        let core = &self.core;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            inodes: core.nodes.len(),
            node_descriptors: core.nodes.descriptors(),
            handles: core.handles.len(),
            exports: core.exports().by_name.len(),
            requests: read(&core.tally.requests),
            errors: read(&core.tally.errors),
            malformed: read(&core.tally.malformed),
            read_bytes: read(&core.tally.read_bytes),
            written_bytes: read(&core.tally.written_bytes),
        }
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.core
    }
}

impl Core {
    /// The export of that name.
    pub fn export(&self, name: &[u8]) -> Option<Arc<Export>> {
        self.exports().by_name.get(name).cloned()
    }

    /// All exports after the one with the number `after`, in the order in which they came.
    pub fn exports_after(&self, after: u64) -> Vec<Arc<Export>> {
        let exports = self.exports();
        let mut found: Vec<_> = exports
            .by_name
            .values()
            .filter(|export| export.id > after)
            .cloned()
            .collect();
        found.sort_unstable_by_key(|export| export.id);
        found
    }

    /// Closes and forgets all that the guest has.
    pub fn end_session(&self) {
        self.minor.store(0, Ordering::SeqCst);
        self.handles.clear(None);
        self.nodes.clear(None);
    }

    /// The device is gone: there may be another.
    pub fn release_device(&self) {
        self.device.store(false, Ordering::SeqCst);
    }

    fn exports(&self) -> MutexGuard<'_, Exports> {
        self.exports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
