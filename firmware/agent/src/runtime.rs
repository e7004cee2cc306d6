//! Makes containers by libcontainer, in a process of its own: the library
//! clones without exec and allocates in the child, which only a process with
//! one thread may do. The agent starts itself again as that helper; the
//! container becomes a child of the agent, and the helper ends. Both the
//! helper and the container's init, until it runs the user's program, report
//! by lines of JSON on one pipe; the pipe's end says that the program runs.
//!
//! What libcontainer does not do in this build: seccomp profiles (its library
//! is not linked) and the device cgroup (needs libbpf); the specification's
//! device rules are therefore not enforced inside the guest.

use std::convert::Infallible;
use std::ffi::{CString, OsStr, OsString};
use std::fs::Permissions;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::time::Duration;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use pathrs::Root;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::unix::pipe;
use tokio::net::{UnixListener, UnixStream};
use tracing::Level;

use crate::error::{Doing, Error};
use crate::init;
use crate::log;
use crate::reaper::Expectation;
use crate::stdio::ProcessEnds;

/// First argument of the agent when it is to be the helper.
pub const HELPER: &str = "make-container";
/// How long the making of one container may take.
const LIMIT: Duration = Duration::from_secs(60);
/// How long after the end of a helper its last report may take to be read.
const LAST_REPORT_LIMIT: Duration = Duration::from_secs(2);
/// The longest line that a helper may report.
const LINE_BYTES: usize = 64 * 1024;
/// Directory of the library's own state in a bundle.
const STATE: &str = "state";

/// What the helper, or the init that it made, has to say.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Report {
    Log {
        level: String,
        component: String,
        message: String,
    },
    Created {
        pid: i32,
    },
    Failed {
        message: String,
    },
    NotExecuted {
        message: String,
    },
}

/// An init that was made and waits for its start.
pub struct Created {
    /// Its pid in the guest's first pid namespace.
    pub pid: i32,
    /// The master of its terminal, if the specification has one.
    pub terminal: Option<OwnedFd>,
    /// To start it by, once.
    pub gate: Gate,
}

/// What an init waits behind.
pub struct Gate {
    notify: PathBuf,
    reports: Reports,
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
    let console = match terminal {
        true => Some(Console::listen()?),
        false => None,
    };
    let (sender, receiver) = pipe::pipe().doing(|| "making a pipe for reports".into())?;
    let sender = sender
        .into_blocking_fd()
        .doing(|| "preparing the pipe for reports".into())?;
    let helper = spawn(bundle, id, ends, sender, console.as_ref())?;
    let mut ended = expectation.claim(helper);
    let mut reports = Reports::new(receiver);
    let mut last_error = None;
    let made = tokio::time::timeout(LIMIT, async {
        let mut gone = None;
        loop {
            let report = match gone {
                None => tokio::select! {
                    report = reports.next() => report?,
                    exit = &mut ended => {
                        gone = Some(exit.map_or(255, |exit| exit.status));
                        continue;
                    }
                },
                // What it reported before it ended is in the pipe; the init may keep that open for long.
                Some(status) => tokio::time::timeout(LAST_REPORT_LIMIT, reports.next())
                    .await
                    .unwrap_or_else(|_| {
                        Err(Error::Internal(format!(
                            "the helper that makes container {id} ended with status {status}"
                        )))
                    })?,
            };
            match report {
                Some(Report::Created { pid }) => return Ok(pid),
                Some(Report::Failed { message }) => {
                    return Err(Error::Internal(format!("making container {id}: {message}")));
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
                        "the helper that makes container {id} ended without a word"
                    )));
                }
            }
        }
    })
    .await;
    let pid = match made {
        Ok(Ok(pid)) => pid,
        Ok(Err(error)) => {
            // The library tells its caller the step, and its log the cause.
            return Err(match last_error {
                Some(cause) => Error::Internal(format!("{error}; {cause}")),
                None => error,
            });
        }
        Err(_) => {
            let _ = crate::cgroup::send(helper, libc::SIGKILL);
            return Err(Error::Internal(format!(
                "container {id} was not made within {} s",
                LIMIT.as_secs()
            )));
        }
    };
    let terminal = match console {
        Some(console) => Some(console.master().await?),
        None => None,
    };
    Ok(Created {
        pid,
        terminal,
        gate: Gate {
            notify: bundle.join(STATE).join(id).join("notify.sock"),
            reports,
        },
    })
}

impl Gate {
    /// Lets the init run the user's program, and waits until it does.
    ///
    /// # Errors
    /// `Internal`, naming the executable, if the kernel would not run it.
    pub async fn open(mut self) -> Result<(), Error> {
        // By way of its directory's descriptor: the whole path may be longer than a socket's may be.
        let directory = self.notify.parent().unwrap_or(Path::new("/"));
        let directory =
            std::fs::File::open(directory).doing(|| format!("opening {}", directory.display()))?;
        let short = format!("/proc/self/fd/{}/notify.sock", directory.as_raw_fd());
        let mut notify = UnixStream::connect(&short)
            .await
            .doing(|| "reaching the container's init".into())?;
        notify
            .write_all(b"start container")
            .await
            .doing(|| "telling the container's init to start".into())?;
        drop(notify);
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
                Some(Report::Created { .. }) => {}
            }
        }
        match last_error {
            Some(message) => Err(Error::Internal(message)),
            None => Ok(()),
        }
    }
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

/// Where the container's init sends the master of its terminal.
struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
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

/// Starts the helper; answers with its pid.
fn spawn(
    bundle: &Path,
    id: &str,
    ends: ProcessEnds,
    reports: OwnedFd,
    console: Option<&Console>,
) -> Result<i32, Error> {
    let number = reports.as_raw_fd();
    let mut command = Command::new(executable());
    command
        .arg0("nacre-agent")
        .arg(HELPER)
        .arg(number.to_string())
        .arg(bundle)
        .arg(id)
        .args(console.map(|console| console.path.as_os_str()))
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(ends.stdin))
        .stdout(Stdio::from(ends.stdout))
        .stderr(Stdio::from(ends.stderr));
    // SAFETY: fcntl is async-signal-safe, and works on a descriptor that the child has a copy of.
    unsafe {
        command.pre_exec(move || match libc::fcntl(number, libc::F_SETFD, 0) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let child = command
        .spawn()
        .doing(|| format!("starting the helper that makes container {id}"))?;
    Ok(child.id() as i32)
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

/// Descriptor of the pipe for reports, in the helper and the processes that it makes.
static REPORTS: AtomicI32 = AtomicI32::new(-1);

/// The helper's whole life. `arguments` are those after [`HELPER`]: descriptor, bundle, id, and the
/// console's socket for a terminal. Answers with its exit code.
pub fn helper(arguments: &[OsString]) -> i32 {
    let [descriptor, bundle, id, console @ ..] = arguments else {
        return 2;
    };
    let Some(descriptor) = descriptor.to_str().and_then(|text| text.parse().ok()) else {
        return 2;
    };
    let (Some(id), console) = (id.to_str(), console.first()) else {
        return 2;
    };
    REPORTS.store(descriptor, Ordering::Relaxed);
    prepare_helper(descriptor);
    match make(Path::new(bundle), id, console.map(PathBuf::from)) {
        Ok(pid) => {
            report(&Report::Created { pid });
            0
        }
        Err(message) => {
            report(&Report::Failed { message });
            1
        }
    }
}

fn prepare_helper(descriptor: RawFd) {
    // SAFETY: numbers only: the pipe shall close when the user's program begins, and what the agent
    // ignores or allows itself is not for the container to inherit.
    unsafe {
        libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC);
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let files = libc::rlimit {
            rlim_cur: 1024,
            rlim_max: 1 << 20,
        };
        libc::setrlimit(libc::RLIMIT_NOFILE, &files);
    }
    log::install(
        log::Sink::Parent(|level, component, message| {
            report(&Report::Log {
                level: level.as_str().into(),
                component: component.into(),
                message: message.into(),
            });
        }),
        Level::WARN,
    );
    std::panic::set_hook(Box::new(|panic| {
        report(&Report::Failed {
            message: panic.to_string(),
        });
    }));
}

fn make(bundle: &Path, id: &str, console: Option<PathBuf>) -> Result<i32, String> {
    make_working_directory(bundle);
    let container = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(bundle.join(STATE))
        .map_err(|error| chain(&error))?
        .with_executor(Program)
        .with_console_socket(console)
        .as_init(bundle)
        .with_systemd(false)
        .with_detach(true)
        .as_sibling(true)
        .build()
        .map_err(|error| chain(&error))?;
    match container.pid() {
        Some(pid) => Ok(pid.as_raw()),
        None => Err("the library made it without a pid".into()),
    }
}

/// Makes the process's working directory where the root has none, as other runtimes do. What goes wrong
/// shows when the process enters it.
fn make_working_directory(bundle: &Path) {
    let Ok(spec) = Spec::load(bundle.join("config.json")) else {
        return;
    };
    let Some(process) = spec.process() else {
        return;
    };
    // Symbolic links in the root are followed within the root.
    let made = Root::open(bundle.join(crate::spec::ROOT))
        .and_then(|root| root.mkdir_all(process.cwd(), &Permissions::from_mode(0o755)));
    if let Err(error) = made {
        tracing::debug!("making {}: {error}", process.cwd().display());
    }
}

/// An error with all its causes, each said once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let words = inner.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = inner.source();
    }
    text
}

/// One write of one line: the helper and the init may both write.
fn report(report: &Report) {
    let mut line = serde_json::to_vec(report).unwrap_or_default();
    line.push(b'\n');
    let descriptor = REPORTS.load(Ordering::Relaxed);
    if descriptor < 0 {
        return;
    }
    // SAFETY: the descriptor was handed to this process for this; it is borrowed, and not closed here.
    let mut pipe = std::mem::ManuallyDrop::new(unsafe { std::fs::File::from_raw_fd(descriptor) });
    let _ = pipe.write_all(&line);
}

/// Runs the user's program, and says so if the kernel would not. Whether there is such a program is
/// found out by running it, so that it is Start that fails.
#[derive(Clone)]
struct Program;

impl Executor for Program {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let arguments = spec
            .process()
            .as_ref()
            .and_then(|process| process.args().clone())
            .unwrap_or_default();
        let path = std::env::var_os("PATH");
        let Err(refused) = execute(&arguments, path.as_deref());
        report(&Report::NotExecuted {
            message: refused.to_string(),
        });
        std::process::exit(refused.status());
    }

    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }
}

/// Why a program did not begin.
#[derive(Debug, thiserror::Error)]
enum NotExecuted {
    #[error("exec: {0:?}: executable file not found in $PATH")]
    NotInPath(String),
    #[error("exec: {0:?}: {1}")]
    Kernel(String, io::Error),
    #[error("exec: {0:?}: an argument has a NUL in it")]
    Nul(String),
}

impl NotExecuted {
    /// As shells say it: 127 not found, 126 found but not run.
    fn status(&self) -> i32 {
        match self {
            NotExecuted::NotInPath(_) => 127,
            NotExecuted::Kernel(_, error) if error.kind() == io::ErrorKind::NotFound => 127,
            NotExecuted::Kernel(..) | NotExecuted::Nul(_) => 126,
        }
    }
}

fn execute(arguments: &[String], path: Option<&OsStr>) -> Result<Infallible, NotExecuted> {
    let name = arguments.first().cloned().unwrap_or_default();
    let arguments: Vec<CString> = arguments
        .iter()
        .map(|argument| CString::new(argument.as_bytes()))
        .collect::<Result<_, _>>()
        .map_err(|_| NotExecuted::Nul(name.clone()))?;
    let mut refusal = None;
    for candidate in candidates(&name, path) {
        let Ok(program) = CString::new(candidate.as_os_str().as_bytes()) else {
            continue;
        };
        let Err(error) = nix::unistd::execv(&program, &arguments);
        match error {
            nix::Error::ENOENT | nix::Error::ENOTDIR if !name.contains('/') => {}
            error => refusal = refusal.or(Some(error)),
        }
    }
    Err(match refusal {
        Some(error) => NotExecuted::Kernel(name, error.into()),
        None => NotExecuted::NotInPath(name),
    })
}

/// Where a program of this name may be. An empty element of PATH is the current directory.
fn candidates(name: &str, path: Option<&OsStr>) -> Vec<PathBuf> {
    if name.contains('/') {
        return vec![name.into()];
    }
    let path = path.unwrap_or(OsStr::new(
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ));
    std::env::split_paths(path)
        .map(|directory| match directory.as_os_str().is_empty() {
            true => Path::new(".").join(name),
            false => directory.join(name),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_a_slash_is_looked_for_in_path() {
        assert_eq!(
            candidates("sh", Some(OsStr::new("/a::/b"))),
            [Path::new("/a/sh"), Path::new("./sh"), Path::new("/b/sh")]
        );
        assert_eq!(candidates("./sh", None), [Path::new("./sh")]);
        assert!(candidates("sh", None).contains(&"/bin/sh".into()));
    }

    #[test]
    fn what_cannot_be_run_is_named_with_its_status() {
        let table = [
            ("no-such-program", 127, "not found in $PATH"),
            ("/no/such/program", 127, "No such file"),
            ("/etc", 126, "ermission denied"),
        ];
        for (name, status, words) in table {
            let Err(refused) = execute(&[name.into()], Some(OsStr::new("/nowhere")));
            assert_eq!(refused.status(), status, "{refused}");
            let text = refused.to_string();
            assert!(text.contains(words) && text.contains(name), "{text}");
        }
    }

    #[test]
    fn reports_survive_the_pipe() {
        let report = Report::NotExecuted {
            message: "exec: \"a\nb\"".into(),
        };
        let line = serde_json::to_string(&report).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Report>(&line).unwrap(), report);
    }

    #[test]
    fn causes_are_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer: {0}")]
        struct Outer(#[source] io::Error);
        let error = Outer(io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(chain(&error).matches("No such file").count(), 1);
    }
}
