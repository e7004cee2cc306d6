//! The agent as its own helper: a process with one thread, as libcontainer
//! needs one (it clones without exec and allocates in the child). It makes one
//! container, says so, and ends; the container's init keeps this code until it
//! runs the user's program.
//!
//! What libcontainer does not do in this build: seccomp profiles (its library
//! is not linked) and the device cgroup (needs libbpf); the specification's
//! device rules are therefore not enforced inside the guest.

use std::convert::Infallible;
use std::ffi::{CString, OsStr, OsString};
use std::fs::Permissions;
use std::io::{self, Write};
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use pathrs::Root;
use serde::{Deserialize, Serialize};
use tracing::Level;

use crate::log;

/// First argument of the agent when it is to be the helper.
pub const ARGUMENT: &str = "make-container";
/// Directory of the library's own state in a bundle.
pub const STATE: &str = "state";
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
    /// The container was not made.
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

/// The helper's whole life. `arguments` are those after [`ARGUMENT`]: descriptor, bundle, id, and the
/// console's socket for a terminal. Answers with its exit code.
pub fn run(arguments: &[OsString]) -> i32 {
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
    prepare(descriptor);
    match make(Path::new(bundle), id, console.map(PathBuf::from)) {
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
    }
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
            message: text(&refused.to_string()),
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
