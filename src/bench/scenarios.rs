//! What is measured. Where two shims are compared they take turns, each in
//! front every other time, so that what else the machine does hits both.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use super::document::Document;
use super::listeners::both_ways;
use super::memory::Held;
use super::peers::{Container, Fifos, Peer, Surroundings};
use super::report::{Better, Report, Unit};
use super::run::{Round, Rounds, Run, turns};

const MIB: usize = 1 << 20;
/// What a container says when it is there.
const READY: &[u8] = b"up\n";
/// A container that says so, and then stays.
const STAYS: [&str; 3] = ["/bin/sh", "-c", "echo up; exec sleep 100000"];

/// The phases of a container's life, one after another.
const LIFE: [&str; 9] = [
    "shim-start",
    "connect",
    "create",
    "start",
    "first-output",
    "kill",
    "exit",
    "delete",
    "shutdown",
];
/// The same of an exec.
const CYCLE: [&str; 4] = ["exec", "start", "wait", "delete"];

/// A stopwatch whose laps go into a table, unless the round is one to warm up.
struct Laps<'r> {
    document: Option<&'r mut Document>,
    table: &'static str,
    side: &'static str,
    last: Instant,
}

impl<'r> Laps<'r> {
    fn start(
        document: &'r mut Document,
        counts: bool,
        table: &'static str,
        side: &'static str,
    ) -> Self {
        Self {
            document: counts.then_some(document),
            table,
            side,
            last: Instant::now(),
        }
    }

    fn lap(&mut self, name: &str) {
        let now = Instant::now();
        self.add(name, Unit::Ms, ms(self.last, now));
        self.last = now;
    }

    fn add(&mut self, name: &str, unit: Unit, value: f64) {
        if let Some(document) = &mut self.document {
            document.add(self.table, self.side, name, unit, value);
        }
    }
}

fn ms(from: Instant, to: Instant) -> f64 {
    (to - from).as_secs_f64() * 1e3
}

/// A table of the shims, some rows of which may be phases.
fn table(title: &str, peers: &[Peer], phases: &[&str]) -> Report {
    let mut table = Report::new(title, peers.iter().map(|peer| peer.name));
    table.phases(phases);
    table
}

/// All rounds, in each of which the shims take turns.
fn taking_turns(
    run: &mut Run<'_>,
    of: &str,
    peers: &[Peer],
    rounds: Rounds,
    mut one: impl FnMut(&mut Document, usize, Round) -> Result<()>,
) -> Result<()> {
    run.expect(rounds);
    run.rounds(of, rounds, |run, round| {
        for at in turns(peers.len(), round.number) {
            let name = peers[at].name;
            run.now(name);
            one(&mut run.document, at, round)
                .with_context(|| format!("in round {} of {name}", round.number + 1))?;
        }
        Ok(())
    })
}

/// A container's life by its phases.
pub(super) fn lifecycle(
    around: &Surroundings,
    peers: &[Peer],
    rounds: Rounds,
    run: &mut Run<'_>,
) -> Result<()> {
    run.table(table("lifecycle", peers, &LIFE));
    let outcome = taking_turns(run, "lifecycle", peers, rounds, |document, at, round| {
        one_life(around, &peers[at], document, round.counts)
    });
    run.document
        .note(&format!("{} events came in", around.events()));
    outcome
}

fn one_life(
    around: &Surroundings,
    peer: &Peer,
    document: &mut Document,
    counts: bool,
) -> Result<()> {
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
    let mut laps = Laps::start(document, counts, "lifecycle", peer.name);
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
pub(super) fn exec(
    around: &Surroundings,
    peers: &[Peer],
    rounds: Rounds,
    run: &mut Run<'_>,
) -> Result<()> {
    run.table(table("exec", peers, &CYCLE));
    let containers = containers(around, peers)?;
    taking_turns(run, "exec", peers, rounds, |document, at, round| {
        let mut laps = Laps::start(document, round.counts, "exec", peers[at].name);
        one_exec(&containers[at], &format!("e{}", round.number), &mut laps)
    })?;
    end(containers)
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
    run: &mut Run<'_>,
) -> Result<()> {
    run.table(table("cat", peers, &[]));
    run.document
        .note(&format!("{mib} MiB each way, SHA-256 compared each time"));
    let containers = containers(around, peers)?;
    let sent = noise(mib * MIB);
    let digest = Sha256::digest(&sent);
    taking_turns(run, "cat", peers, rounds, |document, at, round| {
        let mut laps = Laps::start(document, round.counts, "cat", peers[at].name);
        one_cat(&containers[at], round.number, &sent, &digest, &mut laps)
    })?;
    end(containers)
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
pub(super) fn execs(
    around: &Surroundings,
    peers: &[Peer],
    rounds: Rounds,
    run: &mut Run<'_>,
) -> Result<()> {
    run.table(table("execs", peers, &[]));
    run.document.note(&format!(
        "{} execs after {} to warm up; own RSS is without the guest's memory",
        rounds.count, rounds.warm_up
    ));
    peers.iter().for_each(|_| run.expect(rounds));
    for peer in peers {
        let container = containers(around, std::slice::from_ref(peer))?;
        execs_in(&container[0], peer.name, rounds, run)
            .with_context(|| format!("in execs of {}", peer.name))?;
        end(container)?;
    }
    Ok(())
}

fn execs_in(
    container: &Container<'_>,
    name: &'static str,
    rounds: Rounds,
    run: &mut Run<'_>,
) -> Result<()> {
    let pid = container
        .shim_pid
        .context("the shim does not say its pid")?;
    let mut first = None;
    run.rounds(&format!("execs of {name}"), rounds, |run, round| {
        if round.counts && first.is_none() {
            first = Some((Held::of(pid)?, Instant::now()));
        }
        let mut laps = Laps::start(&mut run.document, false, "execs", name);
        one_exec(container, &format!("e{}", round.number), &mut laps)
            .with_context(|| format!("in exec {}", round.number + 1))
    })?;
    let Some((before, began)) = first else {
        return Ok(());
    };
    let took = ms(began, Instant::now());
    let after = Held::of(pid)?;
    let mut add = |row, unit, value| run.add("execs", name, row, unit, value);
    add("mean cycle", Unit::Ms, took / rounds.count.max(1) as f64);
    add("own RSS before", Unit::Kib, before.own_kib as f64);
    add("own RSS after", Unit::Kib, after.own_kib as f64);
    let growth = |from: u64, to: u64| to as f64 - from as f64;
    let own = growth(before.own_kib, after.own_kib);
    add("own RSS growth", Unit::Kib, own);
    add("RSS before", Unit::Kib, before.rss_kib as f64);
    let all = growth(before.rss_kib, after.rss_kib);
    add("RSS growth", Unit::Kib, all);
    let counted = [
        ("descriptors growth", before.descriptors, after.descriptors),
        ("threads growth", before.threads, after.threads),
    ];
    for (row, from, to) in counted {
        run.add("execs", name, row, Unit::Count, growth(from, to));
        if let Some(table) = run.document.table("execs") {
            table.better(name, row, Better::Less);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_the_same_each_time_and_as_long_as_asked() {
        assert_eq!(noise(13).len(), 13);
        assert_eq!(noise(100), noise(100));
        assert_ne!(noise(64)[..32], noise(64)[32..]);
    }
}
