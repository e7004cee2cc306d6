//! Ends without a word: of a guest that suspends itself, and of a daemon that
//! stands still.

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
        name: "a guest that suspends itself is ended and becomes an exit",
        subject: Subject::Nacre,
        seconds: (120, 120),
        run: suspended_guest,
    },
    Case {
        name: "delete of a daemon that stands still answers within 5 s",
        subject: Subject::Alone,
        seconds: (60, 60),
        run: stopped_daemon,
    },
];

/// What containerd gives `delete`.
const LIMIT: Duration = Duration::from_secs(5);

fn suspended_guest(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("suspended");
    // To idle, and nothing is there to wake it: no program of the guest runs again, its agent neither, and its kernel cuts
    // the agent's connections.
    let script = "mkdir /s && mount -t sysfs s /s && echo freeze >/s/power/state; sleep 1000";
    ctr.detached(&id, &["--cap-add", "CAP_SYS_ADMIN"], &["sh", "-c", script])?;
    ctr.wait_for_status(&id, "STOPPED", context.seconds(15))?;
    let (code, took) = ctr.delete_task(&id)?;
    ensure!(code == 137, "the exit code is {code} instead of 137");
    ensure!(took < context.seconds(5), "delete took {took:?}");
    let log = std::fs::read_to_string(super::lifecycle::log_of(context)?)?;
    ensure!(
        log.lines()
            .any(|line| line.contains(&id) && line.contains("events connection is over")),
        "containerd's log does not say why"
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
