//! VMs whose size follows their containers: by Update, by another container in
//! the VM, by load, and for want of memory.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::calls::One;
use super::stats;
use crate::context::{Context, NAMESPACE};
use crate::ctr::{self, Ctr, expect_words};
use crate::poll;
use crate::shim::Bundle;
use crate::suite::{Case, Subject};
use crate::tasks::Stdio;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "Update grows and shrinks the VM at once",
        subject: Subject::Nacre,
        seconds: (150, 150),
        run: updated,
    },
    Case {
        name: "the limits of a group's containers add up to the VM's size",
        subject: Subject::Nacre,
        seconds: (180, 180),
        run: adds_up,
    },
    Case {
        name: "an unlimited container that takes 1 GiB at 128 MiB a second is never killed",
        subject: Subject::Nacre,
        seconds: (240, 240),
        run: grows,
    },
    Case {
        name: "a busy VM gets a vCPU and gives it back when it is idle",
        subject: Subject::Alone,
        seconds: (150, 150),
        run: follows_load,
    },
];

/// vCPUs and MiB of a VM, by vmctl.
fn size(context: &Context, name: &str) -> Result<(u64, u64)> {
    let mut command = std::process::Command::new(context.programs.vmctl());
    let output = ctr::run(command.args(["inspect", "--json", name]))?;
    output.expect_code(0)?;
    let vm: Value = serde_json::from_str(&output.out()).context("no JSON")?;
    let number = |field: &str| {
        vm[field]
            .as_u64()
            .with_context(|| format!("no {field}: {vm}"))
    };
    Ok((number("vcpus")?, number("memory_mib")?))
}

/// Processors and MemTotal in MiB, as a container sees them.
fn seen(ctr: &Ctr<'_>, id: &str, exec: &str) -> Result<(u64, u64)> {
    let script = "grep -c ^processor /proc/cpuinfo; grep MemTotal /proc/meminfo | tr -dc 0-9";
    let output = ctr.exec(id, exec, &[], &["sh", "-c", script])?;
    output.expect_code(0)?;
    let text = output.out();
    let mut lines = text.lines();
    let mut next =
        || -> Result<u64> { Ok(lines.next().context("a line is missing")?.trim().parse()?) };
    Ok((next()?, next()? / 1024))
}

fn updated(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("updated");
    let limits = [
        "--memory-limit",
        "134217728",
        "--cpu-quota",
        "100000",
        "--cpu-period",
        "100000",
    ];
    let mount = ["--mount", "type=tmpfs,src=tmpfs,dst=/mem,options=size=1g"];
    ctr.detached(&id, &[&limits[..], &mount].concat(), &["sleep", "1000"])?;
    let name = format!("{NAMESPACE}/{id}");
    let boot = size(context, &name)?;
    ensure!(boot == (1, 256), "the VM begins with {boot:?}");
    let shim = stats::shim_of(&ctr, &id)?;
    stats::update(
        &shim,
        &id,
        r#"{"memory":{"limit":402653184},"cpu":{"quota":200000,"period":100000}}"#,
    )?;
    // At once: when Update has answered, the guest has it.
    let grown = size(context, &name)?;
    ensure!(grown == (2, 512), "the VM has grown to {grown:?}");
    let (cpus, memory) = seen(&ctr, &id, "large")?;
    ensure!(
        cpus == 2 && memory > 450,
        "the container sees {cpus} CPUs and {memory} MiB"
    );
    // It can be used: more than the VM began with, in the limit's reach.
    let script =
        "dd if=/dev/zero of=/mem/used bs=1M count=270 2>/dev/null && rm /mem/used && echo used";
    ctr.exec(&id, "uses", &[], &["sh", "-c", script])?
        .expect_code(0)?
        .expect_out("used\n")?;
    let Err(error) = stats::update(&shim, &id, r#"{"cpu":{"quota":100000000,"period":100000}}"#)
    else {
        anyhow::bail!("a thousand CPUs are taken");
    };
    expect_words(&format!("{error:#}"), &["1000 CPUs", "the VM can have"])?;
    stats::update(
        &shim,
        &id,
        r#"{"memory":{"limit":134217728},"cpu":{"quota":100000,"period":100000}}"#,
    )?;
    let shrunk = size(context, &name)?;
    ensure!(shrunk == boot, "the VM has shrunk to {shrunk:?}");
    let (cpus, memory) = seen(&ctr, &id, "small")?;
    ensure!(
        cpus == 1 && memory < 256,
        "the container sees {cpus} CPUs and {memory} MiB"
    );
    super::exec::end(&ctr, context, &id)
}

fn adds_up(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let (one, two) = (context.id("one"), context.id("two"));
    let annotation = format!("io.containerd.runc.v2.group={one}");
    let flags = [
        "--annotation",
        &annotation,
        "--memory-limit",
        "268435456",
        "--cpu-quota",
        "60000",
        "--cpu-period",
        "100000",
    ];
    ctr.detached(&one, &flags, &["sleep", "1000"])?;
    let name = format!("{NAMESPACE}/{one}");
    let alone = size(context, &name)?;
    ensure!(alone == (1, 384), "with one container the VM has {alone:?}");
    ctr.detached(&two, &flags, &["sleep", "1000"])?;
    let both = size(context, &name)?;
    ensure!(both == (2, 640), "with two the VM has {both:?}");
    super::exec::end(&ctr, context, &two)?;
    poll::until("the VM with one container", context.seconds(30), || {
        Ok((size(context, &name)? == alone).then_some(()))
    })?;
    super::exec::end(&ctr, context, &one)
}

fn grows(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("grows");
    let mount = ["--mount", "type=tmpfs,src=tmpfs,dst=/mem,options=size=3g"];
    let script = "for i in 1 2 3 4 5 6 7 8; do \
                  dd if=/dev/zero of=/mem/$i bs=1M count=128 || exit 9; sleep 1; done; echo done >/mem/done; sleep 1000";
    ctr.detached(&id, &mount, &["sh", "-c", script])?;
    let name = format!("{NAMESPACE}/{id}");
    poll::until("1 GiB in use", context.seconds(150), || {
        let status = ctr.task(&id)?.map(|(_, status)| status);
        ensure!(
            status.as_deref() == Some("RUNNING"),
            "the container has become {status:?}"
        );
        std::thread::sleep(std::time::Duration::from_secs(3));
        let looked = ctr.exec(&id, "looks", &[], &["cat", "/mem/done"])?;
        Ok((looked.code == 0).then_some(()))
    })?;
    let (_, memory) = size(context, &name)?;
    ensure!(memory > 1024, "the VM has {memory} MiB for 1 GiB");
    // A program that was killed would have ended the container.
    super::exec::end(&ctr, context, &id)
}

fn follows_load(context: &Context) -> Result<()> {
    let config = context.path("config.toml");
    std::fs::write(
        &config,
        "[hotplug.cpu]\ninterval = \"1s\"\nup_cooldown = \"1s\"\ndown_cooldown = \"3s\"\ndown_readings = 2\n",
    )?;
    // It seldom looks for the file, since it waits for the host then.
    let script = "spin() { until [ -e /stop ]; do i=0; while [ $i -lt 5000 ]; do i=$((i + 1)); done; done; }; \
                  spin & spin; sleep 1000";
    let mut bundle = Bundle::script(context, "load", script)?;
    bundle
        .environment
        .push(("NACRE_CONFIG", config.display().to_string()));
    let one = One::of(context, bundle)?;
    one.tasks
        .create(one.id(), &one.bundle.folder, &Stdio::default())?;
    one.tasks.start(one.id(), "")?;
    let name = format!("{NAMESPACE}/{}", one.id());
    let becomes = |what: &str, vcpus: u64| {
        poll::until(what, context.seconds(45), || {
            Ok((size(context, &name)?.0 == vcpus).then_some(()))
        })
    };
    becomes("a second vCPU under load", 2)?;
    one.tasks
        .exec(one.id(), "stops", "touch /stop", &Stdio::default())?;
    one.tasks.start(one.id(), "stops")?;
    becomes("one vCPU without load", 1)?;
    one.end()
}
