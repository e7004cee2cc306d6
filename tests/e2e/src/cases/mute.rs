//! Ends without a word: of a guest that suspends itself, of an agent that stands
//! still in a guest that does not, and of a daemon.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;

use super::calls::One;
use crate::context::Context;
use crate::ctr::Ctr;
use crate::initrd::Initrd;
use crate::poll;
use crate::processes;
use crate::shim::{Bundle, Connection, Dialect};
use crate::suite::{Case, Subject};
use crate::tasks::Stdio;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a guest that suspends itself is ended, or goes on",
        subject: Subject::Nacre,
        seconds: (120, 120),
        run: suspended_guest,
    },
    Case {
        name: "a container whose agent stands still is killed, and its shim ends",
        subject: Subject::Alone,
        seconds: (120, 120),
        run: stopped_agent,
    },
    Case {
        name: "Shutdown ends a shim whose agent stands still",
        subject: Subject::Alone,
        seconds: (120, 120),
        run: shutdown_of_a_stopped_agent,
    },
    Case {
        name: "delete of a daemon that stands still answers within 5 s",
        subject: Subject::Alone,
        seconds: (60, 60),
        run: stopped_daemon,
    },
];

/// What containerd gives `delete`, and a guest has to answer.
const LIMIT: Duration = Duration::from_secs(5);

/// The agent is the first process of a namespace below, so that it can be stopped from above. When a container sets a
/// limit of the kernel to a number that nobody has, it is.
const ABOVE: &str = "/busybox mkdir /above
/busybox mount -t proc proc /above
/busybox unshare -p -f /init &
until [ $(/busybox cat /above/sys/kernel/panic) = 77 ]; do /busybox sleep 0.1; done
for status in /above/[0-9]*/status; do
  pid=${status#/above/}; pid=${pid%/status}
  [ \"$(/busybox readlink /above/$pid/exe)\" = /init ] && /busybox kill -STOP $pid
done
wait";

fn suspended_guest(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("suspended");
    // To idle, and nothing is there to wake it: no program of the guest runs again, its agent neither, and its kernel cuts
    // the agent's connections.
    // A guest whose memory may grow by virtio-mem is refused by its own driver, and goes on.
    let script = "mkdir /s && mount -t sysfs s /s && (echo freeze >/s/power/state || touch /refused); sleep 1000";
    ctr.detached(&id, &["--cap-add", "CAP_SYS_ADMIN"], &["sh", "-c", script])?;
    let refused = poll::until("an exit or a refusal", context.seconds(30), || {
        if ctr
            .task(&id)?
            .is_some_and(|(_, status)| status == "STOPPED")
        {
            return Ok(Some(false));
        }
        let looked = ctr.exec(&id, "looks", &[], &["ls", "/refused"])?;
        Ok((looked.code == 0).then_some(true))
    })?;
    if refused {
        ctr.exec(&id, "runs", &[], &["true"])?.expect_code(0)?;
        return super::exec::end(&ctr, context, &id);
    }
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

/// A container that runs, whose agent does not any more.
fn with_stopped_agent<'a>(context: &'a Context) -> Result<One<'a>> {
    let script = "echo 77 >/proc/sys/kernel/panic; sleep 1000";
    let mut bundle = Bundle::script(context, "still", script)?;
    Initrd::write(context, Some(ABOVE))?.boots(&mut bundle);
    let one = One::of(context, bundle)?;
    one.tasks
        .create(one.id(), &one.bundle.folder, &Stdio::default())?;
    one.tasks.start(one.id(), "")?;
    // It answers, until it does not.
    poll::until("the end of answers", context.seconds(20), || {
        let (answered, answers) = mpsc::channel();
        let (tasks, id) = (one.tasks.clone(), one.id().to_owned());
        std::thread::spawn(move || answered.send(tasks.pids(&id).is_ok()));
        Ok(answers
            .recv_timeout(context.seconds(2))
            .is_err()
            .then_some(()))
    })?;
    Ok(one)
}

fn stopped_agent(context: &Context) -> Result<()> {
    let one = with_stopped_agent(context)?;
    let began = Instant::now();
    one.tasks.kill(one.id(), "", libc::SIGKILL, false)?;
    let exit = one.tasks.wait(one.id(), "")?;
    let took = began.elapsed();
    eprintln!("  Kill and the exit took {took:?}");
    ensure!(
        exit.exit_status == 137,
        "the exit status is {}",
        exit.exit_status
    );
    ensure!(
        took <= context.seconds(LIMIT.as_secs() + 2),
        "Kill and the exit took {took:?}"
    );
    one.tasks.delete(one.id(), "")?;
    one.shut_down()
}

fn shutdown_of_a_stopped_agent(context: &Context) -> Result<()> {
    let one = with_stopped_agent(context)?;
    let began = Instant::now();
    one.shut_down()?;
    let took = began.elapsed();
    eprintln!("  Shutdown, the end and delete took {took:?}");
    ensure!(
        took <= context.seconds(LIMIT.as_secs() + 2),
        "Shutdown, the end and delete took {took:?}"
    );
    Ok(())
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
