//! containerd goes away under containers that run, and comes back: they have
//! not noticed, and what happened meanwhile is told.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;

use super::attach::Client;
use crate::context::{Context, IMAGE};
use crate::ctr::{Ctr, expect_words};
use crate::daemon::Running;
use crate::image;
use crate::poll;
use crate::suite::{Case, Subject};

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "containers outlive a containerd that is killed and their exits are told to the next",
        subject: Subject::Nacre,
        seconds: (180, 180),
        run: |context| outlive(context, Signal::SIGKILL),
    },
    Case {
        name: "containers outlive a containerd that is told to end and their exits are told to the next",
        subject: Subject::Nacre,
        seconds: (180, 180),
        run: |context| outlive(context, Signal::SIGTERM),
    },
];

/// Ends within a few seconds, whoever looks.
const SHORT: &str =
    "n=0; while [ $n -lt 30 ]; do echo line $n; n=$((n+1)); sleep 0.1; done; exit 9";
/// Ends when it is told so.
const LONG: &str =
    "n=0; (while :; do echo tick $n; n=$((n+1)); sleep 0.3; done) & read stop; exit 4";

fn outlive(context: &Context, by: Signal) -> Result<()> {
    let archive = context.path("image.tar");
    image::write(&context.programs.busybox, &archive)?;
    let version = context.daemon()?.version;
    // One of the case's own: the suite's goes on. Its log has every event that it takes.
    let mut own = Running::start(
        version,
        &context.programs,
        &archive,
        &context.work,
        "trace",
        context.patience,
    )?;
    let context = Context {
        daemon: Some(own.daemon.clone()),
        ..context.clone()
    };
    let result = outlive_in(&context, &mut own, by);
    if result.is_err() {
        let log = fs::read_to_string(&own.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        eprintln!("{}", lines[lines.len().saturating_sub(60)..].join("\n"));
    }
    result
}

fn outlive_in(context: &Context, own: &mut Running, by: Signal) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let (short, long) = (context.id("short"), context.id("long"));
    let log = context.path("log");
    let uri = format!("file://{}", log.display());
    let run = |id: &str, flags: &[&str], script: &str| {
        let mut words = vec!["run", "--detach", "--runtime", context.runtime.name()];
        words.extend(flags);
        words.extend([IMAGE, id, "sh", "-c", script]);
        ctr.call(&words)?.expect_code(0).map(drop)
    };
    // This one's streams are FIFOs at which nobody listens yet.
    run(&long, &[], LONG)?;
    run(&short, &["--log-uri", &uri], SHORT)?;
    poll::until("the first line", context.seconds(20), || {
        Ok(text(&log).contains("line 0\n").then_some(()))
    })?;
    own.stop(by)?;
    let printed = text(&log).lines().count();
    ensure!(printed < 30, "all was printed before containerd's end");
    poll::until("the last line", context.seconds(30), || {
        Ok(text(&log).contains("line 29\n").then_some(()))
    })?;
    // Its exit is known to its shim by then.
    std::thread::sleep(context.seconds(1));
    let heard_before = heard(&own.log);
    own.start_again()?;

    // The exit of what ended meanwhile.
    poll::until(
        "the exit that containerd has missed",
        context.seconds(20),
        || Ok((heard(&own.log) > heard_before).then_some(())),
    )?;
    ctr.wait_for_status(&short, "STOPPED", context.seconds(10))?;
    let whole: String = (0..30).map(|number| format!("line {number}\n")).collect();
    ensure!(text(&log) == whole, "the log has {:?}", text(&log));
    let (code, _) = ctr.delete_task(&short)?;
    ensure!(code == 9, "the exit code is {code}");
    ctr.remove(&short)?;

    // What goes on takes calls, and has its streams.
    ctr.wait_for_status(&long, "RUNNING", context.seconds(10))?;
    ctr.exec(&long, "e1", &[], &["echo", "still here"])?
        .expect_code(0)?
        .expect_out("still here\n")?;
    let mut client = Client::start(&mut ctr.command(&["tasks", "attach", &long]))?;
    client.wait_for("tick 12\n", context.seconds(30))?;
    let seen = String::from_utf8_lossy(&client.seen()).into_owned();
    let ticks: String = (0..=12).map(|number| format!("tick {number}\n")).collect();
    expect_words(&seen, &[&ticks]).context("output of before, of meanwhile and of after")?;
    client.say("stop\n")?;
    let code = client.end(context.seconds(20))?;
    ensure!(code == Some(4), "attach ended with {code:?}");
    ctr.remove(&long)
}

fn text(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_default()
}

/// How many exits of tasks shims have told containerd, by its log.
fn heard(log: &Path) -> usize {
    text(log)
        .lines()
        .filter(|line| line.contains("event forwarded") && line.contains("/tasks/exit"))
        .count()
}
