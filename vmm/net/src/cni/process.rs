//! One run of a plugin's program: its process group, its pipes and its deadline.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};

/// What a plugin may write on stdout, bytes.
pub(super) const STDOUT: usize = 1 << 20;
/// What is kept of the end of stderr, bytes.
pub(super) const STDERR: usize = 4096;
/// How long a program may be open for writing: it is being installed.
const BUSY: Duration = Duration::from_secs(1);

/// Called in the child before the plugin's program is executed.
pub(super) type BeforeExec = fn() -> io::Result<()>;

pub(super) struct Program<'a> {
    pub path: &'a Path,
    pub environment: Vec<(&'static str, OsString)>,
    pub stdin: &'a [u8],
    pub timeout: Duration,
    pub before_exec: Option<BeforeExec>,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Exited(ExitStatus),
    /// Killed at the deadline.
    Late,
    /// Killed since it wrote too much.
    Loud,
}

pub(super) struct Run {
    pub end: End,
    pub stdout: Vec<u8>,
    /// The end of it, without control characters.
    pub stderr: String,
}

/// Runs a program to its end, or to its deadline, where its process group is killed.
pub(super) fn run(program: &Program<'_>) -> io::Result<Run> {
    let deadline = Instant::now().checked_add(program.timeout);
    let mut child = spawn(program)?;
    let mut pipes = Pipes {
        stdin: child.stdin.take(),
        unwritten: program.stdin,
        stdout: child.stdout.take(),
        read: Vec::new(),
        stderr: child.stderr.take(),
        said: Vec::new(),
    };
    let end = follow(&mut child, &mut pipes, deadline);
    if end.is_err() {
        let _ = kill_group(&child);
        child.wait()?;
    }
    Ok(Run {
        end: end?,
        stdout: pipes.read,
        stderr: on_one_line(&pipes.said),
    })
}

fn spawn(program: &Program<'_>) -> io::Result<Child> {
    let mut command = Command::new(program.path);
    command
        .env_clear()
        .envs(
            program
                .environment
                .iter()
                .map(|(name, value)| (name, value)),
        )
        .process_group(0)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let us = rustix::process::getpid();
    let before_exec = program.before_exec;
    let prepare = move || {
        if let Some(before_exec) = before_exec {
            before_exec()?;
        }
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // The caller may have ended before that was said.
        if rustix::process::getppid() != Some(us) {
            return Err(io::Error::from_raw_os_error(libc::ECHILD));
        }
        Ok(())
    };
    // SAFETY: `prepare` makes system calls only, as may be done between fork and exec; of `before_exec`, who set it has
    // promised the same.
    unsafe { command.pre_exec(prepare) };
    let begin = Instant::now();
    loop {
        match command.spawn() {
            Err(error)
                if error.kind() == io::ErrorKind::ExecutableFileBusy && begin.elapsed() < BUSY =>
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            spawned => return spawned,
        }
    }
}

/// The child is not reaped yet, so that the group is its own.
fn kill_group(child: &Child) -> io::Result<()> {
    rustix::process::kill_process_group(pid(child)?, Signal::KILL)?;
    Ok(())
}

fn pid(child: &Child) -> io::Result<Pid> {
    let id = i32::try_from(child.id()).map_err(io::Error::other)?;
    Pid::from_raw(id).ok_or_else(|| io::Error::other("no process"))
}

struct Pipes<'a> {
    stdin: Option<ChildStdin>,
    unwritten: &'a [u8],
    stdout: Option<ChildStdout>,
    read: Vec<u8>,
    stderr: Option<ChildStderr>,
    said: Vec<u8>,
}

fn follow(child: &mut Child, pipes: &mut Pipes<'_>, deadline: Option<Instant>) -> io::Result<End> {
    let pidfd = rustix::process::pidfd_open(pid(child)?, PidfdFlags::empty())?;
    if let Some(stdin) = &pipes.stdin {
        rustix::io::ioctl_fionbio(stdin, true)?;
    }
    loop {
        let ready = pipes.wait(&pidfd, deadline)?;
        if ready.stdin {
            pipes.write();
        }
        if ready.stdout && !take(&mut pipes.stdout, &mut pipes.read) {
            pipes.stdout = None;
        }
        if ready.stderr && !take(&mut pipes.stderr, &mut pipes.said) {
            pipes.stderr = None;
        }
        let too_much = pipes.said.len().saturating_sub(STDERR);
        pipes.said.drain(..too_much);
        if pipes.read.len() > STDOUT {
            kill_group(child)?;
            child.wait()?;
            return Ok(End::Loud);
        }
        // What it has left running may hold the pipes; what it wrote itself is all read.
        if ready.ended && !ready.stdout && !ready.stderr {
            return Ok(End::Exited(child.wait()?));
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            kill_group(child)?;
            child.wait()?;
            return Ok(End::Late);
        }
    }
}

#[derive(Default)]
struct Ready {
    ended: bool,
    stdin: bool,
    stdout: bool,
    stderr: bool,
}

impl Pipes<'_> {
    fn wait(&self, pidfd: &OwnedFd, deadline: Option<Instant>) -> io::Result<Ready> {
        let left = deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        let mut ready = Ready::default();
        let pipes: [(Option<BorrowedFd<'_>>, PollFlags, &mut bool); 4] = [
            (Some(pidfd.as_fd()), PollFlags::IN, &mut ready.ended),
            (fd(&self.stdin), PollFlags::OUT, &mut ready.stdin),
            (fd(&self.stdout), PollFlags::IN, &mut ready.stdout),
            (fd(&self.stderr), PollFlags::IN, &mut ready.stderr),
        ];
        let mut fds = Vec::with_capacity(pipes.len());
        let mut answers = Vec::with_capacity(pipes.len());
        for (pipe, flags, answer) in pipes {
            if let Some(pipe) = pipe {
                fds.push(PollFd::from_borrowed_fd(pipe, flags));
                answers.push(answer);
            }
        }
        match rustix::event::poll(&mut fds, left.as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
            polled => polled?,
        };
        for (fd, answer) in fds.iter().zip(answers) {
            *answer = !fd.revents().is_empty();
        }
        Ok(ready)
    }

    /// Writes what there is room for; closes the pipe behind the last byte, and where nobody reads.
    fn write(&mut self) {
        let Some(stdin) = &mut self.stdin else {
            return;
        };
        match stdin.write(self.unwritten) {
            Ok(count) => self.unwritten = &self.unwritten[count..],
            Err(error) if is_passing(&error) => return,
            Err(_) => self.unwritten = &[],
        }
        if self.unwritten.is_empty() {
            self.stdin = None;
        }
    }
}

fn fd<P: AsFd>(pipe: &Option<P>) -> Option<BorrowedFd<'_>> {
    pipe.as_ref().map(AsFd::as_fd)
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

/// Takes what there is; false at the end.
fn take<R: Read>(pipe: &mut Option<R>, into: &mut Vec<u8>) -> bool {
    let mut chunk = [0; 16 << 10];
    match pipe.as_mut().map(|pipe| pipe.read(&mut chunk)) {
        Some(Ok(count @ 1..)) => {
            into.extend_from_slice(&chunk[..count]);
            true
        }
        Some(Err(error)) => is_passing(&error),
        _ => false,
    }
}

/// Without control characters and the space around it.
pub(super) fn on_one_line(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let plain = |letter: char| if letter.is_control() { ' ' } else { letter };
    text.chars()
        .map(plain)
        .collect::<String>()
        .trim()
        .to_owned()
}

/// Where programs are searched that plugins run: the caller's PATH, or what is usual.
pub(super) fn search_path() -> OsString {
    let usual = OsStr::new("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    std::env::var_os("PATH")
        .filter(|path| !path.is_empty())
        .unwrap_or_else(|| usual.to_owned())
}
