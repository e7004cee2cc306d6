//! How much a guest may have, how it may cache, and what it has.

use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::Error;

/// Whether the guest may change what is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Every request that would change something is refused, and files are opened for reading only.
    ReadOnly,
    /// As the guest's kernel permits.
    ReadWrite,
}

/// How long the guest may believe what it was told about names and attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caching {
    /// For this long; an open looks again. For what others than the guest change, too.
    For(Duration),
    /// Until the guest itself changes it. For what is the guest's alone, or changed by no one.
    Always,
}

impl Default for Caching {
    fn default() -> Self {
        Self::For(Duration::from_secs(1))
    }
}

impl Caching {
    /// Seconds and nanoseconds for the guest.
    pub(crate) fn validity(self) -> (u64, u32) {
        match self {
            Self::For(time) => (time.as_secs(), time.subsec_nanos()),
            Self::Always => (24 * 60 * 60, 0),
        }
    }
}

/// Bounds of one file server. A guest that would go beyond one is answered ENFILE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Nodes that the guest's kernel may know at once; each takes some 300 bytes of the host's memory.
    pub inodes: usize,
    /// Files and directories that the guest may have open at once; each takes a descriptor.
    pub handles: usize,
    /// Descriptors kept for nodes that are not open. Above this the ones not used for longest are
    /// closed, and found again by file handle or name when they are needed.
    pub kept: usize,
    /// Descriptors of nodes above which no further node is given out: those that cannot be found
    /// again (directories on file systems without file handles) add up.
    pub pinned: usize,
    /// Threads that serve requests, 1 to 64.
    pub workers: usize,
}

impl Limits {
    /// Bounds that go with `descriptors`, the process's limit (`RLIMIT_NOFILE`).
    pub fn for_descriptors(descriptors: u64) -> Self {
        let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
        Self {
            inodes: 1 << 19,
            handles: (descriptors / 4).clamp(16, 1 << 16),
            kept: (descriptors / 8).clamp(16, 1 << 16),
            pinned: (descriptors / 4).clamp(16, 1 << 17),
            workers: 4,
        }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let refused = |name, value, right| Err(Error::Limit { name, value, right });
        if self.inodes == 0 {
            return refused("inodes", self.inodes, "at least 1 is needed");
        }
        if self.handles == 0 {
            return refused("handles", self.handles, "at least 1 is needed");
        }
        if self.kept == 0 {
            return refused("kept", self.kept, "at least 1 is needed");
        }
        if self.pinned < self.kept {
            return refused("pinned", self.pinned, "it is not below the limit `kept`");
        }
        if !(1..=64).contains(&self.workers) {
            return refused("workers", self.workers, "1 to 64 are possible");
        }
        Ok(())
    }
}

impl Default for Limits {
    /// Raises the process's soft limit of descriptors to its hard limit, and goes by that.
    fn default() -> Self {
        let limit = getrlimit(Resource::Nofile);
        let raised = Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        };
        let descriptors = match setrlimit(Resource::Nofile, raised) {
            Ok(()) => limit.maximum,
            Err(error) => {
                tracing::debug!(%error, "the limit of descriptors stays as it is");
                limit.current
            }
        };
        Self::for_descriptors(descriptors.unwrap_or(u64::MAX))
    }
}

/// What the guest has and has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Nodes that the guest's kernel knows now.
    pub inodes: usize,
    /// Descriptors held for them now.
    pub node_descriptors: usize,
    /// Files and directories open now.
    pub handles: usize,
    /// Exports there are now.
    pub exports: usize,
    /// Requests answered so far, forgets included.
    pub requests: u64,
    /// Of these, those that were answered with an error.
    pub errors: u64,
    /// Chains that held no request.
    pub malformed: u64,
    /// Bytes of files read by the guest.
    pub read_bytes: u64,
    /// Bytes of files written by the guest.
    pub written_bytes: u64,
}
