//! What goes wrong on the host's side: making the server, exporting, and
//! making the device. What goes wrong for the guest is an errno in its answer.

use std::path::PathBuf;

use rustix::io::Errno;
use thiserror::Error;

/// The server, an export or the device could not be made.
#[derive(Debug, Error)]
pub enum Error {
    /// `/proc` is not there, by which the server opens what it has found.
    #[error("cannot open /proc/self/fd, which the file server needs: mount proc on /proc")]
    Proc(#[source] Errno),
    /// A limit that cannot be.
    #[error("the file server's limit {name} is {value}: {right}")]
    Limit {
        /// The field of [`Limits`](crate::Limits).
        name: &'static str,
        /// Its value.
        value: usize,
        /// What would be right.
        right: &'static str,
    },
    /// The name of an export is not one path component.
    #[error(
        "cannot export under the name {name:?}: a name has 1 to 255 bytes, no slash and no zero byte, and is not . or .."
    )]
    Name {
        /// The name.
        name: String,
    },
    /// There is an export of that name.
    #[error("cannot export under the name {name:?}: it is taken; withdraw that export first")]
    Taken {
        /// The name.
        name: String,
    },
    /// What is to be exported cannot be looked at.
    #[error("cannot look at what is to be exported as {name:?}")]
    Look {
        /// The export's name.
        name: String,
        /// The cause.
        #[source]
        source: Errno,
    },
    /// What is to be exported is neither a directory nor a regular file.
    #[error(
        "cannot export {name:?}: it is neither a directory nor a regular file (mode {mode:#o})"
    )]
    Kind {
        /// The export's name.
        name: String,
        /// Its mode.
        mode: u32,
    },
    /// The tag is not one that the configuration space can hold.
    #[error("the tag {tag:?} of a file system device: 1 to 36 bytes without a zero are possible")]
    Tag {
        /// The tag.
        tag: String,
    },
    /// The server has its device.
    #[error("this file server has a device already: make another server")]
    Device,
    /// A mount could not be cloned for an export.
    #[error(
        "cannot clone the mount of {} for an export: it takes Linux 5.2 and CAP_SYS_ADMIN over the mount namespace", path.display()
    )]
    Clone {
        /// What was to be exported.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Errno,
    },
    /// A user namespace for mapped owners could not be made.
    #[error(
        "cannot make a user namespace for mapped owners: {doing}: it takes CAP_SYS_ADMIN, CAP_SETUID, CAP_SETGID and, to map to root, CAP_SETFCAP, at most 340 ranges that do not overlap, and room below /proc/sys/user/max_user_namespaces"
    )]
    Users {
        /// The step.
        doing: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The owners of a cloned mount could not be mapped.
    #[error(
        "cannot have the owners of {} mapped: it takes a file system with mapped mounts, as ext4 has from Linux 5.12, xfs and btrfs from 5.15, overlayfs from 5.19 and tmpfs from 6.3, and a mount that is not mapped already", path.display()
    )]
    Owners {
        /// What was to be mounted.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Errno,
    },
    /// The attributes of a cloned mount could not be set.
    #[error(
        "cannot make the cloned mount of {} {what}: it takes Linux 5.12 and CAP_SYS_ADMIN over the mount namespace", path.display()
    )]
    Attributes {
        /// What was to be exported.
        path: PathBuf,
        /// "read-only, nosuid and nodev" or "nosuid and nodev".
        what: &'static str,
        /// The cause.
        #[source]
        source: Errno,
    },
}
