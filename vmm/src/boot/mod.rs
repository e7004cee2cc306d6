//! From files to a guest that can begin: kernel, initrd, PVH start information and ACPI tables.

pub mod acpi;
pub mod kernel;
pub mod payload;
pub mod pvh;

use std::path::PathBuf;

use thiserror::Error;

use payload::PayloadError;

/// A guest could not be made ready to boot.
#[derive(Debug, Error)]
pub enum Error {
    /// A file cannot be opened or read.
    #[error("cannot read the {what} {}", path.display())]
    Read {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The kernel file is neither ELF nor bzImage.
    #[error("the kernel {} is neither an ELF vmlinux nor a bzImage", .0.display())]
    Format(PathBuf),
    /// The bzImage's payload cannot be unpacked.
    #[error("cannot unpack the kernel {}", path.display())]
    Payload {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: PayloadError,
    },
    /// The ELF file cannot be loaded.
    #[error("cannot load the kernel {}: {why} (guest memory below 3 GiB is {memory_mib} MiB)", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// What the loader says.
        why: String,
        /// Guest memory that it may use, in MiB.
        memory_mib: u64,
    },
    /// The kernel has no PVH entry point.
    #[error("the kernel {} has no PVH entry point (no Xen ELF note PHYS32_ENTRY): it was built without CONFIG_PVH", .0.display())]
    NoPvhEntry(PathBuf),
    /// The initrd has no place behind the kernel.
    #[error("the initrd {} of {size} bytes does not fit into {memory_mib} MiB of guest memory with the kernel, which ends at {kernel_end:#x}", path.display())]
    InitrdSpace {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// First free byte behind the kernel.
        kernel_end: u64,
        /// Guest memory that it may use, in MiB.
        memory_mib: u64,
    },
    /// Something could not be written to guest memory.
    #[error("cannot write the {what} to guest memory at {address:#x}: {why}")]
    Write {
        /// What it was.
        what: &'static str,
        /// Guest-physical address.
        address: u64,
        /// The cause.
        why: String,
    },
    /// The ACPI tables are larger than their space.
    #[error("the ACPI tables of {0} bytes do not fit below 1 MiB")]
    AcpiSize(usize),
}
