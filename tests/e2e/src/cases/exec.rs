//! Processes beside a container's init: what they print, how they end, and what
//! may not be.

use std::process::{Child, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::context::{Context, Runtime};
use crate::ctr::{self, Ctr, Events, expect_words};
use crate::image::USER;
use crate::poll;
use crate::suite::{Case, Subject};

const fn agreed(name: &'static str, seconds: u64, run: fn(&Context) -> Result<()>) -> Case {
    Case {
        name,
        subject: Subject::Agreed,
        seconds: (seconds, seconds),
        run,
    }
}

pub(crate) const CASES: &[Case] = &[
    agreed("an exec has its own output and exit code", 90, own_output),
    agreed("execs at once stay apart", 120, at_once),
    agreed("an exec reads its stdin to the end", 90, stdin),
    agreed("an exec has the user and folder asked for", 90, environment),
    agreed("a second exec of the same id is refused", 90, same_id),
    agreed("an exec that is killed is seen with 137", 90, killed),
    agreed(
        "an exec of a missing program fails and the container goes on",
        90,
        missing_program,
    ),
    agreed(
        "an exec in a container that has ended is refused",
        90,
        after_the_end,
    ),
    agreed(
        "an exec is told by its events in order",
        90,
        events_in_order,
    ),
    agreed("an exec is listed with its id", 90, listed),
    Case {
        name: "init's exit comes after those of its execs",
        subject: Subject::Nacre,
        seconds: (90, 90),
        run: init_last,
    },
    Case {
        name: "execs one after another leave nothing",
        subject: Subject::Agreed,
        seconds: (180, 3600),
        run: many,
    },
];

/// Ends a container that sleeps, and removes it.
pub(super) fn end(ctr: &Ctr<'_>, context: &Context, id: &str) -> Result<()> {
    ctr.call(&["tasks", "kill", "-s", "SIGKILL", id])?
        .expect_code(0)?;
    ctr.wait_for_status(id, "STOPPED", context.seconds(20))?;
    ctr.remove(id)
}

/// An exec that goes on, whose client ends with it.
struct Sleeper(Child);

impl Sleeper {
    /// Returns once it is listed.
    fn start(ctr: &Ctr<'_>, context: &Context, id: &str, exec_id: &str) -> Result<Self> {
        let child = ctr
            .exec_command(id, exec_id, &[], &["sleep", "1000"])
            .stdin(Stdio::null())
            .spawn()?;
        let sleeper = Sleeper(child);
        poll::until("the exec in the list", context.seconds(20), || {
            let list = ctr.call(&["tasks", "ps", id])?;
            Ok(list.out().contains(exec_id).then_some(()))
        })?;
        Ok(sleeper)
    }

    /// Its exit code, when it has ended.
    fn end(mut self, context: &Context) -> Result<Option<i32>> {
        let status = poll::until("the end of an exec", context.seconds(20), || {
            Ok(self.0.try_wait()?)
        })?;
        Ok(status.code())
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Kills an exec and sees its client's end.
fn kill_exec(
    ctr: &Ctr<'_>,
    context: &Context,
    id: &str,
    exec_id: &str,
    sleeper: Sleeper,
) -> Result<()> {
    ctr.call(&["tasks", "kill", "-s", "SIGKILL", "--exec-id", exec_id, id])?
        .expect_code(0)?;
    let code = sleeper.end(context)?;
    ensure!(code == Some(137), "the exec ended with {code:?}");
    Ok(())
}

fn own_output(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("own");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    for code in [0, 7, 127, 255] {
        let script = format!("echo out {code}; echo err {code} >&2; exit {code}");
        let output = ctr.exec(&id, &format!("e{code}"), &[], &["sh", "-c", &script])?;
        output
            .expect_code(code)?
            .expect_out(&format!("out {code}\n"))?;
        ensure!(
            output.err().contains(&format!("err {code}\n")),
            "stderr has {:?}",
            output.err()
        );
    }
    end(&ctr, context, &id)
}

fn at_once(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("once");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    let mut children = Vec::new();
    for number in 1..=6 {
        let script = format!("sleep 1; echo number {number}; exit {number}");
        let child = ctr
            .exec_command(&id, &format!("e{number}"), &[], &["sh", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        children.push((number, child));
    }
    for (number, child) in children {
        let output = child.wait_with_output()?;
        ensure!(
            output.status.code() == Some(number),
            "exec {number} ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            out == format!("number {number}\n"),
            "exec {number}: {out:?}"
        );
    }
    end(&ctr, context, &id)
}

fn stdin(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("stdin");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    let input: Vec<u8> = (0..(1 << 20)).map(|n: u32| ((n * 31) >> 3) as u8).collect();
    let mut command = ctr.exec_command(&id, "e1", &[], &["sha256sum"]);
    let output = ctr::run_with_input(&mut command, &input)?;
    output.expect_code(0)?;
    expect_words(&output.out(), &[&format!("{:x}", Sha256::digest(&input))])?;
    end(&ctr, context, &id)
}

fn environment(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("user");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    let flags = ["--cwd", "/tmp", "--user", USER.0];
    let script = "pwd; id -u; id -g; echo $FROM_IMAGE";
    ctr.exec(&id, "e1", &flags, &["sh", "-c", script])?
        .expect_code(0)?
        .expect_out(&format!("/tmp\n{}\n{}\nyes\n", USER.1, USER.2))?;
    end(&ctr, context, &id)
}

fn same_id(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("same");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    let sleeper = Sleeper::start(&ctr, context, &id, "e1")?;
    let again = ctr.exec(&id, "e1", &[], &["true"])?;
    ensure!(again.code != 0, "a second exec of the same id works");
    expect_words(&again.err(), &["exist"])?;
    ctr.exec(&id, "e2", &[], &["true"])?.expect_code(0)?;
    kill_exec(&ctr, context, &id, "e1", sleeper)?;
    end(&ctr, context, &id)
}

fn killed(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("killed");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    let sleeper = Sleeper::start(&ctr, context, &id, "e1")?;
    kill_exec(&ctr, context, &id, "e1", sleeper)?;
    ctr.exec(&id, "e2", &[], &["true"])?.expect_code(0)?;
    end(&ctr, context, &id)
}

fn missing_program(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("missing");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    let output = ctr.exec(&id, "e1", &[], &["/bin/is-not-there"])?;
    ensure!(output.code != 0, "it works");
    expect_words(&output.err(), &["is-not-there"])?;
    ctr.exec(&id, "e2", &[], &["echo", "goes on"])?
        .expect_code(0)?
        .expect_out("goes on\n")?;
    end(&ctr, context, &id)
}

fn after_the_end(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("ended");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    ctr.call(&["tasks", "kill", "-s", "SIGKILL", &id])?
        .expect_code(0)?;
    ctr.wait_for_status(&id, "STOPPED", context.seconds(20))?;
    let output = ctr.exec(&id, "e1", &[], &["true"])?;
    ensure!(output.code != 0, "it works");
    expect_words(&output.err(), &["stopped"])?;
    ctr.remove(&id)
}

fn events_in_order(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let events = Events::listen(context, &ctr)?;
    let id = context.id("events");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    ctr.exec(&id, "e1", &[], &["sh", "-c", "exit 3"])?
        .expect_code(3)?;
    end(&ctr, context, &id)?;
    let mut expected = vec![
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
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
    for event in &all[2..4] {
        ensure!(
            event.content["exec_id"] == "e1",
            "{} is of {}",
            event.topic,
            event.content
        );
    }
    ensure!(
        all[4].content["id"] == "e1" && all[4].content["exit_status"] == 3,
        "the exec's exit is {}",
        all[4].content
    );
    ensure!(
        all[5].content["id"] == id.as_str(),
        "init's exit is {}",
        all[5].content
    );
    Ok(())
}

fn listed(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("listed");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    let sleeper = Sleeper::start(&ctr, context, &id, "a-long-sleep")?;
    let output = ctr.call(&["tasks", "ps", &id])?;
    output.expect_code(0)?;
    expect_words(&output.out(), &["a-long-sleep"])?;
    ensure!(
        output.out().lines().count() >= 3,
        "not both are listed: {:?}",
        output.out()
    );
    kill_exec(&ctr, context, &id, "a-long-sleep", sleeper)?;
    end(&ctr, context, &id)
}

fn init_last(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let events = Events::listen(context, &ctr)?;
    let id = context.id("last");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    let first = Sleeper::start(&ctr, context, &id, "e1")?;
    let second = Sleeper::start(&ctr, context, &id, "e2")?;
    ctr.call(&["tasks", "kill", "-s", "SIGKILL", &id])?
        .expect_code(0)?;
    for sleeper in [first, second] {
        let code = sleeper.end(context)?;
        ensure!(code == Some(137), "an exec ended with {code:?}");
    }
    ctr.wait_for_status(&id, "STOPPED", context.seconds(20))?;
    ctr.remove(&id)?;
    events.wait_for(&id, "/tasks/delete", context.seconds(10))?;
    let exits: Vec<String> = events
        .of_task(&id)?
        .iter()
        .filter(|event| event.topic == "/tasks/exit")
        .map(|event| event.content["id"].as_str().unwrap_or_default().to_owned())
        .collect();
    match &exits[..] {
        [_, _, last] if *last == id => Ok(()),
        _ => bail!("the exits are of {exits:?}"),
    }
}

fn many(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("many");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    for number in 0..context.times(10, 1000) {
        ctr.exec(&id, &format!("e{number}"), &[], &["echo", "one of many"])
            .and_then(|output| output.expect_code(0)?.expect_out("one of many\n").map(drop))
            .with_context(|| format!("exec {number}"))?;
    }
    let output = ctr.call(&["tasks", "ps", &id])?;
    ensure!(
        output.out().lines().count() == 2,
        "more than init is left: {:?}",
        output.out()
    );
    end(&ctr, context, &id)
}
