//! `nacre-bench parallel`: several containers started at once, each until its first byte, and until all have said something.

use std::sync::Barrier;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use serde_json::json;

use super::first_byte::{Prepared, Stamps};
use super::peers::{Container, Peer, Surroundings};
use super::report::{Report, Unit};
use super::scenarios::turns;
use super::{Setting, as_root};

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

/// Measures until all rounds are done or something fails; what there is then is shown and written.
pub(super) fn run(options: &Options, setting: &Setting) -> Result<()> {
    as_root()?;
    let peers = setting.peers()?;
    let busybox = setting.busybox()?;
    let patience = Duration::from_secs(setting.patience);
    let around = Surroundings::new(setting.rootfs.as_deref(), &busybox, patience)?;
    let mut reports = reports(options, &peers);
    let outcome = rounds(options, &around, &peers, &mut reports);
    println!("{}", super::machine());
    let tables: Vec<String> = reports.iter().map(Report::table).collect();
    println!("{}", tables.join("\n\n"));
    let saved = match &setting.json {
        Some(file) => super::save(file, value(options, &peers, &reports, outcome.is_ok())),
        None => Ok(()),
    };
    outcome.and(saved)
}

fn reports(options: &Options, peers: &[Peer]) -> Vec<Report> {
    let report = |count: &u16| {
        Report::new(
            format!("parallel, {count} at once"),
            peers.iter().map(|peer| peer.name),
        )
    };
    options.vms.iter().map(report).collect()
}

fn value(
    options: &Options,
    peers: &[Peer],
    reports: &[Report],
    complete: bool,
) -> serde_json::Value {
    let programs: serde_json::Map<String, serde_json::Value> = peers
        .iter()
        .map(|peer| {
            let program = peer.program.display().to_string();
            (peer.name.to_owned(), program.into())
        })
        .collect();
    json!({
        "scenario": "parallel",
        "complete": complete,
        "settings": {
            "vms": options.vms,
            "rounds": options.rounds,
            "warm_up": options.warm_up,
        },
        "programs": programs,
        "tables": reports.iter().map(Report::json).collect::<Vec<_>>(),
    })
}

fn rounds(
    options: &Options,
    around: &Surroundings,
    peers: &[Peer],
    reports: &mut [Report],
) -> Result<()> {
    let all = options.warm_up + options.rounds;
    for round in 0..all {
        let counts = round >= options.warm_up;
        let note = if counts { "" } else { ", to warm up" };
        eprintln!("round {} of {all}{note}", round + 1);
        for (count, report) in options.vms.iter().zip(&mut *reports) {
            for turn in turns(peers.len(), round) {
                let peer = &peers[turn];
                let started = at_once(around, peer, *count).with_context(|| {
                    format!(
                        "{count} containers of {} at once, round {}",
                        peer.name,
                        round + 1
                    )
                })?;
                if counts {
                    add(report, peer.name, &started);
                }
            }
        }
    }
    Ok(())
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
        let mut reports = reports(&options, std::slice::from_ref(&peer));
        let stamps = |began, first| Stamps {
            began,
            started: began,
            first,
        };
        let started = [stamps(1_000_000, 9_000_000), stamps(2_000_000, 12_000_000)];
        add(&mut reports[0], "nacre", &started);
        assert_eq!(reports[0].values("nacre", "each"), [8.0, 10.0]);
        assert_eq!(reports[0].values("nacre", "= all"), [11.0]);
        let value = value(&options, &[peer], &reports, true);
        assert_eq!(value["tables"][0]["scenario"], "parallel, 2 at once");
        assert_eq!(value["programs"]["nacre"], "/s");
    }
}
