//! Ends that one side does not answer to: a guest that stands still, and a
//! daemon that does.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;

use crate::context::Context;
use crate::ctr::Ctr;
use crate::poll;
use crate::processes;
use crate::shim::{Bundle, Connection, Dialect};
use crate::suite::{Case, Subject};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a guest that stands still is killed and deleted in 5 s each",
        subject: Subject::Nacre,
        seconds: (120, 120),
        run: frozen_guest,
    },
    Case {
        name: "delete of a daemon that stands still answers within 5 s",
        subject: Subject::Alone,
        seconds: (60, 60),
        run: stopped_daemon,
    },
];

/// What containerd gives either.
const LIMIT: Duration = Duration::from_secs(5);

fn frozen_guest(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("frozen");
    // Suspended to idle, and nothing there to wake it: no program of the guest runs again, its agent neither.
    let script = "mkdir /s && mount -t sysfs s /s && echo freeze >/s/power/state; sleep 1000";
    ctr.detached(&id, &["--cap-add", "CAP_SYS_ADMIN"], &["sh", "-c", script])?;
    std::thread::sleep(context.seconds(4));
    let began = Instant::now();
    ctr.call(&["tasks", "kill", "-s", "SIGKILL", &id])?
        .expect_code(0)?;
    let killed = began.elapsed();
    ctr.wait_for_status(&id, "STOPPED", context.seconds(5))?;
    let (code, deleted) = ctr.delete_task(&id)?;
    eprintln!("  kill took {killed:?}, delete {deleted:?}");
    ensure!(code == 137, "the exit code is {code} instead of 137");
    // ctr itself takes its time on a slow machine.
    let slack = context.seconds(2);
    ensure!(killed <= LIMIT + slack, "kill took {killed:?}");
    ensure!(deleted <= LIMIT + slack, "delete took {deleted:?}");
    let log = std::fs::read_to_string(super::lifecycle::log_of(context)?)?;
    ensure!(
        log.lines()
            .any(|line| line.contains(&id) && line.contains("does not kill")),
        "the guest has answered: it did not stand still"
    );
    poll::until("the end of the shim", context.seconds(15), || {
        Ok(processes::shims(context.runtime.shim(), &id)
            .is_empty()
            .then_some(()))
    })?;
    ctr.remove(&id)
}

fn stopped_daemon(context: &Context) -> Result<()> {
    let bundle = Bundle::plain(context, "stopped")?;
    let address = bundle.started(Dialect::Version2)?;
    Connection::dial(&address)?.connect("containerd.task.v2.Task", &bundle.id)?;
    let daemon = bundle.processes();
    let pid = daemon.first().context("there is no daemon")?.pid;
    processes::signal(pid, Signal::SIGSTOP);
    let began = Instant::now();
    let answer = bundle.delete()?;
    let took = began.elapsed();
    eprintln!("  delete took {took:?}");
    ensure!(took <= LIMIT, "delete took {took:?}");
    ensure!(
        answer.exit_status == 137 && answer.pid as i32 == pid,
        "delete answers with {answer:?}"
    );
    bundle.wait_until_gone(1)?;
    ensure!(
        std::fs::symlink_metadata(&address).is_err(),
        "{address} is still there"
    );
    Ok(())
}
