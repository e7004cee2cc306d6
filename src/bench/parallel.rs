//! `nacre-bench parallel`: several containers started at once, each until its first byte, and until all have said something.

use std::sync::{PoisonError, RwLock};
use std::thread::Builder;

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use serde_json::{Value, json};

use super::first_byte::{Prepared, Stamps};
use super::peers::{Container, Peer, Surroundings};
use super::report::{Report, Unit, quantile};
use super::run::{Rounds, Run, turns};
use super::{Setting, several};

const SCENARIO: &str = "parallel";

/// Options of `nacre-bench parallel`.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// How many are started at once, each number once
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,2,4,8", overrides_with = "vms", value_parser = clap::value_parser!(u16).range(1..=64))]
    vms: Vec<u16>,
    /// Rounds; in each, every number of them is started once
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: u64,
    /// Rounds before that, which do not count
    #[arg(long, value_name = "N", default_value_t = 1)]
    warm_up: u64,
}

impl Options {
    fn all_rounds(&self) -> Rounds {
        Rounds {
            warm_up: self.warm_up,
            count: self.rounds,
        }
    }

    fn settings(&self) -> Value {
        json!({
            "vms": self.vms,
            "rounds": self.rounds,
            "warm_up": self.warm_up,
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
                let started = at_once(around, peer, *count).with_context(|| {
                    format!("{count} containers of {name} at once, round {number}")
                })?;
                if let (true, Some(table)) = (round.counts, run.document.table(&title(*count))) {
                    add(table, name, &started);
                }
            }
        }
        Ok(())
    })
}

/// One value of each row: starts that share the machine are alike, and would not be so many values.
fn add(report: &mut Report, name: &'static str, started: &[Stamps]) {
    let ms = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e6;
    let each = started.iter().map(|one| ms(one.began, one.first));
    let each: Vec<f64> = each.collect();
    report.add(name, "each, median", Unit::Ms, quantile(&each, 50.0));
    report.add(name, "each, slowest", Unit::Ms, quantile(&each, 100.0));
    let began = started.iter().map(|one| one.began).min().unwrap_or(0);
    let first = started.iter().map(|one| one.first).max().unwrap_or(0);
    report.add(name, "= all", Unit::Ms, ms(began, first));
}

/// Starts so many, a thread each that waits for the others before it begins; and ends them, which does not count.
fn at_once(around: &Surroundings, peer: &Peer, count: u16) -> Result<Vec<Stamps>> {
    let prepared = (0..count)
        .map(|_| Prepared::new(around, peer))
        .collect::<Result<Vec<_>>>()?;
    let starts = prepared.into_iter().map(|one| || one.start());
    let started = together(starts.collect(), Builder::new)?;
    let (containers, stamps): (Vec<Container<'_>>, Vec<Stamps>) = started.into_iter().unzip();
    containers.into_iter().try_for_each(Container::end)?;
    Ok(stamps)
}

/// Does all of it, a thread each; none begins before there is a thread for all of them. Without one nothing is done.
fn together<T: Send>(
    work: Vec<impl FnOnce() -> Result<T> + Send>,
    thread: impl Fn() -> Builder,
) -> Result<Vec<T>> {
    let count = work.len();
    // Who reads waits until it is no longer held, and learns whether to go on.
    let gate = RwLock::new(false);
    let done = std::thread::scope(|scope| {
        let mut held = gate.write().unwrap_or_else(PoisonError::into_inner);
        let spawned: std::io::Result<Vec<_>> = work
            .into_iter()
            .map(|work| {
                let gate = &gate;
                thread().spawn_scoped(scope, move || {
                    let open = *gate.read().unwrap_or_else(PoisonError::into_inner);
                    ensure!(open, "there were not threads enough");
                    work()
                })
            })
            .collect();
        *held = spawned.is_ok();
        drop(held);
        let threads = spawned.with_context(|| format!("starting {count} threads"))?;
        // All are joined before the first error is told, so that what runs is freed.
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            let done = thread.join();
            done.unwrap_or_else(|_| Err(anyhow!("the thread of a start panicked")))
        };
        anyhow::Ok(threads.into_iter().map(join).collect::<Vec<_>>())
    })?;
    done.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn without_a_thread_for_each_nothing_begins_and_nobody_waits() {
        let begun = AtomicU32::new(0);
        let work = || {
            let one = || Ok(begun.fetch_add(1, Ordering::Relaxed));
            vec![one; 3]
        };
        let mut done = together(work(), Builder::new).unwrap();
        done.sort_unstable();
        assert_eq!(done, [0, 1, 2]);
        let asked = Cell::new(0);
        let last_fails = || {
            asked.set(asked.get() + 1);
            match asked.get() {
                3 => Builder::new().stack_size(1 << 62),
                _ => Builder::new(),
            }
        };
        let error = together(work(), last_fails).unwrap_err();
        assert!(error.to_string().contains("3 threads"), "{error}");
        assert_eq!(begun.into_inner(), 3);
    }

    fn options(words: &str) -> Result<Options, clap::Error> {
        crate::bench::options(words)
    }

    #[test]
    fn options_have_their_defaults_and_their_bounds() {
        assert_eq!(options("").unwrap().vms, [1, 2, 4, 8]);
        // xtask has its own in front of the user's.
        assert_eq!(options("--vms 1,2 --vms 3").unwrap().vms, [3]);
        for words in ["--vms 0", "--vms 65", "--vms x", "--vms 1,,2"] {
            assert!(options(words).is_err(), "{words}");
        }
    }

    #[test]
    fn all_are_up_when_the_last_is() {
        let peer = Peer {
            name: "nacre",
            program: "/s".into(),
            ..Peer::default()
        };
        let options = options("--vms 2").unwrap();
        let mut reports = several::tables(SCENARIO, &options.vms, &[peer]);
        let stamps = |began, first| Stamps {
            began,
            started: began,
            first,
        };
        let started = [stamps(1_000_000, 9_000_000), stamps(2_000_000, 12_000_000)];
        add(&mut reports[0], "nacre", &started);
        assert_eq!(reports[0].values("nacre", "each, median"), [8.0]);
        assert_eq!(reports[0].values("nacre", "each, slowest"), [10.0]);
        assert_eq!(reports[0].values("nacre", "= all"), [11.0]);
    }
}
