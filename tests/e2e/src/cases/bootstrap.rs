//! The shim's program as containerd starts it, without a containerd: start,
//! delete, info, version.

use std::fs;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::context::{Context, NAMESPACE, Runtime};
use crate::ctr::{self, expect_words};
use crate::processes;
use crate::shim::{Bundle, Connection, Dialect};
use crate::suite::{Case, Subject};
use crate::tasks::{Stdio, Tasks};

const fn alone(name: &'static str, seconds: u64, run: fn(&Context) -> Result<()>) -> Case {
    Case {
        name,
        subject: Subject::Alone,
        seconds: (seconds, seconds),
        run,
    }
}

pub(crate) const CASES: &[Case] = &[
    alone("shim -v prints its version", 20, version),
    alone("shim -info names the mount types that it handles", 20, info),
    alone(
        "start answers a containerd 2.3 with version 3",
        60,
        |context| dialect(context, Dialect::Params),
    ),
    alone(
        "start answers a containerd 1.7 with version 2",
        60,
        |context| dialect(context, Dialect::Version2),
    ),
    alone(
        "start answers a containerd 1.6 with the bare address",
        60,
        |context| dialect(context, Dialect::Bare),
    ),
    alone(
        "start takes runtime options on stdin for no parameters",
        60,
        runtime_options,
    ),
    alone("both task services are served", 60, both_services),
    alone("the longest names make a short socket path", 60, long_names),
    alone("a full log FIFO does not block start", 60, full_log),
    alone(
        "a log FIFO without a reader does not block start",
        60,
        unread_log,
    ),
    alone("the same group gets the same address", 90, same_group),
    alone(
        "delete of a shim that never came up answers 137",
        30,
        delete_before_start,
    ),
    alone(
        "SIGKILL of the daemon and delete leave nothing",
        60,
        delete_after_kill,
    ),
    alone(
        "delete frees what a SIGKILL left and a new start works",
        90,
        start_after_kill,
    ),
    alone(
        "delete leaves no daemon, though nobody takes its events",
        90,
        delete_unheard,
    ),
    alone("SIGTERM ends a daemon that nobody called", 60, terminated),
    alone("Shutdown ends the daemon within 5 s", 60, shut_down),
    alone("a daemon that nobody calls ends itself", 90, not_called),
];

fn version(context: &Context) -> Result<()> {
    let output = ctr::run(Command::new(context.programs.shim()).arg("-v"))?;
    output.expect_code(0)?;
    expect_words(
        &output.out(),
        &["containerd-shim-nacre-v1", env!("CARGO_PKG_VERSION")],
    )
}

fn info(context: &Context) -> Result<()> {
    // containerd writes options to stdin here, or nothing.
    let output = ctr::run(Command::new(context.programs.shim()).arg("-info"))?;
    output.expect_code(0)?;
    ensure!(output.stderr.is_empty(), "stderr has {:?}", output.err());
    expect_words(
        &output.out(),
        &[
            "io.containerd.nacre.v1",
            "containerd.io/runtime-allow-mounts",
        ],
    )
}

/// Dials as containerd does, once; calls something; ends the daemon by it.
fn expect_service(bundle: &Bundle<'_>, address: &str) -> Result<()> {
    ensure!(
        address.len() <= 107,
        "the socket's path has {} bytes: {address}",
        address.len()
    );
    let kind = fs::symlink_metadata(address)
        .with_context(|| address.to_owned())?
        .file_type();
    ensure!(kind.is_socket(), "{address} is no socket");
    let connection = Connection::dial(address)?;
    let answer = connection.connect("containerd.task.v2.Task", &bundle.id)?;
    let pid = answer.shim_pid as i32;
    let daemon = processes::all()
        .into_iter()
        .find(|process| process.pid == pid);
    let daemon = daemon.with_context(|| format!("Connect names the pid {pid}, which is none"))?;
    ensure!(
        daemon.is(Runtime::Nacre.shim()),
        "Connect names {}",
        daemon.describe()
    );
    connection.shutdown(&bundle.id)?;
    bundle.wait_until_gone(5)?;
    let answer = bundle.delete()?;
    ensure!(answer.exited_at.is_some(), "delete answers without a time");
    ensure!(
        fs::symlink_metadata(address).is_err(),
        "{address} is still there"
    );
    Ok(())
}

fn dialect(context: &Context, dialect: Dialect) -> Result<()> {
    let bundle = Bundle::plain(context, "dialect")?;
    let address = bundle.started(dialect)?;
    // At once, before anything else: nobody dials a second time.
    drop(UnixStream::connect(&address).with_context(|| format!("dialling {address}"))?);
    expect_service(&bundle, &address)
}

fn runtime_options(context: &Context) -> Result<()> {
    // An Any with runc's options, as 1.7 sends it: type_url = 1, value = 2.
    let bundle = Bundle::plain(context, "options")?;
    let url = b"containerd.runc.v1.Options";
    let mut options = vec![0x0a, url.len() as u8];
    options.extend_from_slice(url);
    options.extend_from_slice(&[0x12, 2, 0x18, 1]);
    let output = bundle.start_with(Dialect::Version2, &options)?;
    output.expect_code(0)?;
    let address = crate::shim::address_in(Dialect::Version2, &output.stdout)?;
    expect_service(&bundle, &address)
}

fn both_services(context: &Context) -> Result<()> {
    let bundle = Bundle::plain(context, "services")?;
    let address = bundle.started(Dialect::Version2)?;
    let connection = Connection::dial(&address)?;
    let mut pids = Vec::new();
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        pids.push(connection.connect(service, &bundle.id)?.shim_pid);
    }
    ensure!(pids[0] == pids[1] && pids[0] > 1, "the pids are {pids:?}");
    expect_service(&bundle, &address)
}

fn long_names(context: &Context) -> Result<()> {
    // containerd's own limit for either.
    let (namespace, id) = ("n".repeat(76), "i".repeat(76));
    let bundle = Bundle::new(context, &namespace, &id, &[])?;
    let address = bundle.started(Dialect::Version2)?;
    expect_service(&bundle, &address)
}

fn make_log(bundle: &Bundle<'_>) -> Result<std::path::PathBuf> {
    let path = bundle.folder.join("log");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o700))?;
    Ok(path)
}

fn full_log(context: &Context) -> Result<()> {
    use std::io::Write;
    let bundle = Bundle::plain(context, "full-log")?;
    let path = make_log(&bundle)?;
    // Read-write: the FIFO has a reader, this one, who never reads.
    let mut fifo = fs::File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let mut filled = 0;
    loop {
        match fifo.write(&[b'x'; 4096]) {
            Ok(written) => filled += written,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error.into()),
        }
    }
    ensure!(filled > 0, "nothing fitted into the FIFO");
    let address = bundle.started(Dialect::Version2)?;
    expect_service(&bundle, &address)
}

fn unread_log(context: &Context) -> Result<()> {
    let bundle = Bundle::plain(context, "unread-log")?;
    make_log(&bundle)?;
    let address = bundle.started(Dialect::Version2)?;
    expect_service(&bundle, &address)
}

fn same_group(context: &Context) -> Result<()> {
    for (number, annotation) in [
        "io.containerd.runc.v2.group",
        "io.kubernetes.cri.sandbox-id",
    ]
    .iter()
    .enumerate()
    {
        let group = context.id(&format!("group-{number}"));
        let first = Bundle::new(context, NAMESPACE, &group, &[(annotation, &group)])?;
        let second = Bundle::new(
            context,
            NAMESPACE,
            &context.id(&format!("member-{number}")),
            &[(annotation, &group)],
        )?;
        let address = first.started(Dialect::Version2)?;
        let again = second.started(Dialect::Version2)?;
        ensure!(address == again, "{annotation}: {address} and {again}");
        ensure!(second.processes().is_empty(), "a second daemon was started");
        // The member's delete is not the daemon's end.
        second.delete()?;
        drop(UnixStream::connect(&address).context("dialling after a member's delete")?);
        expect_service(&first, &address)?;
    }
    Ok(())
}

fn delete_before_start(context: &Context) -> Result<()> {
    let bundle = Bundle::plain(context, "never")?;
    let answer = bundle.delete()?;
    ensure!(
        answer.exit_status == 137,
        "exit status {}",
        answer.exit_status
    );
    ensure!(answer.exited_at.is_some(), "no time");
    Ok(())
}

fn delete_after_kill(context: &Context) -> Result<()> {
    let bundle = Bundle::plain(context, "killed")?;
    let address = bundle.started(Dialect::Version2)?;
    let pid = bundle
        .processes()
        .first()
        .context("there is no daemon")?
        .pid;
    // Long enough for the VM to be there with all that it has.
    std::thread::sleep(context.seconds(3));
    bundle.kill()?;
    let answer = bundle.delete()?;
    ensure!(
        answer.exit_status == 137,
        "exit status {}",
        answer.exit_status
    );
    ensure!(
        answer.pid as i32 == pid,
        "delete answers with the pid {} instead of {pid}",
        answer.pid
    );
    ensure!(answer.exited_at.is_some(), "no time");
    ensure!(
        fs::symlink_metadata(&address).is_err(),
        "{address} is still there"
    );
    // Once more, for containerd may: it says the same, or at least no error.
    bundle.delete()?;
    Ok(())
}

fn start_after_kill(context: &Context) -> Result<()> {
    let bundle = Bundle::plain(context, "again")?;
    bundle.started(Dialect::Version2)?;
    bundle.kill()?;
    bundle.delete()?;
    let address = bundle.started(Dialect::Version2)?;
    expect_service(&bundle, &address)
}

/// After Shutdown the daemon still has events to tell, and containerd is not there.
fn delete_unheard(context: &Context) -> Result<()> {
    let bundle = Bundle::script(context, "unheard", "sleep 1000")?;
    let address = bundle.started(Dialect::Params)?;
    let tasks = Tasks::dial(&address)?;
    tasks.create(&bundle.id, &bundle.folder, &Stdio::default())?;
    tasks.start(&bundle.id, "")?;
    tasks.kill(&bundle.id, "", libc::SIGKILL, false)?;
    tasks.wait(&bundle.id, "")?;
    tasks.delete(&bundle.id, "")?;
    tasks.shutdown(&bundle.id)?;
    bundle.delete()?;
    let left = bundle.processes();
    ensure!(
        left.is_empty(),
        "delete has answered and {} is there",
        left[0].describe()
    );
    Ok(())
}

fn terminated(context: &Context) -> Result<()> {
    let bundle = Bundle::plain(context, "terminated")?;
    let address = bundle.started(Dialect::Version2)?;
    let daemon = bundle.processes();
    ensure!(!daemon.is_empty(), "there is no daemon");
    daemon
        .iter()
        .for_each(|process| processes::signal(process.pid, Signal::SIGTERM));
    bundle.wait_until_gone(10)?;
    ensure!(
        fs::symlink_metadata(&address).is_err(),
        "{address} is still there"
    );
    Ok(())
}

fn shut_down(context: &Context) -> Result<()> {
    let bundle = Bundle::plain(context, "shutdown")?;
    let address = bundle.started(Dialect::Version2)?;
    let connection = Connection::dial(&address)?;
    let started = Instant::now();
    connection.shutdown(&bundle.id)?;
    bundle.wait_until_gone(5)?;
    eprintln!("  ended after {:.2} s", started.elapsed().as_secs_f64());
    Ok(())
}

fn not_called(context: &Context) -> Result<()> {
    let bundle = Bundle::plain(context, "not-called")?;
    let started = Instant::now();
    let address = bundle.started(Dialect::Version2)?;
    if bundle.processes().is_empty() {
        bail!("there is no daemon");
    }
    bundle.wait_until_gone(50)?;
    let after = started.elapsed();
    ensure!(
        after >= context.seconds(20).min(std::time::Duration::from_secs(20)),
        "it ended after {after:?} already"
    );
    ensure!(
        fs::symlink_metadata(&address).is_err(),
        "{address} is still there"
    );
    Ok(())
}
