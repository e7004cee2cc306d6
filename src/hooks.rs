//! Hooks of OCI specs that run on the host, where the runtime specification's
//! runtime namespace is: prestart, createRuntime, poststart and poststop. The
//! other two kinds are the guest's. What poststop is owed is kept in a file, so
//! that it is done by whoever cleans up.

use std::collections::HashMap;
use std::ffi::CString;
use std::fmt;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use oci_spec::runtime::{Hook, Hooks, Spec};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use crate::origin;

/// How long a hook may run that has no timeout of its own.
const LONGEST: Duration = Duration::from_secs(60);
/// The same where the shim is gone, and containerd waits five seconds for all that is left to be freed.
const LONGEST_IN_CLEANUP: Duration = Duration::from_secs(3);
/// What is kept of a hook's stderr, bytes.
const STDERR: usize = 4096;

/// The stages whose hooks run on the host, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Deprecated, and before createRuntime.
    Prestart,
    /// In Create, when the container's namespaces are there.
    CreateRuntime,
    /// In Start, when the program runs.
    Poststart,
    /// In Delete, when the container is gone.
    Poststop,
}

impl Stage {
    const ALL: [Self; 4] = [
        Self::Prestart,
        Self::CreateRuntime,
        Self::Poststart,
        Self::Poststop,
    ];

    /// The container's status in the meantime.
    fn status(self) -> &'static str {
        match self {
            Self::Prestart | Self::CreateRuntime => "creating",
            Self::Poststart => "running",
            Self::Poststop => "stopped",
        }
    }

    #[allow(deprecated, reason = "containerd's clients still set prestart")]
    fn hooks(self, hooks: &Hooks) -> &[Hook] {
        let hooks = match self {
            Self::Prestart => hooks.prestart(),
            Self::CreateRuntime => hooks.create_runtime(),
            Self::Poststart => hooks.poststart(),
            Self::Poststop => hooks.poststop(),
        };
        hooks.as_deref().unwrap_or_default()
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        })
    }
}

/// A hook that is none, or that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The spec says something that cannot be.
    #[error("The {stage} hook {}: {cause}", path.display())]
    Wrong {
        /// When it would run.
        stage: Stage,
        /// Its program.
        path: PathBuf,
        /// What is wrong.
        cause: &'static str,
    },
    /// It failed.
    #[error("The {stage} hook {} {cause}", path.display())]
    Failed {
        /// When it ran.
        stage: Stage,
        /// Its program.
        path: PathBuf,
        /// How, with what it wrote on stderr.
        cause: String,
    },
}

/// The hooks of a container on the host, and what they are told of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostHooks {
    id: String,
    bundle: PathBuf,
    annotations: HashMap<String, String>,
    hooks: Hooks,
}

impl HostHooks {
    /// Those of a spec; None if it has none for the host.
    ///
    /// # Errors
    /// [`Error::Wrong`]: a path that is not absolute, or a timeout that is not above 0.
    pub fn of(spec: &Spec, id: &str, bundle: &Path) -> Result<Option<Self>, Error> {
        let Some(hooks) = spec.hooks() else {
            return Ok(None);
        };
        let mut any = false;
        for stage in Stage::ALL {
            for hook in stage.hooks(hooks) {
                any = true;
                let wrong = |cause| Error::Wrong {
                    stage,
                    path: hook.path().clone(),
                    cause,
                };
                if !hook.path().is_absolute() {
                    return Err(wrong("the path must be absolute"));
                }
                if hook.timeout().is_some_and(|timeout| timeout <= 0) {
                    return Err(wrong("the timeout must be above 0 seconds"));
                }
            }
        }
        Ok(any.then(|| Self {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            annotations: spec.annotations().clone().unwrap_or_default(),
            hooks: hooks.clone(),
        }))
    }

    /// Whether there are hooks for a stage.
    pub fn has(&self, stage: Stage) -> bool {
        !stage.hooks(&self.hooks).is_empty()
    }

    /// Runs the hooks of a stage one after another, each to its end or its timeout. Blocks. `pid` is the host's pid of
    /// the container.
    ///
    /// # Errors
    /// The first that fails; those after it are not run.
    pub fn run(&self, stage: Stage, pid: u32) -> Result<(), Error> {
        let state = self.state(stage, Some(pid));
        let mut hooks = stage.hooks(&self.hooks).iter();
        hooks.try_for_each(|hook| run(stage, hook, &self.bundle, &state, LONGEST))
    }

    /// Runs the poststop hooks, all of them: one that fails is logged. Blocks.
    pub fn run_poststop(&self) {
        self.poststop(LONGEST);
    }

    fn poststop(&self, longest: Duration) {
        let state = self.state(Stage::Poststop, None);
        for hook in Stage::Poststop.hooks(&self.hooks) {
            if let Err(error) = run(Stage::Poststop, hook, &self.bundle, &state, longest) {
                tracing::warn!(container = self.id, %error, "a hook failed");
            }
        }
    }

    /// The state that hooks read: runtime-spec, "State".
    fn state(&self, stage: Stage, pid: Option<u32>) -> Vec<u8> {
        let mut state = serde_json::json!({
            "ociVersion": oci_spec::runtime::VERSION,
            "id": self.id,
            "status": stage.status(),
            "bundle": self.bundle,
            "annotations": self.annotations,
        });
        if let Some(pid) = pid {
            state["pid"] = pid.into();
        }
        state.to_string().into_bytes()
    }

    /// Writes down what poststop is owed.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn keep(&self, file: &Path) -> io::Result<()> {
        let text = serde_json::to_vec(self)?;
        let mut file = std::fs::File::create(file)?;
        file.write_all(&text)?;
        file.sync_all()
    }
}

/// Runs the poststop hooks that a file of [`HostHooks::keep`] says are owed, and removes it. True if it was there.
///
/// # Errors
/// It cannot be read or removed. A hook that fails is no error.
pub fn settle(file: &Path) -> io::Result<bool> {
    let text = match std::fs::read(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        text => text?,
    };
    match serde_json::from_slice::<HostHooks>(&text) {
        Ok(hooks) => hooks.poststop(LONGEST_IN_CLEANUP),
        // Cut off by the end of its writer, before any hook ran.
        Err(error) => {
            tracing::warn!(file = %file.display(), %error, "hooks that are owed cannot be read");
        }
    }
    std::fs::remove_file(file)?;
    Ok(true)
}

fn run(
    stage: Stage,
    hook: &Hook,
    bundle: &Path,
    state: &[u8],
    longest: Duration,
) -> Result<(), Error> {
    let failed = |cause: String| Error::Failed {
        stage,
        path: hook.path().clone(),
        cause,
    };
    let own = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok());
    let limit = match own.map(Duration::from_secs) {
        Some(own) if longest == LONGEST => own,
        Some(own) => own.min(longest),
        None => longest,
    };
    tracing::debug!(%stage, path = %hook.path().display(), ?limit, "a hook runs");
    let mut child = spawn(hook, bundle, state)
        .map_err(|error| failed(format!("cannot be started: {error}")))?;
    let stderr = child.stderr.take();
    let ended = follow(&mut child, stderr, Instant::now() + limit)
        .map_err(|error| failed(format!("cannot be waited for: {error}")))?;
    let cause = match ended {
        (Some(status), _) if status.success() => return Ok(()),
        (Some(status), said) => format!("failed with {status}{said}"),
        (None, said) => format!("did not end within {limit:?} and was killed{said}"),
    };
    Err(failed(cause))
}

fn spawn(hook: &Hook, bundle: &Path, state: &[u8]) -> io::Result<Child> {
    // Not a pipe: a hook that reads nothing holds nobody up.
    let mut stdin = std::fs::File::from(memfd_create(c"state", MFdFlags::MFD_CLOEXEC)?);
    stdin.write_all(state)?;
    stdin.rewind()?;
    let mut command = Command::new(hook.path());
    if let Some((name, arguments)) = hook.args().as_ref().and_then(|args| args.split_first()) {
        command.arg0(name).args(arguments);
    }
    let pairs = hook
        .env()
        .iter()
        .flatten()
        .filter_map(|pair| pair.split_once('='));
    command
        .env_clear()
        .envs(pairs)
        .process_group(0)
        .stdin(stdin)
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let bundle = CString::new(bundle.as_os_str().as_bytes())?;
    let us = nix::unistd::getpid();
    let prepare = move || {
        origin::go_back()?;
        nix::unistd::chdir(bundle.as_c_str())?;
        // We may have ended before that was said.
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        if nix::unistd::getppid() != us {
            return Err(io::Error::from_raw_os_error(libc::ECHILD));
        }
        Ok(())
    };
    // SAFETY: `prepare` makes system calls only, on what was made before, as may be done between fork and exec.
    unsafe { command.pre_exec(prepare) };
    command.spawn()
}

/// Waits for a hook and takes what it says meanwhile; at the deadline it is killed with its process group. Answers with its
/// status, None if it was killed, and the beginning of its stderr as the end of a sentence.
fn follow(
    child: &mut Child,
    stderr: Option<ChildStderr>,
    deadline: Instant,
) -> io::Result<(Option<ExitStatus>, String)> {
    let group = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    let pidfd = rustix::process::Pid::from_raw(group.as_raw())
        .ok_or_else(|| io::Error::other("no pid"))
        .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
    let pidfd = match pidfd {
        Ok(pidfd) => pidfd,
        Err(error) => {
            let _ = killpg(group, Signal::SIGKILL);
            child.wait()?;
            return Err(error);
        }
    };
    let mut stderr = stderr;
    let mut said = Vec::new();
    let status = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let wait = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let ended = {
            let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN)];
            if let Some(stderr) = &stderr {
                fds.push(PollFd::from_borrowed_fd(stderr.as_fd(), PollFlags::IN));
            }
            match rustix::event::poll(&mut fds, Some(&wait)) {
                Err(rustix::io::Errno::INTR) => continue,
                polled => polled?,
            };
            let speaks = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
            (speaks, !fds[0].revents().is_empty())
        };
        let (speaks, has_ended) = ended;
        if speaks && !take(&mut stderr, &mut said) {
            stderr = None;
        }
        if has_ended && !speaks {
            break Some(child.wait()?);
        }
        if Instant::now() >= deadline {
            // It is our child and not reaped, so that the group is its own.
            let _ = killpg(group, Signal::SIGKILL);
            let status = child.wait()?;
            break has_ended.then_some(status);
        }
    };
    let text: String = String::from_utf8_lossy(&said)
        .chars()
        .map(|letter| if letter.is_control() { ' ' } else { letter })
        .collect();
    let said = match text.trim() {
        "" => String::new(),
        words => format!(": {words}"),
    };
    Ok((status, said))
}

/// Takes what there is of stderr; false at its end.
fn take(stderr: &mut Option<ChildStderr>, said: &mut Vec<u8>) -> bool {
    let mut chunk = [0; 4096];
    match stderr.as_mut().map(|stderr| stderr.read(&mut chunk)) {
        Some(Ok(count @ 1..)) => {
            let room = STDERR - said.len();
            said.extend_from_slice(&chunk[..count.min(room)]);
            true
        }
        Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use serde_json::{Value, json};

    use super::*;

    struct Bundle(tempfile::TempDir);

    impl Bundle {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn script(&self, name: &str, text: &str) -> PathBuf {
            let path = self.0.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path
        }

        fn hooks(&self, hooks: Value) -> Result<Option<HostHooks>, Error> {
            let spec = json!({"ociVersion": "1.1.0", "annotations": {"a": "b"}, "hooks": hooks});
            HostHooks::of(&serde_json::from_value(spec).unwrap(), "c1", self.0.path())
        }

        fn read(&self, name: &str) -> String {
            std::fs::read_to_string(self.0.path().join(name)).unwrap()
        }
    }

    #[test]
    fn a_hook_has_its_arguments_environment_folder_and_the_state() {
        let bundle = Bundle::new();
        let path = bundle.script(
            "hook",
            "cat >state; echo \"$1 $A $B\" >words; env >env; pwd >folder",
        );
        let hooks = json!({"createRuntime": [{"path": path, "args": ["hook", "one"], "env": ["A=x", "B=y=z"]}]});
        let hooks = bundle.hooks(hooks).unwrap().unwrap();
        assert!(hooks.has(Stage::CreateRuntime) && !hooks.has(Stage::Poststop));
        hooks.run(Stage::CreateRuntime, 42).unwrap();
        let state: Value = serde_json::from_str(&bundle.read("state")).unwrap();
        let folder = bundle.0.path().to_str().unwrap();
        assert_eq!(
            state,
            json!({"ociVersion": oci_spec::runtime::VERSION, "id": "c1", "status": "creating", "pid": 42,
                "bundle": folder, "annotations": {"a": "b"}})
        );
        assert_eq!(bundle.read("words"), "one x y=z\n");
        assert_eq!(bundle.read("folder").trim(), folder);
        assert!(!bundle.read("env").contains("CARGO"));
    }

    #[test]
    fn the_first_that_fails_is_told_with_its_stderr_and_stops_the_rest() {
        let bundle = Bundle::new();
        let fails = bundle.script("fails", "echo no such luck >&2; exit 3");
        let runs = bundle.script("runs", "echo ran >>ran");
        let hooks = json!({"prestart": [{"path": runs}, {"path": fails}, {"path": runs}]});
        let hooks = bundle.hooks(hooks).unwrap().unwrap();
        let error = hooks.run(Stage::Prestart, 1).unwrap_err().to_string();
        for word in ["prestart", "fails", "exit status: 3", "no such luck"] {
            assert!(error.contains(word), "{error}");
        }
        assert_eq!(bundle.read("ran"), "ran\n");
    }

    #[test]
    fn a_hook_that_hangs_is_killed_with_its_children_and_one_that_is_loud_is_cut() {
        let bundle = Bundle::new();
        let hangs = bundle.script(
            "hangs",
            "sleep 1000 & echo $! >child; echo waiting >&2; wait",
        );
        let hooks = json!({"poststart": [{"path": hangs, "timeout": 1}]});
        let hooks = bundle.hooks(hooks).unwrap().unwrap();
        let error = hooks.run(Stage::Poststart, 1).unwrap_err().to_string();
        assert!(
            error.contains("within 1s") && error.contains("waiting"),
            "{error}"
        );
        let child = PathBuf::from(format!("/proc/{}/stat", bundle.read("child").trim()));
        let gone = || std::fs::read_to_string(&child).map_or(true, |stat| stat.contains(") Z "));
        let end = Instant::now() + Duration::from_secs(10);
        while !gone() {
            assert!(Instant::now() < end, "{} lives", child.display());
            std::thread::sleep(Duration::from_millis(10));
        }

        let loud = bundle.script("loud", "head -c 300000 /dev/zero | tr '\\0' x >&2; exit 1");
        let hooks = json!({"prestart": [{"path": loud}]});
        let hooks = bundle.hooks(hooks).unwrap().unwrap();
        let error = hooks.run(Stage::Prestart, 1).unwrap_err().to_string();
        assert!(error.len() < STDERR + 300, "{} bytes", error.len());
    }

    #[test]
    fn a_child_that_keeps_stderr_open_holds_nobody_up() {
        let bundle = Bundle::new();
        let leaves = bundle.script("leaves", "sleep 30 & echo $! >child");
        let hooks = json!({"prestart": [{"path": leaves}]});
        let hooks = bundle.hooks(hooks).unwrap().unwrap();
        let began = Instant::now();
        hooks.run(Stage::Prestart, 1).unwrap();
        assert!(began.elapsed() < Duration::from_secs(20));
        let child = bundle.read("child").trim().parse().unwrap();
        nix::sys::signal::kill(Pid::from_raw(child), Signal::SIGKILL).unwrap();
    }

    #[test]
    fn what_poststop_is_owed_is_done_once_whatever_fails() {
        let bundle = Bundle::new();
        let fails = bundle.script("fails", "echo fails >>ran; exit 1");
        let runs = bundle.script("runs", "cat >state; echo runs >>ran");
        let hooks =
            json!({"poststop": [{"path": fails}, {"path": "/does/not/exist"}, {"path": runs}]});
        let hooks = bundle.hooks(hooks).unwrap().unwrap();
        let file = bundle.0.path().join("owed.json");
        hooks.keep(&file).unwrap();
        assert!(settle(&file).unwrap());
        assert!(!settle(&file).unwrap());
        assert_eq!(bundle.read("ran"), "fails\nruns\n");
        let state: Value = serde_json::from_str(&bundle.read("state")).unwrap();
        assert_eq!(state["status"], "stopped");
        assert_eq!(state.get("pid"), None);
        std::fs::write(&file, "{").unwrap();
        assert!(settle(&file).unwrap());
    }

    #[test]
    fn wrong_hooks_are_named_and_none_is_none() {
        let bundle = Bundle::new();
        let guests =
            json!({"startContainer": [{"path": "/a"}], "createContainer": [{"path": "b"}]});
        assert!(bundle.hooks(guests).unwrap().is_none());
        let error = |hooks| bundle.hooks(hooks).unwrap_err().to_string();
        let relative = error(json!({"poststop": [{"path": "bin/hook"}]}));
        assert!(
            relative.contains("poststop") && relative.contains("absolute"),
            "{relative}"
        );
        let zero = error(json!({"prestart": [{"path": "/hook", "timeout": 0}]}));
        assert!(zero.contains("/hook") && zero.contains("above 0"), "{zero}");
    }
}
