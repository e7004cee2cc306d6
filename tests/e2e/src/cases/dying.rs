//! Guests that end within Create, and by a fault that nobody handles. The first
//! boot with an init of ours, which starts a clock and becomes the agent: when
//! the clock is over, the kernel panics, wherever Create is by then.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::ttrpc::Code;

use super::calls::One;
use crate::context::Context;
use crate::initrd::Initrd;
use crate::leaks::{self, Snapshot};
use crate::lots::Lots;
use crate::poll;
use crate::shim::Bundle;
use crate::suite::{Case, Subject};
use crate::tasks::Stdio;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a guest that ends within Create fails it with the reason and leaves nothing",
        subject: Subject::Alone,
        seconds: (180, 1800),
        run: within_create,
    },
    Case {
        name: "a triple fault of the guest becomes an exit with the reason",
        subject: Subject::Alone,
        seconds: (90, 90),
        run: triple_fault,
    },
];

/// The bundle's shim with a guest that panics `seconds` after its first process.
fn start<'a>(context: &'a Context, seconds: f64) -> Result<One<'a>> {
    let script = format!(
        "/busybox mkdir /clock\n/busybox mount -t proc proc /clock\nexec 9>/clock/sysrq-trigger\n\
         (/busybox sleep {seconds:.2}; echo c >&9) &\nexec 9>&-\nexec /init"
    );
    let mut bundle = Bundle::script(context, "mortal", "sleep 1000")?;
    Initrd::write(context, Some(&script))?.boots(&mut bundle);
    One::of(context, bundle)
}

fn create(one: &One<'_>) -> crate::tasks::Answer<u32> {
    let created = one
        .tasks
        .create(one.id(), &one.bundle.folder, &Stdio::default());
    created.map(|answer| answer.pid)
}

fn within_create(context: &Context) -> Result<()> {
    // A guest with a long life: it is the clock that ends the others. What a Create takes when the guest is there
    // is about what is left of the first one when the clock starts.
    let one = start(context, 1000.0)?;
    create(&one)?;
    let began = Instant::now();
    one.tasks
        .create("second", &one.bundle.folder, &Stdio::default())?;
    let whole = began.elapsed().mul_f64(2.0);
    eprintln!("  the clock runs for up to {whole:?}");
    one.tasks.delete("second", "")?;
    one.tasks.start(one.id(), "")?;
    one.end()?;

    let before = Snapshot::take(&context.programs, None);
    let times = context.times(2, 20);
    let mut lots = Lots::beginning(31);
    let mut refused = 0;
    for number in 0..times {
        // A part of the time each, so that all of it is met. The kernel's own start is before it.
        let seconds = whole.as_secs_f64() * (f64::from(number) + lots.part()) / f64::from(times);
        refused +=
            u32::from(dies(context, seconds).with_context(|| format!("after {seconds:.2} s"))?);
        let left = leaks::left_after(&context.programs, None, &before, context.seconds(10));
        ensure!(left.is_empty(), "after {seconds:.2} s: {}", left.join("; "));
    }
    ensure!(refused > 0, "no guest ended within Create");
    // And the same container by a new shim.
    let one = One::start(context, "mortal", "sleep 1000")?;
    create(&one)?;
    one.tasks.start(one.id(), "")?;
    one.end()
}

/// Whether Create was still under way when the guest ended.
fn dies(context: &Context, seconds: f64) -> Result<bool> {
    let one = start(context, seconds)?;
    let began = Instant::now();
    let created = create(&one);
    eprintln!("  {seconds:.2} s: {created:?} after {:?}", began.elapsed());
    let refused = match created {
        Err(refusal) => {
            ensure!(refusal.code == Some(Code::INTERNAL), "Create: {refusal}");
            // A kernel that has no pvpanic yet can only reset.
            let why = ["kernel panicked", "asked for a reboot"];
            ensure!(
                why.iter().any(|why| refusal.message.contains(why))
                    && refusal.message.contains(one.id()),
                "Create does not say why: {refusal}"
            );
            ensure!(
                one.tasks.state(one.id(), "").is_err(),
                "the container is known"
            );
            true
        }
        Ok(_) => {
            let exit = one.tasks.wait(one.id(), "")?.exit_status;
            ensure!(exit == 137, "the exit status is {exit}");
            false
        }
    };
    images_are_gone(one.id(), refused, context.seconds(5))?;
    // Nothing new begins in a VM that has ended.
    let again = one
        .tasks
        .create("another", &one.bundle.folder, &Stdio::default());
    ensure!(again.is_err(), "a dead guest takes a container");
    if !refused {
        one.tasks.delete(one.id(), "")?;
    }
    // It may have ended by itself by now.
    let _ = one.tasks.shutdown(one.id());
    one.has_ended()?;
    Ok(refused)
}

/// A Create that failed has no disk image left, the others have theirs.
fn images_are_gone(id: &str, gone: bool, limit: Duration) -> Result<()> {
    let directory = super::races::state_directory(id)?;
    let images = |directory: &Path| -> Result<usize> {
        let entries = fs::read_dir(directory)?.flatten();
        Ok(entries
            .filter(|entry| entry.path().extension().is_some_and(|end| end == "img"))
            .count())
    };
    poll::until("the end of the disk image", limit, || {
        Ok((images(&directory)? == usize::from(!gone)).then_some(()))
    })
}

fn triple_fault(context: &Context) -> Result<()> {
    let script = "sleep 1; echo b >/proc/sysrq-trigger; sleep 1000";
    let mut bundle = Bundle::script(context, "faults", script)?;
    let config = context.path("config.toml");
    // How the kernel is to reboot: by an exception without a handler for it, nor for what that leads to.
    fs::write(&config, "cmdline = \"reboot=t\"\n")?;
    let config = ("NACRE_CONFIG", config.display().to_string());
    bundle.environment.push(config);
    let one = One::of(context, bundle)?;
    create(&one)?;
    one.tasks.start(one.id(), "")?;
    let began = Instant::now();
    let exit = one.tasks.wait(one.id(), "")?.exit_status;
    ensure!(exit == 137, "the exit status is {exit}");
    ensure!(
        began.elapsed() < context.seconds(20),
        "the exit came after {:?}",
        began.elapsed()
    );
    poll::until("the exit's event", context.seconds(2), || {
        Ok((one.told.count(&format!("exit {} 137", one.id())) == 1).then_some(()))
    })?;
    let folder = &one.bundle.folder;
    let again = one.tasks.create("another", folder, &Stdio::default());
    let refusal = again.err().context("a dead guest takes a container")?;
    ensure!(
        refusal.message.contains("triple fault"),
        "it does not say why: {refusal}"
    );
    one.tasks.delete(one.id(), "")?;
    one.shut_down()
}
