//! virtio-blk (virtio 1.3 section 5.2) over raw files and block devices.
//!
//! `image` is one file; `disk` is what the guest sees: one file, or several joined by the partition
//! table that `gpt` makes. `request` is what a driver asks for, `flight` one such request on its
//! way, with the guest memory that it holds. `engine` carries out what flights need from files, by
//! io_uring or by threads. `service` is the loop between queue and engine, on a thread of its own
//! so that nothing else waits behind a slow disk, and `device` is what the transport sees. Several
//! queues and image formats other than raw are not here.

mod device;
mod disk;
mod engine;
mod flight;
mod gpt;
mod image;
mod request;
mod service;
#[cfg(test)]
mod tests;

pub use device::Block;
pub use disk::Disk;
pub use gpt::part_uuid;

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
    #[error("The disk image {} has {bytes} bytes; at least {least} are needed", path.display())]
    Empty {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// What it should be.
        least: u64,
    },
    /// More bytes than a file offset counts.
    #[error("The disk {disk} is too large: a disk has less than 2^63 bytes")]
    Large {
        /// What it consists of.
        disk: String,
    },
    /// The image cannot be used past the host's page cache.
    #[error("The disk image {} cannot be opened with O_DIRECT; a disk with the host's cache can use it", path.display())]
    Direct {
        /// The image.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// io_uring was asked for and cannot be had.
    #[error(
        "The host gives no io_uring for the disk {disk}; threads, or the automatic choice, work without it"
    )]
    Ring {
        /// What it consists of.
        disk: String,
        /// What the system says.
        #[source]
        source: io::Error,
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
    #[error("The disk id {id:?} of {disk} has {} bytes; at most {ID_BYTES} are possible", id.len())]
    Id {
        /// What the disk consists of.
        disk: String,
        /// The identifier.
        id: String,
    },
}

fn access(read_only: bool) -> &'static str {
    if read_only { "reading" } else { "writing" }
}
