//! Containers and execs on a terminal.

use anyhow::{Result, ensure};

use crate::context::Context;
use crate::ctr::Ctr;
use crate::suite::{Case, Subject};
use crate::terminal::Terminal;

const fn agreed(name: &'static str, seconds: u64, run: fn(&Context) -> Result<()>) -> Case {
    Case {
        name,
        subject: Subject::Agreed,
        seconds: (seconds, seconds),
        run,
    }
}

pub(crate) const CASES: &[Case] = &[
    agreed("a terminal is one to the container", 60, is_one),
    agreed("a terminal's new size reaches the container", 90, resized),
    agreed("what is typed reaches the container", 60, typed),
    agreed("an exec on a terminal has its own", 90, exec),
];

/// Shows the terminal's size until it is the one that is waited for.
const WATCH_SIZE: &str =
    "until [ \"$(stty size)\" = '40 100' ]; do stty size; sleep 0.2; done; stty size; exit 5";

fn is_one(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let script =
        "test -t 0 && test -t 1 && test -t 2 && echo all three; echo to stderr >&2; exit 9";
    let mut command = ctr.run_command(&context.id("tty"), &["--tty"], &["sh", "-c", script]);
    let mut terminal = Terminal::start(&mut command, 80, 24)?;
    let status = terminal.end(context.seconds(30))?;
    ensure!(status.code() == Some(9), "it ended with {status}");
    let screen = terminal.screen();
    ensure!(
        screen.contains("all three\r") && screen.contains("to stderr\r"),
        "it shows {screen:?}"
    );
    Ok(())
}

fn resized(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let mut command = ctr.run_command(&context.id("size"), &["--tty"], &["sh", "-c", WATCH_SIZE]);
    let mut terminal = Terminal::start(&mut command, 80, 24)?;
    terminal.wait_for("24 80", context.seconds(30))?;
    terminal.resize(100, 40)?;
    let status = terminal.end(context.seconds(20))?;
    ensure!(status.code() == Some(5), "it ended with {status}");
    Ok(())
}

fn typed(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let script = "trap 'echo interrupted; exit 3' INT; echo ready; read line; echo \"<$line>\"; while :; do sleep 1; done";
    let mut command = ctr.run_command(&context.id("typed"), &["--tty"], &["sh", "-c", script]);
    let mut terminal = Terminal::start(&mut command, 80, 24)?;
    terminal.wait_for("ready", context.seconds(30))?;
    terminal.type_in("hello\r")?;
    terminal.wait_for("<hello>", context.seconds(10))?;
    terminal.type_in("\x03")?;
    terminal.wait_for("interrupted", context.seconds(10))?;
    let status = terminal.end(context.seconds(20))?;
    ensure!(status.code() == Some(3), "it ended with {status}");
    Ok(())
}

fn exec(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("exec");
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    let mut command = ctr.exec_command(&id, "e1", &["--tty"], &["sh", "-c", WATCH_SIZE]);
    let mut terminal = Terminal::start(&mut command, 80, 24)?;
    terminal.wait_for("24 80", context.seconds(30))?;
    terminal.resize(100, 40)?;
    let status = terminal.end(context.seconds(20))?;
    ensure!(status.code() == Some(5), "it ended with {status}");
    super::exec::end(&ctr, context, &id)
}
