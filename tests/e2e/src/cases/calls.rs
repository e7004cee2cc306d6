//! The task service called directly, without a containerd: what is refused and
//! by which code, and what a client of `ctr` never asks for.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api::Status;
use containerd_shim_protos::ttrpc::Code;
use sha2::{Digest, Sha256};

use crate::context::Context;
use crate::ctr::expect_words;
use crate::poll;
use crate::processes;
use crate::shim::{self, Bundle, Dialect};
use crate::sink::{Sink, Told};
use crate::suite::{Case, Subject};
use crate::tasks::{Stdio, Tasks, expect_refusal, fifo};

const fn alone(name: &'static str, seconds: u64, run: fn(&Context) -> Result<()>) -> Case {
    Case {
        name,
        subject: Subject::Alone,
        seconds: (seconds, seconds),
        run,
    }
}

pub(crate) const CASES: &[Case] = &[
    alone(
        "calls that may not be have containerd's codes and change nothing",
        120,
        codes,
    ),
    alone(
        "a created container shows its host's stdio and takes an exec before its Start",
        90,
        created,
    ),
    alone(
        "Start of a missing program says so and Delete answers within 5 s",
        90,
        missing_program,
    ),
    alone("Kill of all reaches what init has started", 90, kill_all),
    alone("an exec that is stuck stops nothing else", 120, stuck),
    alone(
        "20 MiB come back from an exec with CloseIO as the only end",
        240,
        twenty_mebibytes,
    ),
];

const KILL: i32 = libc::SIGKILL;

/// A shim with one container that is created; it is ended when the case is over.
pub(super) struct One<'a> {
    pub bundle: Bundle<'a>,
    pub address: String,
    pub tasks: Tasks,
    /// What it tells of events.
    pub told: Told,
    _sink: Sink,
}

impl<'a> One<'a> {
    /// Starts a shim for `sh -c SCRIPT`.
    pub fn start(context: &'a Context, name: &str, script: &str) -> Result<Self> {
        One::of(context, Bundle::script(context, name, script)?)
    }

    /// Starts the shim of a bundle.
    pub fn of(context: &Context, mut bundle: Bundle<'a>) -> Result<Self> {
        let sink = Sink::serve(&context.path("events"))?;
        let address = ("TTRPC_ADDRESS", sink.address.clone());
        bundle.environment.push(address);
        let address = bundle.started(Dialect::Params)?;
        let tasks = Tasks::dial(&address)?;
        Ok(One {
            bundle,
            address,
            tasks,
            told: sink.told.clone(),
            _sink: sink,
        })
    }

    /// The same with its container running.
    pub fn running(context: &'a Context, name: &str, script: &str, stdio: &Stdio) -> Result<Self> {
        let one = One::start(context, name, script)?;
        one.tasks.create(one.id(), &one.bundle.folder, stdio)?;
        one.tasks.start(one.id(), "")?;
        Ok(one)
    }

    pub fn id(&self) -> &str {
        &self.bundle.id
    }

    pub fn status(&self, exec_id: &str) -> Result<Status> {
        let state = self.tasks.state(self.id(), exec_id)?;
        Ok(state.status.enum_value_or_default())
    }

    /// Kills the container, deletes it, ends the shim, and sees that it ends.
    pub fn end(self) -> Result<()> {
        self.tasks.kill(self.id(), "", KILL, false)?;
        let exit = self.tasks.wait(self.id(), "")?.exit_status;
        ensure!(exit == 137, "the exit status is {exit}");
        self.tasks.delete(self.id(), "")?;
        self.shut_down()
    }

    /// Shutdown, and what must hold then.
    pub fn shut_down(self) -> Result<()> {
        self.tasks.shutdown(self.id())?;
        self.has_ended()
    }

    /// The end within 5 s, and that the exit of every container was told.
    pub fn has_ended(&self) -> Result<()> {
        self.bundle.wait_until_gone(5)?;
        self.bundle.delete()?;
        let (created, exits) = (self.told.count("create"), self.told.count("exit"));
        ensure!(
            created <= exits,
            "{created} containers were made, {exits} exits told: {:?}",
            self.told.all()
        );
        Ok(())
    }
}

fn codes(context: &Context) -> Result<()> {
    let one = One::start(context, "codes", "sleep 1000")?;
    let (tasks, id, folder) = (&one.tasks, one.id(), &one.bundle.folder);
    let none = Stdio::default();

    // Nothing is there yet.
    let missing = Code::NOT_FOUND;
    expect_refusal("State of nothing", tasks.state(id, ""), missing)?;
    expect_refusal("Start of nothing", tasks.start(id, ""), missing)?;
    expect_refusal("Kill of nothing", tasks.kill(id, "", KILL, false), missing)?;
    expect_refusal("Delete of nothing", tasks.delete(id, ""), missing)?;
    expect_refusal("Wait for nothing", tasks.wait(id, ""), missing)?;
    expect_refusal(
        "Exec in nothing",
        tasks.exec(id, "e1", "true", &none),
        missing,
    )?;
    let invalid = Code::INVALID_ARGUMENT;
    for strange in ["a/b", "..", ""] {
        let what = format!("Create of {strange:?}");
        expect_refusal(&what, tasks.create(strange, folder, &none), invalid)?;
    }
    let connected = tasks.connect(id)?;
    let daemon = one.bundle.processes();
    ensure!(
        daemon.len() == 1 && daemon[0].pid == connected.shim_pid as i32,
        "Connect names {}, the shims are {daemon:?}",
        connected.shim_pid
    );

    let pid = tasks.create(id, folder, &none)?.pid;
    ensure!(
        pid == connected.task_pid,
        "Create says {pid}, Connect {}",
        connected.task_pid
    );
    ensure!(
        processes::all()
            .iter()
            .any(|process| process.pid == pid as i32),
        "the pid {pid} is no process of the host"
    );
    expect_refusal(
        "a second Create",
        tasks.create(id, folder, &none),
        Code::ALREADY_EXISTS,
    )?;
    tasks.start(id, "")?;
    let state = Code::FAILED_PRECONDITION;
    expect_refusal("a second Start", tasks.start(id, ""), state)?;
    expect_refusal("Delete while it runs", tasks.delete(id, ""), state)?;
    expect_refusal("Checkpoint", tasks.checkpoint(id), Code::UNIMPLEMENTED)?;
    for strange in ["a/b", "..", ""] {
        let what = format!("Exec as {strange:?}");
        expect_refusal(&what, tasks.exec(id, strange, "true", &none), invalid)?;
    }
    tasks.exec(id, "e1", "sleep 1000", &none)?;
    let again = tasks.exec(id, "e1", "true", &none);
    expect_refusal("a second exec of the id", again, Code::ALREADY_EXISTS)?;
    tasks.start(id, "e1")?;
    expect_refusal("Delete of an exec that runs", tasks.delete(id, "e1"), state)?;
    tasks.kill(id, "e1", KILL, false)?;
    ensure!(tasks.wait(id, "e1")?.exit_status == 137, "the exec's exit");
    expect_refusal(
        "Kill of an ended exec",
        tasks.kill(id, "e1", KILL, false),
        missing,
    )?;
    tasks.delete(id, "e1")?;
    expect_refusal("State of a deleted exec", tasks.state(id, "e1"), missing)?;
    // None of it has done anything.
    ensure!(
        one.status("")? == Status::RUNNING,
        "it is {:?}",
        one.status("")?
    );
    let pids = tasks.pids(id)?.processes;
    ensure!(
        pids.iter().any(|process| process.info.is_none()),
        "Pids: {pids:?}"
    );

    tasks.kill(id, "", KILL, false)?;
    let exit = tasks.wait(id, "")?.exit_status;
    ensure!(
        exit == 137 && one.status("")? == Status::STOPPED,
        "the exit is {exit}"
    );
    expect_refusal(
        "Kill of what has ended",
        tasks.kill(id, "", KILL, false),
        missing,
    )?;
    expect_refusal(
        "Exec after the end",
        tasks.exec(id, "e2", "true", &none),
        state,
    )?;
    let deleted = tasks.delete(id, "")?;
    ensure!(
        deleted.exit_status == 137 && deleted.pid == pid && deleted.exited_at.is_some(),
        "Delete answers {deleted}"
    );
    expect_refusal("a second Delete", tasks.delete(id, ""), missing)?;
    one.shut_down()
}

fn created(context: &Context) -> Result<()> {
    let one = One::start(context, "created", "echo from init; sleep 1000")?;
    let (tasks, id) = (&one.tasks, one.id());
    let (path, stdout) = fifo(&context.work, "stdout")?;
    let mut reader = File::options().read(true).write(true).open(&path)?;
    let stdio = Stdio {
        stdout: stdout.clone(),
        ..Stdio::default()
    };
    let pid = tasks.create(id, &one.bundle.folder, &stdio)?.pid;
    let network = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net"));
    ensure!(
        network(&pid.to_string())? != network("self")?,
        "the pid {pid} is in the host's network namespace"
    );
    let state = tasks.state(id, "")?;
    ensure!(
        state.status.enum_value_or_default() == Status::CREATED
            && state.stdout == stdout
            && state.pid == pid
            && state.bundle == one.bundle.folder.display().to_string(),
        "State says {state}"
    );
    // As with runc, whose containers take execs as soon as they are created.
    let log = context.path("exec");
    let stdio = Stdio {
        stdout: format!("file://{}", log.display()),
        ..Stdio::default()
    };
    tasks.exec(id, "early", "echo before init; exit 4", &stdio)?;
    tasks.start(id, "early")?;
    let exit = tasks.wait(id, "early")?.exit_status;
    ensure!(exit == 4, "the early exec's exit status is {exit}");
    ensure!(fs::read_to_string(&log)? == "before init\n", "its output");
    tasks.delete(id, "early")?;
    ensure!(
        one.status("")? == Status::CREATED,
        "it is {:?}",
        one.status("")?
    );
    tasks.start(id, "")?;
    let mut text = [0; 10];
    reader.read_exact(&mut text)?;
    ensure!(&text == b"from init\n", "init printed {text:?}");
    one.end()
}

fn missing_program(context: &Context) -> Result<()> {
    let one = One::start(context, "missing", "sleep 1000")?;
    let (tasks, id, folder) = (&one.tasks, one.id(), &one.bundle.folder);
    shim::write_config(folder, &[], &["/bin/is-not-there"])?;
    tasks.create(id, folder, &Stdio::default())?;
    let refusal = tasks.start(id, "").err().context("Start works")?;
    expect_words(&refusal.message, &["is-not-there"])?;
    let began = Instant::now();
    let deleted = tasks.delete(id, "")?;
    let took = began.elapsed();
    ensure!(took < context.seconds(5), "Delete took {took:?}");
    ensure!(deleted.exit_status == 127, "Delete answers {deleted}");
    one.shut_down()
}

fn kill_all(context: &Context) -> Result<()> {
    let log = context.path("all");
    let stdio = Stdio {
        stdout: format!("file://{}", log.display()),
        ..Stdio::default()
    };
    // A shell runs its trap when the program that it waits for has ended.
    let script = "trap 'echo init' USR1; sh -c \"trap 'echo child' USR1; echo ready; while :; do sleep 0.1; done\" & \
                  while :; do sleep 0.1; done";
    let one = One::running(context, "all", script, &stdio)?;
    let count = |word: &str| -> Result<usize> {
        let text = fs::read_to_string(&log)?;
        Ok(text.lines().filter(|line| *line == word).count())
    };
    let until = |word: &'static str, times: usize| {
        poll::until(
            &format!("{times} times {word:?}"),
            context.seconds(20),
            || Ok((count(word)? >= times).then_some(())),
        )
    };
    until("ready", 1)?;
    one.tasks.kill(one.id(), "", libc::SIGUSR1, false)?;
    until("init", 1)?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(count("child")? == 0, "a signal for init reached its child");
    one.tasks.kill(one.id(), "", libc::SIGUSR1, true)?;
    until("child", 1)?;
    until("init", 2)?;
    one.end()
}

fn stuck(context: &Context) -> Result<()> {
    let mut bundle = Bundle::script(context, "stuck", "sleep 1000")?;
    // Readers that take nothing are given up soon.
    let config = context.path("config.toml");
    fs::write(&config, "reader_timeout = \"3s\"\n")?;
    let config = ("NACRE_CONFIG", config.display().to_string());
    bundle.environment.push(config);
    let one = One::of(context, bundle)?;
    let (tasks, id) = (&one.tasks, one.id());
    tasks.create(id, &one.bundle.folder, &Stdio::default())?;
    tasks.start(id, "")?;

    // One that is stopped, one that ignores what it may, one whose output nobody reads, one that never reads.
    let (path, unread) = fifo(&context.work, "unread")?;
    let _reader = File::options().read(true).write(true).open(&path)?;
    let (path, full) = fifo(&context.work, "full")?;
    let mut writer = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)?;
    let none = Stdio::default();
    tasks.exec(id, "stopped", "kill -STOP $$", &none)?;
    tasks.exec(
        id,
        "deaf",
        "trap '' TERM INT HUP; while :; do sleep 1; done",
        &none,
    )?;
    let stdio = Stdio {
        stdout: unread,
        ..Stdio::default()
    };
    tasks.exec(id, "unread", "exec yes", &stdio)?;
    let stdio = Stdio {
        stdin: full,
        ..Stdio::default()
    };
    tasks.exec(id, "full", "exec sleep 1000", &stdio)?;
    let all = ["stopped", "deaf", "unread", "full"];
    for exec in all {
        tasks.start(id, exec)?;
    }
    while writer.write(&[0; 4096]).is_ok() {}
    tasks.kill(id, "deaf", libc::SIGTERM, false)?;
    std::thread::sleep(Duration::from_secs(1));

    let limit = context.seconds(5);
    let log = context.path("log");
    for turn in 0..3 {
        let began = Instant::now();
        let exec = format!("e{turn}");
        let stdio = Stdio {
            stdout: format!("file://{}", log.display()),
            ..Stdio::default()
        };
        tasks.exec(id, &exec, "echo goes on", &stdio)?;
        tasks.start(id, &exec)?;
        let exit = tasks.wait(id, &exec)?.exit_status;
        tasks.delete(id, &exec)?;
        tasks.pids(id)?;
        let took = began.elapsed();
        ensure!(
            exit == 0 && took < limit,
            "exit status {exit} after {took:?}"
        );
    }
    ensure!(
        fs::read_to_string(&log)? == "goes on\n".repeat(3),
        "the output of the others"
    );
    for exec in all {
        ensure!(
            one.status(exec)? == Status::RUNNING,
            "{exec} is {:?}",
            one.status(exec)?
        );
        tasks.kill(id, exec, KILL, false)?;
        let exit = tasks.wait(id, exec)?.exit_status;
        ensure!(exit == 137, "{exec} ended with {exit}");
        tasks.delete(id, exec)?;
    }
    one.end()
}

fn twenty_mebibytes(context: &Context) -> Result<()> {
    const SIZE: usize = 20 << 20;
    let one = One::running(context, "bytes", "sleep 1000", &Stdio::default())?;
    let (tasks, id) = (&one.tasks, one.id());
    let (input, stdin) = fifo(&context.work, "in")?;
    let (output, stdout) = fifo(&context.work, "out")?;
    let reading = reader(output);
    let stdio = Stdio {
        stdin,
        stdout,
        ..Stdio::default()
    };
    tasks.exec(id, "cat", "exec cat", &stdio)?;
    tasks.start(id, "cat")?;
    let mut data = Vec::with_capacity(SIZE);
    let mut hash = Sha256::digest(b"twenty");
    while data.len() < SIZE {
        data.extend_from_slice(&hash);
        hash = Sha256::digest(hash);
    }
    let began = Instant::now();
    // Closed when it is written: a client that leaves is not the end.
    File::options().write(true).open(&input)?.write_all(&data)?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(
        one.status("cat")? == Status::RUNNING,
        "cat is {:?}",
        one.status("cat")?
    );
    tasks.close_stdin(id, "cat")?;
    let exit = tasks.wait(id, "cat")?.exit_status;
    ensure!(exit == 0, "cat ended with {exit}");
    let back = reading
        .join()
        .map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    eprintln!("  back after {:.1} s", began.elapsed().as_secs_f64());
    ensure!(back.len() == SIZE, "{} bytes came back", back.len());
    ensure!(
        Sha256::digest(&back) == Sha256::digest(&data),
        "the checksum differs"
    );
    tasks.delete(id, "cat")?;
    one.end()
}

/// Reads a FIFO to its end.
fn reader(path: PathBuf) -> std::thread::JoinHandle<std::io::Result<Vec<u8>>> {
    std::thread::spawn(move || fs::read(path))
}
