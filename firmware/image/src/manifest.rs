//! What `manifest.json` beside an image says of it.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::modules::PlannedModule;

/// The manifest of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`](crate::FORMAT) of the maker.
    pub format: u32,
    /// The kernel.
    pub kernel: KernelEntry,
    /// The initrd.
    pub initrd: FileEntry,
    /// The agent's binary, `/init` in the initrd.
    pub agent: FileEntry,
    /// Whether the modules have kept their signatures, without which some kernels load none.
    pub signatures_kept: bool,
    /// The modules in the initrd, in load order.
    pub modules: Vec<ModuleEntry>,
    /// Wanted modules that the kernel has built in, sorted.
    pub built_in: Vec<String>,
    /// Wanted but not necessary modules that this kernel does not have, sorted.
    pub missing: Vec<String>,
}

/// The kernel of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelEntry {
    /// What `uname -r` says in the guest.
    pub release: String,
    /// The version text of the bzImage; empty where the kernel came as an ELF file.
    pub version: String,
    /// The ELF file.
    pub vmlinux: FileEntry,
}

/// A file by its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Lower-case hexadecimal SHA-256.
    pub sha256: String,
    /// Length in bytes.
    pub size: u64,
}

impl FileEntry {
    /// The entry of this content.
    pub fn of(content: &[u8]) -> Self {
        FileEntry {
            sha256: crate::hex(&Sha256::digest(content)),
            size: content.len() as u64,
        }
    }
}

/// A module in the initrd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleEntry {
    /// The name, with underscores.
    pub name: String,
    /// Its file's name in the initrd's `/modules`.
    pub file: String,
    /// When the agent loads it.
    pub group: Group,
    /// Its own version, where it states one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub version: Option<String>,
    /// The kernel and options that it was built for.
    pub vermagic: String,
    /// The unpacked file.
    #[serde(flatten)]
    pub content: FileEntry,
}

impl ModuleEntry {
    pub(crate) fn of(module: &PlannedModule) -> Self {
        ModuleEntry {
            name: module.name.clone(),
            file: module.file_name(),
            group: module.group,
            version: module.info.version.clone(),
            vermagic: module.info.vermagic.clone(),
            content: FileEntry::of(&module.content),
        }
    }
}

/// When the agent loads a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    /// Before the agent dials the host.
    Boot,
    /// After that, before the first container.
    Mount,
    /// After that, before the first disk or network device, and before the VM's size changes.
    Late,
}

impl Group {
    /// The word in `/modules/order`.
    pub fn word(self) -> &'static str {
        match self {
            Group::Boot => "boot",
            Group::Mount => "mount",
            Group::Late => "late",
        }
    }
}
