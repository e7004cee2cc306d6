//! The life of a task and its end, however it comes: events, signals, the death
//! of the guest or of the shim, and that nothing stays.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;

use crate::context::{Context, Count, Runtime};
use crate::ctr::{Ctr, Events};
use crate::leaks::{self, Snapshot};
use crate::poll;
use crate::processes;
use crate::suite::{Case, Subject};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "events come in order with the exit's code",
        subject: Subject::Agreed,
        seconds: (90, 90),
        run: events_in_order,
    },
    Case {
        name: "a running task is listed, killed and deleted",
        subject: Subject::Agreed,
        seconds: (120, 120),
        run: kill_and_delete,
    },
    Case {
        name: "SIGTERM reaches a handler and its exit code comes back",
        subject: Subject::Agreed,
        seconds: (90, 90),
        run: term_is_handled,
    },
    Case {
        name: "a task that runs is not deleted",
        subject: Subject::Agreed,
        seconds: (90, 90),
        run: delete_while_running,
    },
    Case {
        name: "the same container again and again leaves nothing",
        subject: Subject::Agreed,
        seconds: (240, 600),
        run: again_and_again,
    },
    Case {
        name: "SIGKILL of the shim leaves nothing and the exit is told",
        subject: Subject::Agreed,
        seconds: (120, 120),
        run: shim_killed,
    },
    Case {
        name: "SIGTERM of the shim ends the task and leaves nothing",
        subject: Subject::Nacre,
        seconds: (120, 120),
        run: shim_terminated,
    },
    Case {
        name: "a guest that panics becomes an exit",
        subject: Subject::Nacre,
        seconds: (120, 120),
        run: guest_panics,
    },
    Case {
        name: "a guest that reboots becomes an exit",
        subject: Subject::Nacre,
        seconds: (120, 120),
        run: guest_reboots,
    },
];

fn events_in_order(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let events = Events::listen(context, &ctr)?;
    let id = context.id("events");
    ctr.script(&id, &[], "exit 42")?.expect_code(42)?;
    let mut expected = vec![
        "/tasks/create",
        "/tasks/start",
        "/tasks/exit",
        "/tasks/delete",
    ];
    if let Err(error) = events.wait_for(&id, "/tasks/delete", context.seconds(10)) {
        // runc's shim may be gone before its last event is sent; ours may not.
        match context.runtime {
            Runtime::Runc => drop(expected.pop()),
            Runtime::Nacre => return Err(error),
        }
    }
    let all = events.of_task(&id)?;
    let topics: Vec<&str> = all.iter().map(|event| event.topic.as_str()).collect();
    ensure!(topics == expected, "the events are {topics:?}");
    let pid = &all[0].content["pid"];
    ensure!(
        pid.as_u64().is_some_and(|pid| pid > 1),
        "create has the pid {pid}"
    );
    for event in &all[1..] {
        let other = &event.content["pid"];
        ensure!(
            other == pid,
            "{} has the pid {other}, create has {pid}",
            event.topic
        );
    }
    for event in &all[2..] {
        let code = &event.content["exit_status"];
        ensure!(code == 42, "{} has the exit status {code}", event.topic);
        let time = &event.content["exited_at"];
        ensure!(
            !time.is_null(),
            "{} has no time: {}",
            event.topic,
            event.content
        );
    }
    Ok(())
}

fn kill_and_delete(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("kill");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    let (pid, status) = ctr.task(&id)?.context("the task is not listed")?;
    ensure!(status == "RUNNING", "the task is {status}");
    ensure!(
        processes::all().iter().any(|process| process.pid == pid),
        "its pid {pid} is no process of this machine"
    );
    let pids = ctr.call(&["tasks", "ps", &id])?;
    pids.expect_code(0)?;
    ensure!(
        pids.out().lines().count() >= 2,
        "no process is listed: {:?}",
        pids.out()
    );
    ctr.call(&["tasks", "kill", "-s", "SIGKILL", &id])?
        .expect_code(0)?;
    ctr.wait_for_status(&id, "STOPPED", context.seconds(20))?;
    let (code, took) = ctr.delete_task(&id)?;
    ensure!(code == 137, "the task's exit code is {code} instead of 137");
    ensure!(
        took < context.seconds(5),
        "delete took {:.1} s",
        took.as_secs_f64()
    );
    ctr.remove(&id)
}

fn term_is_handled(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("term");
    ctr.detached(
        &id,
        &[],
        &[
            "sh",
            "-c",
            "trap 'exit 7' TERM; while :; do sleep 0.2; done",
        ],
    )?;
    // Until the handler is in place the signal does nothing, for the shell is its namespace's init.
    poll::until("the shell's end by SIGTERM", context.seconds(30), || {
        ctr.call(&["tasks", "kill", "-s", "SIGTERM", &id])?;
        std::thread::sleep(Duration::from_millis(300));
        Ok(ctr.task(&id)?.filter(|(_, status)| status == "STOPPED"))
    })?;
    let (code, _) = ctr.delete_task(&id)?;
    ensure!(code == 7, "the task's exit code is {code} instead of 7");
    ctr.remove(&id)
}

fn delete_while_running(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("busy");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    let refused = ctr.call(&["tasks", "delete", &id])?;
    ensure!(refused.code != 0, "a running task was deleted");
    let (_, status) = ctr
        .task(&id)?
        .context("the task is gone after a refused delete")?;
    ensure!(status == "RUNNING", "the task is {status}");
    ctr.call(&["tasks", "kill", "-s", "SIGKILL", &id])?
        .expect_code(0)?;
    ctr.wait_for_status(&id, "STOPPED", context.seconds(20))?;
    ctr.remove(&id)
}

fn again_and_again(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let times = context.times(3, 20);
    let id = context.id("again");
    let once = || -> Result<()> {
        ctr.script(&id, &[], "echo out; echo err >&2; exit 3")?
            .expect_code(3)?
            .expect_out("out\n")?;
        Ok(())
    };
    once()?;
    let daemon = Some(ctr.daemon);
    let settle = context.seconds(10);
    poll::until("the end of the first container's remains", settle, || {
        Ok(processes::shims(context.runtime.shim(), &id)
            .is_empty()
            .then_some(()))
    })?;
    let before = Snapshot::take(&context.programs, daemon);
    for number in 1..=times {
        once().with_context(|| format!("container {number} of {times}"))?;
        // In a soak each is looked at, so that one that left something is known by its number.
        if context.count == Count::Soak || number == times {
            let left = leaks::left_after(&context.programs, daemon, &before, settle);
            ensure!(
                left.is_empty(),
                "after {number} containers: {}",
                left.join("; ")
            );
        }
    }
    Ok(())
}

/// What is where shims have their sockets by default.
fn sockets_now() -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir("/run/containerd/s")
        .into_iter()
        .flatten()
        .flatten();
    entries.map(|entry| entry.path()).collect()
}

fn shim_killed(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let events = Events::listen(context, &ctr)?;
    let id = context.id("shim-killed");
    let sockets = sockets_now();
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    let shims = processes::shims(context.runtime.shim(), &id);
    ensure!(
        !shims.is_empty(),
        "there is no process of the shim for {id}"
    );
    for shim in &shims {
        eprintln!("  killing {}", shim.describe());
        processes::signal(shim.pid, Signal::SIGKILL);
    }
    let exit = events.wait_for(&id, "/tasks/exit", context.seconds(20))?;
    ensure!(
        exit.content["exit_status"] == 137,
        "the exit is {}",
        exit.content
    );
    poll::until(
        "containerd forgetting the task",
        context.seconds(20),
        || Ok(ctr.task(&id)?.is_none().then_some(())),
    )?;
    if context.runtime == Runtime::Runc {
        // Its shim leaves its sockets then, which is not for us to judge.
        for socket in sockets_now()
            .into_iter()
            .filter(|socket| !sockets.contains(socket))
        {
            std::fs::remove_file(socket)?;
        }
    }
    ctr.remove(&id)
}

fn shim_terminated(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let events = Events::listen(context, &ctr)?;
    let id = context.id("shim-terminated");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    let shims = processes::shims(context.runtime.shim(), &id);
    ensure!(
        !shims.is_empty(),
        "there is no process of the shim for {id}"
    );
    shims
        .iter()
        .for_each(|shim| processes::signal(shim.pid, Signal::SIGTERM));
    poll::until(
        "the end of the shim after SIGTERM",
        context.seconds(15),
        || {
            Ok(processes::shims(context.runtime.shim(), &id)
                .is_empty()
                .then_some(()))
        },
    )?;
    let exit = events.wait_for(&id, "/tasks/exit", context.seconds(15))?;
    ensure!(
        exit.content["exit_status"] == 137,
        "the exit is {}",
        exit.content
    );
    poll::until(
        "containerd forgetting the task",
        context.seconds(20),
        || {
            Ok(ctr
                .task(&id)?
                .is_none_or(|(_, status)| status == "STOPPED")
                .then_some(()))
        },
    )?;
    ctr.remove(&id)
}

/// Has the guest die by this key of sysrq while its container sleeps.
fn guest_dies(context: &Context, name: &str, key: &str, word: &str) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let events = Events::listen(context, &ctr)?;
    let id = context.id(name);
    // Privileged containers name the host's devices, which a guest does not have; the capability is enough.
    let script = format!(
        "umount /proc/sysrq-trigger; echo dying; sleep 1; echo {key} >/proc/sysrq-trigger; sleep 1000"
    );
    let output = ctr.script(&id, &["--cap-add", "CAP_SYS_ADMIN"], &script)?;
    ensure!(
        output.code != 0,
        "the container of a dead guest exited with 0"
    );
    ensure!(
        output.out().starts_with("dying\n"),
        "it said {:?}",
        output.out()
    );
    let exit = events.wait_for(&id, "/tasks/exit", context.seconds(10))?;
    ensure!(
        exit.content["exit_status"] == 137,
        "the exit is {}",
        exit.content
    );
    let count = events
        .of_task(&id)?
        .iter()
        .filter(|event| event.topic == "/tasks/exit")
        .count();
    ensure!(count == 1, "{count} exits were told");
    poll::until("the end of the shim", context.seconds(10), || {
        Ok(processes::shims(context.runtime.shim(), &id)
            .is_empty()
            .then_some(()))
    })?;
    // Why, in containerd's log.
    let log = std::fs::read_to_string(log_of(context)?).unwrap_or_default();
    ensure!(
        log.lines()
            .any(|line| line.contains(&id) && line.contains(word)),
        "containerd's log has no line with {id} and {word:?}"
    );
    Ok(())
}

/// containerd's own log: its standard error.
pub(super) fn log_of(context: &Context) -> Result<std::path::PathBuf> {
    let pid = context.daemon()?.pid;
    Ok(std::fs::read_link(format!("/proc/{pid}/fd/2"))?)
}

fn guest_panics(context: &Context) -> Result<()> {
    guest_dies(context, "panic", "c", "panic")
}

fn guest_reboots(context: &Context) -> Result<()> {
    guest_dies(context, "reboot", "b", "reboot")
}
