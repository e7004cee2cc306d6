//! `nacre-bench density`: what containers that do nothing hold of the host, several of them at once: memory beyond the guest's, threads,
//! descriptors, and what is missing of the host's memory.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};

use super::memory::{Held, Parts, proportional};
use super::peers::{Container, Peer, Surroundings};
use super::report::{Better, Report, Unit, quantile};
use super::run::{Rounds, Run, turns};
use super::{Setting, interrupt, several};

const SCENARIO: &str = "density";
/// What each container does.
const IDLES: [&str; 2] = ["sleep", "100000"];
/// Between two looks at what all hold.
const BETWEEN: Duration = Duration::from_secs(1);
/// They have settled when all together changed by less than this between two looks, for each one.
const SETTLED_KIB: u64 = 64;
/// And the host's own memory, in which there is more that comes and goes.
const QUIET_KIB: u64 = 1024;
const LOOKS: u32 = 3;

/// Options of `nacre-bench density`.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// How many run at once, each number once
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,4,8", overrides_with = "vms", value_parser = clap::value_parser!(u16).range(1..=256))]
    vms: Vec<u16>,
    /// Rounds; in each, every number of them is looked at once
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: u64,
    /// Longest wait in seconds until what they hold stands still
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    settle: u64,
}

impl Options {
    fn all_rounds(&self) -> Rounds {
        Rounds {
            warm_up: 0,
            count: self.rounds,
        }
    }

    fn settings(&self) -> Value {
        json!({
            "vms": self.vms,
            "rounds": self.rounds,
            "settle_s": self.settle,
        })
    }
}

/// Measures until all rounds are done, something fails or a signal comes; what there is then is shown and written.
pub(super) fn run(options: &Options, setting: &Setting) -> Result<()> {
    let rounds = |around: &Surroundings, peers: &[Peer], run: &mut Run<'_>| {
        rounds(options, around, peers, run)
    };
    several::run(SCENARIO, &options.vms, options.settings(), setting, rounds)
}

fn title(count: u16) -> String {
    several::title(SCENARIO, count)
}

fn rounds(
    options: &Options,
    around: &Surroundings,
    peers: &[Peer],
    run: &mut Run<'_>,
) -> Result<()> {
    let rounds = options.all_rounds();
    run.expect(rounds);
    run.rounds(SCENARIO, rounds, |run, round| {
        for count in &options.vms {
            for turn in turns(peers.len(), round.number) {
                let peer = &peers[turn];
                let (name, number) = (peer.name, round.number + 1);
                run.now(&format!("{count} of {name}"));
                let settle = Duration::from_secs(options.settle);
                let seen = together(around, peer, *count, settle)
                    .with_context(|| format!("{count} containers of {name}, round {number}"))?;
                for (still, what) in [
                    (seen.quiet, "what the host had before still changed"),
                    (seen.settled, "what they hold still changed"),
                ] {
                    if !still {
                        run.document.note(&format!(
                            "{count} of {name}, round {number}: {what} after {} s",
                            options.settle
                        ));
                    }
                }
                if let Some(table) = run.document.table(&title(*count)) {
                    seen.add(table, name);
                }
            }
        }
        Ok(())
    })
}

/// What so many hold.
#[derive(Debug)]
struct Seen {
    each: Vec<One>,
    /// How much less memory the host has for others, KiB, of all.
    host_kib: f64,
    /// The host's memory stood still before.
    quiet: bool,
    settled: bool,
}

/// One shim, and the processes below it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct One {
    memory: Parts,
    threads: u64,
    descriptors: u64,
    processes: u64,
}

/// A row of each container.
type Row = (&'static str, Unit, fn(&One) -> u64);

const ROWS: [Row; 5] = [
    ("PSS beyond guest memory", Unit::Kib, |one| {
        one.memory.own_kib
    }),
    ("PSS of guest memory", Unit::Kib, |one| one.memory.guest_kib),
    ("threads", Unit::Count, |one| one.threads),
    ("descriptors", Unit::Count, |one| one.descriptors),
    ("processes", Unit::Count, |one| one.processes),
];

impl Seen {
    /// One value of each row: what runs at once is alike, and would not be so many values.
    fn add(&self, table: &mut Report, name: &str) {
        let mut add = |row: &str, unit, value| {
            table.add(name, row, unit, value);
            table.better(name, row, Better::Less);
        };
        for (row, unit, of) in ROWS {
            let all: Vec<f64> = self.each.iter().map(|one| of(one) as f64).collect();
            add(row, unit, quantile(&all, 50.0));
            if all.len() > 1 {
                add(&format!("{row}, most"), unit, quantile(&all, 100.0));
            }
        }
        let each = self.host_kib / self.each.len().max(1) as f64;
        add("host memory", Unit::Kib, each);
    }
}

/// Starts so many, looks at them when they have settled, and ends them.
fn together(around: &Surroundings, peer: &Peer, count: u16, settle: Duration) -> Result<Seen> {
    let quiet = settled(settle, QUIET_KIB, || Ok(available_kib()? as u64))?;
    let before = available_kib()?;
    let containers = (0..count)
        .map(|_| Container::running(around, peer, &IDLES))
        .collect::<Result<Vec<_>>>()?;
    let shims = containers
        .iter()
        .map(|container| container.shim_pid.context("the shim does not say its pid"))
        .collect::<Result<Vec<_>>>()?;
    let settled = settled(settle, SETTLED_KIB * u64::from(count), || {
        let all = shims.iter().map(|pid| one(*pid));
        let all = all.collect::<Result<Vec<_>>>()?;
        Ok(all
            .iter()
            .map(|one| one.memory.own_kib + one.memory.guest_kib)
            .sum())
    })?;
    let host_kib = before - available_kib()?;
    let each = shims.iter().map(|pid| one(*pid)).collect::<Result<_>>()?;
    containers.into_iter().try_for_each(Container::end)?;
    Ok(Seen {
        each,
        host_kib,
        quiet,
        settled,
    })
}

/// Looks until a few looks one after another are about the same; whether they were before the time was over.
fn settled(within: Duration, kib: u64, mut look: impl FnMut() -> Result<u64>) -> Result<bool> {
    let began = Instant::now();
    let mut last = look()?;
    let mut same = 0;
    while same < LOOKS {
        if began.elapsed() > within {
            return Ok(false);
        }
        interrupt::check()?;
        std::thread::sleep(BETWEEN);
        let now = look()?;
        same = match now.abs_diff(last) < kib {
            true => same + 1,
            false => 0,
        };
        last = now;
    }
    Ok(true)
}

/// A shim and all below it.
fn one(shim: i32) -> Result<One> {
    let mut total = One::default();
    for pid in family(shim)? {
        let memory = proportional(pid)?;
        let held = Held::of(pid)?;
        total.memory.own_kib += memory.own_kib;
        total.memory.guest_kib += memory.guest_kib;
        total.threads += held.threads;
        total.descriptors += held.descriptors;
        total.processes += 1;
    }
    Ok(total)
}

/// A process, its children, and theirs.
fn family(first: i32) -> Result<BTreeSet<i32>> {
    let mut all = BTreeSet::new();
    let mut left = vec![first];
    while let Some(pid) = left.pop() {
        if !all.insert(pid) {
            continue;
        }
        let tasks = format!("/proc/{pid}/task");
        let tasks = fs::read_dir(&tasks).with_context(|| format!("reading {tasks}"))?;
        for task in tasks {
            // A thread may end meanwhile.
            let children = fs::read_to_string(task?.path().join("children")).unwrap_or_default();
            left.extend(
                children
                    .split_whitespace()
                    .filter_map(|pid| pid.parse::<i32>().ok()),
            );
        }
    }
    Ok(all)
}

/// What the host has for others, KiB.
fn available_kib() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    available_of(&text).context("/proc/meminfo has no MemAvailable")
}

fn available_of(meminfo: &str) -> Option<f64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn options(words: &str) -> Result<Options, clap::Error> {
        crate::bench::options(words)
    }

    #[test]
    fn options_have_their_defaults_and_their_bounds() {
        assert_eq!(options("").unwrap().vms, [1, 4, 8]);
        // xtask has its own in front of the user's.
        assert_eq!(options("--vms 1,2 --vms 3").unwrap().vms, [3]);
        for words in ["--vms 0", "--vms 257", "--rounds x"] {
            assert!(options(words).is_err(), "{words}");
        }
    }

    #[test]
    fn a_family_has_the_children_and_holds_what_they_hold() {
        let mut child = Command::new("sh")
            .args(["-c", "sleep 20 & echo; wait"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        let mut line = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        let all = family(pid).unwrap();
        assert!(all.contains(&pid) && all.len() == 2, "{all:?}");
        let held = one(pid).unwrap();
        assert_eq!((held.processes, held.threads), (2, 2));
        assert!(held.memory.own_kib > 0 && held.memory.guest_kib == 0);
        for pid in all {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
        child.wait().unwrap();
        assert!(family(pid).is_err());
    }

    #[test]
    fn what_stands_still_has_settled_and_what_grows_has_not() {
        let mut seen = 0;
        let still = settled(Duration::from_secs(30), 64, || {
            seen += 1;
            Ok(if seen < 2 { 0 } else { 9000 })
        });
        assert!(still.unwrap() && seen == 5);
        let mut grown = 0;
        let growing = settled(Duration::from_millis(10), 64, || {
            grown += 1000;
            Ok(grown)
        });
        assert!(!growing.unwrap());
    }

    #[test]
    fn all_of_it_is_in_the_report() {
        let options = options("--vms 2").unwrap();
        let peer = Peer {
            name: "nacre",
            program: "/s".into(),
            ..Peer::default()
        };
        let mut table = several::tables(SCENARIO, &options.vms, &[peer]).remove(0);
        let one = |own_kib| One {
            memory: Parts {
                own_kib,
                guest_kib: 50_000,
            },
            threads: 9,
            descriptors: 40,
            processes: 1,
        };
        let seen = Seen {
            each: vec![one(8000), one(9000), one(7000)],
            host_kib: 180_000.0,
            quiet: true,
            settled: true,
        };
        seen.add(&mut table, "nacre");
        let values = |row| table.values("nacre", row);
        // One of a round, however many there are.
        assert_eq!(values("PSS beyond guest memory"), [8000.0]);
        assert_eq!(values("PSS beyond guest memory, most"), [9000.0]);
        let rows = &table.sides[0].series;
        assert!(rows.iter().all(|row| row.better == Better::Less));
        assert_eq!(values("host memory"), [60_000.0]);
        assert_eq!(
            available_of("MemFree: 1 kB\nMemAvailable:  77 kB\n"),
            Some(77.0)
        );
    }
}
