//! What a caller says about the VM that it wants. Checked in one place,
//! before anything is made.

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;

/// Smallest guest memory that a stock kernel and the agent's initrd boot in, in MiB.
pub const MINIMUM_MEMORY_MIB: u64 = 64;

/// Where the serial console's bytes go and come from.
pub struct Console {
    /// Receives what the guest prints. Must not block for long: it is called from a vCPU thread.
    pub output: Box<dyn Write + Send>,
    /// A readable, pollable file (terminal, pipe, socket) whose bytes the guest receives, if any.
    pub input: Option<File>,
}

/// One VM.
pub struct VmConfig {
    /// Names the VM in logs and thread names.
    pub name: String,
    /// ELF `vmlinux` with a PVH note, or a bzImage.
    pub kernel: PathBuf,
    /// initramfs, uncompressed or in a form that the kernel unpacks.
    pub initrd: Option<PathBuf>,
    /// Kernel command line, whole; see [`default_cmdline`].
    pub cmdline: String,
    /// Boot memory in MiB, at least [`MINIMUM_MEMORY_MIB`].
    pub memory_mib: u64,
    /// vCPUs at boot, 1–254.
    pub vcpus: u8,
    /// Disks that are there from the start, in window order.
    pub disks: Vec<DiskConfig>,
    /// virtio-mmio windows declared, those with a device included; 1–18. The rest are spare.
    pub windows: u8,
    /// Whether to have a virtio-vsock device.
    pub vsock: bool,
    /// Whether to have a virtio-rng device.
    pub rng: bool,
    /// Serial console.
    pub console: Console,
}

/// A disk backed by a raw file or block device.
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// Raw image. Its format is never guessed.
    pub path: PathBuf,
    /// Opened read-only and offered with VIRTIO_BLK_F_RO.
    pub read_only: bool,
    /// Serial that the guest reads by VIRTIO_BLK_T_GET_ID, at most 20 bytes.
    pub id: String,
}
