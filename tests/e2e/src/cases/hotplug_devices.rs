//! vCPUs and memory that come and go under load: disk and streams go on without a wrong byte, and what is in memory that goes has
//! been moved.

use std::io::Write;
use std::process::ChildStdin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::hotplug::{alone, expect};
use crate::context::Context;
use crate::poll;
use crate::shell::{Kernel, Shell};
use crate::suite::Case;

pub(crate) const CASES: &[Case] = &[
    alone(
        "resize: disk and streams go on while vCPUs and memory by virtio-mem come and go",
        (400, 7200),
        |context| under_load(context, "virtio-mem"),
    ),
    alone(
        "resize: disk and streams go on while vCPUs and memory by ACPI come and go",
        (400, 7200),
        |context| under_load(context, "acpi"),
    ),
];

const BOOT_MIB: u64 = 512;
const GROWN_MIB: u64 = 640;
/// How long nothing may arrive: a guest that is emulated takes its time to move memory away.
const STALL: u64 = 30;

fn under_load(context: &Context, way: &str) -> Result<()> {
    let (boot, most) = (format!("{BOOT_MIB}M"), format!("{GROWN_MIB}M"));
    let options = ["--memory", &boot, "--max-vcpus", "2", "--max-memory", &most];
    // What is written is on a disk, by virtio-blk; the root below it by virtio-fs.
    let options = [&options[..], &["--memory-way", way, "--scratch", "64M"]].concat();
    let mut shell = Shell::start(context, "load", Kernel::Usual, &options)?;
    // What runs beside the shell speaks on standard error.
    shell.write(b"exec 9>&2\n")?;
    shell.tell(DISK)?;
    disk_goes_on(context, &mut shell)?;
    for round in 0..context.times(2, 20) {
        moved(&mut shell).with_context(|| format!("round {round} of memory that moves"))?;
        disk_goes_on(context, &mut shell)?;
    }
    let echo = Echo::start(context, &mut shell)?;
    let rounds = context.times(6, 200);
    for round in 0..rounds {
        let before = echo.back();
        resize(&shell, 2, GROWN_MIB)?;
        resize(&shell, 1, BOOT_MIB)?;
        echo.goes_on(before)
            .and_then(|()| disk_goes_on(context, &mut shell))
            .with_context(|| {
                format!(
                    "round {round} under load, after {} bytes by the streams",
                    echo.back()
                )
            })?;
    }
    let (bytes, longest) = echo.end()?;
    let disk = disk_rounds(&shell)?;
    eprintln!(
        "  {rounds} rounds by {way}: {disk} times 1 MiB by the disk and {} KiB by the streams and back, all as they were; nothing came for {longest:?} at most",
        bytes >> 10
    );
    shell.end()
}

fn resize(shell: &Shell<'_>, vcpus: u64, mib: u64) -> Result<()> {
    let (cpus, memory) = (vcpus.to_string(), format!("{mib}M"));
    let resized = shell.resize(&["--cpus", &cpus, "--memory", &memory])?;
    expect("vCPUs", &resized["vcpus"]["now"], vcpus)?;
    expect("MiB", &resized["memory"]["now"], mib)
}

/// Writes to the disk and reads from it, past the guest's cache, again and again, and says each time whether it is the same.
const DISK: &str = "mkdir -p /disk; (round=0; while :; do \
    head -c 1048576 /dev/urandom > /dev/shm/disk; sum=$(sha256sum < /dev/shm/disk); \
    dd if=/dev/shm/disk of=/disk/$((round % 4)) bs=65536 oflag=direct 2> /dev/null || echo WRONG write; \
    back=$(dd if=/disk/$((round % 4)) bs=65536 iflag=direct 2> /dev/null | sha256sum); \
    [ \"$sum\" = \"$back\" ] || echo WRONG $sum $back; \
    round=$((round + 1)); echo \"disk <$round>\"; done) < /dev/null >&9 2>&9 &";

/// How often the disk has given back what it got; fails if it ever gave something else.
fn disk_rounds(shell: &Shell<'_>) -> Result<u64> {
    let said = shell.errors();
    if let Some(wrong) = said.lines().find(|line| line.contains("WRONG")) {
        bail!("the disk gives something else than it got: {wrong}");
    }
    let last = said.rsplit("disk <").next().unwrap_or_default();
    Ok(last
        .split('>')
        .next()
        .unwrap_or_default()
        .parse()
        .unwrap_or(0))
}

/// Waits for the disk's next round.
fn disk_goes_on(context: &Context, shell: &mut Shell<'_>) -> Result<()> {
    let before = disk_rounds(shell)?;
    poll::until("the disk goes on", context.seconds(STALL), || {
        if let Some(end) = shell.ended()? {
            bail!("the VM ended ({end}): {}", shell.errors());
        }
        Ok((disk_rounds(shell)? > before).then_some(()))
    })
}

/// Fills plugged memory, takes it away, and looks at what was in it.
fn moved(shell: &mut Shell<'_>) -> Result<()> {
    const KEPT_MIB: u64 = 40;
    const SUM: &str = "sha256sum < /dev/shm/kept";
    // Pages of the zone that memory which may go is in.
    const IN_USE: &str = "awk '/zone/ { movable = /Movable/ } \
        movable && $1 == \"pages\" { free = $3 } movable && $1 == \"managed\" { print $2 - free }' /proc/zoneinfo | tail -n 1";
    resize(shell, 2, GROWN_MIB)?;
    let before = shell.number(IN_USE)?;
    let kept = shell.tell(&format!(
        "head -c $(({KEPT_MIB} << 20)) /dev/urandom > /dev/shm/kept && {SUM}"
    ))?;
    let in_use = shell.number(IN_USE)?;
    ensure!(
        in_use >= before + (KEPT_MIB << 8) * 9 / 10,
        "of what was plugged {in_use} pages are in use, and {before} before {KEPT_MIB} MiB were written"
    );
    resize(shell, 1, BOOT_MIB)?;
    ensure!(
        shell.tell(SUM)? == kept,
        "what was in memory that went has changed"
    );
    shell.tell("rm /dev/shm/kept")?;
    Ok(())
}

/// Words of 8 bytes, none of which comes twice in a case; cheap to make, since whoever makes them is emulated too.
struct Words(u64);

impl Words {
    fn next(&mut self) -> [u8; 8] {
        // An LCG (Knuth's MMIX).
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0.to_le_bytes()
    }
}

/// What goes into the container's standard input, through `cat`, and comes back by its standard output, without end.
struct Echo {
    back: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    /// What was wrong with what came back.
    wrong: Arc<OnceLock<String>>,
    limit: Duration,
    writer: std::thread::JoinHandle<Result<u64>>,
    reader: std::thread::JoinHandle<Result<Duration>>,
}

/// More than a stream's credit, so that both directions are full at times.
const UNDER_WAY: u64 = 384 << 10;

impl Echo {
    fn start(context: &Context, shell: &mut Shell<'_>) -> Result<Self> {
        let (stdin, said) = shell.becomes("cat")?;
        let (back, stop) = (
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let limit = context.seconds(STALL);
        let (counted, stopped) = (Arc::clone(&back), Arc::clone(&stop));
        let writer = std::thread::spawn(move || write(stdin, &counted, &stopped));
        let counted = Arc::clone(&back);
        let wrong = Arc::new(OnceLock::new());
        let said_wrong = Arc::clone(&wrong);
        let reader = std::thread::spawn(move || {
            let outcome = read(&said, &counted, limit);
            outcome.inspect_err(|error| {
                let _ = said_wrong.set(format!("{error:#}"));
            })
        });
        Ok(Self {
            back,
            stop,
            wrong,
            limit,
            writer,
            reader,
        })
    }

    /// Bytes that have come back.
    fn back(&self) -> u64 {
        self.back.load(Ordering::Relaxed)
    }

    /// Waits until more than those have come back.
    fn goes_on(&self, before: u64) -> Result<()> {
        poll::until("bytes come back", self.limit, || {
            if let Some(wrong) = self.wrong.get() {
                bail!("the streams: {wrong}");
            }
            Ok((self.back() > before).then_some(()))
        })
    }

    /// Ends it: how many bytes have come back, all that were sent, and for how long none came at most.
    fn end(self) -> Result<(u64, Duration)> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.writer.join().ok().context("the writer panicked")??;
        let longest = self.reader.join().ok().context("the reader panicked")??;
        let back = self.back.load(Ordering::Relaxed);
        ensure!(back == sent, "of {sent} bytes {back} have come back");
        Ok((back, longest))
    }
}

fn write(mut stdin: ChildStdin, back: &AtomicU64, stop: &AtomicBool) -> Result<u64> {
    let mut words = Words(1);
    let mut part = vec![0; 16 << 10];
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        if sent - back.load(Ordering::Relaxed) < UNDER_WAY {
            for word in part.chunks_exact_mut(8) {
                word.copy_from_slice(&words.next());
            }
            stdin.write_all(&part).context("writing to cat")?;
            sent += part.len() as u64;
        }
        // The guest is to have time for other things.
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(sent)
}

fn read(said: &Receiver<Vec<u8>>, back: &AtomicU64, limit: Duration) -> Result<Duration> {
    let mut words = Words(1);
    let mut part = Vec::new();
    let mut longest = Duration::ZERO;
    loop {
        let began = Instant::now();
        let count = back.load(Ordering::Relaxed);
        match said.recv_timeout(limit) {
            Ok(more) => {
                back.fetch_add(more.len() as u64, Ordering::Relaxed);
                part.extend(more);
            }
            Err(RecvTimeoutError::Disconnected) => {
                ensure!(
                    part.is_empty(),
                    "{} bytes came beyond the last word",
                    part.len()
                );
                return Ok(longest);
            }
            Err(RecvTimeoutError::Timeout) => bail!("no byte came for {limit:?}, after {count}"),
        }
        longest = longest.max(began.elapsed());
        let whole = part.len() - part.len() % 8;
        for came in part[..whole].chunks_exact(8) {
            let wanted = words.next();
            ensure!(
                came == wanted,
                "behind byte {count} {wanted:02x?} came back as {came:02x?}"
            );
        }
        part.drain(..whole);
    }
}
