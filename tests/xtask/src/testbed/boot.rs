//! One boot of the outer guest: the emulator's process, the channel to the guest's init, and the watchdog over it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use nacre_testbed::{Frame, Job, PORT_NAME};

use super::machine::Machine;
use super::{Failure, Request, Sink};
use crate::run::step;
use crate::{daemons, paths};

/// Until the first frame, in which the outer guest boots.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// Longest silence of a guest that beats every second; a host that is busy otherwise stretches the emulation.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// How time is counted: two nanoseconds for each instruction, and none while the guest waits.
const COUNTED: &str = "shift=1,sleep=off";

/// The emulator, killed and reaped when dropped.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots the outer guest, runs the command, and returns its exit code.
pub(super) fn boot(
    machine: &Machine,
    request: &Request,
    sink: &mut dyn Sink,
) -> Result<i32, Failure> {
    let logs = paths::testbed("");
    let (ours, theirs) = UnixStream::pair()?;
    let theirs = OwnedFd::from(theirs);
    let console = logs.join("console.log");
    let mut command = qemu_command(machine, request, &console, theirs.as_raw_fd());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(logs.join("qemu.log"))?);
    let inherited = theirs.as_raw_fd();
    let parent = std::process::id() as i32;
    // SAFETY: only async-signal-safe calls on plain integers. The emulator gets its end of the channel and dies with us.
    unsafe {
        command.pre_exec(move || {
            if libc::fcntl(inherited, libc::F_SETFD, 0) < 0
                || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0
            {
                return Err(io::Error::last_os_error());
            }
            if libc::getppid() != parent {
                return Err(io::Error::other("the parent is gone"));
            }
            Ok(())
        });
    }
    let started = Instant::now();
    let mut qemu = Qemu(command.spawn().context("starting the unpacked QEMU")?);
    drop(theirs);

    let mut channel = ours;
    let job = Job {
        argv: request.argv.clone(),
        env: guest_environment(request),
        cwd: "/root".into(),
        time: now(),
    };
    Frame::Job(serde_json::to_vec(&job)?).write_to(&mut channel)?;
    let mut silence = BOOT_LIMIT;
    // The command's time begins when the guest is up.
    let mut deadline: Option<Instant> = None;
    loop {
        let limit = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        if limit == Some(Duration::ZERO) {
            return Err(Failure::Fatal(anyhow!(
                "the command ran into its time limit of {} s",
                request.time_limit.unwrap_or_default().as_secs()
            )));
        }
        channel.set_read_timeout(Some(limit.map_or(silence, |limit| limit.min(silence))))?;
        match Frame::read_from(&mut channel) {
            Ok(Some(Frame::Hello(text))) => {
                step(format!(
                    "testbed: {text} ({:.1} s on this machine)",
                    started.elapsed().as_secs_f64()
                ));
                silence = SILENCE_LIMIT;
                deadline = request.time_limit.map(|limit| Instant::now() + limit);
            }
            Ok(Some(Frame::Stdout(data))) => sink.stdout(&data),
            Ok(Some(Frame::Stderr(data))) => sink.stderr(&data),
            Ok(Some(Frame::File { path, offset, data })) => {
                store(&request.out, &path, offset, &data)?;
            }
            Ok(Some(Frame::Exit(code))) => return Ok(code),
            Ok(Some(Frame::Heartbeat | Frame::Job(_))) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                if limit.is_some_and(|limit| limit <= silence) {
                    continue;
                }
                return Err(Failure::Froze(format!(
                    "the outer guest said nothing for {} s{}",
                    silence.as_secs(),
                    tail(&console)
                )));
            }
            Ok(None) | Err(_) => {
                let status = qemu.0.wait()?;
                let said = fs::read_to_string(logs.join("qemu.log")).unwrap_or_default();
                let said = said
                    .lines()
                    .filter(|line| !line.contains("TCG doesn't support"))
                    .collect::<Vec<_>>()
                    .join("\n");
                return Err(Failure::Froze(format!(
                    "the outer guest ended without a result (QEMU: {status}) {said}{}",
                    tail(&console)
                )));
            }
        }
    }
}

fn qemu_command(machine: &Machine, request: &Request, console: &Path, channel: i32) -> Command {
    let root = &machine.qemu;
    let library = |below: &str| root.join(below).display().to_string();
    // By its own loader and libraries, so that the machine's release does not matter.
    let mut command = Command::new(library("usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"));
    command
        .arg("--library-path")
        .arg(library("usr/lib/x86_64-linux-gnu"));
    command.arg(root.join("usr/bin/qemu-system-x86_64")).env(
        "QEMU_MODULE_DIR",
        root.join("usr/lib/x86_64-linux-gnu/qemu"),
    );
    command
        .arg("-L")
        .arg(root.join("usr/share/qemu"))
        .arg("-L")
        .arg(root.join("usr/share/seabios"));
    let (accel, cpus) = match request.counted {
        true => ("tcg,thread=single", 1),
        false => ("tcg,thread=multi", request.cpus),
    };
    if request.counted {
        command.args(["-icount", COUNTED]);
    }
    command.args([
        "-M",
        "q35",
        "-accel",
        accel,
        "-cpu",
        "EPYC,+svm,+npt",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    command
        .arg("-smp")
        .arg(cpus.to_string())
        .arg("-m")
        .arg(request.memory.to_string());
    command
        .arg("-kernel")
        .arg(&machine.kernel)
        .arg("-initrd")
        .arg(&machine.initramfs);
    command.args([
        "-append",
        "console=ttyS0 panic=-1 quiet mitigations=off nokaslr",
    ]);
    command
        .arg("-serial")
        .arg(format!("file:{}", console.display()));
    for (id, image) in [("tools", &machine.tools), ("payload", &machine.payload)] {
        command.arg("-drive").arg(format!(
            "if=none,id={id},format=raw,readonly=on,file={}",
            image.display()
        ));
        command
            .arg("-device")
            .arg(format!("virtio-blk-pci,drive={id}"));
    }
    command.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
    command
        .arg("-chardev")
        .arg(format!("socket,id=channel,fd={channel}"));
    command
        .arg("-device")
        .arg(format!("virtserialport,chardev=channel,name={PORT_NAME}"));
    command
}

fn guest_environment(request: &Request) -> Vec<(String, String)> {
    let fixed = [
        (
            "PATH",
            "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
        ),
        ("HOME", "/root"),
        ("TERM", "dumb"),
        ("TMPDIR", "/tmp"),
        ("NACRE_TESTBED", "nested"),
        ("NACRE_OUT", nacre_testbed::OUT_DIR),
        ("NACRE_BIN", "/usr/local/bin"),
    ];
    let mut all: Vec<(String, String)> = fixed
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    if request.counted {
        all.push(("NACRE_TESTBED_COUNTED".to_owned(), "1".to_owned()));
    }
    all.extend(daemons::environment_in_guest());
    all.extend(request.env.iter().cloned());
    all
}

fn now() -> i64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |time| time.as_secs() as i64)
}

/// Writes a piece of a file that came out of the guest; a path that would leave the folder is refused.
fn store(folder: &Path, path: &str, offset: u64, data: &[u8]) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let inside = Path::new(path)
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_)));
    if !inside || path.is_empty() {
        bail!("the outer guest named a file outside of its folder: {path}");
    }
    let file = folder.join(path);
    fs::create_dir_all(file.parent().unwrap_or(folder))?;
    let file = File::options()
        .create(true)
        .write(true)
        .truncate(offset == 0)
        .open(&file)
        .with_context(|| format!("writing {}", file.display()))?;
    Ok(file.write_all_at(data, offset)?)
}

/// The last lines of the console, for an error.
fn tail(console: &Path) -> String {
    let text = String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    match lines.len() {
        0 => format!(" (console empty, {})", console.display()),
        count => format!(
            "; its console ended with:\n{}",
            lines[count.saturating_sub(15)..].join("\n")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counted_machine_has_one_cpu_and_the_others_have_their_own_time() {
        let machine = Machine {
            qemu: "/q".into(),
            kernel: "/k".into(),
            initramfs: "/i".into(),
            tools: "/t".into(),
            payload: "/p".into(),
        };
        let mut request = Request::new(Vec::new());
        let line = |request: &Request| {
            let command = qemu_command(&machine, request, Path::new("/c"), 3);
            let words: Vec<_> = command
                .get_args()
                .map(|word| word.to_string_lossy())
                .collect();
            words.join(" ")
        };
        let usual = line(&request);
        assert!(
            usual.contains("tcg,thread=multi") && usual.contains("-smp 2"),
            "{usual}"
        );
        assert!(!usual.contains("-icount"), "{usual}");
        request.counted = true;
        let counted = line(&request);
        for words in ["-icount shift=1,sleep=off", "tcg,thread=single", "-smp 1 "] {
            assert!(counted.contains(words), "{words} in {counted}");
        }
    }

    #[test]
    fn files_from_the_guest_stay_in_their_folder() {
        let folder = tempfile::tempdir().unwrap();
        store(folder.path(), "a/b", 0, b"123").unwrap();
        store(folder.path(), "a/b", 3, b"45").unwrap();
        assert_eq!(fs::read(folder.path().join("a/b")).unwrap(), b"12345");
        for path in ["../x", "/etc/x", "a/../../x", ""] {
            assert!(store(folder.path(), path, 0, b"").is_err(), "{path}");
        }
    }
}
