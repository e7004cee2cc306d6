//! The file server of nacre's guests: a virtio-fs device inside the VMM's
//! process, without a daemon beside it, whose exports come and go while the guest runs.
//!
//! A [`FileServer`] is made for each VM. Its [`device`](FileServer::device) goes into the VM's configuration; what
//! [`export`](FileServer::export) is given the guest finds as an entry of the file system that it mounts.
//!
//! **Why the protocol's server is our own.** The two libraries that there are, fuse-backend-rs 0.14 and virtiofsd 1.14,
//! ride vm-memory 0.17: each batch would need a second view of guest memory and a second kind of queue beside
//! [`nacre_vmm`]'s, which are checked and fuzzed as they are. The first speaks version 7.33 of the protocol, without
//! O_TMPFILE, syncfs and statx, and brings nix 0.24, mio 0.8 and a radix tree along; the second is a program more than
//! a library. What they would save is small: most of a file server is its policy towards the guest, and that was to be
//! our own in any case.
//!
//! **Who is trusted.** The guest is not. It names files by numbers that the server has given and by single
//! components, which are opened relative to an O_PATH descriptor of their directory with openat2 and RESOLVE_BENEATH;
//! symbolic links go to the guest as text and are followed by no one here. Only regular files and directories are ever
//! opened. What each number, name, size and offset may be is checked where it is read, and what the guest
//! may have at once is bounded by [`Limits`].
//!
//! **What is not here.** Locks are the guest's own: programs in the guest see each other's, not the host's.
//! ioctl (`lsattr`, `chattr`) and DAX do not exist. The guest's O_TMPFILE needs Linux 6.2 in the guest; before, it is
//! refused there. Supplementary groups are known to the guest's kernel only, which checks permissions by itself.
//! Device nodes, overlay whiteouts among them, cannot be made, so an export is no upper layer for an overlay of the guest's.
//! Mounts below an export do not show as mounts in the guest, but each file has an inode number of its own. A system
//! call of the host's that hangs (a dead network file system) holds one thread, and a reset waits for it.

mod abi;
mod credentials;
mod device;
mod directory;
mod error;
mod export;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod handles;
mod limits;
mod message;
mod nodes;
mod ops;
mod owners;
mod server;
mod stat;
mod sys;
#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(
    not(test),
    allow(dead_code, reason = "the fuzz target needs less of it than tests do")
)]
mod testing;
#[cfg(test)]
mod tests;
mod worker;

pub use error::Error;
pub use export::{open_export, open_mapped_export};
pub use limits::{Access, Caching, Counters, Limits};
pub use owners::{OwnerMap, Owners, Range, attach};
pub use server::FileServer;
