//! What `nacre-bench net` is told, and what follows from that.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::work::Sizes;
use super::{OF_NETWORK, OF_VSOCK, OURS, QEMU};
use crate::bench::peers::Peer;
use crate::bench::report::Report;
use crate::bench::run::Rounds;
use crate::bench::variable;
use crate::config::{ByteSize, Config};

/// Options of `nacre-bench net`.
#[derive(Debug, Clone, Args)]
pub(in crate::bench) struct Options {
    /// Rounds; in each, everything is measured once
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub rounds: u64,
    /// Rounds before that, which do not count
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub warm_up: u64,
    /// MiB that all streams of a measurement carry together
    #[arg(long, value_name = "N", default_value_t = 256, overrides_with = "mib", value_parser = clap::value_parser!(u64).range(1..=65536))]
    pub mib: u64,
    /// Requests of a measurement
    #[arg(long, value_name = "N", default_value_t = 1000, overrides_with = "requests", value_parser = clap::value_parser!(u32).range(1..=4000))]
    pub requests: u32,
    /// Leave out the network
    #[arg(long, conflicts_with = "no_vsock")]
    pub no_network: bool,
    /// Leave out the vsock
    #[arg(long)]
    pub no_vsock: bool,
    /// vCPUs of the VMs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=254))]
    pub vcpus: u8,
    /// Memory of the VMs
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub memory: ByteSize,
    /// The static program that measures [default: NACRE_PROBE, else nacre-probe beside this program or in PATH]
    #[arg(long, value_name = "PROGRAM")]
    pub probe: Option<PathBuf>,
    /// Folder of the CNI plugins bridge and host-local, absolute [default: NACRE_CNI_BIN, else as the configuration has it]
    #[arg(long, value_name = "DIR")]
    pub cni: Option<PathBuf>,
    /// Also measure this QEMU for x86-64
    #[arg(long, value_name = "PROGRAM")]
    pub qemu: Option<PathBuf>,
    /// QEMU's initrd: nacre's with the module virtio_pci [default: nacre's, as the configuration names it]
    #[arg(long, value_name = "FILE", requires = "qemu")]
    pub qemu_initrd: Option<PathBuf>,
}

impl Options {
    /// How much there is of each.
    pub(super) fn sizes(&self) -> Sizes {
        Sizes {
            mib: self.mib,
            requests: self.requests,
        }
    }

    /// All rounds of a table.
    pub fn all_rounds(&self) -> Rounds {
        Rounds {
            warm_up: self.warm_up,
            count: self.rounds,
        }
    }

    /// What the figures depend on.
    pub fn settings(&self) -> Value {
        json!({
            "rounds": self.rounds,
            "warm_up": self.warm_up,
            "mib": self.mib,
            "requests": self.requests,
            "vcpus": self.vcpus,
            "memory_mib": self.memory.mib(),
            "qemu_vhost": false,
        })
    }

    /// The tables that are wanted.
    pub fn tables(&self, peers: &[Peer]) -> Vec<Report> {
        let qemu = self.qemu.as_ref().map(|_| QEMU);
        let names = peers.iter().map(|peer| peer.name).chain(qemu);
        let network = (!self.no_network).then(|| Report::new(OF_NETWORK, names));
        let vsock = (!self.no_vsock).then(|| Report::new(OF_VSOCK, [OURS]));
        network.into_iter().chain(vsock).collect()
    }

    /// Where the CNI plugins are.
    pub fn plugins(&self, config: &Config) -> Vec<PathBuf> {
        let given = self.cni.clone().or_else(|| variable("NACRE_CNI_BIN"));
        given.map_or_else(
            || config.network.cni_bin_dirs.clone(),
            |folder| vec![folder],
        )
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
        assert_eq!((all.mib, all.requests, all.rounds), (256, 1000, 10));
        // xtask has its own in front of the user's.
        let some = options("--mib 8 --mib 1 --requests 9 --memory 1G --cni /c").unwrap();
        assert_eq!((some.mib, some.requests), (1, 9));
        let config = Config::default();
        assert_eq!(some.plugins(&config), [PathBuf::from("/c")]);
        for words in [
            "--mib 0",
            "--requests 0",
            "--requests 4001",
            "--vcpus 0",
            "--qemu-initrd /i",
            "--no-network --no-vsock",
        ] {
            assert!(options(words).is_err(), "{words}");
        }
    }

    /// Shims that nobody starts.
    pub fn peers() -> [Peer; 2] {
        [OURS, "runc"].map(|name| Peer {
            name,
            program: format!("/bin/{name}").into(),
            ..Peer::default()
        })
    }

    #[test]
    fn a_table_that_is_not_wanted_is_not_there() {
        let tables = options("--no-network").unwrap().tables(&peers());
        assert_eq!(tables.len(), 1);
        assert_eq!(tables[0].title, OF_VSOCK);
    }
}
