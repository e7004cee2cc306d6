//! Resizing a VM whose guest's root takes CPUs and memory offline and online, ejects them, and writes to the hotplug registers, unasked
//! and while a change is under way: each change answers in time, with its cause if it fails; what `vmctl` counts is what the
//! guest has; and afterwards the VM is resized as ever.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::hotplug::{alone, memory_total};
use crate::context::Context;
use crate::ctr::{Output, expect_words};
use crate::poll;
use crate::shell::Shell;
use crate::suite::Case;

pub(crate) const CASES: &[Case] = &[
    alone(
        "resize: a guest's root that takes CPUs offline and ejects them, unasked, harms no other change",
        (300, 300),
        cpus,
    ),
    alone(
        "resize: a guest's root that takes memory offline and ejects it, unasked, harms no other change",
        (300, 300),
        memory,
    ),
    alone(
        "resize: a guest that hears of no change is waited for no longer than was said, and all is undone",
        (300, 300),
        deaf,
    ),
    alone(
        "resize: a guest's root that writes to the hotplug registers is answered to in time",
        (300, 300),
        registers,
    ),
    alone(
        "resize: a guest that ejects what it uses goes on or ends with a reason",
        (300, 300),
        from_under_it,
    ),
];

/// Seconds that the guest has for each step.
const PATIENCE: u64 = 8;
const BOOT_MIB: u64 = 384;
const UNIT_MIB: u64 = 128;

/// Without this the kernel lets nobody map the registers otherwise than its own ACPI has, and so not at all with busybox.
const OPEN: &str = "nopat";

fn start<'a>(context: &'a Context, name: &str, cmdline: &str) -> Result<Shell<'a>> {
    let (boot, most) = (
        format!("{BOOT_MIB}M"),
        format!("{}M", BOOT_MIB + 2 * UNIT_MIB),
    );
    let options = ["--memory", &boot, "--max-vcpus", "3", "--max-memory", &most];
    let options = [&options[..], &["--memory-way", "acpi"]].concat();
    Shell::start_with_root(context, name, &options, PATIENCE, cmdline)
}

fn size(of: &Value) -> (Option<u64>, Option<u64>) {
    (of["vcpus"].as_u64(), of["memory_mib"].as_u64())
}

fn unasked(of: &Value) -> Result<u64> {
    let unasked = of["unasked_ejects"].as_u64();
    unasked.with_context(|| format!("no unasked_ejects in {of}"))
}

/// Has the guest's root eject something unasked, and waits until both who count that have one more, and the guest as much as the
/// host.
fn ejects(context: &Context, shell: &mut Shell<'_>, eject: &str) -> Result<()> {
    let before = unasked(&shell.usage()?)?;
    shell.root(eject)?;
    poll::until("the eject is counted", context.seconds(10), || {
        Ok((unasked(&shell.usage()?)? > before).then_some(()))
    })?;
    let counts = (unasked(&shell.inspect()?)?, unasked(&shell.usage()?)?);
    ensure!(
        counts == (before + 1, before + 1),
        "unasked ejects by inspect and top are {counts:?}, and were {before}"
    );
    agrees(shell)
}

/// What the host counts, by both who tell it, is what the guest's kernel has, online or not.
fn agrees(shell: &mut Shell<'_>) -> Result<()> {
    let (inspected, usage) = (size(&shell.inspect()?), size(&shell.usage()?));
    ensure!(
        inspected == usage,
        "vCPUs and MiB are {inspected:?} by inspect and {usage:?} by top"
    );
    let counts = shell.root(
        "ls -d sys/devices/system/cpu/cpu[0-9]* | wc -l; ls -d sys/devices/system/memory/memory3[2-9] 2> /dev/null | wc -l",
    )?;
    let mut counts = counts.lines().map(|line| line.trim().parse::<u64>());
    let mut next = || -> Result<u64> { Ok(counts.next().context("a count is missing")??) };
    let guest = (Some(next()?), Some(BOOT_MIB + UNIT_MIB * next()?));
    ensure!(
        inspected == guest,
        "vCPUs and MiB are {inspected:?} by the host, and {guest:?} by the guest's kernel"
    );
    Ok(())
}

/// Tries to come to a size while something is done behind its back: it answers in time, and if it fails, it says at which vCPU or unit.
fn tried(context: &Context, shell: &Shell<'_>, options: &[&str], named: &[&str]) -> Result<Output> {
    // A change that fails is undone, and each of both may take the guest's time for bringing online, for a call to the agent, and for an eject.
    let limit = context.seconds(8 * PATIENCE);
    let began = Instant::now();
    let output = shell.try_resize(options)?;
    let took = began.elapsed();
    eprintln!(
        "  {options:?}: {} after {took:.1?}: {}",
        output.code,
        output.err()
    );
    ensure!(
        took < limit,
        "{options:?} took {took:?}, the limit is {limit:?}"
    );
    if output.code != 0 {
        let why = output.err();
        ensure!(
            output.code == 1
                && why.contains("bring the VM to")
                && named.iter().any(|name| why.contains(name)),
            "{options:?} ended with {}, and names none of {named:?}: {why}",
            output.code
        );
    }
    Ok(output)
}

/// A change that nobody disturbs: it is made, and the guest has just so much online.
fn honest(shell: &mut Shell<'_>, vcpus: u64, mib: u64) -> Result<()> {
    let (cpus, memory) = (vcpus.to_string(), format!("{mib}M"));
    let resized = shell.resize(&["--cpus", &cpus, "--memory", &memory])?;
    let now = (
        resized["vcpus"]["now"].as_u64(),
        resized["memory"]["now"].as_u64(),
    );
    ensure!(now == (Some(vcpus), Some(mib)), "it has come to {resized}");
    let online = shell.number("grep -c ^processor /proc/cpuinfo")?;
    ensure!(online == vcpus, "of {vcpus} vCPUs {online} are online");
    let total = memory_total(shell)?;
    ensure!(
        (mib - UNIT_MIB..mib).contains(&total),
        "the guest has {total} MiB online of {mib}"
    );
    agrees(shell)
}

fn cpus(context: &Context) -> Result<()> {
    let mut shell = start(context, "cpus", "")?;
    honest(&mut shell, 2, BOOT_MIB)?;
    // Offline behind the host's back: the next change sees it.
    let offline = "echo 0 > sys/devices/system/cpu/cpu1/online";
    shell.root(offline)?;
    agrees(&mut shell)?;
    honest(&mut shell, 2, BOOT_MIB)?;
    shell.root(offline)?;
    honest(&mut shell, 1, BOOT_MIB)?;

    // While it is plugged.
    shell.root_keeps(offline, 5)?;
    tried(context, &shell, &["--cpus", "2"], &["vCPU 1"])?;
    shell.root_stops()?;
    agrees(&mut shell)?;
    honest(&mut shell, 2, BOOT_MIB)?;

    // Online again while it is unplugged.
    shell.root_keeps("echo 1 > sys/devices/system/cpu/cpu1/online", 5)?;
    tried(context, &shell, &["--cpus", "1"], &["vCPU 1"])?;
    shell.root_stops()?;
    agrees(&mut shell)?;
    honest(&mut shell, 1, BOOT_MIB)?;

    // Ejected, unasked, when it is there and while it comes.
    let eject = "echo 1 > $(readlink -f sys/devices/system/cpu/cpu1/firmware_node)/eject";
    honest(&mut shell, 2, BOOT_MIB)?;
    ejects(context, &mut shell, eject)?;
    honest(&mut shell, 2, BOOT_MIB)?;
    honest(&mut shell, 1, BOOT_MIB)?;
    shell.root_keeps(eject, 20)?;
    tried(context, &shell, &["--cpus", "3"], &["vCPU 1", "vCPU 2"])?;
    shell.root_stops()?;
    settled(context, &mut shell)?;
    honest(&mut shell, 3, BOOT_MIB)?;
    honest(&mut shell, 1, BOOT_MIB)?;
    shell.end()
}

/// Waits until what was begun in the guest has ended: then both count the same.
fn settled(context: &Context, shell: &mut Shell<'_>) -> Result<()> {
    let limit = Instant::now() + context.seconds(10);
    loop {
        let outcome = agrees(shell);
        if outcome.is_ok() || Instant::now() >= limit {
            return outcome;
        }
        std::thread::sleep(Duration::from_millis(300));
    }
}

fn memory(context: &Context) -> Result<()> {
    let mut shell = start(context, "memory", "")?;
    let one = BOOT_MIB + UNIT_MIB;
    let (boot, grown) = (format!("{BOOT_MIB}M"), format!("{one}M"));
    let names = ["128 MiB at 0x100000000", "memory block 32"];
    honest(&mut shell, 1, one)?;
    let offline = "echo offline > sys/devices/system/memory/memory32/state";
    let online = "echo online_movable > sys/devices/system/memory/memory32/state";
    shell.root(offline)?;
    agrees(&mut shell)?;
    honest(&mut shell, 1, BOOT_MIB)?;

    shell.root_keeps(offline, 10)?;
    tried(context, &shell, &["--memory", &grown], &names)?;
    shell.root_stops()?;
    agrees(&mut shell)?;
    honest(&mut shell, 1, BOOT_MIB)?;

    honest(&mut shell, 1, one)?;
    shell.root_keeps(online, 10)?;
    tried(context, &shell, &["--memory", &boot], &names)?;
    shell.root_stops()?;
    agrees(&mut shell)?;
    honest(&mut shell, 1, BOOT_MIB)?;

    let eject = "for unit in sys/bus/acpi/devices/PNP0C80:*; do if grep -q 1 $unit/status 2> /dev/null; then echo 1 > $unit/eject; fi; done";
    honest(&mut shell, 1, one)?;
    ejects(context, &mut shell, eject)?;
    honest(&mut shell, 1, one)?;
    honest(&mut shell, 1, BOOT_MIB)?;
    shell.root_keeps(eject, 50)?;
    let most = format!("{}M", one + UNIT_MIB);
    let names = ["128 MiB at 0x10"];
    tried(context, &shell, &["--memory", &most], &names)?;
    shell.root_stops()?;
    settled(context, &mut shell)?;
    honest(&mut shell, 1, one + UNIT_MIB)?;
    honest(&mut shell, 1, BOOT_MIB)?;
    shell.end()
}

/// Without the driver of the Generic Event Device the kernel notices nothing.
fn deaf(context: &Context) -> Result<()> {
    const DRIVER: &str = "sys/bus/platform/drivers/acpi-ged";
    let mut shell = start(context, "deaf", "")?;
    let device = shell.root(&format!("ls {DRIVER} | grep ACPI0013"))?;
    let hears =
        |shell: &mut Shell<'_>, how: &str| shell.root(&format!("echo {device} > {DRIVER}/{how}"));
    let (grown, small) = (format!("{}M", BOOT_MIB + UNIT_MIB), format!("{BOOT_MIB}M"));
    let refused = |shell: &mut Shell<'_>, options: [&str; 2], words: &[&str]| -> Result<()> {
        let output = tried(context, shell, &options, &words[..1])?;
        output.expect_code(1)?;
        expect_words(&output.err(), words)?;
        ensure!(
            output.took > context.seconds(PATIENCE),
            "the guest had {:?} and not the time that was said",
            output.took
        );
        agrees(shell)
    };
    hears(&mut shell, "unbind")?;
    let undone = "it was unplugged again";
    refused(
        &mut shell,
        ["--cpus", "3"],
        &["vCPU 1 was plugged, but", undone],
    )?;
    let unit = "128 MiB at 0x100000000";
    refused(
        &mut shell,
        ["--memory", &grown],
        &[unit, "was plugged, but", undone],
    )?;
    hears(&mut shell, "bind")?;
    honest(&mut shell, 3, BOOT_MIB + UNIT_MIB)?;
    hears(&mut shell, "unbind")?;
    let undone = ["the request is taken back", "it is online again"];
    let words = |what| [&[what, "the guest does not eject it"][..], &undone].concat();
    refused(
        &mut shell,
        ["--cpus", "1"],
        &words("vCPU 2 is offline, but"),
    )?;
    refused(&mut shell, ["--memory", &small], &words(unit))?;
    let online = shell.number("grep -c ^processor /proc/cpuinfo")?;
    ensure!(online == 3, "{online} of 3 vCPUs are online again");
    hears(&mut shell, "bind")?;
    honest(&mut shell, 1, BOOT_MIB)?;
    shell.end()
}

/// Where the registers are, and in them those of the slots.
const REGISTERS: u64 = 0xd010_0000;
const CPUS: u64 = 0x1000;
const MEMORY: u64 = 0x2000;

fn poke(offset: u64, value: Option<u32>) -> String {
    let value = value.map_or_else(String::new, |value| format!(" {value:#x}"));
    format!("devmem {:#x} 32{value}", REGISTERS + offset)
}

fn registers(context: &Context) -> Result<()> {
    let mut shell = start(context, "pokes", OPEN)?;
    shell.root("mkdir -p /dev; [ -e /dev/mem ] || mknod /dev/mem c 1 1")?;
    // Not the registers themselves: what the kernel lets nobody write to would make this a case about nothing.
    let status = shell.root(&poke(CPUS, None))?;
    ensure!(status == "0x0000000F", "_STA of vCPU 0 is {status}");
    let (grown, small) = (format!("{}M", BOOT_MIB + UNIT_MIB), format!("{BOOT_MIB}M"));
    let slots = [1, 2].map(|slot| CPUS + 16 * slot);
    let units = [0, 1].map(|unit| MEMORY + 16 * unit);
    // What waits for the kernel is fetched before it comes to it; reports of failure, of success, and of nothing known; and the
    // boot vCPU, and slots that are none, are ejected.
    let steals = poke(0, None);
    let reports: Vec<String> = [0x81, 0, 0xffff_ffff]
        .iter()
        .flat_map(|status| {
            slots.iter().chain(&units).flat_map(move |slot| {
                [3, 1].map(|event| {
                    format!(
                        "{}; {}",
                        poke(slot + 4, Some(event)),
                        poke(slot + 8, Some(*status))
                    )
                })
            })
        })
        .collect();
    let nothing = [
        poke(CPUS, Some(1)),
        poke(CPUS + 16 * 200, Some(1)),
        poke(MEMORY + 16 * 239, Some(1)),
        poke(12, Some(1)),
    ];
    for (what, ms) in [
        (steals, 1),
        (reports.join("; "), 1),
        (nothing.join("; "), 1),
    ] {
        shell.root_keeps(&what, ms)?;
        for options in [["--cpus", "3"], ["--cpus", "1"]] {
            tried(context, &shell, &options, &["vCPU 1", "vCPU 2"])?;
        }
        for options in [["--memory", &grown], ["--memory", &small]] {
            tried(context, &shell, &options, &["128 MiB at 0x10"])?;
        }
        shell.root_stops()?;
        honest(&mut shell, 3, BOOT_MIB + UNIT_MIB)?;
        honest(&mut shell, 1, BOOT_MIB)?;
    }
    ensure!(
        unasked(&shell.usage()?)? > 0,
        "no eject of the boot vCPU is counted"
    );
    shell.end()
}

/// Ejects, by the registers, what its own kernel uses: a vCPU that runs, and memory that is online.
fn from_under_it(context: &Context) -> Result<()> {
    let left = [
        (Some(1), Some(BOOT_MIB + UNIT_MIB)),
        (Some(2), Some(BOOT_MIB)),
    ];
    for ((what, slot), left) in [("vCPU", CPUS + 16), ("memory", MEMORY)].iter().zip(left) {
        let mut shell = start(context, what, OPEN)?;
        shell.root("mkdir -p /dev; [ -e /dev/mem ] || mknod /dev/mem c 1 1")?;
        honest(&mut shell, 2, BOOT_MIB + UNIT_MIB)?;
        // The answer may never come: what would print it may be on that vCPU, or in that memory.
        let command = format!(
            "(echo '{}' > /root.ask; cat /root.said) < /dev/null > /dev/null 2>&1 &\n",
            poke(*slot, Some(1))
        );
        shell.write(command.as_bytes())?;
        let counted = poll::until("the eject or the end", context.seconds(20), || {
            if let Some(end) = shell.ended()? {
                return Ok(Some(end));
            }
            // Its process may be on its way out.
            let Ok(usage) = shell.usage() else {
                return Ok(None);
            };
            if unasked(&usage)? == 0 {
                return Ok(None);
            }
            ensure!(
                size(&usage) == left,
                "without it the VM has {:?} instead of {left:?}",
                size(&usage)
            );
            Ok(Some("counted, and gone".to_owned()))
        })?;
        eprintln!("  {what}: {counted}");
        let named = [
            "vCPU 1",
            "128 MiB at 0x10",
            "ended",
            "agent",
            "No VM",
            "gone",
        ];
        let smaller = ["--cpus", "1", "--memory", &format!("{BOOT_MIB}M")];
        if shell.ended()?.is_none() {
            tried(context, &shell, &smaller, &named)?;
        }
        match shell.ended()? {
            // Whoever ran it is told how the VM ended.
            Some(_) => {
                let said = shell.errors();
                let reason = said.lines().find(|line| line.contains("The VM"));
                let reason = reason.with_context(|| format!("no reason is told: {said}"))?;
                eprintln!("  {what}: {reason}");
            }
            None => shell.stop()?,
        }
    }
    Ok(())
}
