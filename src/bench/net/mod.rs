//! `nacre-bench net`: TCP and UDP between a container and a server, next to runc with the same kind of network, and next to QEMU if there is
//! one; and the vsock of a VM. Here are the rounds; `work` is what is measured, `bridge` the network, `qemu` and `vsock` where beside
//! containers, `host` the vsock's other end, `options` what it is told. What measures is `nacre-probe`, the same everywhere.

mod bridge;
mod host;
mod options;
mod qemu;
mod vsock;
mod work;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::console::Booted;
use super::guest::GuestKernel;
use super::peers::{Joined, Peer, Surroundings};
use super::probed::{self, PROBE, Probed};
use super::report::{Unit, quantile};
use super::run::{Round, Run, turns};
use super::steady::steady;
use super::{Setting, as_root, interrupt};
use crate::config::Config;
use bridge::Bridge;
pub(super) use options::Options;
use qemu::Qemu;
use work::{NETWORK, VSOCK};

// The scenario vsock has the same server, words and VM.
pub(super) use host::answer;
pub(super) use vsock::{Size, Vm};
pub(super) use work::{BIG, Sizes, Work};

const OURS: &str = "nacre";
const QEMU: &str = "qemu";
/// The tables.
const OF_NETWORK: &str = "virtio-net";
const OF_VSOCK: &str = "vsock";
/// What containers have mounted over it.
const FOLDERS: [&str; 5] = ["dev", "etc", "proc", "sys", "tmp"];

/// Measures until all rounds are done, something fails or a signal comes; what there is then is shown and written.
pub(super) fn run(options: &Options, setting: &Setting) -> Result<()> {
    as_root()?;
    let bench = Bench::prepare(options, setting)?;
    let mut run = Run::new("net", options.settings(), setting);
    run.document.tables = options.tables(&bench.peers);
    run.document.guest_kernel = Some(GuestKernel::of(
        &bench.config.kernel,
        Some(&bench.config.initrd),
    ));
    run.peers(&bench.peers);
    if let Some(qemu) = &options.qemu {
        run.document.program(QEMU, qemu);
    }
    (0..run.document.tables.len()).for_each(|_| run.expect(options.all_rounds()));
    let network = match options.no_network {
        true => Ok(()),
        false => bench.network(&mut run),
    };
    let outcome = network.and_then(|()| match options.no_vsock {
        true => Ok(()),
        false => bench.vsock(&mut run),
    });
    run.end(outcome)
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

    /// Measures one thing. A QEMU that fails is left out from there on.
    fn measure(
        &mut self,
        work: Work,
        words: &[String],
        sizes: Sizes,
        round: Round,
        run: &mut Run<'_>,
    ) -> Result<()> {
        interrupt::check()?;
        let name = self.name;
        run.now(&format!("{name}, {}", work.name));
        let asked = self
            .ask(words)
            .and_then(|line| work.values(&line, sizes))
            .with_context(|| {
                let round = round.number + 1;
                format!("{name} failed in round {round}, {}", words.join(" "))
            });
        match asked {
            Ok(values) => add(run, round, OF_NETWORK, name, work, values),
            Err(error) if matches!(self.place, Place::Qemu(_)) => {
                interrupt::check_after_failure()?;
                run.failed(&format!("{error:#}"));
                self.left_out = true;
            }
            Err(error) => return Err(error),
        }
        Ok(())
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

    fn network(&self, run: &mut Run<'_>) -> Result<()> {
        let bridge = Bridge::make(self.folder.path(), self.options.plugins(&self.config))?;
        let around = Surroundings::over(&self.root(), self.patience)?;
        let mut sides = self.containers(&bridge, &around)?;
        if let Some(program) = &self.options.qemu {
            match self.qemu(program, &bridge) {
                Ok(side) => sides.push(side),
                Err(error) => {
                    interrupt::check_after_failure()?;
                    run.failed(&format!("qemu is left out: {error:#}"));
                }
            }
        }
        self.rounds(&bridge, &mut sides, run)?;
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

    fn rounds(&self, bridge: &Bridge, sides: &mut [Side<'_>], run: &mut Run<'_>) -> Result<()> {
        let sizes = self.options.sizes();
        run.rounds("network", self.options.all_rounds(), |run, round| {
            for work in NETWORK {
                let words = work.words(&bridge.server(), sizes);
                for turn in turns(sides.len(), round.number) {
                    let side = &mut sides[turn];
                    if !side.left_out {
                        side.measure(work, &words, sizes, round, run)?;
                    }
                }
            }
            Ok(())
        })
    }

    fn vsock(&self, run: &mut Run<'_>) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .context("starting a runtime")?;
        let size = Size {
            vcpus: self.options.vcpus,
            memory_mib: self.options.memory.mib(),
        };
        let root = self.root();
        runtime.block_on(async {
            let mut vm = tokio::select! {
                vm = Vm::boot(&self.config, size, &root, self.patience) => vm?,
                why = interrupt::come() => return Err(why),
            };
            let outcome = tokio::select! {
                outcome = self.vsock_rounds(&mut vm, run) => outcome,
                why = interrupt::come() => Err(why),
            };
            vm.end().await;
            outcome
        })
    }

    async fn vsock_rounds(&self, vm: &mut Vm, run: &mut Run<'_>) -> Result<()> {
        let sizes = self.options.sizes();
        let rounds = self.options.all_rounds();
        for round in rounds.each() {
            run.begin(OF_VSOCK, rounds, round)?;
            for work in VSOCK {
                run.now(work.name);
                let asked = vm.ask(work, sizes).await;
                let values = asked
                    .and_then(|line| work.values(&line, sizes))
                    .with_context(|| {
                        let round = round.number + 1;
                        anyhow!("the vsock failed in round {round}, {}", work.name)
                    })?;
                add(run, round, OF_VSOCK, OURS, work, values);
            }
            run.done()?;
        }
        Ok(())
    }
}

/// Adds one measurement, if its round counts. Of requests that is their median and their p99: those of a round are alike, and would not be
/// so many values.
fn add(
    run: &mut Run<'_>,
    round: Round,
    table: &str,
    side: &str,
    work: Work,
    (unit, values): (Unit, Vec<f64>),
) {
    if !round.counts || values.is_empty() {
        return;
    }
    run.add(table, side, work.name, unit, quantile(&values, 50.0));
    if work.asks() {
        let row = format!("{}, p99", work.name);
        run.add(table, side, &row, unit, quantile(&values, 99.0));
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
    use super::options::tests::{options, peers};
    use super::*;

    #[test]
    fn every_value_of_a_round_that_counts_is_in_its_table() {
        let options = options("--qemu /q").unwrap();
        let setting = Setting::default();
        let mut run = Run::new("net", options.settings(), &setting);
        run.document.tables = options.tables(&peers());
        for round in options.all_rounds().each().take(2) {
            for work in NETWORK {
                let run = &mut run;
                add(
                    run,
                    round,
                    OF_NETWORK,
                    OURS,
                    work,
                    (Unit::Us, vec![3.0, 9.0, 2.0]),
                );
                add(run, round, OF_NETWORK, "runc", work, (Unit::Us, vec![2.0]));
            }
            for work in VSOCK {
                let values = (Unit::MibPerSecond, vec![7.0]);
                add(&mut run, round, OF_VSOCK, OURS, work, values);
            }
        }
        let text = run.document.text();
        for words in ["virtio-net", "vsock", "nacre/runc", "1.50", "qemu p99"] {
            assert!(text.contains(words), "{words} in {text}");
        }
        let [network, vsock] = run.document.tables.as_slice() else {
            panic!("two tables in {text}");
        };
        assert_eq!(network.values(OURS, "UDP request"), [3.0]);
        assert_eq!(network.values(OURS, "UDP request, p99"), [9.0]);
        assert!(network.values(OURS, "TCP in, 1 stream, p99").is_empty());
        assert_eq!(vsock.values(OURS, VSOCK[8].name), [7.0]);
    }
}
