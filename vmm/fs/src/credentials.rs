//! Who a worker thread is while it serves a request.
//!
//! What the guest creates is made with the guest's user and group as this thread's fsuid and fsgid, so
//! that it has its owner from its first moment and the host's kernel applies set-group-ID directories
//! and default ACLs. The guest's kernel has checked permissions before, with groups that are not known
//! here; so the right to pass over them (CAP_DAC_OVERRIDE) is kept. CAP_FSETID is put down where the
//! guest asks that set-user-ID and set-group-ID be taken away, and CAP_SYS_RESOURCE, by which quotas would
//! not hold, for good.

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{getegid, geteuid, umask};
use rustix::thread::{
    CapabilitySet, CapabilitySets, UnshareFlags, capabilities, set_capabilities, set_thread_groups,
    unshare_unsafe,
};

use crate::sys;

/// The calling thread's credentials. Not for other threads.
#[derive(Debug)]
pub(crate) struct Credentials {
    own: (u32, u32),
    full: CapabilitySets,
    /// Whether CAP_FSETID is put down.
    lowered: bool,
    _thread: std::marker::PhantomData<*const ()>,
}

impl Credentials {
    /// Of this thread, which gets a umask of its own and no signals.
    pub fn take() -> Result<Self, Errno> {
        sys::block_signals();
        // SAFETY: descriptors stay shared; only the umask and the working and root directories become
        // this thread's own.
        unsafe { unshare_unsafe(UnshareFlags::FS) }?;
        umask(Mode::empty());
        // Groups of this process are not the guest's: by them a file would keep its set-group-ID. Not root, it stays in them.
        let _ = set_thread_groups(&[]);
        let mut full = capabilities(None)?;
        // Quotas and what a file system has in reserve are to hold the guest.
        full.effective.remove(CapabilitySet::SYS_RESOURCE);
        full.permitted.remove(CapabilitySet::SYS_RESOURCE);
        set_capabilities(None, full)?;
        Ok(Self {
            own: (geteuid().as_raw(), getegid().as_raw()),
            full,
            lowered: false,
            _thread: std::marker::PhantomData,
        })
    }

    /// Does what creates a file for a user of the guest.
    pub fn creating<T>(
        &mut self,
        (uid, gid): (u32, u32),
        mask: u32,
        create: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        self.lower(false)?;
        umask(Mode::from_raw_mode(mask & 0o777));
        let result = if (uid, gid) == self.own {
            create()
        } else {
            self.as_user(uid, gid, create)
        };
        umask(Mode::empty());
        result
    }

    fn as_user<T>(
        &mut self,
        uid: u32,
        gid: u32,
        create: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let result = sys::set_fs_ids(uid, gid)
            .and_then(|()| {
                // The kernel takes the capabilities over files with the fsuid.
                if uid != 0 && self.own.0 == 0 {
                    let mut sets = self.full;
                    sets.effective
                        .remove(FILE_CAPABILITIES.difference(CapabilitySet::DAC_OVERRIDE));
                    set_capabilities(None, sets)?;
                }
                Ok(())
            })
            .and_then(|()| create());
        let back = sys::set_fs_ids(self.own.0, self.own.1)
            .and_then(|()| set_capabilities(None, self.full));
        if let Err(error) = back {
            tracing::error!(%error, "a file server's thread cannot take its credentials back");
            return Err(error);
        }
        result
    }

    /// Does what takes set-user-ID and set-group-ID away if `kill` is set, and leaves them otherwise.
    pub fn changing<T>(
        &mut self,
        kill: bool,
        change: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        self.lower(kill)?;
        change()
    }

    fn lower(&mut self, lowered: bool) -> Result<(), Errno> {
        if self.lowered != lowered {
            let mut sets = self.full;
            if lowered {
                sets.effective.remove(CapabilitySet::FSETID);
            }
            set_capabilities(None, sets)?;
            self.lowered = lowered;
        }
        Ok(())
    }
}

/// What goes with the fsuid.
const FILE_CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::LINUX_IMMUTABLE);
