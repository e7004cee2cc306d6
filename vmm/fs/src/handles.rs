//! Files and directories that the guest has open.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use crate::directory::Stream;
use crate::nodes::Node;

/// One open file or directory.
#[derive(Debug)]
pub(crate) struct Handle {
    pub file: File,
    pub node: Arc<Node>,
    /// Of a directory: where reading it has come to.
    pub stream: Option<Mutex<Stream>>,
}

impl Handle {
    pub fn new(file: File, node: Arc<Node>) -> Self {
        node.handles.fetch_add(1, Ordering::Relaxed);
        let stream = node.is_directory().then(Mutex::default);
        Self { file, node, stream }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.node.handles.fetch_sub(1, Ordering::Relaxed);
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[derive(Default)]
struct Table {
    open: HashMap<u64, Arc<Handle>>,
    last: u64,
}

/// All that is open.
pub(crate) struct Handles {
    table: Mutex<Table>,
    limit: usize,
}

impl Handles {
    pub fn new(limit: usize) -> Self {
        Self {
            table: Mutex::default(),
            limit,
        }
    }

    pub fn len(&self) -> usize {
        self.table().open.len()
    }

    /// Whether another can be opened: asked before a file is made.
    pub fn room(&self) -> Result<(), Errno> {
        if self.len() < self.limit {
            Ok(())
        } else {
            Err(Errno::NFILE)
        }
    }

    /// Its number for the guest, never 0 and never used again.
    pub fn insert(&self, handle: Handle) -> Result<u64, Errno> {
        let mut table = self.table();
        if handle.node.export.is_withdrawn() {
            return Err(Errno::STALE);
        }
        if table.open.len() >= self.limit {
            return Err(Errno::NFILE);
        }
        table.last += 1;
        let number = table.last;
        table.open.insert(number, Arc::new(handle));
        Ok(number)
    }

    /// The handle of that number, if it is one of that node.
    pub fn get(&self, number: u64, node: u64) -> Result<Arc<Handle>, Errno> {
        let table = self.table();
        match table.open.get(&number) {
            Some(handle) if handle.node.id == node => Ok(Arc::clone(handle)),
            _ => Err(Errno::BADF),
        }
    }

    pub fn remove(&self, number: u64, node: u64) -> Result<(), Errno> {
        let mut table = self.table();
        match table.open.get(&number) {
            Some(handle) if handle.node.id == node => {
                let gone = table.open.remove(&number);
                drop(table);
                drop(gone);
                Ok(())
            }
            _ => Err(Errno::BADF),
        }
    }

    /// Closes all of an export, or all there are.
    pub fn clear(&self, export: Option<u64>) {
        let mut table = self.table();
        let gone: Vec<_> = table
            .open
            .extract_if(|_, handle| export.is_none_or(|export| handle.node.export.id == export))
            .collect();
        drop(table);
        drop(gone);
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
