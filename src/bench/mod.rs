//! `nacre-bench`: measures our shim, next to runc's in the same run, by driving
//! both as containerd does; and how a VM grows and shrinks. What it measures it
//! prints and does not judge: a time is no test. Two runs it compares.
//!
//! `scenarios` is what is measured of shims, `peers`, `listeners` and `shim`
//! how one is driven, `storage` and `net` what is measured of files and of the
//! network in them (by `probed` and, in QEMU, `console`; `steady` has their VMs'
//! configuration), `hotplug` what is measured of a VM, `boot` how it begins, `density` and `parallel` what several containers
//! hold and how they begin at once (`first_byte` is one's beginning), `memory` what a process
//! holds.
//!
//! `run` is a scenario under way, with its `progress` and what an `interrupt`
//! does to it; `document` what it leaves, with what its guests booted (`guest`) and a `report` for each table; `page`
//! (with `plot`) and `compare` are made of that.

mod boot;
mod compare;
mod console;
mod density;
mod document;
mod first_byte;
mod guest;
mod hotplug;
mod interrupt;
mod listeners;
mod memory;
mod net;
mod page;
mod parallel;
mod peers;
mod plot;
mod probed;
mod progress;
mod report;
mod run;
mod scenarios;
mod several;
pub mod shim;
mod steady;
mod storage;
mod vsock;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, Subcommand};
use serde_json::json;

use crate::config::Config;
use guest::GuestKernel;
use peers::{Peer, Surroundings};
use run::{Rounds, Run};

/// Measures nacre's shim, and runc's beside it; and how a VM grows and shrinks. Run it as root where guests run; `cargo xtask bench` does all of that.
/// SIGINT or SIGTERM ends a scenario: what it has made is cleaned up, and what it has measured is shown and written.
#[derive(Debug, Parser)]
#[command(name = "nacre-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    setting: Setting,
}

/// What every scenario needs.
#[derive(Debug, Default, Args)]
struct Setting {
    /// nacre's shim [default: containerd-shim-nacre-v1 beside this program, else in PATH]
    #[arg(long, value_name = "PROGRAM", global = true)]
    shim: Option<PathBuf>,
    /// runc's shim [default: containerd-shim-runc-v2 in NACRE_CONTAINERD_2_1 or PATH, if there is one]
    #[arg(long, value_name = "PROGRAM", global = true)]
    runc_shim: Option<PathBuf>,
    /// runc itself [default: NACRE_RUNC, else the one in PATH]
    #[arg(long, value_name = "PROGRAM", global = true)]
    runc: Option<PathBuf>,
    /// Measure nacre's shim alone
    #[arg(long, global = true)]
    alone: bool,
    /// Root file system of the containers, with sh, sleep, true and cat; runc's containers may write to it [default: one made of busybox]
    #[arg(long, value_name = "DIR", global = true)]
    rootfs: Option<PathBuf>,
    /// A static busybox to make the root of [default: NACRE_BUSYBOX, else the one in PATH]
    #[arg(long, value_name = "PROGRAM", global = true, conflicts_with = "rootfs")]
    busybox: Option<PathBuf>,
    /// Also write every value to this file, as JSON; after each round, at most once a second
    #[arg(long, value_name = "FILE", global = true)]
    json: Option<PathBuf>,
    /// Also write a page of it to this file, as HTML that needs nothing else
    #[arg(long, value_name = "FILE", global = true)]
    html: Option<PathBuf>,
    /// Longest time of one call, in seconds
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 300,
        global = true,
        overrides_with = "patience"
    )]
    patience: u64,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Shims(Scenario),
    /// vCPUs and memory of a VM come and go, by their parts: host call, noticed, online, acknowledged. Starts no shim: the
    /// options of shims mean nothing here
    Hotplug(Box<hotplug::Options>),
    /// From a VMM's process to its guest's init, next to other VMMs with the same guest; and the phases of our own boots, up to a
    /// container's first byte. Instructions, calls and exits are counted as well
    Boot(Box<boot::Options>),
    /// What containers that do nothing hold of the host: memory beyond the guest's, threads, descriptors; next to runc
    Density(density::Options),
    /// A stream of the vsock in 64 KiB writes, each way: in the VM's own process, as the shim has it, and through vmctl's Unix
    /// socket
    Vsock(vsock::Options),
    /// Several containers started at once, each until its first byte, next to runc
    Parallel(parallel::Options),
    /// Files by virtio-blk and virtio-fs, next to runc on the same files: a big one read from end to end and at random, a tree
    /// walked and unpacked
    Storage(Box<storage::Options>),
    /// The network by virtio-net, next to runc with veth: TCP streams each way, requests and answers; and the vsock that stdio
    /// goes over
    Net(Box<net::Options>),
    /// Makes the page of --html anew, of files that --json has written
    Page(page::Options),
    /// Compares what --json has written in two runs of one scenario: what has changed beyond the noise, and how that is known
    Compare(compare::Options),
}

/// What is measured of shims.
#[derive(Debug, Subcommand)]
enum Scenario {
    /// A container's life by its phases: shim-start, connect, create, start, first-output, kill, exit, delete, shutdown
    Lifecycle {
        /// Containers of each shim
        #[arg(long, value_name = "N", default_value_t = 10)]
        count: u64,
        /// Containers of each shim before that, which do not count
        #[arg(long, value_name = "N", default_value_t = 1)]
        warm_up: u64,
    },
    /// `true` as an exec in a running container: exec, start, wait, delete
    Exec {
        /// Execs of each shim
        #[arg(long, value_name = "N", default_value_t = 100)]
        count: u64,
        /// Execs of each shim before that, which do not count
        #[arg(long, value_name = "N", default_value_t = 5)]
        warm_up: u64,
    },
    /// Bytes through `cat` and back, by FIFOs, with CloseIO for the end
    Cat {
        /// Times for each shim
        #[arg(long, value_name = "N", default_value_t = 5)]
        count: u64,
        /// Times before that, which do not count
        #[arg(long, value_name = "N", default_value_t = 1)]
        warm_up: u64,
        /// MiB each time
        #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1024))]
        mib: u16,
    },
    /// Many execs one after another in one container, and what the shim holds before and after
    Execs {
        /// Execs
        #[arg(long, value_name = "N", default_value_t = 1000)]
        count: u64,
        /// Execs before the first look
        #[arg(long, value_name = "N", default_value_t = 20)]
        warm_up: u64,
    },
}

/// The program. Measurements go to stdout; an error to stderr, and the exit code is then 1, or 2 for wrong arguments; 1 as
/// well where `compare --fail` has found something worse.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too; a closed stdout has no remedy.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let measure = |scenario: &dyn Fn() -> Result<()>| -> Result<ExitCode> {
        interrupt::listen()?;
        scenario().map(|()| ExitCode::SUCCESS)
    };
    let setting = &cli.setting;
    let outcome = match &cli.command {
        Command::Shims(scenario) => measure(&|| shims(scenario, setting)),
        Command::Hotplug(options) => measure(&|| hotplug::run(options, setting)),
        Command::Boot(options) => measure(&|| boot::run(options, setting)),
        Command::Density(options) => measure(&|| density::run(options, setting)),
        Command::Parallel(options) => measure(&|| parallel::run(options, setting)),
        Command::Vsock(options) => measure(&|| vsock::run(options, setting)),
        Command::Storage(options) => measure(&|| storage::run(options, setting)),
        Command::Net(options) => measure(&|| net::run(options, setting)),
        Command::Page(options) => page::run(options, setting).map(|()| ExitCode::SUCCESS),
        Command::Compare(options) => compare::run(options, setting),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("nacre-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn as_root() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "Shims mount and make cgroups: run nacre-bench as root"
    );
    Ok(())
}

impl Scenario {
    /// Its name, its rounds, and what else is set.
    fn describe(&self) -> (&'static str, Rounds, serde_json::Value) {
        let (name, count, warm_up, mib) = match *self {
            Self::Lifecycle { count, warm_up } => ("lifecycle", count, warm_up, None),
            Self::Exec { count, warm_up } => ("exec", count, warm_up, None),
            Self::Cat {
                count,
                warm_up,
                mib,
            } => ("cat", count, warm_up, Some(mib)),
            Self::Execs { count, warm_up } => ("execs", count, warm_up, None),
        };
        let mut settings = json!({ "rounds": count, "warm_up": warm_up });
        if let Some(mib) = mib {
            settings["mib"] = mib.into();
        }
        (name, Rounds { warm_up, count }, settings)
    }
}

fn shims(scenario: &Scenario, setting: &Setting) -> Result<()> {
    as_root()?;
    let peers = setting.peers()?;
    let config = Config::load()?;
    let busybox = setting.busybox()?;
    let patience = Duration::from_secs(setting.patience);
    let around = Surroundings::new(setting.rootfs.as_deref(), &busybox, patience)?;
    let (name, rounds, mut settings) = scenario.describe();
    settings["rootfs"] = match &setting.rootfs {
        Some(rootfs) => rootfs.display().to_string().into(),
        None => "made of busybox".into(),
    };
    let mut run = Run::new(name, settings, setting);
    run.peers(&peers);
    run.document.guest_kernel = Some(GuestKernel::of(&config.kernel, Some(&config.initrd)));
    let outcome = match *scenario {
        Scenario::Lifecycle { .. } => scenarios::lifecycle(&around, &peers, rounds, &mut run),
        Scenario::Exec { .. } => scenarios::exec(&around, &peers, rounds, &mut run),
        Scenario::Cat { mib, .. } => scenarios::cat(&around, &peers, rounds, mib.into(), &mut run),
        Scenario::Execs { .. } => scenarios::execs(&around, &peers, rounds, &mut run),
    };
    run.end(outcome)
}

impl Setting {
    fn peers(&self) -> Result<Vec<Peer>> {
        let ours = Self::ours(self.shim.as_deref(), "containerd-shim-nacre-v1", "--shim")?;
        let mut peers = vec![Peer {
            name: "nacre",
            program: ours,
            ..Peer::default()
        }];
        if self.alone {
            return Ok(peers);
        }
        let known = std::env::var_os("NACRE_CONTAINERD_2_1")
            .map(|folder| PathBuf::from(folder).join("containerd-shim-runc-v2"))
            .filter(|program| program.is_file());
        let theirs = self.runc_shim.clone().or(known);
        let Some(theirs) = theirs.or_else(|| in_path("containerd-shim-runc-v2")) else {
            bail!(
                "There is no containerd-shim-runc-v2 to compare with: --runc-shim names it, --alone measures without"
            );
        };
        let runc = self.runc.clone().or_else(|| variable("NACRE_RUNC"));
        let runc = match runc {
            // A folder that holds it, or it.
            Some(runc) if runc.is_dir() => Some(runc),
            Some(runc) => absolute(&runc)?.parent().map(Path::to_owned),
            None => None,
        };
        peers.push(Peer {
            name: "runc",
            program: absolute(&theirs)?,
            path: runc,
            ..Peer::default()
        });
        Ok(peers)
    }

    /// A program of ours beside this one, or in PATH, unless it was named.
    fn ours(given: Option<&Path>, name: &str, option: &str) -> Result<PathBuf> {
        let beside = std::env::current_exe()?.with_file_name(name);
        let found = match given {
            Some(given) => Some(given.to_owned()),
            None if beside.is_file() => Some(beside),
            None => in_path(name),
        };
        let found = found.with_context(|| {
            format!("There is no {name} beside this program or in PATH: {option} names it")
        })?;
        absolute(&found)
    }

    fn busybox(&self) -> Result<PathBuf> {
        if self.rootfs.is_some() {
            return Ok(PathBuf::new());
        }
        let given = self.busybox.clone().or_else(|| variable("NACRE_BUSYBOX"));
        given.or_else(|| in_path("busybox")).context(
            "There is no busybox in PATH to make a root of: --busybox or --rootfs names one",
        )
    }
}

/// Each number of containers has a table of its own.
fn each_once(vms: &[u16]) -> Result<()> {
    for (at, count) in vms.iter().enumerate() {
        ensure!(
            !vms[..at].contains(count),
            "--vms names {count} twice: each number once is wanted"
        );
    }
    Ok(())
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from)
}

/// An existing program's absolute path: shims are started in another folder.
fn absolute(program: &Path) -> Result<PathBuf> {
    ensure!(
        program.is_file(),
        "There is no program {}",
        program.display()
    );
    Ok(std::path::absolute(program)?)
}

fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

/// Options of a scenario, from words.
#[cfg(test)]
fn options<Options: Args>(words: &str) -> Result<Options, clap::Error> {
    #[derive(Parser)]
    struct Line<Options: Args> {
        #[command(flatten)]
        options: Options,
    }
    let words = std::iter::once("nacre-bench").chain(words.split_whitespace());
    Line::try_parse_from(words).map(|line| line.options)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
        let cli = Cli::parse_from(["nacre-bench", "cat", "--mib", "3", "--alone"]);
        assert!(cli.setting.alone);
        assert!(matches!(
            cli.command,
            Command::Shims(Scenario::Cat { mib: 3, .. })
        ));
        let none = [
            "cat --mib 0",
            "page",
            "compare a",
            "compare a b --threshold -1",
        ];
        for words in none.map(|words| words.split(' ')) {
            let words = std::iter::once("nacre-bench").chain(words);
            assert!(Cli::try_parse_from(words.clone()).is_err(), "{words:?}");
        }
    }

    #[test]
    fn a_number_of_containers_is_named_once() {
        each_once(&[4, 1, 8]).unwrap();
        let error = each_once(&[4, 1, 4]).unwrap_err();
        assert!(error.to_string().contains("4 twice"), "{error}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = absolute(Path::new("/nowhere/shim")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/shim"));
    }
}
