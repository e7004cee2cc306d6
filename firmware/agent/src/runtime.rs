//! Makes containers, and more processes in them, by libcontainer in a process
//! of its own (`helper`), and starts them. What is made becomes a child of the
//! agent, and the helper ends. Both the helper and what it made, until that
//! runs the user's program, report by lines of JSON on one pipe; the pipe's end
//! says that the program runs.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::unix::pipe;
use tokio::net::{UnixListener, UnixStream};
use tracing::Level;

use crate::error::{Doing, Error};
use crate::helper::{self, Report};
use crate::init;
use crate::log;
use crate::reaper::Expectation;
use crate::stdio::ProcessEnds;

/// How long the making of one container or process may take.
const LIMIT: Duration = Duration::from_secs(60);
/// How long after the end of a helper its last report may take to be read.
const LAST_REPORT_LIMIT: Duration = Duration::from_secs(2);
/// The longest line that a helper may report.
const LINE_BYTES: usize = 64 * 1024;

/// A process that was made and waits for its start.
pub struct Created {
    /// Its pid in the guest's first pid namespace.
    pub pid: i32,
    /// The master of its terminal, if it has one.
    pub terminal: Option<OwnedFd>,
    /// To start it by, once.
    pub gate: Gate,
}

/// What a process waits behind.
pub struct Gate {
    way: Way,
    reports: Reports,
}

/// How the process hears that it may begin.
enum Way {
    /// An init listens on a socket.
    Socket(PathBuf),
    /// An exec reads from a pipe.
    Pipe(pipe::Sender),
}

/// Makes the container of a bundle. `expectation` must have begun before, and be kept until the pid is claimed.
///
/// # Errors
/// `Internal` with what the library said first and last.
pub async fn create(
    expectation: &Expectation,
    bundle: &Path,
    id: &str,
    ends: ProcessEnds,
    terminal: bool,
) -> Result<Created, Error> {
    let console = Console::if_wanted(terminal)?;
    let (sender, receiver) = pipe::pipe().doing(|| "making a pipe for reports".into())?;
    let sender = sender
        .into_blocking_fd()
        .doing(|| "preparing the pipe for reports".into())?;
    let arguments = [
        helper::MAKE.into(),
        number(&sender),
        bundle.into(),
        id.into(),
    ];
    let maker = spawn(arguments.into(), &[sender], ends, console.as_ref())?;
    let mut reports = Reports::new(receiver);
    let what = format!("container {id}");
    let pid = match reports.made(maker, expectation, &what).await? {
        Report::Created { pid } => pid,
        other => return Err(Error::Internal(format!("making {what}: {other:?}"))),
    };
    let terminal = match console {
        Some(console) => Some(console.master().await?),
        None => None,
    };
    let notify = bundle.join(helper::STATE).join(id).join("notify.sock");
    Ok(Created {
        pid,
        terminal,
        gate: Gate {
            way: Way::Socket(notify),
            reports,
        },
    })
}

/// Makes a process in the container of a bundle, by the OCI process in `directory`, which must be the exec's
/// own. `expectation` must have begun before, and be kept until the pid is claimed.
///
/// # Errors
/// `Internal` with what the library said first and last. Nothing of it runs then.
pub async fn join(
    expectation: &Expectation,
    bundle: &Path,
    id: &str,
    directory: &Path,
    ends: ProcessEnds,
    terminal: bool,
) -> Result<Created, Error> {
    let console = Console::if_wanted(terminal)?;
    let (sender, receiver) = pipe::pipe().doing(|| "making a pipe for reports".into())?;
    let (word, wait) = pipe::pipe().doing(|| "making a pipe for the start".into())?;
    let sender = sender
        .into_blocking_fd()
        .doing(|| "preparing the pipe for reports".into())?;
    let wait = wait
        .into_blocking_fd()
        .doing(|| "preparing the pipe for the start".into())?;
    let arguments = [
        helper::JOIN.into(),
        number(&sender),
        number(&wait),
        bundle.into(),
        id.into(),
        directory.into(),
    ];
    let maker = spawn(arguments.into(), &[sender, wait], ends, console.as_ref())?;
    let mut reports = Reports::new(receiver);
    let what = format!("a process in container {id}");
    let made = reports.made(maker, expectation, &what).await;
    // Written before the process could report anything.
    let pid = std::fs::read_to_string(directory.join(helper::PID))
        .ok()
        .and_then(|text| text.trim().parse().ok());
    let failed = match (made, pid) {
        (Ok(Report::Waiting), Some(pid)) => {
            let terminal = match &console {
                Some(console) => console.master().await.map(Some),
                None => Ok(None),
            };
            match terminal {
                Ok(terminal) => {
                    return Ok(Created {
                        pid,
                        terminal,
                        gate: Gate {
                            way: Way::Pipe(word),
                            reports,
                        },
                    });
                }
                Err(error) => error,
            }
        }
        (Ok(other), _) => Error::Internal(format!("making {what}: {other:?}")),
        (Err(error), _) => error,
    };
    if let Some(pid) = pid
        && expectation.claim(pid).try_recv().is_err()
    {
        let _ = crate::cgroup::send(pid, libc::SIGKILL);
    }
    Err(failed)
}

impl Gate {
    /// Lets the process run the user's program, and waits until it does.
    ///
    /// # Errors
    /// `Internal`, naming the executable, if the kernel would not run it.
    pub async fn open(mut self) -> Result<(), Error> {
        match self.way {
            Way::Socket(path) => notify(&path).await?,
            Way::Pipe(mut word) => word
                .write_all(&[1])
                .await
                .doing(|| "telling the process to start".into())?,
        }
        let mut last_error = None;
        loop {
            match self.reports.next().await? {
                None => break,
                Some(Report::NotExecuted { message }) => return Err(Error::Internal(message)),
                Some(Report::Failed { message }) => last_error = Some(message),
                Some(Report::Log {
                    level,
                    component,
                    message,
                }) => {
                    log::line(&level, &component, &message);
                    if level == Level::ERROR.as_str() {
                        last_error.get_or_insert(message);
                    }
                }
                Some(Report::Created { .. } | Report::Waiting) => {}
            }
        }
        match last_error {
            Some(message) => Err(Error::Internal(message)),
            None => Ok(()),
        }
    }
}

/// Tells a container's init to start.
async fn notify(path: &Path) -> Result<(), Error> {
    // By way of its directory's descriptor: the whole path may be longer than a socket's may be.
    let directory = path.parent().unwrap_or(Path::new("/"));
    let directory =
        std::fs::File::open(directory).doing(|| format!("opening {}", directory.display()))?;
    let short = format!("/proc/self/fd/{}/notify.sock", directory.as_raw_fd());
    let mut notify = UnixStream::connect(&short)
        .await
        .doing(|| "reaching the container's init".into())?;
    notify
        .write_all(b"start container")
        .await
        .doing(|| "telling the container's init to start".into())
}

struct Reports {
    pipe: BufReader<pipe::Receiver>,
    /// The begun line: kept here, so that a call to `next` may be given up.
    line: Vec<u8>,
}

impl Reports {
    fn new(pipe: pipe::Receiver) -> Reports {
        Reports {
            pipe: BufReader::new(pipe),
            line: Vec::new(),
        }
    }

    /// Waits until the helper `maker` has made `what`; answers with the report that says so. A helper that
    /// takes too long is killed.
    async fn made(
        &mut self,
        maker: i32,
        expectation: &Expectation,
        what: &str,
    ) -> Result<Report, Error> {
        let mut ended = expectation.claim(maker);
        let mut last_error = None;
        let made = tokio::time::timeout(LIMIT, async {
            let mut gone = None;
            loop {
                let report = match gone {
                    None => tokio::select! {
                        report = self.next() => report?,
                        exit = &mut ended => {
                            gone = Some(exit.map_or(255, |exit| exit.status));
                            continue;
                        }
                    },
                    // What it reported before it ended is in the pipe; what it made may keep that open for long.
                    Some(status) => tokio::time::timeout(LAST_REPORT_LIMIT, self.next())
                        .await
                        .unwrap_or_else(|_| {
                            Err(Error::Internal(format!(
                                "the helper that makes {what} ended with status {status}"
                            )))
                        })?,
                };
                match report {
                    Some(made @ (Report::Created { .. } | Report::Waiting)) => return Ok(made),
                    Some(Report::Failed { message }) => {
                        return Err(Error::Internal(format!("making {what}: {message}")));
                    }
                    Some(Report::Log {
                        level,
                        component,
                        message,
                    }) => {
                        log::line(&level, &component, &message);
                        if level == Level::ERROR.as_str() {
                            last_error.get_or_insert(message);
                        }
                    }
                    Some(Report::NotExecuted { message }) => return Err(Error::Internal(message)),
                    None => {
                        return Err(Error::Internal(format!(
                            "the helper that makes {what} ended without a word"
                        )));
                    }
                }
            }
        })
        .await;
        match (made, last_error) {
            (Ok(Ok(report)), _) => Ok(report),
            // The library tells its caller the step, and its log the cause.
            (Ok(Err(error)), Some(cause)) => Err(Error::Internal(format!("{error}; {cause}"))),
            (Ok(Err(error)), None) => Err(error),
            (Err(_), _) => {
                let _ = crate::cgroup::send(maker, libc::SIGKILL);
                let limit = LIMIT.as_secs();
                Err(Error::Internal(format!(
                    "{what} was not made within {limit} s"
                )))
            }
        }
    }

    async fn next(&mut self) -> Result<Option<Report>, Error> {
        let room = LINE_BYTES.saturating_sub(self.line.len()) as u64;
        (&mut self.pipe)
            .take(room)
            .read_until(b'\n', &mut self.line)
            .await
            .doing(|| "reading a report".into())?;
        if self.line.is_empty() {
            return Ok(None);
        }
        let line = std::mem::take(&mut self.line);
        serde_json::from_slice(&line).map(Some).map_err(|error| {
            Error::Internal(format!(
                "a report that cannot be read ({error}): {}",
                String::from_utf8_lossy(&line[..line.len().min(200)])
            ))
        })
    }
}

/// Where the process sends the master of its terminal.
struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    fn if_wanted(terminal: bool) -> Result<Option<Console>, Error> {
        match terminal {
            true => Console::listen().map(Some),
            false => Ok(None),
        }
    }

    fn listen() -> Result<Console, Error> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(init::STATE).join(format!("console-{number}"));
        let listener = UnixListener::bind(&path)
            .doing(|| format!("listening on {} for a terminal", path.display()))?;
        Ok(Console { listener, path })
    }

    async fn master(&self) -> Result<OwnedFd, Error> {
        let receive = async {
            let (stream, _) = self.listener.accept().await?;
            let received = || receive_descriptor(stream.as_raw_fd()).map_err(io::Error::from);
            let descriptor = stream.async_io(Interest::READABLE, received).await?;
            descriptor.ok_or_else(|| io::Error::other("no descriptor came"))
        };
        match tokio::time::timeout(Duration::from_secs(10), receive).await {
            Ok(received) => received.doing(|| "receiving the terminal".into()),
            Err(_) => Err(Error::Internal("the terminal did not come in 10 s".into())),
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn receive_descriptor(socket: RawFd) -> nix::Result<Option<OwnedFd>> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let mut bytes = [0; 64];
    let mut slices = [io::IoSliceMut::new(&mut bytes)];
    let mut room = nix::cmsg_space!([RawFd; 1]);
    let message = recvmsg::<()>(
        socket,
        &mut slices,
        Some(&mut room),
        MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT,
    )?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control
            && let Some(first) = descriptors.first()
        {
            // SAFETY: the kernel has just made this descriptor for us by SCM_RIGHTS; nobody else knows of it.
            return Ok(Some(unsafe { OwnedFd::from_raw_fd(*first) }));
        }
    }
    Ok(None)
}

/// Starts the helper, which inherits `descriptors`; answers with its pid.
fn spawn(
    arguments: Vec<OsString>,
    descriptors: &[OwnedFd],
    ends: ProcessEnds,
    console: Option<&Console>,
) -> Result<i32, Error> {
    let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let mut command = Command::new(executable());
    command
        .arg0("nacre-agent")
        .args(arguments)
        .args(console.map(|console| console.path.as_os_str()))
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(ends.stdin))
        .stdout(Stdio::from(ends.stdout))
        .stderr(Stdio::from(ends.stderr));
    // SAFETY: fcntl is async-signal-safe, and works on descriptors that the child has copies of; the numbers
    // are only read.
    unsafe {
        command.pre_exec(move || {
            for number in &numbers {
                if libc::fcntl(*number, libc::F_SETFD, 0) == -1 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let child = command
        .spawn()
        .doing(|| "starting the agent as its helper".into())?;
    Ok(child.id() as i32)
}

/// A descriptor as an argument.
fn number(descriptor: &OwnedFd) -> OsString {
    descriptor.as_raw_fd().to_string().into()
}

/// The agent's own file: by the read-only root if it is there, so that a container that gets at a
/// helper's /proc/PID/exe cannot write to it.
fn executable() -> &'static OsStr {
    static INIT: &str = "/init";
    if std::process::id() == 1 && Path::new(INIT).exists() {
        OsStr::new(INIT)
    } else {
        OsStr::new("/proc/self/exe")
    }
}
