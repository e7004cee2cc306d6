//! `binary://`: a program that is started to take a process's output. It has
//! stdout on descriptor 3 and stderr on 4, closes 5 when it is ready, and finds the
//! names of what it logs in its environment. It ends when both streams do.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::sync::{oneshot, watch};

use super::target::Error;
use crate::origin;

/// How long the program may take to be ready.
const READY: Duration = Duration::from_secs(10);
/// How long it may go on after SIGTERM, and after its owner is gone.
const TERMINATES: Duration = Duration::from_secs(2);
/// The descriptors that are promised to it.
const STDOUT: RawFd = 3;
const STDERR: RawFd = 4;
const READINESS: RawFd = 5;

/// The ends of the streams that are ours.
#[derive(Default)]
pub struct Pipes {
    stdout: Option<pipe::Sender>,
    stderr: Option<pipe::Sender>,
}

impl Pipes {
    /// The write end of a stream by its name, once.
    pub fn take(&mut self, name: &str) -> Option<pipe::Sender> {
        match name {
            "stdout" => self.stdout.take(),
            _ => self.stderr.take(),
        }
    }
}

/// A running logging program. Dropped with its process, it is told to terminate, and is killed if it does not.
pub struct Logger {
    ended: watch::Receiver<bool>,
    _released: oneshot::Sender<()>,
}

impl Logger {
    /// Starts the program and waits until it says that it is ready.
    ///
    /// # Errors
    /// It cannot be started, ends before it is ready, or is not ready in time.
    pub async fn start(
        program: &Path,
        arguments: &[String],
        namespace: &str,
        id: &str,
    ) -> Result<(Self, Pipes), Error> {
        let failed = |cause: String| Error::Logger {
            program: program.to_owned(),
            cause,
        };
        let system = |error: io::Error| failed(format!("cannot be started: {error}"));
        let (stdout, our_stdout) = pipe2(OFlag::O_CLOEXEC).map_err(|errno| system(errno.into()))?;
        let (stderr, our_stderr) = pipe2(OFlag::O_CLOEXEC).map_err(|errno| system(errno.into()))?;
        let (ready, readiness) = pipe2(OFlag::O_CLOEXEC).map_err(|errno| system(errno.into()))?;
        let pipes = Pipes {
            stdout: Some(sender(our_stdout).map_err(system)?),
            stderr: Some(sender(our_stderr).map_err(system)?),
        };
        let mut command = Command::new(program);
        command
            .args(arguments.iter().map(OsStr::new))
            .env_clear()
            .env("CONTAINER_ID", id)
            .env("CONTAINER_NAMESPACE", namespace)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let mut child = spawn(&mut command, [stdout, stderr, readiness]).map_err(system)?;

        let mut ready = pipe::Receiver::from_owned_fd(ready).map_err(system)?;
        let mut byte = [0];
        // Closed or written to: both say ready.
        let said = tokio::time::timeout(READY, ready.read(&mut byte)).await;
        match said {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(system(error)),
            Err(_) => return Err(failed(format!("was not ready within {READY:?}"))),
        }
        if let Ok(Some(status)) = child.try_wait()
            && !status.success()
        {
            return Err(failed(format!("ended before it was ready: {status}")));
        }
        let (end, ended) = watch::channel(false);
        let (released, release) = oneshot::channel();
        tokio::spawn(follow(child, release, end));
        let logger = Self {
            ended,
            _released: released,
        };
        Ok((logger, pipes))
    }

    /// Completes when the program has ended.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut ended = self.ended.clone();
        async move {
            // An error means that the task is gone, and the program with it.
            let _ = ended.wait_for(|ended| *ended).await;
        }
    }
}

/// Waits for the program, and ends it some time after its owner is gone.
async fn follow(mut child: Child, release: oneshot::Receiver<()>, end: watch::Sender<bool>) {
    let status = tokio::select! {
        status = child.wait() => Some(status),
        // Never sent: it is dropped with the process's stdio.
        _ = release => None,
    };
    let status = match status {
        Some(status) => status,
        None => {
            if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
                // Not reaped yet, so the pid is its own.
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGTERM,
                );
            }
            match tokio::time::timeout(TERMINATES, child.wait()).await {
                Ok(status) => status,
                Err(_) => child.kill().await.and(child.wait().await),
            }
        }
    };
    match status {
        Ok(status) if status.success() => tracing::debug!("a logging program has ended"),
        Ok(status) => tracing::warn!(%status, "a logging program has ended"),
        Err(error) => tracing::warn!(%error, "cannot wait for a logging program"),
    }
    end.send_replace(true);
}

fn sender(fd: OwnedFd) -> io::Result<pipe::Sender> {
    let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    pipe::Sender::from_owned_fd(fd)
}

/// Spawns it where the shim came from, with these three on the descriptors that are promised.
fn spawn(command: &mut Command, theirs: [OwnedFd; 3]) -> io::Result<Child> {
    // While these numbers are taken, nothing that the spawn itself needs can have them and be overwritten in the child.
    let mut low = Vec::new();
    loop {
        let null = File::open("/dev/null")?;
        if null.as_raw_fd() > READINESS {
            break;
        }
        low.push(null);
    }
    // So these are above.
    let [stdout, stderr, readiness] = &theirs;
    let kept = [
        stdout.try_clone()?,
        stderr.try_clone()?,
        readiness.try_clone()?,
    ];
    let sources = [&kept[0], &kept[1], &kept[2]].map(AsRawFd::as_raw_fd);
    let prepare = move || {
        origin::go_back()?;
        for (source, target) in sources.into_iter().zip([STDOUT, STDERR, READINESS]) {
            // SAFETY: a system call on numbers; what had the target's number in this child is none of its business.
            if unsafe { libc::dup2(source, target) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: `prepare` makes system calls only, which may be made between fork and exec.
    unsafe { command.pre_exec(prepare) };
    let child = command.spawn();
    drop((kept, low));
    child
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use tokio::io::AsyncWriteExt;

    use super::*;

    fn script(directory: &Path, text: &str) -> PathBuf {
        let path = directory.join("logger");
        std::fs::write(&path, format!("#!/bin/sh\n{text}")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn it_gets_streams_names_and_arguments_and_ends_with_them() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("log");
        let program = script(
            directory.path(),
            "exec 5>&-\n{ echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $2\"; /bin/cat <&3; /bin/cat <&4; } >\"$1\"\n",
        );
        let arguments = [file.to_str().unwrap().to_owned(), "two".to_owned()];
        let (logger, mut pipes) = Logger::start(&program, &arguments, "ns", "c1")
            .await
            .unwrap();
        let mut stdout = pipes.take("stdout").unwrap();
        let mut stderr = pipes.take("stderr").unwrap();
        assert!(pipes.take("stdout").is_none());
        stdout.write_all(b"out\n").await.unwrap();
        stderr.write_all(b"err\n").await.unwrap();
        drop((stdout, stderr));
        tokio::time::timeout(Duration::from_secs(20), logger.ended())
            .await
            .unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"ns/c1 two\nout\nerr\n");
    }

    #[tokio::test]
    async fn what_cannot_start_or_ends_at_once_is_an_error_with_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("none");
        let error = Logger::start(&missing, &[], "ns", "c1")
            .await
            .err()
            .unwrap();
        assert!(
            error.to_string().contains("none cannot be started"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn one_that_goes_on_is_terminated_with_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let program = script(directory.path(), "exec 5>&-\nexec /bin/sleep 1000\n");
        let (logger, pipes) = Logger::start(&program, &[], "ns", "c1").await.unwrap();
        let ended = logger.ended();
        drop((logger, pipes));
        tokio::time::timeout(Duration::from_secs(20), ended)
            .await
            .unwrap();
    }
}
