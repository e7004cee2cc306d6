//! `nacre-bench hotplug`: vCPUs and memory come and go in a VM of ours, and in
//! QEMU's if there is one. Here are the rounds; `ours` and `qemu` are the VMs,
//! `parts` what a time is made of, `measured` what was measured, and its
//! picture.

mod measured;
mod ours;
mod parts;
mod qemu;
mod qmp;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::run::{Rounds, turns};
use super::{Setting, interrupt};
use crate::config::{ByteSize, Config};
use measured::{Direction, Measured, OURS, PEER};
use ours::Ours;
use parts::Parts;
use qemu::{Booted, Qemu};

/// An operation that has failed so often is left out from there on.
const FAILURES: usize = 3;

/// Options of `nacre-bench hotplug`.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// How many vCPUs are plugged at once, beside the one that the VM begins with; each 1 to 253
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1, 2, 4, 8], value_parser = clap::value_parser!(u8).range(1..=253))]
    vcpus: Vec<u8>,
    /// How much memory is plugged at once; multiples of 128M
    #[arg(long, value_name = "SIZE,…", value_delimiter = ',', default_values = ["128M", "256M", "512M", "1G", "2G", "4G"], value_parser = blocks)]
    sizes: Vec<ByteSize>,
    /// By which ways memory is plugged
    #[arg(long, value_name = "WAY,…", value_enum, value_delimiter = ',', default_values = ["virtio-mem", "acpi"])]
    ways: Vec<Way>,
    /// Leave vCPUs out
    #[arg(long, conflicts_with = "vcpus")]
    no_vcpus: bool,
    /// Leave memory out
    #[arg(long, conflicts_with_all = ["sizes", "ways", "no_vcpus"])]
    no_memory: bool,
    /// Rounds; in each, everything is plugged and unplugged once
    #[arg(long, value_name = "N", default_value_t = 10)]
    rounds: u64,
    /// Rounds before that, which do not count
    #[arg(long, value_name = "N", default_value_t = 1)]
    warm_up: u64,
    /// Memory that the VM begins with: a third of what is plugged or more, so that the guest can give all of it back
    #[arg(long, value_name = "SIZE", default_value = "1536M")]
    memory: ByteSize,
    /// Guest kernel [default: from the configuration]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// initrd with nacre's agent [default: from the configuration]
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Also write how the times are distributed to this file, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Also measure this QEMU for x86-64: vCPUs, and memory as DIMMs; its guest is the same kernel with busybox
    #[arg(long, value_name = "PROGRAM")]
    qemu: Option<PathBuf>,
}

fn blocks(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse()?;
    if size.mib() == 0 || size != ByteSize::from_mib(size.mib().next_multiple_of(128)) {
        return Err("a guest takes memory in blocks of 128M: a multiple of that is wanted".into());
    }
    Ok(size)
}

/// How memory comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Way {
    /// By the virtio-mem device
    VirtioMem,
    /// By ACPI, in units of 128 MiB
    Acpi,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::VirtioMem => "virtio-mem",
            Self::Acpi => "acpi",
        }
    }
}

/// What comes and goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// So many vCPUs.
    Vcpus(u8),
    /// So many MiB.
    Memory(u64, Way),
}

impl What {
    fn name(self) -> String {
        match self {
            Self::Vcpus(1) => "1 vCPU".to_owned(),
            Self::Vcpus(count) => format!("{count} vCPUs"),
            Self::Memory(mib, way) => format!("{} {}", ByteSize::from_mib(mib), way.name()),
        }
    }

    /// Whether QEMU is measured at it too: its guest has no driver of virtio-mem, which is a module in stock kernels.
    fn has_peer(self) -> bool {
        !matches!(self, Self::Memory(_, Way::VirtioMem))
    }
}

/// One VM and what is done to it.
#[derive(Debug, Clone)]
struct Setup {
    operations: Vec<What>,
    /// How memory comes; None if only vCPUs do.
    way: Option<Way>,
    boot_mib: u64,
}

impl Setup {
    fn name(&self) -> &'static str {
        self.way.map_or("vCPUs", Way::name)
    }

    fn most_vcpus(&self) -> u8 {
        let counts = self.operations.iter().map(|what| match what {
            What::Vcpus(count) => *count,
            What::Memory(..) => 0,
        });
        counts.max().unwrap_or(0)
    }

    fn most_mib(&self) -> u64 {
        let sizes = self.operations.iter().map(|what| match what {
            What::Vcpus(_) => 0,
            What::Memory(mib, _) => *mib,
        });
        sizes.max().unwrap_or(0)
    }
}

impl Options {
    fn all_rounds(&self) -> Rounds {
        Rounds {
            warm_up: self.warm_up,
            count: self.rounds,
        }
    }

    /// The VMs, one after another.
    fn setups(&self) -> Vec<Setup> {
        let boot_mib = self.memory.mib();
        let setup = |way, all: Vec<What>| {
            let mut operations = Vec::new();
            for what in all {
                // Each has its table, by its name.
                if !operations.contains(&what) {
                    operations.push(what);
                }
            }
            Setup {
                operations,
                way,
                boot_mib,
            }
        };
        let mut setups = Vec::new();
        if !self.no_vcpus {
            let vcpus = self.vcpus.iter().copied().map(What::Vcpus);
            setups.push(setup(None, vcpus.collect()));
        }
        let ways = self.ways.iter().enumerate();
        let once = ways.filter(|(at, way)| !self.no_memory && !self.ways[..*at].contains(way));
        for way in once.map(|(_, way)| *way) {
            let sizes = self.sizes.iter().map(|size| What::Memory(size.mib(), way));
            setups.push(setup(Some(way), sizes.collect()));
        }
        setups
    }
}

/// Measures until all rounds are done, something fails that makes going on pointless, or a signal comes; what there is then is
/// shown and written.
pub(super) fn run(options: &Options, setting: &Setting) -> Result<()> {
    let mut config = Config::load()?;
    config.kernel = options.kernel.clone().unwrap_or(config.kernel);
    config.initrd = options.initrd.clone().unwrap_or(config.initrd);
    let busybox = match &options.qemu {
        Some(_) => setting.busybox()?,
        None => PathBuf::new(),
    };
    let bench = Bench {
        options,
        config: &config,
        busybox,
        patience: Duration::from_secs(setting.patience),
    };
    let setups = options.setups();
    let mut measured = Measured::new(options, &config, &setups, setting);
    let runtime = tokio::runtime::Runtime::new().context("starting threads")?;
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = bench.all(&setups, &mut measured) => outcome,
            why = interrupt::come() => Err(why),
        }
    });
    let drawn = options.plot.as_ref().map_or(Ok(()), |file| {
        let svg = measured.plot()?;
        std::fs::write(file, svg).with_context(|| format!("writing {}", file.display()))
    });
    measured.run.end(outcome).and(drawn)
}

/// All that stays the same.
struct Bench<'o> {
    options: &'o Options,
    config: &'o Config,
    busybox: PathBuf,
    patience: Duration,
}

impl Bench<'_> {
    async fn all(&self, setups: &[Setup], measured: &mut Measured<'_>) -> Result<()> {
        for setup in setups {
            self.one(setup, measured)
                .await
                .with_context(|| format!("measuring {}", setup.name()))?;
        }
        Ok(())
    }

    async fn one(&self, setup: &Setup, measured: &mut Measured<'_>) -> Result<()> {
        let mut ours = Ours::boot(self.config, setup, self.patience).await?;
        measured.guest(self.config, &ours.kernel_release);
        let mut peer = match &self.options.qemu {
            Some(program) if setup.operations.iter().all(|what| what.has_peer()) => {
                let what = Booted {
                    program,
                    kernel: &self.config.kernel,
                    busybox: &self.busybox,
                };
                let qemu = Qemu::boot(&what, setup, self.patience).await?;
                measured.qemu(program, &qemu.version);
                Some(qemu)
            }
            Some(_) | None => None,
        };
        let rounds = self.options.all_rounds();
        for round in rounds.each() {
            measured.run.begin(setup.name(), rounds, round)?;
            for what in setup.operations.iter().copied() {
                for side in turns(1 + usize::from(peer.is_some()), round.number) {
                    let name = if side == 0 { OURS } else { PEER };
                    if measured.failures(what, name) >= FAILURES {
                        continue;
                    }
                    measured.run.now(&format!("{name}, {}", what.name()));
                    let done = match (&mut peer, side) {
                        (Some(peer), 1) => there_and_back(peer, what).await,
                        _ => there_and_back(&mut ours, what).await,
                    };
                    match done {
                        Ok((plug, unplug)) if round.counts => {
                            measured.add(what, Direction::Plug, name, &plug);
                            measured.add(what, Direction::Unplug, name, &unplug);
                        }
                        Ok(_) => {}
                        Err(error) if side == 1 => {
                            // The signal may have been QEMU's as well.
                            interrupt::check_after_failure()?;
                            measured.failed(what, name, &error);
                            // What it has now is not known.
                            peer = None;
                            break;
                        }
                        Err(error) => {
                            measured.failed(what, name, &error);
                            let back = ours.back(what).await;
                            eprint!("{}", ours.console());
                            back.context("going back after a failure")?;
                        }
                    }
                }
            }
            measured.run.done()?;
        }
        ours.end().await;
        Ok(())
    }
}

/// A VM that something comes to and goes from.
trait Plugging {
    /// It comes, and is in use when this returns.
    async fn plug(&mut self, what: What) -> Result<Parts>;
    /// All that came goes.
    async fn unplug(&mut self, what: What) -> Result<Parts>;
}

async fn there_and_back(vm: &mut impl Plugging, what: What) -> Result<(Parts, Parts)> {
    let plug = vm.plug(what).await;
    let plug = plug.with_context(|| format!("plugging {}", what.name()))?;
    let unplug = vm.unplug(what).await;
    let unplug = unplug.with_context(|| format!("unplugging {}", what.name()))?;
    Ok((plug, unplug))
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

    fn options(words: &[&str]) -> Result<Options, clap::Error> {
        let words = std::iter::once("hotplug").chain(words.iter().copied());
        Line::try_parse_from(words).map(|line| line.options)
    }

    #[test]
    fn there_is_a_vm_for_vcpus_and_one_for_each_way() {
        let setups = options(&[]).unwrap().setups();
        let names: Vec<_> = setups.iter().map(Setup::name).collect();
        assert_eq!(names, ["vCPUs", "virtio-mem", "acpi"]);
        assert_eq!((setups[0].most_vcpus(), setups[0].most_mib()), (8, 0));
        assert_eq!((setups[2].most_vcpus(), setups[2].most_mib()), (0, 4096));
        let chosen = options(&["--vcpus", "3,1,3", "--sizes", "256M,1G", "--ways", "acpi"]);
        let setups = chosen.unwrap().setups();
        assert_eq!(setups.len(), 2);
        assert_eq!(setups[0].operations, [What::Vcpus(3), What::Vcpus(1)]);
        assert_eq!(setups[1].operations[1], What::Memory(1024, Way::Acpi));
        assert_eq!(options(&["--no-memory"]).unwrap().setups().len(), 1);
        assert_eq!(options(&["--no-vcpus"]).unwrap().setups().len(), 2);
    }

    #[test]
    fn what_cannot_be_plugged_is_refused() {
        for words in [
            ["--vcpus", "0"],
            ["--vcpus", "254"],
            ["--sizes", "100M"],
            ["--sizes", "0"],
            ["--sizes", "134217729"],
            ["--ways", "auto"],
        ] {
            assert!(options(&words).is_err(), "{words:?}");
        }
    }

    #[test]
    fn an_operation_is_named_as_it_was_asked_for() {
        let names = [
            What::Vcpus(1),
            What::Vcpus(8),
            What::Memory(128, Way::VirtioMem),
            What::Memory(4096, Way::Acpi),
        ]
        .map(What::name);
        assert_eq!(names, ["1 vCPU", "8 vCPUs", "128M virtio-mem", "4G acpi"]);
    }
}
