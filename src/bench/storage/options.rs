//! What `nacre-bench storage` is told, and what follows from that.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::{QEMU, Way};
use crate::bench::peers::Peer;
use crate::bench::report::Report;
use crate::bench::run::Rounds;
use crate::config::ByteSize;

/// Options of `nacre-bench storage`.
#[derive(Debug, Clone, Args)]
pub(in crate::bench) struct Options {
    /// Rounds; in each, everything is measured once
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub rounds: u64,
    /// Rounds before that, which do not count
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub warm_up: u64,
    /// MiB of the file that is read
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=65536))]
    pub mib: u64,
    /// Files in the tree, of 100 to 4095 bytes
    #[arg(long, value_name = "N", default_value_t = 10_000, overrides_with = "files", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub files: u64,
    /// Reads of 4 KiB at random places, at each depth
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..))]
    pub reads: u32,
    /// Folder of the host for the files and disks; on tmpfs nothing is ever cold on the host [default: that for temporary files]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// vCPUs of the VMs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=254))]
    pub vcpus: u8,
    /// Memory of the VMs
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub memory: ByteSize,
    /// The static program that measures [default: NACRE_PROBE, else nacre-probe beside this program or in PATH]
    #[arg(long, value_name = "PROGRAM")]
    pub probe: Option<PathBuf>,
    /// Also measure this QEMU for x86-64, with --virtiofsd
    #[arg(long, value_name = "PROGRAM", requires = "virtiofsd")]
    pub qemu: Option<PathBuf>,
    /// virtiofsd for QEMU
    #[arg(long, value_name = "PROGRAM", requires = "qemu")]
    pub virtiofsd: Option<PathBuf>,
    /// QEMU's initrd: nacre's with the module virtio_pci [default: nacre's, as the configuration names it]
    #[arg(long, value_name = "FILE", requires = "qemu")]
    pub qemu_initrd: Option<PathBuf>,
}

impl Options {
    /// All rounds.
    pub fn all_rounds(&self) -> Rounds {
        Rounds {
            warm_up: self.warm_up,
            count: self.rounds,
        }
    }

    /// What the figures depend on, with the folder that the files are in.
    pub fn settings(&self, within: &Path) -> Value {
        json!({
            "rounds": self.rounds,
            "warm_up": self.warm_up,
            "mib": self.mib,
            "files": self.files,
            "reads": self.reads,
            "dir": within,
            "vcpus": self.vcpus,
            "memory_mib": self.memory.mib(),
        })
    }

    /// A table for each way; runc stands in both.
    pub fn tables(&self, peers: &[Peer]) -> [Report; 2] {
        let qemu = self.qemu.as_ref().map(|_| QEMU);
        Way::BOTH.map(|way| {
            let names = peers.iter().map(|peer| peer.name).chain(qemu);
            Report::new(way.name(), names)
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn options(words: &str) -> Result<Options, clap::Error> {
        crate::bench::options(words)
    }

    #[test]
    fn options_have_their_defaults_and_their_bounds() {
        let all = options("").unwrap();
        assert_eq!((all.mib, all.files, all.rounds), (64, 10_000, 10));
        // xtask has its own count in front of the user's.
        let some =
            options("--files 1000 --mib 1 --files 9 --qemu /q --virtiofsd /v --memory 1G").unwrap();
        assert_eq!((some.memory.mib(), some.vcpus, some.files), (1024, 1, 9));
        for words in [
            "--mib 0",
            "--files 0",
            "--reads 0",
            "--vcpus 0",
            "--qemu /q",
            "--virtiofsd /v",
            "--qemu-initrd /i",
        ] {
            assert!(options(words).is_err(), "{words}");
        }
    }
}
