//! `nacre-bench parallel`: several containers started at once, each until its first byte, and until all have said something.

use std::sync::Barrier;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use serde_json::{Value, json};

use super::document::GuestKernel;
use super::first_byte::{Prepared, Stamps};
use super::peers::{Container, Peer, Surroundings};
use super::report::{Report, Unit};
use super::run::{Rounds, Run, turns};
use super::{Setting, as_root};
use crate::config::Config;

/// Options of `nacre-bench parallel`.
#[derive(Debug, Clone, Args)]
pub(super) struct Options {
    /// How many are started at once
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
    as_root()?;
    let peers = setting.peers()?;
    let busybox = setting.busybox()?;
    let patience = Duration::from_secs(setting.patience);
    let around = Surroundings::new(setting.rootfs.as_deref(), &busybox, patience)?;
    let mut run = Run::new("parallel", options.settings(), setting);
    run.document.tables = tables(options, &peers);
    run.document.guest_kernel = Some(GuestKernel::of(&Config::load()?.kernel));
    run.peers(&peers);
    let outcome = rounds(options, &around, &peers, &mut run);
    run.end(outcome)
}

fn title(count: u16) -> String {
    format!("parallel, {count} at once")
}

fn tables(options: &Options, peers: &[Peer]) -> Vec<Report> {
    let names = || peers.iter().map(|peer| peer.name);
    let table = |count: &u16| Report::new(title(*count), names());
    options.vms.iter().map(table).collect()
}

fn rounds(
    options: &Options,
    around: &Surroundings,
    peers: &[Peer],
    run: &mut Run<'_>,
) -> Result<()> {
    let rounds = options.all_rounds();
    run.expect(rounds);
    run.rounds("parallel", rounds, |run, round| {
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

fn add(report: &mut Report, name: &'static str, started: &[Stamps]) {
    let ms = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e6;
    for one in started {
        report.add(name, "each", Unit::Ms, ms(one.began, one.first));
    }
    let began = started.iter().map(|one| one.began).min().unwrap_or(0);
    let first = started.iter().map(|one| one.first).max().unwrap_or(0);
    report.add(name, "= all", Unit::Ms, ms(began, first));
}

/// Starts so many, a thread each that waits for the others before it begins; and ends them, which does not count.
fn at_once(around: &Surroundings, peer: &Peer, count: u16) -> Result<Vec<Stamps>> {
    let prepared = (0..count)
        .map(|_| Prepared::new(around, peer))
        .collect::<Result<Vec<_>>>()?;
    let together = Barrier::new(prepared.len());
    let started = std::thread::scope(|scope| {
        let threads: Vec<_> = prepared
            .into_iter()
            .map(|one| {
                scope.spawn(|| {
                    together.wait();
                    one.start()
                })
            })
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread
                .join()
                .unwrap_or_else(|_| Err(anyhow!("the thread of a start panicked")))
        };
        // All are joined before the first error is told, so that what runs is freed.
        threads.into_iter().map(join).collect::<Vec<_>>()
    });
    let started = started.into_iter().collect::<Result<Vec<_>>>()?;
    let (containers, stamps): (Vec<Container<'_>>, Vec<Stamps>) = started.into_iter().unzip();
    containers.into_iter().try_for_each(Container::end)?;
    Ok(stamps)
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

    fn options(words: &str) -> Result<Options, clap::Error> {
        let words = std::iter::once("parallel").chain(words.split_whitespace());
        Line::try_parse_from(words).map(|line| line.options)
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
            path: None,
            config: None,
        };
        let options = options("--vms 2").unwrap();
        let mut reports = tables(&options, &[peer]);
        let stamps = |began, first| Stamps {
            began,
            started: began,
            first,
        };
        let started = [stamps(1_000_000, 9_000_000), stamps(2_000_000, 12_000_000)];
        add(&mut reports[0], "nacre", &started);
        assert_eq!(reports[0].values("nacre", "each"), [8.0, 10.0]);
        assert_eq!(reports[0].values("nacre", "= all"), [11.0]);
    }
}
