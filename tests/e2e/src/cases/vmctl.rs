//! `vmctl` by itself: boot, run, doctor, list.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nacre_probe::net::wire::Content;

use crate::context::Context;
use crate::ctr::{self, Ctr, Output, expect_words};
use crate::suite::{Case, Subject};
use crate::terminal::Terminal;
use crate::{image, net};

const fn alone(name: &'static str, seconds: u64, run: fn(&Context) -> Result<()>) -> Case {
    Case {
        name,
        subject: Subject::Alone,
        seconds: (seconds, seconds),
        run,
    }
}

pub(crate) const CASES: &[Case] = &[
    alone("vmctl doctor finds that this host runs guests", 90, doctor),
    alone(
        "vmctl doctor without /dev/kvm fails and says so",
        30,
        doctor_without_kvm,
    ),
    alone(
        "vmctl boot reaches the agent and prints the phases as JSON",
        90,
        boot_phases,
    ),
    alone(
        "vmctl boot --timing prints the phases for people",
        90,
        boot_text,
    ),
    alone(
        "vmctl boot without an initrd shows the panic and ends",
        90,
        boot_panic,
    ),
    alone(
        "vmctl boot with 16M is refused with the minimum",
        20,
        too_little_memory,
    ),
    alone(
        "vmctl boot with more memory than can be mapped says so",
        30,
        too_much_memory,
    ),
    alone("vmctl boot names a missing kernel", 20, boot_missing_kernel),
    alone(
        "vmctl config prints a reference that is right, and names what is wrong",
        20,
        configuration,
    ),
    alone("vmctl run prints what the program prints", 90, run_echo),
    alone("vmctl run passes the exit code on", 240, run_exit_codes),
    alone(
        "vmctl run keeps stdout and stderr apart and leaves the folder alone",
        90,
        run_streams,
    ),
    alone(
        "vmctl run on a terminal gives the program one",
        120,
        run_terminal,
    ),
    alone(
        "vmctl run hands a vsock port of the guest's to a Unix socket, and refuses one that nobody listens on",
        120,
        run_vsock,
    ),
    Case {
        name: "vmctl list shows the VM of a running container",
        subject: Subject::Nacre,
        seconds: (90, 90),
        run: list,
    },
];

fn vmctl(context: &Context, arguments: &[&str]) -> Command {
    let mut command = Command::new(context.programs.vmctl());
    command.args(arguments);
    command
}

fn call(context: &Context, arguments: &[&str]) -> Result<Output> {
    ctr::run(&mut vmctl(context, arguments))
}

fn doctor(context: &Context) -> Result<()> {
    let output = call(context, &["doctor"])?;
    output.expect_code(0)?;
    expect_words(&output.out(), &["/dev/kvm", "guest"])
}

fn doctor_without_kvm(context: &Context) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("without-kvm")
        .arg(context.programs.vmctl())
        .arg("doctor");
    let output = ctr::run(&mut command)?;
    ensure!(output.code != 0, "it found nothing wrong");
    expect_words(&format!("{}{}", output.out(), output.err()), &["/dev/kvm"])
}

fn boot_phases(context: &Context) -> Result<()> {
    let output = call(context, &["boot", "--timing", "--json"])?;
    output.expect_code(0)?;
    let report: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("stdout is no JSON object")?;
    let release = report["kernel_release"].as_str().unwrap_or_default();
    ensure!(!release.is_empty(), "no kernel release: {report}");
    let mut before = 0;
    for phase in [
        "process_ns",
        "main_ns",
        "start_ns",
        "kvm_ns",
        "loaded_ns",
        "first_run_ns",
        "first_exit_ns",
        "init_ns",
        "connected_ns",
        "ready_ns",
    ] {
        let at = report["phases"][phase].as_u64();
        let at = at.with_context(|| format!("the phase {phase} was not reached: {report}"))?;
        // The process's start is known to a tick of 10 ms only; nothing else may be out of order.
        ensure!(
            at >= before || phase == "main_ns",
            "{phase} is before the phase before it: {report}"
        );
        before = at;
    }
    ensure!(
        report["exits"]["port-write"].as_u64() > Some(0),
        "the guest wrote to no port: {report}"
    );
    // The guest's own clock agrees that time went by.
    let guest = |phase: &str| report["phases"][phase].as_u64().unwrap_or_default();
    ensure!(
        0 < guest("guest_init_us") && guest("guest_init_us") <= guest("guest_ready_us"),
        "the guest's own times are wrong: {report}"
    );
    Ok(())
}

fn boot_text(context: &Context) -> Result<()> {
    let output = call(context, &["boot", "--timing"])?;
    output.expect_code(0)?;
    expect_words(
        &output.out(),
        &[
            "process start",
            "first vCPU run",
            "guest init",
            "agent ready",
        ],
    )
}

fn boot_panic(context: &Context) -> Result<()> {
    // The console comes on stdout. A kernel whose pvpanic is a module cannot say that it panics here: it only resets.
    let words = "panic=-1 root=/dev/none";
    let output = call(
        context,
        &["boot", "--no-agent", "--memory", "256M", "--append", words],
    )?;
    ensure!(
        [3, 4].contains(&output.code),
        "exit code {} instead of 3 or 4: {}",
        output.code,
        output.err()
    );
    expect_words(&output.out(), &["Linux version", "Kernel panic"])
}

fn too_little_memory(context: &Context) -> Result<()> {
    let output = call(context, &["boot", "--memory", "16M"])?;
    ensure!(output.code != 0, "it booted");
    expect_words(&output.err(), &["memory", "16", "at least"])?;
    ensure!(
        output.took < context.seconds(5),
        "it took {:?}",
        output.took
    );
    Ok(())
}

fn too_much_memory(context: &Context) -> Result<()> {
    let mut command = vmctl(context, &["boot", "--memory", "3072M"]);
    // SAFETY: setrlimit is async-signal-safe, and its argument lives until it returns.
    unsafe {
        command.pre_exec(|| {
            let limit = libc::rlimit {
                rlim_cur: 2 << 30,
                rlim_max: 2 << 30,
            };
            match libc::setrlimit(libc::RLIMIT_AS, &raw const limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let output = ctr::run(&mut command)?;
    ensure!(output.code != 0, "it booted");
    let text = output.err().to_lowercase();
    expect_words(&text, &["memory", "map", "3072"])
}

fn boot_missing_kernel(context: &Context) -> Result<()> {
    let path = context.path("no-kernel-here");
    let output = call(context, &["boot", "--kernel", &path.to_string_lossy()])?;
    ensure!(output.code != 0, "it booted");
    expect_words(&output.err(), &[&path.to_string_lossy(), "kernel"])
}

fn configuration(context: &Context) -> Result<()> {
    let path = context.path("nacre.toml");
    let name = path.to_string_lossy();
    let reference = call(context, &["config"])?;
    reference.expect_code(0)?;
    expect_words(&reference.out(), &["#default_vcpus = 1", "[share]"])?;
    std::fs::write(&path, &reference.stdout)?;
    call(context, &["config", "--check", &name])?.expect_code(0)?;
    let wrong = reference
        .out()
        .replace("#default_vcpus = 1", "default_vcpus = 0");
    let line = wrong
        .lines()
        .position(|line| line.starts_with("default_vcpus"));
    let line = format!("line {}", line.context("no default_vcpus")? + 1);
    std::fs::write(&path, wrong)?;
    let output = call(context, &["config", "--check", &name])?;
    output.expect_code(1)?;
    expect_words(
        &output.err(),
        &[&name, &line, "`size.default_vcpus`", "1 to 254"],
    )?;
    // And so does whoever reads it to use it.
    let output = ctr::run(vmctl(context, &["list"]).env("NACRE_CONFIG", &path))?;
    output.expect_code(1)?;
    expect_words(&output.err(), &[&name, &line])
}

fn rootfs(context: &Context) -> Result<PathBuf> {
    let folder = context.path("rootfs");
    std::fs::create_dir_all(&folder)?;
    image::unpack(&context.programs.busybox, &folder)?;
    Ok(folder)
}

fn run_in(context: &Context, rootfs: &std::path::Path, command: &[&str]) -> Result<Output> {
    let mut arguments = vec!["run", "--rootfs"];
    let rootfs = rootfs.to_string_lossy();
    arguments.push(&rootfs);
    arguments.push("--");
    arguments.extend(command);
    call(context, &arguments)
}

fn run_echo(context: &Context) -> Result<()> {
    let output = run_in(
        context,
        &rootfs(context)?,
        &["echo", "hello from a bare container"],
    )?;
    output
        .expect_code(0)?
        .expect_out("hello from a bare container\n")?;
    Ok(())
}

fn run_exit_codes(context: &Context) -> Result<()> {
    let rootfs = rootfs(context)?;
    for code in [0, 1, 42, 255] {
        run_in(context, &rootfs, &["sh", "-c", &format!("exit {code}")])?.expect_code(code)?;
    }
    Ok(())
}

fn run_streams(context: &Context) -> Result<()> {
    let rootfs = rootfs(context)?;
    let script = "echo out; echo err >&2; echo changed >/etc/motto; cat /etc/motto";
    let output = run_in(context, &rootfs, &["sh", "-c", script])?;
    output.expect_code(0)?.expect_out("out\nchanged\n")?;
    ensure!(output.err() == "err\n", "stderr has {:?}", output.err());
    let motto = std::fs::read_to_string(rootfs.join("etc/motto"))?;
    ensure!(
        motto == "made on the spot\n",
        "the host's folder was changed: {motto:?}"
    );
    Ok(())
}

fn run_vsock(context: &Context) -> Result<()> {
    const BYTES: u64 = 1 << 20;
    let rootfs = rootfs(context)?;
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("vsock");
    let listener = UnixListener::bind(folder.path().join("vsock_5000"))?;
    let program = vmctl(context, &["run", "--volume", "/usr/local/bin:/probe:ro"])
        .arg("--rootfs")
        .arg(&rootfs)
        .arg("--vsock")
        .arg(&socket)
        .args(["--vsock-port", "5000", "--", net::PROBE])
        .args(["net", "send", "--to", "vsock:2:5000", "--bytes"])
        .arg(BYTES.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let served = std::thread::spawn(move || -> Result<()> {
        let (stream, _) = listener.accept()?;
        // The guest is up, and has no such port.
        let mut client = UnixStream::connect(&socket)?;
        client.write_all(b"CONNECT 9\n")?;
        let mut answer = Vec::new();
        client.read_to_end(&mut answer)?;
        ensure!(answer.is_empty(), "port 9 was answered: {answer:?}");
        // Counts, checks and tells the probe, which compares.
        nacre_probe::net::answer(&File::from(OwnedFd::from(stream)), &Content::new())
    });
    let output = program.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success() && said.contains(&BYTES.to_string()),
        "the probe ended with {}: {said}{complained}",
        output.status
    );
    served
        .join()
        .map_err(|_| anyhow!("the server panicked"))??;
    ensure!(
        !folder.path().join("vsock").exists(),
        "the socket is left behind"
    );
    Ok(())
}

fn run_terminal(context: &Context) -> Result<()> {
    let rootfs = rootfs(context)?.to_string_lossy().into_owned();
    let script = "test -t 0 && test -t 1 && test -t 2 && echo all three; read line; echo \"<$line>\"; \
                  until [ \"$(stty size)\" = '40 100' ]; do stty size; sleep 0.2; done; \
                  trap 'echo interrupted; exit 7' INT; echo armed; while :; do sleep 1; done";
    let arguments = ["run", "--rootfs", &rootfs, "--", "sh", "-c", script];
    let mut terminal = Terminal::start(&mut vmctl(context, &arguments), 80, 24)?;
    terminal.wait_for("all three\r\n", context.seconds(60))?;
    terminal.type_in("typed\r")?;
    terminal.wait_for("<typed>\r\n", context.seconds(20))?;
    terminal.wait_for("24 80", context.seconds(20))?;
    terminal.resize(100, 40)?;
    terminal.wait_for("armed", context.seconds(20))?;
    // The key goes to the program as a byte and becomes a signal there, not here.
    terminal.type_in("\x03")?;
    let status = terminal.end(context.seconds(30))?;
    ensure!(status.code() == Some(7), "it ended with {status}");
    let screen = terminal.screen();
    ensure!(screen.contains("interrupted"), "it shows {screen:?}");
    Ok(())
}

fn list(context: &Context) -> Result<()> {
    let ctr = Ctr::new(context)?;
    let id = context.id("listed");
    let none = call(context, &["list"])?;
    none.expect_code(0)?;
    if none.out().contains(&id) {
        bail!("{id} is listed before it is there");
    }
    ctr.detached(&id, &[], &["sleep", "1000"])?;
    let some = call(context, &["list"])?;
    some.expect_code(0)?;
    expect_words(&some.out(), &[&id])?;
    ctr.call(&["tasks", "kill", "-s", "SIGKILL", &id])?
        .expect_code(0)?;
    ctr.wait_for_status(&id, "STOPPED", context.seconds(20))?;
    ctr.remove(&id)?;
    let after = call(context, &["list"])?;
    after.expect_code(0)?;
    ensure!(!after.out().contains(&id), "{id} is still listed");
    Ok(())
}
