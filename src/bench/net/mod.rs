//! `nacre-bench net`: TCP and UDP between a container and a server, next to runc with the same kind of network, and next to QEMU if there is
//! one; and the vsock of a VM. Here are the rounds; `work` is what is measured, `bridge` the network, `qemu` and `vsock` where beside
//! containers, `host` the vsock's other end, `measured` what came of it. What measures is `nacre-probe`, the same everywhere.

mod bridge;
mod host;
mod measured;
mod qemu;
mod vsock;
mod work;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Args;

use super::console::Booted;
use super::peers::{Joined, Peer, Surroundings};
use super::probed::{self, PROBE, Probed};
use super::scenarios::turns;
use super::steady::steady;
use super::{Setting, as_root, variable};
use crate::config::{ByteSize, Config};
use bridge::Bridge;
use measured::{Measured, Table};
use qemu::Qemu;
use work::{NETWORK, VSOCK};

// The scenario vsock has the same server, words and VM.
pub(super) use host::answer;
pub(super) use vsock::{Size, Vm};
pub(super) use work::{BIG, Sizes, Work};

const OURS: &str = "nacre";
const QEMU: &str = "qemu";
/// What containers have mounted over it.
const FOLDERS: [&str; 5] = ["dev", "etc", "proc", "sys", "tmp"];

/// Options of `nacre-bench net`.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// Rounds; in each, everything is measured once
    #[arg(long, value_name = "N", default_value_t = 10)]
    rounds: u64,
    /// Rounds before that, which do not count
    #[arg(long, value_name = "N", default_value_t = 1)]
    warm_up: u64,
    /// MiB that all streams of a measurement carry together
    #[arg(long, value_name = "N", default_value_t = 256, overrides_with = "mib", value_parser = clap::value_parser!(u64).range(1..=65536))]
    mib: u64,
    /// Requests of a measurement
    #[arg(long, value_name = "N", default_value_t = 1000, overrides_with = "requests", value_parser = clap::value_parser!(u32).range(1..=4000))]
    requests: u32,
    /// Leave out the network
    #[arg(long, conflicts_with = "no_vsock")]
    no_network: bool,
    /// Leave out the vsock
    #[arg(long)]
    no_vsock: bool,
    /// vCPUs of the VMs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=254))]
    vcpus: u8,
    /// Memory of the VMs
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    memory: ByteSize,
    /// The static program that measures [default: NACRE_PROBE, else nacre-probe beside this program or in PATH]
    #[arg(long, value_name = "PROGRAM")]
    probe: Option<PathBuf>,
    /// Folder of the CNI plugins bridge and host-local, absolute [default: NACRE_CNI_BIN, else as the configuration has it]
    #[arg(long, value_name = "DIR")]
    cni: Option<PathBuf>,
    /// Also measure this QEMU for x86-64
    #[arg(long, value_name = "PROGRAM")]
    qemu: Option<PathBuf>,
    /// QEMU's initrd: nacre's with the module virtio_pci [default: nacre's, as the configuration names it]
    #[arg(long, value_name = "FILE", requires = "qemu")]
    qemu_initrd: Option<PathBuf>,
}

impl Options {
    fn sizes(&self) -> Sizes {
        Sizes {
            mib: self.mib,
            requests: self.requests,
        }
    }

    fn plugins(&self, config: &Config) -> Vec<PathBuf> {
        let given = self.cni.clone().or_else(|| variable("NACRE_CNI_BIN"));
        given.map_or_else(
            || config.network.cni_bin_dirs.clone(),
            |folder| vec![folder],
        )
    }
}

/// Measures until all rounds are done or something fails; what there is then is shown and written.
pub(super) fn run(options: &Options, setting: &Setting) -> Result<()> {
    as_root()?;
    let bench = Bench::prepare(options, setting)?;
    let mut measured = Measured::new(&bench.peers, options);
    let network = match options.no_network {
        true => Ok(()),
        false => bench.network(&mut measured),
    };
    let outcome = network.and_then(|()| match options.no_vsock {
        true => Ok(()),
        false => bench.vsock(&mut measured),
    });
    println!("{}", super::machine());
    println!("{}", measured.text());
    let saved = match &setting.json {
        Some(file) => {
            let mut value = measured.json(options, &bench.peers, outcome.is_ok());
            value["kernel"] = bench.config.kernel.display().to_string().into();
            super::save(file, value)
        }
        None => Ok(()),
    };
    outcome.and(saved)
}

/// What everything is measured with.
struct Bench<'o> {
    options: &'o Options,
    peers: Vec<Peer>,
    config: Config,
    probe: PathBuf,
    patience: Duration,
    folder: tempfile::TempDir,
}

/// Where the probe runs.
struct Side<'s> {
    name: &'static str,
    place: Place<'s>,
    /// Its network.
    _joined: bridge::Joined,
    /// It has failed, and is not ours to mend.
    left_out: bool,
}

enum Place<'s> {
    Container(Probed<'s>),
    Qemu(Qemu),
}

impl Side<'_> {
    fn ask(&mut self, words: &[String]) -> Result<String> {
        match &mut self.place {
            Place::Container(container) => container.ask(words),
            Place::Qemu(qemu) => qemu.guest.ask(words),
        }
    }

    fn end(self) -> Result<()> {
        match self.place {
            Place::Container(container) => container.end(),
            Place::Qemu(qemu) => qemu.guest.end(),
        }
        .with_context(|| format!("ending {}", self.name))
    }
}

impl<'o> Bench<'o> {
    /// Makes the root of the containers, and looks for all that is needed.
    fn prepare(options: &'o Options, setting: &Setting) -> Result<Self> {
        let probe = probed::program(options.probe.as_deref())?;
        let folder = tempfile::Builder::new()
            .prefix("nacre-bench-net-")
            .tempdir()
            .context("making a folder for the containers' root")?;
        let mut peers = setting.peers()?;
        let kept = folder.path().join("config.toml");
        peers[0].config = Some(steady(kept, options.vcpus, options.memory)?);
        let bench = Self {
            options,
            peers,
            config: Config::load()?,
            probe,
            patience: Duration::from_secs(setting.patience),
            folder,
        };
        make_root(&bench.root(), &bench.probe)?;
        Ok(bench)
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    fn network(&self, measured: &mut Measured) -> Result<()> {
        let bridge = Bridge::make(self.folder.path(), self.options.plugins(&self.config))?;
        let around = Surroundings::over(&self.root(), self.patience)?;
        let mut sides = self.containers(&bridge, &around)?;
        if let Some(program) = &self.options.qemu {
            match self.qemu(program, &bridge) {
                Ok(side) => sides.push(side),
                Err(error) => measured.failed(format!("qemu is left out: {error:#}")),
            }
        }
        self.rounds(&bridge, &mut sides, measured)?;
        let mut lasting = sides.into_iter().filter(|side| !side.left_out);
        lasting.try_for_each(Side::end)
    }

    fn containers<'s>(&self, bridge: &Bridge, around: &'s Surroundings) -> Result<Vec<Side<'s>>> {
        let start = |peer: &Peer| {
            let joined = bridge.join(peer.name)?;
            let place = container(around, peer, &joined.path, &self.root())
                .with_context(|| format!("starting a container of {}", peer.name))?;
            Ok(Side {
                name: peer.name,
                place: Place::Container(place),
                _joined: joined,
                left_out: false,
            })
        };
        self.peers.iter().map(start).collect()
    }

    fn qemu<'s>(&self, program: &Path, bridge: &Bridge) -> Result<Side<'s>> {
        let joined = bridge.join(QEMU)?;
        let initrd = self.options.qemu_initrd.as_ref();
        let what = Booted {
            program,
            kernel: &self.config.kernel,
            initrd: initrd.unwrap_or(&self.config.initrd),
            vcpus: self.options.vcpus,
            memory_mib: self.options.memory.mib(),
        };
        let folder = self.folder.path();
        let qemu = Qemu::boot(&what, &self.probe, &joined, folder, self.patience)?;
        Ok(Side {
            name: QEMU,
            place: Place::Qemu(qemu),
            _joined: joined,
            left_out: false,
        })
    }

    fn rounds(
        &self,
        bridge: &Bridge,
        sides: &mut [Side<'_>],
        measured: &mut Measured,
    ) -> Result<()> {
        let sizes = self.options.sizes();
        for round in 0..self.all_rounds() {
            let counts = self.begin(round, "network");
            for work in NETWORK {
                let words = work.words(&bridge.server(), sizes);
                for turn in turns(sides.len(), round) {
                    let side = &mut sides[turn];
                    if side.left_out {
                        continue;
                    }
                    let asked = side
                        .ask(&words)
                        .and_then(|line| work.values(&line, sizes))
                        .with_context(|| {
                            let name = side.name;
                            format!("{name} failed in round {}, {}", round + 1, words.join(" "))
                        });
                    match asked {
                        Ok(values) if counts => {
                            measured.add(Table::Network, side.name, work.name, values);
                        }
                        Ok(_) => {}
                        Err(error) if matches!(side.place, Place::Qemu(_)) => {
                            measured.failed(format!("{error:#}"));
                            side.left_out = true;
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        Ok(())
    }

    fn vsock(&self, measured: &mut Measured) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .context("starting a runtime")?;
        let size = Size {
            vcpus: self.options.vcpus,
            memory_mib: self.options.memory.mib(),
        };
        runtime.block_on(async {
            let mut vm = Vm::boot(&self.config, size, &self.root(), self.patience).await?;
            let outcome = self.vsock_rounds(&mut vm, measured).await;
            vm.end().await;
            outcome
        })
    }

    async fn vsock_rounds(&self, vm: &mut Vm, measured: &mut Measured) -> Result<()> {
        let sizes = self.options.sizes();
        for round in 0..self.all_rounds() {
            let counts = self.begin(round, "vsock");
            for work in VSOCK {
                let asked = vm.ask(work, sizes).await;
                let values = asked
                    .and_then(|line| work.values(&line, sizes))
                    .with_context(|| {
                        anyhow!("the vsock failed in round {}, {}", round + 1, work.name)
                    })?;
                if counts {
                    measured.add(Table::Vsock, OURS, work.name, values);
                }
            }
        }
        Ok(())
    }

    fn all_rounds(&self) -> u64 {
        self.options.warm_up + self.options.rounds
    }

    /// Tells of a round; whether it counts.
    fn begin(&self, round: u64, of: &str) -> bool {
        let counts = round >= self.options.warm_up;
        let note = if counts { "" } else { ", to warm up" };
        eprintln!("{of}: round {} of {}{note}", round + 1, self.all_rounds());
        counts
    }
}

/// A root that has the probe and nothing else.
pub(super) fn make_root(root: &Path, probe: &Path) -> Result<()> {
    for name in FOLDERS {
        let path = root.join(name);
        std::fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
    }
    std::fs::copy(probe, root.join(PROBE))
        .with_context(|| format!("copying {}: --probe names another", probe.display()))?;
    Ok(())
}

fn container<'s>(
    around: &'s Surroundings,
    peer: &Peer,
    netns: &Path,
    root: &Path,
) -> Result<Probed<'s>> {
    let joined = Joined {
        binds: &[],
        netns: Some(netns),
    };
    Probed::start(around, peer, &joined, ("bind", root, &["rbind", "rw"]))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    pub(super) fn options(words: &str) -> Result<Options, clap::Error> {
        let words = std::iter::once("net").chain(words.split_whitespace());
        Line::try_parse_from(words).map(|line| line.options)
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
}
