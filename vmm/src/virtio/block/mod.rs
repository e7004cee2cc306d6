//! virtio-blk (virtio 1.3 section 5.2) over raw files and block devices.
//!
//! `backend` is the file, `request` one request of the driver, `device` the
//! device and the thread that it serves its queue on, so that nothing else
//! waits behind a slow disk. Discard, several queues and image formats are not
//! here.

mod backend;
mod device;
mod request;
#[cfg(test)]
mod tests;

pub use backend::Disk;
pub use device::Block;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Bytes of a sector, the unit of all of a driver's offsets (5.2.6).
pub const SECTOR: u64 = 512;
/// Bytes of the text that VIRTIO_BLK_T_GET_ID gives.
pub const ID_BYTES: usize = 20;

/// Why a disk could not be made.
#[derive(Debug, Error)]
pub enum Error {
    /// The image could not be opened.
    #[error("Cannot open the disk image {} for {}", path.display(), access(*.read_only))]
    Open {
        /// The image.
        path: PathBuf,
        /// How it was to be opened.
        read_only: bool,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// Its kind or size could not be found out.
    #[error("Cannot find out the size of the disk image {}", path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// It is a directory, a pipe or the like.
    #[error("The disk image {} is neither a regular file nor a block device", path.display())]
    Kind {
        /// The image.
        path: PathBuf,
    },
    /// There is not one sector in it.
    #[error("The disk image {} has {bytes} bytes; a disk has at least 512", path.display())]
    Empty {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Another VM writes it, or it is to be written and another VM uses it.
    #[error("The disk image {} is in use: cannot lock it for {}", path.display(), access(*.read_only))]
    Locked {
        /// The image.
        path: PathBuf,
        /// How it was to be used.
        read_only: bool,
    },
    /// The lock could not even be tried.
    #[error("Cannot lock the disk image {}", path.display())]
    Lock {
        /// The image.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The identifier does not fit into what GET_ID gives.
    #[error("The disk id {id:?} of {} has {} bytes; at most {ID_BYTES} are possible", path.display(), id.len())]
    Id {
        /// The image.
        path: PathBuf,
        /// The identifier.
        id: String,
    },
}

fn access(read_only: bool) -> &'static str {
    if read_only { "reading" } else { "writing" }
}
