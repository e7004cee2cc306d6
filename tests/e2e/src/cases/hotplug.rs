//! vCPUs and memory that come and go by `vmctl resize`, again and again: the guest has them each time, what ran goes on, and the
//! host has everything back.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::context::Context;
use crate::held::{Held, Resident};
use crate::poll;
use crate::shell::{Kernel, Shell};
use crate::suite::{Case, Subject};

pub(super) const fn alone(
    name: &'static str,
    seconds: (u64, u64),
    run: fn(&Context) -> Result<()>,
) -> Case {
    Case {
        name,
        subject: Subject::Alone,
        seconds,
        run,
    }
}

pub(crate) const CASES: &[Case] = &[
    alone(
        "resize: vCPUs come and go many times and leave nothing",
        (600, 7200),
        |context| vcpus(context, Kernel::Usual),
    ),
    alone(
        "resize: vCPUs come and go many times on Linux 6.12",
        (600, 7200),
        |context| vcpus(context, Kernel::Newer),
    ),
    alone(
        "resize: memory by virtio-mem comes and goes, and the host has it back",
        (600, 3600),
        |context| memory(context, Kernel::Usual, "virtio-mem"),
    ),
    alone(
        "resize: memory by virtio-mem comes and goes on Linux 6.12",
        (600, 3600),
        |context| memory(context, Kernel::Newer, "virtio-mem"),
    ),
    alone(
        "resize: memory by ACPI comes and goes, and the host has it back",
        (600, 3600),
        |context| memory(context, Kernel::Usual, "acpi"),
    ),
    alone(
        "resize: memory by ACPI comes and goes on Linux 6.12",
        (600, 3600),
        |context| memory(context, Kernel::Newer, "acpi"),
    ),
    alone(
        "resize: memory that the guest frees goes back to the host",
        (180, 180),
        reporting,
    ),
];

/// Memory of the VMM beside the guest's that may come to be without being lost: allocators keep some.
const OWN_KIB: u64 = 1024;

pub(super) fn expect(what: &str, seen: &Value, wanted: u64) -> Result<()> {
    ensure!(
        seen.as_u64() == Some(wanted),
        "{what} is {seen} instead of {wanted}"
    );
    Ok(())
}

/// The changes that `vmctl resize --json` says that it made.
pub(super) fn steps(resized: &Value) -> Result<Vec<String>> {
    let steps = resized["steps"].as_array().context("no steps")?;
    let what = |step: &Value| {
        let ms = |part: &str| step[part].as_u64().unwrap_or_default() as f64 / 1000.0;
        let what = step["what"].as_str().unwrap_or_default().to_owned();
        eprintln!(
            "  {what}: host {:.1} ms, noticed {:.1} ms, online {:.1} ms, total {:.1} ms",
            ms("host_us"),
            ms("noticed_us"),
            ms("online_us"),
            ms("total_us")
        );
        what
    };
    Ok(steps.iter().map(what).collect())
}

/// Does it so many times; what the VMM holds after the first time, which is what it holds in the end, its own memory apart.
fn again_and_again(
    context: &Context,
    shell: &mut Shell<'_>,
    rounds: u32,
    mut once: impl FnMut(&mut Shell<'_>) -> Result<()>,
) -> Result<Held> {
    once(shell)?;
    let first = Held::by(shell.pid())?;
    let own = Resident::of(shell.pid())?.own;
    for round in 1..rounds {
        once(shell).with_context(|| format!("round {round}"))?;
    }
    first.again(shell.pid(), context.seconds(15))?;
    let now = Resident::of(shell.pid())?.own;
    eprintln!("  the VMM's own memory: {own} KiB after the first round, {now} after {rounds}");
    ensure!(
        now <= own + OWN_KIB,
        "the VMM's own memory grew from {own} to {now} KiB in {rounds} rounds"
    );
    Ok(first)
}

/// One vCPU, more of them, and one again.
fn vcpus(context: &Context, kernel: Kernel) -> Result<()> {
    let rounds = match kernel {
        Kernel::Usual => context.times(20, 200),
        Kernel::Newer => context.times(4, 200),
    };
    let most = u64::from(context.times(4, 8));
    let options = ["--memory", "256M", "--max-vcpus", &most.to_string()];
    let mut shell = Shell::start(context, "cpus", kernel, &options)?;
    again_and_again(context, &mut shell, rounds, |shell| vcpus_once(shell, most))?;
    shell.end()
}

fn vcpus_once(shell: &mut Shell<'_>, most: u64) -> Result<()> {
    let grown = shell.resize(&["--cpus", &most.to_string()])?;
    expect("vCPUs before", &grown["vcpus"]["before"], 1)?;
    expect("vCPUs", &grown["vcpus"]["now"], most)?;
    let came: Vec<String> = (1..most).map(|number| format!("vCPU {number}")).collect();
    ensure!(steps(&grown["vcpus"])? == came, "the steps are {grown}");
    // A program runs on each; one that works goes on when the last one, to which it is bound, goes.
    let last = most - 1;
    let on_each = format!(
        "grep -c ^processor /proc/cpuinfo; for cpu in $(seq 1 {last}); do \
         taskset -c $cpu cut -d' ' -f39 /proc/self/stat || exit 9; done"
    );
    let mut numbers = vec![most];
    numbers.extend(1..most);
    let numbers: Vec<String> = numbers.iter().map(u64::to_string).collect();
    let seen = shell.tell(&on_each)?;
    ensure!(
        seen.lines().eq(&numbers),
        "count and CPUs that programs ran on are {seen:?} instead of {numbers:?}"
    );
    shell.tell(&format!(
        ": > /tmp/beats; taskset -c {last} sh -c 'while :; do echo >> /tmp/beats; done' < /dev/null & worker=$!; \
         until [ -s /tmp/beats ]; do usleep 20000; done; \
         test \"$(taskset -cp $worker)\" = \"pid $worker's current affinity list: {last}\""
    ))?;
    let fewer = shell.resize(&["--cpus", "1"])?;
    expect("vCPUs", &fewer["vcpus"]["now"], 1)?;
    let went: Vec<String> = came.into_iter().rev().collect();
    ensure!(steps(&fewer["vcpus"])? == went, "the steps are {fewer}");
    let seen = shell.tell(
        "grep -c ^processor /proc/cpuinfo; beats=$(stat -c %s /tmp/beats); \
         tries=0; until [ $(stat -c %s /tmp/beats) -gt $beats ]; do tries=$((tries + 1)); [ $tries -lt 200 ] || exit 9; usleep 20000; done; \
         cut -d' ' -f39 /proc/$worker/stat; kill $worker; wait $worker 2> /dev/null; true",
    )?;
    ensure!(seen == "1\n0", "count and CPU of the worker are {seen:?}");
    Ok(())
}

const BOOT_MIB: u64 = 512;
const GROWN_MIB: u64 = 1024;
/// Enough that all of what was plugged is touched: the kernel gives programs movable memory first.
const TOUCHED_MIB: u64 = 620;
/// Too much for what would be left.
const IN_USE_MIB: u64 = 720;

/// Has a program of the guest hold memory until [`let_go`]. One read of /dev/zero may come short; then it is tried again.
fn hold(shell: &mut Shell<'_>, mib: u64) -> Result<()> {
    for _ in 0..5 {
        shell.tell(&format!(
            "rm -f /tmp/holder; dd if=/dev/zero bs={mib}M count=1 2> /dev/null < /dev/null | \
             sh -c 'head -c 1 > /dev/null; echo $$ > /tmp/holder; exec sleep 100000' & \
             tries=0; until [ -s /tmp/holder ]; do tries=$((tries + 1)); [ $tries -lt 1000 ] || exit 9; usleep 50000; done"
        ))?;
        let held = shell.number("awk '/^VmRSS/ { print $2 }' /proc/$(pidof dd)/status")?;
        // The kernel counts in steps for each thread, so that a few pages may not be counted yet.
        if held + 1024 >= mib * 1024 {
            return Ok(());
        }
        eprintln!("  the program holds {held} KiB of {mib} MiB: once more");
        let_go(shell)?;
    }
    anyhow::bail!("no program of the guest holds {mib} MiB")
}

fn let_go(shell: &mut Shell<'_>) -> Result<()> {
    shell.tell("kill $(cat /tmp/holder); wait 2> /dev/null; true")?;
    Ok(())
}

/// Small, full of what was just used, and small again.
fn memory(context: &Context, kernel: Kernel, way: &str) -> Result<()> {
    let rounds = match kernel {
        Kernel::Usual => context.times(5, 50),
        Kernel::Newer => context.times(2, 50),
    };
    let options = [
        "--memory",
        &format!("{BOOT_MIB}M"),
        "--max-memory",
        &format!("{GROWN_MIB}M"),
        "--memory-way",
        way,
    ];
    let mut shell = Shell::start(context, "memory", kernel, &options)?;
    let first = again_and_again(context, &mut shell, rounds, |shell| memory_once(shell, way))?;
    in_use(&mut shell, way, context.seconds(40))?;
    first.again(shell.pid(), context.seconds(15))?;
    shell.end()
}

/// What `vmctl resize` says that it did to bring memory to the grown size, or back.
fn expected_steps(way: &str, grown: bool) -> Vec<String> {
    const UNITS: [&str; 4] = ["0x100000000", "0x108000000", "0x110000000", "0x118000000"];
    if way == "virtio-mem" {
        let mib = if grown { GROWN_MIB - BOOT_MIB } else { 0 };
        return vec![format!("virtio-mem to {mib} MiB")];
    }
    let mut units: Vec<String> = UNITS.iter().map(|at| format!("128 MiB at {at}")).collect();
    if !grown {
        units.reverse();
    }
    units
}

fn grow(shell: &Shell<'_>, way: &str) -> Result<()> {
    let grown = shell.resize(&["--memory", &format!("{GROWN_MIB}M")])?;
    expect("MiB before", &grown["memory"]["before"], BOOT_MIB)?;
    expect("MiB", &grown["memory"]["now"], GROWN_MIB)?;
    let seen = steps(&grown["memory"])?;
    ensure!(seen == expected_steps(way, true), "the steps are {seen:?}");
    Ok(())
}

fn shrink(shell: &Shell<'_>, way: &str) -> Result<()> {
    let shrunk = shell.resize(&["--memory", &format!("{BOOT_MIB}M")])?;
    expect("MiB", &shrunk["memory"]["now"], BOOT_MIB)?;
    let seen = steps(&shrunk["memory"])?;
    ensure!(seen == expected_steps(way, false), "the steps are {seen:?}");
    Ok(())
}

pub(super) fn memory_total(shell: &mut Shell<'_>) -> Result<u64> {
    let kib = shell.number("awk '/^MemTotal/ { print $2 }' /proc/meminfo")?;
    Ok(kib / 1024)
}

fn memory_once(shell: &mut Shell<'_>, way: &str) -> Result<()> {
    let plugged = GROWN_MIB - BOOT_MIB;
    let before = memory_total(shell)?;
    grow(shell, way)?;
    let after = memory_total(shell)?;
    // Some of it is the kernel's from the beginning.
    ensure!(
        after >= before + plugged * 95 / 100,
        "the guest has {after} MiB, and had {before}"
    );
    hold(shell, TOUCHED_MIB)?;
    let full = Resident::rollup(shell.pid())?;
    let_go(shell)?;
    shrink(shell, way)?;
    let limit = Instant::now() + Duration::from_secs(5);
    let wanted = full.saturating_sub(plugged * 1024 * 95 / 100);
    loop {
        let now = Resident::rollup(shell.pid())?;
        if now <= wanted {
            eprintln!("  resident: {full} KiB when all was used, {now} KiB after the unplug");
            break;
        }
        ensure!(
            Instant::now() < limit,
            "of {full} KiB the process has {now} KiB left 5 s after {plugged} MiB were unplugged"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let left = memory_total(shell)?;
    ensure!(
        left.abs_diff(before) <= 4,
        "the guest has {left} MiB, and had {before}"
    );
    Ok(())
}

/// Shrinking by what is in use is refused with the cause and changes nothing; when it is free again it works.
fn in_use(shell: &mut Shell<'_>, way: &str, limit: Duration) -> Result<()> {
    const SUM: &str = "sha256sum < /dev/shm/kept";
    grow(shell, way)?;
    let kept = shell.tell(&format!(
        "head -c 16777216 /dev/urandom > /dev/shm/kept && {SUM}"
    ))?;
    hold(shell, IN_USE_MIB)?;
    let before = memory_total(shell)?;
    let words: &[&str] = match way {
        "virtio-mem" => &[
            "bring the VM to 512 MiB of memory from 1024",
            "512 MiB were to go by virtio-mem: not tried, since the guest has only ",
            " MiB available",
        ],
        _ => &[
            "bring the VM to 512 MiB of memory from 1024",
            "of 512 MiB can be unplugged",
            "128 MiB at 0x100000000: not tried, since the guest has only ",
            " MiB available",
        ],
    };
    let refused = shell.refused(&["--memory", &format!("{BOOT_MIB}M")], words)?;
    ensure!(
        refused.took < limit,
        "it took {:?}, the limit is {limit:?}",
        refused.took
    );
    shell.expect_size(1, GROWN_MIB)?;
    let after = memory_total(shell)?;
    ensure!(
        after == before,
        "the guest has {after} MiB after a shrink that failed, and had {before}"
    );
    shell.tell("kill -0 $(cat /tmp/holder)")?;
    ensure!(shell.tell(SUM)? == kept, "a file in memory has changed");
    let_go(shell)?;
    shrink(shell, way)?;
    ensure!(shell.tell(SUM)? == kept, "a file in memory has changed");
    shell.tell("rm /dev/shm/kept")?;
    Ok(())
}

/// What a program frees goes back although nobody asks for it.
fn reporting(context: &Context) -> Result<()> {
    const MIB: u64 = 200;
    let mut shell = Shell::start(context, "reports", Kernel::Usual, &["--memory", "512M"])?;
    let given = |shell: &Shell<'_>| -> Result<u64> {
        let usage = shell.usage()?;
        let given = usage["memory"]["given_back_mib"].as_u64();
        given.with_context(|| format!("no given_back_mib in {usage}"))
    };
    hold(&mut shell, MIB)?;
    let (full, given_before) = (Resident::rollup(shell.pid())?, given(&shell)?);
    let_go(&mut shell)?;
    let began = Instant::now();
    // What is free in pieces of less than 2 MiB is not reported.
    let wanted = full.saturating_sub(MIB * 1024 * 3 / 4);
    // The driver reports every 2 s, and no more than 64 MiB of a free list at a time.
    let left = poll::until(
        "memory that was freed is the host's",
        context.seconds(60),
        || {
            let now = Resident::rollup(shell.pid())?;
            Ok((now <= wanted).then_some(now))
        },
    )?;
    eprintln!(
        "  resident: {full} KiB with {MIB} MiB in use, {left} KiB {:.1} s after they were freed",
        began.elapsed().as_secs_f64()
    );
    let given_now = given(&shell)?;
    ensure!(
        given_now >= given_before + MIB * 3 / 4,
        "given back are {given_now} MiB, and {given_before} before {MIB} were freed"
    );
    shell.end()
}
