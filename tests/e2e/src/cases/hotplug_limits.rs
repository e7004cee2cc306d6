//! What `vmctl resize` refuses, and in which words; and guests that lack something, have too little, or are not there yet.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::hotplug::{alone, expect, memory_total, steps};
use crate::context::Context;
use crate::ctr::{self, expect_words};
use crate::held::Held;
use crate::shell::{Kernel, Shell, vmctl};
use crate::suite::Case;
use crate::{initrd, poll, processes};

pub(crate) const CASES: &[Case] = &[
    alone(
        "resize: what cannot be is refused at once and in words",
        (180, 180),
        refusals,
    ),
    alone(
        "resize: a VM without an agent is refused at once",
        (90, 90),
        without_agent,
    ),
    alone(
        "resize: a guest without virtio-mem's driver says so, and gets ACPI memory by default",
        (180, 180),
        without_driver,
    ),
    alone(
        "resize: a VM that boots is resized when it is ready",
        (120, 120),
        while_it_boots,
    ),
];

/// What is refused without asking the guest to do anything; much of it is the emulated machine's start of a program.
const AT_ONCE: Duration = Duration::from_secs(8);

fn refusals(context: &Context) -> Result<()> {
    const BOOT_MIB: u64 = 160;
    let options = [
        "--memory",
        &format!("{BOOT_MIB}M"),
        "--max-vcpus",
        "3",
        "--max-memory",
        "20G",
    ];
    let shell = Shell::start(context, "no", Kernel::Usual, &options)?;
    let before = Held::by(shell.pid())?;
    let refused: [(&[&str], &[&str]); 8] = [
        (&["--cpus", "0"], &["--cpus", "0 is not in 1..=254"]),
        (&["--cpus", "255"], &["--cpus", "255 is not in 1..=254"]),
        (
            &["--cpus", "4"],
            &[
                "bring the VM to 4 vCPUs from 1",
                "it was started for 3 at most",
            ],
        ),
        (
            &["--memory", "21G"],
            &[
                "bring the VM to 21504 MiB of memory from 160",
                "it was started for",
                "MiB at most",
            ],
        ),
        (
            &["--memory", "128M"],
            &["it began with 160 MiB, and only what was plugged can be unplugged"],
        ),
        (&["--memory", "0"], &["it began with 160 MiB"]),
        (&["--memory", "much"], &["--memory", "much"]),
        // The structures of so many pages have no room in so small a guest.
        (
            &["--memory", "16384M"],
            &[
                "for 16224 MiB more the guest's kernel needs 254 MiB for page structures (1.56 %) and 8 MiB to spare, and has",
                "MiB available: ask for less at a time",
            ],
        ),
    ];
    for (options, words) in refused {
        let output = shell.refused(options, words)?;
        ensure!(
            output.took < AT_ONCE.mul_f64(context.patience),
            "{options:?} took {:?}",
            output.took
        );
    }
    shell.expect_size(1, BOOT_MIB)?;
    before.again(shell.pid(), context.seconds(15))?;
    // What is possible before what is not has been done, and is told.
    shell.refused(
        &["--cpus", "2", "--memory", "128M"],
        &["it began with 160 MiB", "; the VM has 2 vCPUs now"],
    )?;
    shell.expect_size(2, BOOT_MIB)?;
    shell.resize(&["--cpus", "1"])?;
    shell.end()
}

fn without_agent(context: &Context) -> Result<()> {
    let busybox = fs::read(&context.programs.busybox)?;
    let sleeps: &[u8] = b"#!/busybox sh\nexec /busybox sleep 1000\n";
    let initrd = initrd::with(Vec::new(), &[("busybox", &busybox), ("init", sleeps)])?;
    let path = context.path("initrd");
    fs::write(&path, initrd)?;
    let name = context.id("bare");
    let mut command = vmctl(context);
    command.args(["boot", "--no-agent", "--name", &name, "--max-vcpus", "2"]);
    command.args(["--max-memory", "1G", "--initrd"]).arg(path);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("starting vmctl boot")?;
    inspected(context, &name)?;
    for (option, size) in [("--cpus", "2"), ("--memory", "640M")] {
        let output = ctr::run(vmctl(context).args(["resize", &name, option, size]))?;
        output.expect_code(1)?;
        expect_words(&output.err(), &["bring the VM to", "agent"])?;
        ensure!(
            output.took < AT_ONCE.mul_f64(context.patience),
            "it took {:?}",
            output.took
        );
    }
    let vm = inspected(context, &name)?;
    expect("vCPUs", &vm["vcpus"], 1)?;
    processes::signal(child.id() as i32, Signal::SIGTERM);
    let status = poll::until("the end of vmctl boot", context.seconds(20), || {
        Ok(child.try_wait()?)
    })?;
    ensure!(status.code() == Some(8), "vmctl boot ended with {status}");
    Ok(())
}

/// Waits until the VM can be asked; what it says.
fn inspected(context: &Context, name: &str) -> Result<Value> {
    let ask = || -> Result<Option<Value>> {
        let mut command: Command = vmctl(context);
        let output = command.args(["inspect", name, "--json"]).output()?;
        Ok(serde_json::from_slice(&output.stdout).ok())
    };
    poll::until("the VM's control socket", context.seconds(30), ask)
}

fn without_driver(context: &Context) -> Result<()> {
    let whole = fs::read(&context.programs.initrd)?;
    let path = context.path("initrd");
    fs::write(&path, initrd::without_module(whole, "virtio_mem")?)?;
    let path = path.to_string_lossy().into_owned();
    let options = ["--initrd", &path, "--memory", "512M", "--max-memory", "1G"];
    let asked = [&options[..], &["--memory-way", "virtio-mem"]].concat();
    let shell = Shell::start(context, "asked", Kernel::Usual, &asked)?;
    let output = shell.refused(
        &["--memory", "640M"],
        &[
            "no driver has taken the virtio-mem device up",
            "; the guest lacks ",
            "virtio_mem",
        ],
    )?;
    ensure!(
        output.took < AT_ONCE.mul_f64(context.patience),
        "it took {:?}",
        output.took
    );
    shell.expect_size(1, 512)?;
    shell.end()?;

    let mut shell = Shell::start(context, "auto", Kernel::Usual, &options)?;
    let before = memory_total(&mut shell)?;
    let grown = shell.resize(&["--memory", "640M"])?;
    let seen = steps(&grown["memory"])?;
    ensure!(seen == ["128 MiB at 0x100000000"], "the steps are {seen:?}");
    let after = memory_total(&mut shell)?;
    ensure!(after >= before + 120, "{after} MiB after {before}");
    shell.resize(&["--memory", "512M"])?;
    shell.end()
}

fn while_it_boots(context: &Context) -> Result<()> {
    let options = ["--memory", "512M", "--max-vcpus", "2", "--max-memory", "1G"];
    let mut shell = Shell::start_unready(context, "early", Kernel::Usual, &options)?;
    let vm = inspected(context, &shell.name)?;
    ensure!(
        vm["state"] == "booting",
        "it is {} before it is resized",
        vm["state"]
    );
    let grown = shell.resize(&["--cpus", "2", "--memory", "640M"])?;
    expect("vCPUs", &grown["vcpus"]["now"], 2)?;
    expect("MiB", &grown["memory"]["now"], 640)?;
    expect(
        "CPUs in the guest",
        &shell.number("grep -c ^processor /proc/cpuinfo")?.into(),
        2,
    )?;
    let total = memory_total(&mut shell)?;
    ensure!(total > 560, "the guest has {total} MiB");
    shell.end()
}
