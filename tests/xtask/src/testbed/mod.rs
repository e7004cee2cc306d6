//! The nested testbed: boots an emulated AMD machine with SVM and runs one command in it.
//!
//! QEMU and the outer kernel come from unpacked packages. The outer guest has two read-only disks, tools and payload, under a
//! tmpfs root, and talks over one virtio-serial port (crate `nacre-testbed`). Its console goes to a log file.

mod boot;
mod machine;

use std::fs;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nacre_testbed::Frame;

use crate::kvm::{self, Place};
use crate::run::{Lock, step};
use crate::{daemons, paths};

/// One command in the testbed.
pub struct Request {
    /// The command.
    pub argv: Vec<String>,
    /// Environment beside the usual one.
    pub env: Vec<(String, String)>,
    /// Folder of the built programs that are there.
    pub programs: PathBuf,
    /// Files and folders to bring along: from where, to where.
    pub copies: Vec<(PathBuf, PathBuf)>,
    /// Files and folders that are brought along as they are, their programs without this machine's libraries.
    pub roots: Vec<(PathBuf, PathBuf)>,
    /// Memory of the outer guest in MiB.
    pub memory: u32,
    /// Its CPUs; see [`CPUS`].
    pub cpus: u32,
    /// Its time is a count of its instructions, whatever else this machine does. It has one CPU then.
    pub counted: bool,
    /// Longest run of the command.
    pub time_limit: Option<Duration>,
    /// Run in the testbed even where the machine's own KVM would do.
    pub force_nested: bool,
    /// Folder on this machine that receives what the command writes to `$NACRE_OUT`.
    pub out: PathBuf,
    /// Leave what is already in that folder.
    pub keep_out: bool,
}

/// CPUs of the emulated machine. With several, each in a thread of QEMU's, registers of the machine and of the guests in it are lost now
/// and then, in QEMU's own guests too: kernels panic, guests take triple faults or stand still. With one, a host has one CPU, and a VM
/// without limits no more.
pub const CPUS: u32 = 2;

impl Request {
    /// A command with the usual size and surroundings.
    pub fn new(argv: Vec<String>) -> Request {
        let out = paths::testbed("out");
        Request {
            argv,
            env: Vec::new(),
            programs: paths::target().join("debug"),
            copies: Vec::new(),
            roots: Vec::new(),
            memory: 4096,
            cpus: CPUS,
            counted: false,
            time_limit: None,
            force_nested: false,
            out,
            keep_out: false,
        }
    }
}

/// What came of a command.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code, or 128 + the signal.
    pub code: i32,
    /// Why the testbed had to be booted a second time, if it had.
    pub retried: Option<String>,
}

/// Where the lines of a command go.
pub trait Sink {
    /// Bytes of its standard output.
    fn stdout(&mut self, data: &[u8]);
    /// Bytes of its standard error.
    fn stderr(&mut self, data: &[u8]);
}

/// Passes everything on to this process's own output.
pub struct Terminal;

impl Sink for Terminal {
    fn stdout(&mut self, data: &[u8]) {
        let _ = io::stdout()
            .write_all(data)
            .and_then(|()| io::stdout().flush());
    }

    fn stderr(&mut self, data: &[u8]) {
        let _ = io::stderr().write_all(data);
    }
}

/// Runs a command where guests can run: in the testbed, or directly on a machine whose KVM runs stock kernels. A testbed that
/// freezes is booted once more.
pub fn execute(request: &Request, sink: &mut dyn Sink) -> Result<Outcome> {
    let why = match attempt(request, sink) {
        Ok(code) => {
            return Ok(Outcome {
                code,
                retried: None,
            });
        }
        Err(Failure::Fatal(error)) => return Err(error),
        Err(Failure::Froze(why)) => why,
    };
    step(format!("{why}; running it once more"));
    match attempt(request, sink) {
        Ok(code) => Ok(Outcome {
            code,
            retried: Some(why),
        }),
        Err(Failure::Fatal(error)) => Err(error),
        Err(Failure::Froze(again)) => Err(anyhow!(
            "the testbed failed twice: first {why}, then {again}"
        )),
    }
}

/// The same without a second boot; for callers that know where to go on.
pub fn attempt(request: &Request, sink: &mut dyn Sink) -> Result<i32, Failure> {
    let (place, why) = kvm::place(request.force_nested);
    step(format!(
        "{why}: running {}",
        if place == Place::Host {
            "directly on it"
        } else {
            "in the nested testbed"
        }
    ));
    let _lock = Lock::take(
        &paths::testbed("lock"),
        "the testbed (NACRE_TESTBED_NAME=NAME makes another beside it)",
    )?;
    if !request.keep_out && request.out.exists() {
        fs::remove_dir_all(&request.out).context("emptying the output folder")?;
    }
    fs::create_dir_all(&request.out).context("making the output folder")?;
    match place {
        Place::Host => Ok(on_host(request, &daemons::environment_on_host()?, sink)?),
        Place::Testbed => {
            let machine = {
                // What is downloaded and built for one testbed serves the next.
                static PREPARING: Mutex<()> = Mutex::new(());
                let _one_at_a_time = PREPARING.lock();
                machine::prepare(request)?
            };
            boot::boot(&machine, request, sink)
        }
    }
}

/// Why a boot gave no exit code.
#[derive(Debug)]
pub enum Failure {
    /// The outer guest went silent or died: the emulator's doing, worth one retry.
    Froze(String),
    /// Anything that a second boot would not change.
    Fatal(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::Fatal(error.into())
    }
}

fn on_host(request: &Request, daemons: &[(String, String)], sink: &mut dyn Sink) -> Result<i32> {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(&request.argv[0]);
    command
        .args(&request.argv[1..])
        .env("PATH", format!("{}:{path}", request.programs.display()));
    command
        .env("NACRE_OUT", &request.out)
        .env("NACRE_BIN", &request.programs);
    command
        .env("NACRE_KERNEL", paths::image("vmlinux"))
        .env("NACRE_INITRD", paths::image("initrd"))
        .env("NACRE_IMAGE_6_12", paths::newer_image(""))
        .env("NACRE_PROBE", paths::static_program(paths::PROBE));
    command.envs(daemons.iter().cloned());
    let mut child = command
        .envs(request.env.iter().cloned())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (sender, receiver) = std::sync::mpsc::channel();
    let pump = |mut stream: Box<dyn Read + Send>, wrap: fn(Vec<u8>) -> Frame| {
        let sender = sender.clone();
        std::thread::spawn(move || {
            let mut buffer = vec![0u8; 65536];
            while let Ok(read @ 1..) = stream.read(&mut buffer) {
                let _ = sender.send(wrap(buffer[..read].to_vec()));
            }
        });
    };
    pump(
        Box::new(child.stdout.take().context("no stdout")?),
        Frame::Stdout,
    );
    pump(
        Box::new(child.stderr.take().context("no stderr")?),
        Frame::Stderr,
    );
    drop(sender);
    let started = Instant::now();
    let mut ended = None;
    loop {
        match receiver.recv_timeout(Duration::from_millis(50)) {
            Ok(Frame::Stdout(data)) => sink.stdout(&data),
            Ok(Frame::Stderr(data)) => sink.stderr(&data),
            Ok(_) => {}
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
            // What is left is held open by something the command left behind.
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) if ended.is_some() => break,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
        }
        ended = child.try_wait()?;
        if request
            .time_limit
            .is_some_and(|limit| started.elapsed() > limit)
        {
            let _ = child.kill();
            let _ = child.wait();
            bail!("{} ran into its time limit", request.argv[0]);
        }
    }
    let status = child.wait()?;
    use std::os::unix::process::ExitStatusExt;
    Ok(status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Collected(Vec<u8>, Vec<u8>);

    impl Sink for Collected {
        fn stdout(&mut self, data: &[u8]) {
            self.0.extend(data);
        }

        fn stderr(&mut self, data: &[u8]) {
            self.1.extend(data);
        }
    }

    fn shell(script: &str) -> Request {
        Request::new(["sh", "-c", script].map(str::to_owned).to_vec())
    }

    #[test]
    fn a_command_on_the_host_gives_output_environment_and_code() {
        let mut sink = Collected::default();
        let daemons = [("NACRE_RUNC".to_owned(), "/x/runc".to_owned())];
        let script = "echo $NACRE_RUNC $NACRE_KERNEL; echo no >&2; exit 42";
        assert_eq!(on_host(&shell(script), &daemons, &mut sink).unwrap(), 42);
        let expected = format!("/x/runc {}\n", paths::image("vmlinux").display());
        assert_eq!(
            (String::from_utf8(sink.0).unwrap(), sink.1),
            (expected, b"no\n".to_vec())
        );
        assert_eq!(
            on_host(&shell("kill -9 $$"), &[], &mut Collected::default()).unwrap(),
            137
        );
    }

    #[test]
    fn a_command_on_the_host_has_a_time_limit() {
        let mut request = shell("exec sleep 30");
        request.time_limit = Some(Duration::from_millis(100));
        assert!(on_host(&request, &[], &mut Collected::default()).is_err());
    }
}
