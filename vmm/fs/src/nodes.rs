//! The nodes that the guest's kernel knows, each with the count of its
//! lookups, and how their files are found.
//!
//! A node begins with an O_PATH descriptor of its file. A guest forgets nodes only when it is short of
//! memory, so the descriptors would add up: beyond a bound the ones not used for longest are closed, and the
//! file is found again by its file handle, or, where the file system gives none, by parent and name;
//! then it must prove to be the same. Directories without a file handle keep their descriptor.

use std::collections::{HashMap, VecDeque};
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use crate::abi::ROOT_ID;
use crate::export::Export;
use crate::stat::{Stat, stat};
use crate::sys::FileHandle;

/// Victims looked at for one descriptor too many.
const PROBES: usize = 16;

/// Opens one component below `parent`, whatever it is, without following it.
pub(crate) fn open_child(parent: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    openat2(
        parent,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS,
    )
}

/// A descriptor that is counted while it is open.
#[derive(Debug)]
pub(crate) struct Counted {
    fd: OwnedFd,
    count: Arc<AtomicUsize>,
}

impl Counted {
    fn new(fd: OwnedFd, count: &Arc<AtomicUsize>) -> Arc<Self> {
        count.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self {
            fd,
            count: Arc::clone(count),
        })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
    }
}

impl AsFd for Counted {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Which file it is, among those that the host has now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    export: u64,
    mount: u64,
    dev: u64,
    ino: u64,
}

impl Key {
    fn of(export: &Export, found: &Stat) -> Self {
        Self {
            export: export.id,
            mount: found.mount,
            dev: found.dev,
            ino: found.attr.ino,
        }
    }
}

/// A file that the guest's kernel knows.
#[derive(Debug)]
pub(crate) struct Node {
    pub id: u64,
    pub export: Arc<Export>,
    pub kind: FileType,
    key: Key,
    /// Handles that are open: such a node keeps its descriptor.
    pub handles: AtomicU32,
    used: AtomicBool,
    place: Mutex<Place>,
}

#[derive(Debug)]
struct Place {
    at: At,
    parent: u64,
    name: Box<CStr>,
}

#[derive(Debug)]
enum At {
    Open(Arc<Counted>),
    /// Closed, to be found again by its handle.
    Handle(FileHandle),
    /// Closed, to be found again by its name, with the time of birth that it had then: an overlay's file has
    /// another since it was copied up.
    Name((i64, u32)),
}

impl Node {
    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_directory(&self) -> bool {
        self.kind == FileType::Directory
    }

    /// Whether `found`, whose file handle is `now`, is this file, though its descriptor was closed meanwhile.
    fn is(&self, place: &Place, found: &Stat, now: &mut HandleOf) -> bool {
        match &place.at {
            At::Open(_) => true,
            At::Handle(handle) => now.is(handle),
            At::Name(birth) => self.has(found) && *birth == found.birth,
        }
    }

    /// Whether `found` has this node's number and type.
    fn has(&self, found: &Stat) -> bool {
        Key::of(&self.export, found) == self.key && found.file_type() == self.kind
    }
}

/// The file handle of a file that was looked up, which a system call gives, and few lookups need.
enum HandleOf {
    Unasked,
    Needed,
    Is(Result<FileHandle, Errno>),
}

impl HandleOf {
    fn is(&mut self, handle: &FileHandle) -> bool {
        match self {
            Self::Is(now) => now.as_ref().is_ok_and(|now| now == handle),
            Self::Unasked | Self::Needed => {
                *self = Self::Needed;
                false
            }
        }
    }
}

/// A node with its file at hand.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub node: Arc<Node>,
    pub fd: Arc<Counted>,
}

impl AsFd for Found {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

struct Known {
    node: Arc<Node>,
    lookups: u64,
}

#[derive(Default)]
struct Table {
    known: HashMap<u64, Known>,
    by_key: HashMap<Key, u64>,
    /// Nodes with a descriptor, the one that was first to get it in front; also some that have none any more.
    open: VecDeque<u64>,
    last: u64,
}

/// All nodes. No lock, of the table or of a node, is held over a system call: on a file system that hangs it holds its caller only.
pub(crate) struct Nodes {
    table: Mutex<Table>,
    descriptors: Arc<AtomicUsize>,
    limit: usize,
    kept: usize,
    pinned: usize,
}

impl Nodes {
    pub fn new(limit: usize, kept: usize, pinned: usize) -> Self {
        Self {
            table: Mutex::new(Table {
                last: ROOT_ID,
                ..Table::default()
            }),
            descriptors: Arc::default(),
            limit,
            kept,
            pinned,
        }
    }

    pub fn len(&self) -> usize {
        self.table().known.len()
    }

    pub fn descriptors(&self) -> usize {
        self.descriptors.load(Ordering::Relaxed)
    }

    /// Counts one lookup of the file behind `fd`, and gives its node.
    pub fn look_up(
        &self,
        export: &Arc<Export>,
        fd: OwnedFd,
        found: &Stat,
        parent: u64,
        name: &CStr,
    ) -> Result<Found, Errno> {
        let key = Key::of(export, found);
        let mut now = HandleOf::Unasked;
        if self.descriptors() >= self.pinned {
            self.close_some();
        }
        let mut guard = loop {
            let table = self.table();
            let known = table.by_key.get(&key).and_then(|id| table.known.get(id));
            if let Some(known) = known {
                known.node.is(&known.node.place(), found, &mut now);
            }
            if !matches!(now, HandleOf::Needed) {
                break table;
            }
            drop(table);
            now = HandleOf::Is(FileHandle::of(fd.as_fd()));
        };
        let table = &mut *guard;
        if export.is_withdrawn() {
            return Err(Errno::STALE);
        }
        let full = self.descriptors() >= self.pinned;
        let result = if let Some(known) = table
            .by_key
            .get(&key)
            .and_then(|id| table.known.get_mut(id))
            .filter(|known| known.node.is(&known.node.place(), found, &mut now))
        {
            known.lookups = known.lookups.saturating_add(1);
            let node = Arc::clone(&known.node);
            let mut place = node.place();
            if place.parent != parent || *place.name != *name {
                place.parent = parent;
                place.name = name.into();
            }
            let fd = if let At::Open(fd) = &place.at {
                Arc::clone(fd)
            } else {
                let fd = Counted::new(fd, &self.descriptors);
                if !full {
                    place.at = At::Open(Arc::clone(&fd));
                    table.open.push_back(node.id);
                }
                fd
            };
            drop(place);
            node.used.store(true, Ordering::Relaxed);
            Found { node, fd }
        } else {
            if table.known.len() >= self.limit || full {
                return Err(Errno::NFILE);
            }
            table.last += 1;
            let id = table.last;
            let fd = Counted::new(fd, &self.descriptors);
            let node = Arc::new(Node {
                id,
                export: Arc::clone(export),
                kind: found.file_type(),
                key,
                handles: AtomicU32::new(0),
                used: AtomicBool::new(false),
                place: Mutex::new(Place {
                    at: At::Open(Arc::clone(&fd)),
                    parent,
                    name: name.into(),
                }),
            });
            table.by_key.insert(key, id);
            table.known.insert(
                id,
                Known {
                    node: Arc::clone(&node),
                    lookups: 1,
                },
            );
            table.open.push_back(id);
            Found { node, fd }
        };
        drop(guard);
        self.close_some();
        Ok(result)
    }

    /// The node of that number with its file.
    pub fn find(&self, id: u64) -> Result<Found, Errno> {
        let node = self.node(id)?;
        node.used.store(true, Ordering::Relaxed);
        let (parent, name, birth) = {
            let place = node.place();
            match &place.at {
                At::Open(fd) => {
                    let fd = Arc::clone(fd);
                    drop(place);
                    return Ok(Found { node, fd });
                }
                At::Handle(handle) => {
                    let handle = handle.clone();
                    drop(place);
                    let fd = node.export.open_handle(&handle, node.key.mount)?;
                    if !node.has(&stat(&fd)?) {
                        return Err(Errno::STALE);
                    }
                    return Ok(self.opened(node, fd));
                }
                At::Name(birth) => (place.parent, place.name.clone(), *birth),
            }
        };
        // Only files are found by name, and directories never, so this is one step.
        let parent = self.node(parent)?;
        if !parent.is_directory() || parent.export.id != node.export.id {
            return Err(Errno::STALE);
        }
        let parent = self.find(parent.id)?;
        let fd = open_child(parent.as_fd(), &name).map_err(|_| Errno::STALE)?;
        let now = stat(&fd)?;
        if !node.has(&now) || now.birth != birth {
            return Err(Errno::STALE);
        }
        Ok(self.opened(node, fd))
    }

    /// Keeps a descriptor that was opened again, for as long as the request lasts where there are too many.
    fn opened(&self, node: Arc<Node>, fd: OwnedFd) -> Found {
        let full = self.descriptors() >= self.pinned;
        let fd = Counted::new(fd, &self.descriptors);
        if full {
            self.close_some();
            return Found { node, fd };
        }
        let again = {
            let mut place = node.place();
            let again = !matches!(place.at, At::Open(_));
            place.at = At::Open(Arc::clone(&fd));
            again
        };
        if again {
            let mut table = self.table();
            if table.known.contains_key(&node.id) {
                table.open.push_back(node.id);
            }
            drop(table);
            self.close_some();
        }
        Found { node, fd }
    }

    fn node(&self, id: u64) -> Result<Arc<Node>, Errno> {
        let table = self.table();
        let known = table.known.get(&id).ok_or(Errno::STALE)?;
        Ok(Arc::clone(&known.node))
    }

    /// Takes back `lookups` of a node; more than there were are as many as there were.
    pub fn forget(&self, id: u64, lookups: u64) {
        let mut table = self.table();
        let Some(known) = table.known.get_mut(&id) else {
            return;
        };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups > 0 {
            return;
        }
        let gone = table.known.remove(&id);
        if let Some(Known { node, .. }) = &gone
            && table.by_key.get(&node.key) == Some(&id)
        {
            table.by_key.remove(&node.key);
        }
        // Each node is in the list once while it has a descriptor: what is left behind is swept when it prevails.
        if table.open.len() > 2 * table.known.len() + 64 {
            let Table { open, known, .. } = &mut *table;
            open.retain(|id| known.contains_key(id));
        }
        drop(table);
        drop(gone);
    }

    /// The file that `node` was looked up as has another name now.
    pub fn renamed(&self, export: &Export, found: &Stat, parent: u64, name: &CStr) {
        let key = Key::of(export, found);
        let table = self.table();
        if let Some(known) = table.by_key.get(&key).and_then(|id| table.known.get(id)) {
            let mut place = known.node.place();
            place.parent = parent;
            place.name = name.into();
        }
    }

    /// Forgets all nodes of an export, or all there are.
    pub fn clear(&self, export: Option<u64>) {
        let mut table = self.table();
        let gone = match export {
            None => {
                table.by_key.clear();
                table.open.clear();
                std::mem::take(&mut table.known).into_values().collect()
            }
            Some(export) => {
                table.by_key.retain(|key, _| key.export != export);
                let of_it = |_: &u64, known: &mut Known| known.node.key.export == export;
                let gone: Vec<_> = table
                    .known
                    .extract_if(of_it)
                    .map(|(_, gone)| gone)
                    .collect();
                let Table { open, known, .. } = &mut *table;
                open.retain(|id| known.contains_key(id));
                gone
            }
        };
        // Closing takes its time.
        drop(table);
        drop(gone);
    }

    /// Closes descriptors while there are more than are to be kept and one can be spared: one that was used lately only where
    /// there are as many as there may be.
    fn close_some(&self) {
        for _ in 0..PROBES {
            if self.descriptors() <= self.kept {
                return;
            }
            let node = {
                let mut table = self.table();
                let Some(id) = table.open.pop_front() else {
                    return;
                };
                let Some(known) = table.known.get(&id) else {
                    continue;
                };
                let node = Arc::clone(&known.node);
                let used = node.used.swap(false, Ordering::Relaxed);
                if (used && self.descriptors() < self.pinned)
                    || node.handles.load(Ordering::Relaxed) > 0
                {
                    table.open.push_back(id);
                    continue;
                }
                node
            };
            if !close(&node) {
                self.table().open.push_back(node.id);
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes the node's descriptor if its file can be found again; whether it has none now.
fn close(node: &Node) -> bool {
    let (fd, parent) = {
        let place = node.place();
        let At::Open(fd) = &place.at else {
            return true;
        };
        (Arc::clone(fd), place.parent)
    };
    let handle = node
        .export
        .handle(fd.as_fd(), node.key.mount, node.is_directory());
    let at = match handle {
        Ok(handle) => At::Handle(handle),
        // The root of an export has no name below it.
        Err(_) if !node.is_directory() && parent != ROOT_ID => match stat(fd.as_ref()) {
            Ok(now) if node.has(&now) && now.attr.nlink > 0 => At::Name(now.birth),
            // Without a name, or another number since it was copied up: only by its descriptor.
            _ => return false,
        },
        Err(_) => return false,
    };
    // The one that is opened again meanwhile is to be kept, and so is the one of a file that was opened.
    let mut place = node.place();
    let same = matches!(&place.at, At::Open(now) if Arc::ptr_eq(now, &fd));
    if !same || node.handles.load(Ordering::Relaxed) > 0 {
        return false;
    }
    place.at = at;
    true
}
