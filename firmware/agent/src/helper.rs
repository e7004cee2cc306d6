//! The agent as its own helper: a process with one thread, as libcontainer
//! needs one (it clones without exec and allocates in the child). It makes one
//! container, or one more process in a container, says so, and ends; what it
//! made keeps this code until it runs the user's program.
//!
//! What libcontainer does not do in this build: seccomp profiles (its library
//! is not linked), which are applied here, and the device cgroup (needs
//! libbpf), which `device_rules` does.

use std::convert::Infallible;
use std::ffi::{CString, OsStr, OsString};
use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use libcontainer::container::ContainerStatus;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::unistd::{Gid, Uid};
use pathrs::Root;
use serde::{Deserialize, Serialize};
use tracing::Level;

use crate::confinement::{self, Own};
use crate::hotplug::offliner;
use crate::log;
use crate::seccomp::Filter;
use crate::users::{Identity, Users};

/// First argument of the agent when it is to make a container.
pub const MAKE: &str = "make-container";
/// First argument of the agent when it is to make a process in a container.
pub const JOIN: &str = "join-container";
/// In the directory of an exec: the OCI process.
pub const PROCESS: &str = "process.json";
/// In the directory of an exec: the pid of what was made, in decimal.
pub const PID: &str = "pid";
/// Directory of the library's own state in a bundle.
pub const STATE: &str = "state";
/// In a bundle: the compiled seccomp profile, if there is one.
pub const FILTER: &str = "seccomp.json";
/// In a bundle for the init, in the directory of an exec for that: its own capabilities, if others are on loan.
pub const OWN: &str = "capabilities.json";
/// In the directory of an exec, if the container has users of its own: who it is among them.
pub const IDENTITY: &str = "identity.json";
/// Characters of one report's text. A report is thereby one write that the kernel does not split, though
/// the helper and the init may both write.
const TEXT_CHARACTERS: usize = 600;

/// What the helper, or the init that it made, has to say.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub enum Report {
    /// A line of the log.
    Log {
        /// As `tracing` names it.
        level: String,
        /// Who said it.
        component: String,
        /// What was said.
        message: String,
    },
    /// The container is made, and its init waits.
    Created {
        /// Of the init, in the guest's first pid namespace.
        pid: i32,
    },
    /// The process of an exec is in the container, and waits for a byte before it runs the user's program.
    Waiting,
    /// The container or process was not made.
    Failed {
        /// What was said.
        message: String,
    },
    /// The user's program was not run.
    NotExecuted {
        /// What was said.
        message: String,
    },
}

/// Descriptor of the pipe for reports, in the helper and the processes that it makes.
static REPORTS: AtomicI32 = AtomicI32::new(-1);

/// The helper's whole life, if the arguments after the program's name are a helper's; its exit code then.
/// They are [`MAKE`], descriptor for reports, bundle, id, and the console's socket for a terminal; or [`JOIN`],
/// descriptor for reports, descriptor to wait at, bundle, id, the exec's directory, and the console's socket; or
/// [`offliner::OFFLINE`] and what belongs to that.
pub fn run(arguments: &[OsString]) -> Option<i32> {
    let number = |text: &OsString| text.to_str().and_then(|text| text.parse::<RawFd>().ok());
    let (kind, arguments) = arguments.split_first()?;
    if kind == offliner::OFFLINE {
        return Some(offliner::run(arguments));
    }
    let made = match (kind.to_str()?, arguments) {
        (MAKE, [reports, bundle, id, console @ ..]) => {
            let Some(id) = prepared(number(reports), id) else {
                return Some(2);
            };
            make(Path::new(bundle), id, console.first().map(PathBuf::from))
        }
        (JOIN, [reports, wait, bundle, id, directory, console @ ..]) => {
            let (Some(wait), Some(id)) = (number(wait), prepared(number(reports), id)) else {
                return Some(2);
            };
            let (bundle, directory) = (Path::new(bundle), Path::new(directory));
            join(
                bundle,
                id,
                directory,
                wait,
                console.first().map(PathBuf::from),
            )
        }
        (MAKE | JOIN, _) => return Some(2),
        _ => return None,
    };
    Some(match made {
        Ok(pid) => {
            report(&Report::Created { pid });
            0
        }
        Err(message) => {
            report(&Report::Failed {
                message: text(&message),
            });
            1
        }
    })
}

fn prepared(reports: Option<RawFd>, id: &OsString) -> Option<&str> {
    let reports = reports?;
    REPORTS.store(reports, Ordering::Relaxed);
    prepare(reports);
    id.to_str()
}

fn prepare(descriptor: RawFd) {
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
                message: text(message),
            });
        }),
        Level::WARN,
    );
    std::panic::set_hook(Box::new(|panic| {
        report(&Report::Failed {
            message: text(&panic.to_string()),
        });
    }));
}

fn make(bundle: &Path, id: &str, console: Option<PathBuf>) -> Result<i32, String> {
    make_working_directory(bundle);
    let mut container = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(bundle.join(STATE))
        .map_err(|error| chain(&error))?
        .with_executor(Program::load(bundle, bundle, None)?)
        .with_console_socket(console)
        .as_init(bundle)
        .with_systemd(false)
        .with_detach(true)
        .as_sibling(true)
        .build()
        .map_err(|error| chain(&error))?;
    // The agent keeps the states; for the library, whatever has an init may be joined.
    container
        .set_status(ContainerStatus::Running)
        .save()
        .map_err(|error| chain(&error))?;
    match container.pid() {
        Some(pid) => Ok(pid.as_raw()),
        None => Err("the library made it without a pid".into()),
    }
}

/// Makes a process in a container. The library leaves sockets and links in the container's state, and names
/// them by chance; each exec therefore works on a copy of the state, in the directory that is its own.
fn join(
    bundle: &Path,
    id: &str,
    directory: &Path,
    wait: RawFd,
    console: Option<PathBuf>,
) -> Result<i32, String> {
    let (state, copy) = (bundle.join(STATE).join(id), directory.join(id));
    std::fs::create_dir(&copy)
        .and_then(|()| std::fs::copy(state.join("state.json"), copy.join("state.json")))
        .map_err(|error| format!("copying the container's state: {error}"))?;
    ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(directory)
        .and_then(|builder| builder.with_pid_file(Some(directory.join(PID))))
        .map_err(|error| chain(&error))?
        .with_executor(Program::load(bundle, directory, Some(wait))?)
        .with_console_socket(console)
        .as_tenant()
        .with_process(Some(directory.join(PROCESS)))
        .with_detach(true)
        .as_sibling(true)
        .build()
        .map(|pid| pid.as_raw())
        .map_err(|error| chain(&error))
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
    let users = spec.linux().as_ref().and_then(Users::of);
    let owner = users.map_or((0, 0), |users| users.outside((0, 0)));
    // It is the container's root's.
    set_owner_of_files(owner);
    // Symbolic links in the root are followed within the root.
    let made = Root::open(bundle.join(crate::spec::ROOT))
        .and_then(|root| root.mkdir_all(process.cwd(), &Permissions::from_mode(0o755)));
    set_owner_of_files((0, 0));
    if let Err(error) = made {
        tracing::debug!("making {}: {error}", process.cwd().display());
    }
}

/// As whom this process makes files. With the user go its capabilities over files, not those to change either number.
fn set_owner_of_files((uid, gid): (u32, u32)) {
    nix::unistd::setfsgid(Gid::from_raw(gid));
    nix::unistd::setfsuid(Uid::from_raw(uid));
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

/// What a report may carry of a text.
fn text(whole: &str) -> String {
    whole.chars().take(TEXT_CHARACTERS).collect()
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
struct Program {
    /// Descriptor to read a byte from before the program is run.
    wait: Option<RawFd>,
    filter: Option<Filter>,
    own: Option<Own>,
    /// Who it becomes among the container's own users, and their namespace.
    identity: Option<(Identity, Arc<File>)>,
}

impl Program {
    fn load(bundle: &Path, directory: &Path, wait: Option<RawFd>) -> Result<Program, String> {
        let identity: Option<Identity> = stored(&directory.join(IDENTITY))?;
        let mut own = stored(&directory.join(OWN))?;
        let identity = match identity {
            None => None,
            Some(identity) => {
                own = identity.own();
                let namespace = identity
                    .namespace()
                    .map_err(|error| format!("opening the container's user namespace: {error}"))?;
                Some((identity, Arc::new(namespace)))
            }
        };
        Ok(Program {
            wait,
            filter: stored(&bundle.join(FILTER))?,
            own,
            identity,
        })
    }
}

/// What a file holds as JSON; nothing if there is no such file.
fn stored<T: serde::de::DeserializeOwned>(file: &Path) -> Result<Option<T>, String> {
    let wrong = |error: &dyn std::error::Error| format!("reading {}: {error}", file.display());
    match std::fs::read(file) {
        Ok(json) => serde_json::from_slice(&json)
            .map(Some)
            .map_err(|error| wrong(&error)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(wrong(&error)),
    }
}

impl Executor for Program {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        if let Some(wait) = self.wait {
            report(&Report::Waiting);
            if !may_begin(wait) {
                std::process::exit(GIVEN_UP);
            }
        }
        let arguments = spec
            .process()
            .as_ref()
            .and_then(|process| process.args().clone())
            .unwrap_or_default();
        let path = std::env::var_os("PATH");
        let itself = match &self.identity {
            Some((identity, namespace)) => identity.take_on(namespace),
            None => Ok(()),
        };
        let process = spec.process().as_ref();
        let no_new_privileges =
            process.and_then(|process| process.no_new_privileges()) == Some(true);
        let confined =
            || confinement::confine(self.filter.as_ref(), self.own.as_ref(), no_new_privileges);
        let Err(refused) = itself
            .map_err(NotExecuted::NotItself)
            .and_then(|()| confined().map_err(NotExecuted::NotConfined))
            .and_then(|()| execute(&arguments, path.as_deref()));
        report(&Report::NotExecuted {
            message: text(&refused.to_string()),
        });
        std::process::exit(refused.status());
    }

    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }
}

/// Exit code of a process that was never told to begin.
const GIVEN_UP: i32 = 255;

/// Waits for the agent's byte; false if there will be none.
fn may_begin(wait: RawFd) -> bool {
    let mut byte = 0_u8;
    loop {
        // SAFETY: the descriptor was handed to this process for this; one byte is written at most.
        match unsafe { libc::read(wait, (&raw mut byte).cast(), 1) } {
            1 => return true,
            0 => return false,
            _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            _ => return false,
        }
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
    #[error("becoming a user of the container's user namespace: {0}")]
    NotItself(io::Error),
    #[error("applying the seccomp profile: {0}")]
    NotConfined(io::Error),
}

impl NotExecuted {
    /// As shells say it: 127 not found, 126 found but not run.
    fn status(&self) -> i32 {
        match self {
            NotExecuted::NotInPath(_) => 127,
            NotExecuted::Kernel(_, error) if error.kind() == io::ErrorKind::NotFound => 127,
            NotExecuted::Kernel(..)
            | NotExecuted::Nul(_)
            | NotExecuted::NotItself(_)
            | NotExecuted::NotConfined(_) => 126,
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
    fn a_report_of_anything_is_one_whole_write() {
        let message = text(&"\u{7}".repeat(100_000));
        let line = serde_json::to_string(&Report::Failed { message }).unwrap();
        assert!(line.len() < libc::PIPE_BUF, "{}", line.len());
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
