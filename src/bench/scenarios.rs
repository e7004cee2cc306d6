//! What is measured. Where two shims are compared they take turns, each in
//! front every other time, so that what else the machine does hits both.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use super::listeners::both_ways;
use super::memory::Held;
use super::peers::{Container, Fifos, Peer, Surroundings};
use super::report::{Report, Unit};

const MIB: usize = 1 << 20;
/// What a container says when it is there.
const READY: &[u8] = b"up\n";
/// A container that says so, and then stays.
const STAYS: [&str; 3] = ["/bin/sh", "-c", "echo up; exec sleep 100000"];

/// A stopwatch whose laps go into a report, unless the round is one to warm up.
struct Laps<'r> {
    report: Option<&'r mut Report>,
    shim: &'static str,
    last: Instant,
}

impl<'r> Laps<'r> {
    fn start(report: &'r mut Report, counts: bool, shim: &'static str) -> Self {
        Self {
            report: counts.then_some(report),
            shim,
            last: Instant::now(),
        }
    }

    fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.add(name, Unit::Ms, ms(self.last, now));
        self.last = now;
    }

    fn add(&mut self, name: &'static str, unit: Unit, value: f64) {
        if let Some(report) = &mut self.report {
            report.add(self.shim, name, unit, value);
        }
    }
}

fn ms(from: Instant, to: Instant) -> f64 {
    (to - from).as_secs_f64() * 1e3
}

fn names(peers: &[Peer]) -> impl Iterator<Item = &'static str> {
    peers.iter().map(|peer| peer.name)
}

/// Which of `count` is whose turn: each is first every other round.
pub(super) fn turns(count: usize, round: u64) -> impl Iterator<Item = usize> {
    (0..count).map(move |turn| {
        if round.is_multiple_of(2) {
            turn
        } else {
            count - 1 - turn
        }
    })
}

/// Rounds to measure, after some that are not.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rounds {
    pub warm_up: u64,
    pub count: u64,
}

impl Rounds {
    fn each(self, peers: usize, mut run: impl FnMut(usize, u64, bool) -> Result<()>) -> Result<()> {
        for round in 0..self.warm_up + self.count {
            for peer in turns(peers, round) {
                run(peer, round, round >= self.warm_up)?;
            }
        }
        Ok(())
    }
}

/// A container's life by its phases.
pub(super) fn lifecycle(around: &Surroundings, peers: &[Peer], rounds: Rounds) -> Result<Report> {
    let mut report = Report::new("lifecycle", names(peers));
    rounds.each(peers.len(), |at, _, counts| {
        let peer = &peers[at];
        one_life(around, peer, &mut report, counts)
            .with_context(|| format!("in the life of a container of {}", peer.name))
    })?;
    report.note(format!("{} events came in", around.events()));
    Ok(report)
}

fn one_life(around: &Surroundings, peer: &Peer, report: &mut Report, counts: bool) -> Result<()> {
    let mut container = Container::bundle(around, peer, &STAYS)?;
    let stdout = container.fifo("stdout")?;
    let stderr = container.fifo("stderr")?;
    let mut reader = both_ways(&stdout)?;
    let _silent = both_ways(&stderr)?;
    let stdio = Fifos {
        stdin: None,
        stdout: Some(stdout),
        stderr: Some(stderr),
    };
    let began = Instant::now();
    let mut laps = Laps::start(report, counts, peer.name);
    let answer = container.start_shim()?;
    laps.lap("shim-start");
    container.connect(&answer)?;
    laps.lap("connect");
    container.create(&stdio)?;
    laps.lap("create");
    container.start("")?;
    laps.lap("start");
    let mut said = [0; READY.len()];
    reader.read_exact(&mut said).context("its first output")?;
    ensure!(said == READY, "it said {said:?} instead of {READY:?}");
    laps.lap("first-output");
    laps.add("= up", Unit::Ms, ms(began, Instant::now()));
    container.kill()?;
    laps.lap("kill");
    let status = container.wait("")?;
    laps.lap("exit");
    ensure!(status == 137, "it ended with {status} after a SIGKILL");
    container.delete("")?;
    laps.lap("delete");
    container.shut_down()?;
    laps.lap("shutdown");
    laps.add("= life", Unit::Ms, ms(began, Instant::now()));
    Ok(())
}

/// `true` as an exec: added, started, waited for, deleted.
pub(super) fn exec(around: &Surroundings, peers: &[Peer], rounds: Rounds) -> Result<Report> {
    let mut report = Report::new("exec", names(peers));
    let containers = containers(around, peers)?;
    rounds.each(peers.len(), |at, round, counts| {
        let mut laps = Laps::start(&mut report, counts, peers[at].name);
        one_exec(&containers[at], &format!("e{round}"), &mut laps)
            .with_context(|| format!("in exec {round} of {}", peers[at].name))
    })?;
    end(containers)?;
    Ok(report)
}

fn containers<'s>(around: &'s Surroundings, peers: &[Peer]) -> Result<Vec<Container<'s>>> {
    let start = |peer: &Peer| {
        Container::running(around, peer, &STAYS)
            .with_context(|| format!("starting a container of {}", peer.name))
    };
    peers.iter().map(start).collect()
}

fn end(containers: Vec<Container<'_>>) -> Result<()> {
    containers.into_iter().try_for_each(Container::end)
}

fn one_exec(container: &Container<'_>, id: &str, laps: &mut Laps<'_>) -> Result<()> {
    let began = Instant::now();
    container.exec(id, &["true"], &Fifos::default())?;
    laps.lap("exec");
    container.start(id)?;
    laps.lap("start");
    let status = container.wait(id)?;
    laps.lap("wait");
    ensure!(status == 0, "true ended with {status}");
    container.delete(id)?;
    laps.lap("delete");
    laps.add("= cycle", Unit::Ms, ms(began, Instant::now()));
    Ok(())
}

/// Bytes through `cat` and back, with CloseIO for its end.
pub(super) fn cat(
    around: &Surroundings,
    peers: &[Peer],
    rounds: Rounds,
    mib: usize,
) -> Result<Report> {
    let mut report = Report::new("cat", names(peers));
    let containers = containers(around, peers)?;
    let sent = noise(mib * MIB);
    let digest = Sha256::digest(&sent);
    rounds.each(peers.len(), |at, round, counts| {
        let mut laps = Laps::start(&mut report, counts, peers[at].name);
        one_cat(&containers[at], round, &sent, &digest, &mut laps)
            .with_context(|| format!("in round {round} of {}", peers[at].name))
    })?;
    end(containers)?;
    report.note(format!("{mib} MiB each way, SHA-256 compared each time"));
    Ok(report)
}

fn one_cat(
    container: &Container<'_>,
    round: u64,
    sent: &[u8],
    digest: &[u8],
    laps: &mut Laps<'_>,
) -> Result<()> {
    let id = format!("cat{round}");
    let stdin = container.fifo(&format!("{id}-in"))?;
    let stdout = container.fifo(&format!("{id}-out"))?;
    let stderr = container.fifo(&format!("{id}-err"))?;
    let mut reader = both_ways(&stdout)?;
    let _silent = both_ways(&stderr)?;
    let stdio = Fifos {
        stdin: Some(stdin.clone()),
        stdout: Some(stdout.clone()),
        stderr: Some(stderr.clone()),
    };
    container.exec(&id, &["cat"], &stdio)?;
    container.start(&id)?;
    let write = |fifo: &Path| -> Result<()> {
        // The shim has it open: this does not wait.
        let mut writer = OpenOptions::new().write(true).open(fifo)?;
        writer.write_all(sent).context("writing to cat")
    };
    laps.last = Instant::now();
    let began = laps.last;
    let mut back = vec![0; sent.len()];
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| write(&stdin));
        reader.read_exact(&mut back).context("reading from cat")?;
        writing
            .join()
            .unwrap_or_else(|_| Err(anyhow::anyhow!("the writer panicked")))
    })?;
    laps.lap("round-trip");
    let seconds = began.elapsed().as_secs_f64();
    laps.add(
        "rate",
        Unit::MibPerSecond,
        sent.len() as f64 / MIB as f64 / seconds,
    );
    ensure!(
        Sha256::digest(&back)[..] == *digest,
        "what came back is not what was sent"
    );
    laps.last = Instant::now();
    container.close_stdin(&id)?;
    let status = container.wait(&id)?;
    laps.lap("close-to-exit");
    ensure!(status == 0, "cat ended with {status}");
    container.delete(&id)?;
    for fifo in [&stdin, &stdout, &stderr] {
        std::fs::remove_file(fifo)?;
    }
    Ok(())
}

/// Bytes that do not repeat (xorshift), the same each time.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Many execs one after another in one container, and what its shim holds before and after.
pub(super) fn execs(around: &Surroundings, peers: &[Peer], rounds: Rounds) -> Result<Report> {
    let mut report = Report::new("execs", names(peers));
    for peer in peers {
        let container = containers(around, std::slice::from_ref(peer))?;
        let pid = container[0]
            .shim_pid
            .context("the shim does not say its pid")?;
        for round in 0..rounds.warm_up {
            let mut laps = Laps::start(&mut report, false, peer.name);
            one_exec(&container[0], &format!("w{round}"), &mut laps)?;
        }
        let before = Held::of(pid)?;
        let began = Instant::now();
        for round in 0..rounds.count {
            let mut laps = Laps::start(&mut report, false, peer.name);
            one_exec(&container[0], &format!("e{round}"), &mut laps)
                .with_context(|| format!("in exec {round} of {}", peer.name))?;
        }
        let took = ms(began, Instant::now());
        let after = Held::of(pid)?;
        let mut add = |name, unit, value| report.add(peer.name, name, unit, value);
        add("mean cycle", Unit::Ms, took / rounds.count.max(1) as f64);
        let growth = |from: u64, to: u64| to as f64 - from as f64;
        for (name, unit, value) in [
            ("own RSS before", Unit::Kib, before.own_kib as f64),
            ("own RSS after", Unit::Kib, after.own_kib as f64),
            (
                "own RSS growth",
                Unit::Kib,
                growth(before.own_kib, after.own_kib),
            ),
            ("RSS before", Unit::Kib, before.rss_kib as f64),
            (
                "RSS growth",
                Unit::Kib,
                growth(before.rss_kib, after.rss_kib),
            ),
            (
                "descriptors growth",
                Unit::Count,
                growth(before.descriptors, after.descriptors),
            ),
            (
                "threads growth",
                Unit::Count,
                growth(before.threads, after.threads),
            ),
        ] {
            add(name, unit, value);
        }
        end(container)?;
    }
    report.note(format!(
        "{} execs after {} to warm up; own RSS is without the guest's memory",
        rounds.count, rounds.warm_up
    ));
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_shim_is_first_every_other_round() {
        assert_eq!(turns(2, 0).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(turns(2, 1).collect::<Vec<_>>(), [1, 0]);
    }

    #[test]
    fn rounds_to_warm_up_do_not_count() {
        let rounds = Rounds {
            warm_up: 2,
            count: 3,
        };
        let mut counted = Vec::new();
        rounds
            .each(2, |peer, round, counts| {
                counted.push((peer, round, counts));
                Ok(())
            })
            .unwrap();
        assert_eq!(counted.iter().filter(|(_, _, counts)| *counts).count(), 6);
        assert_eq!(counted[0], (0, 0, false));
        assert_eq!(counted[9], (1, 4, true));
    }

    #[test]
    fn noise_is_the_same_each_time_and_as_long_as_asked() {
        assert_eq!(noise(13).len(), 13);
        assert_eq!(noise(100), noise(100));
        assert_ne!(noise(64)[..32], noise(64)[32..]);
    }
}
