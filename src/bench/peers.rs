//! The shims that are compared, and what each needs around it: a root, a
//! bundle, and who takes its log and its events (`listeners`). What a container
//! leaves is freed when its value is dropped.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api::{
    ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest,
    DeleteResponse, Empty, ExecProcessRequest, KillRequest, Mount, ShutdownRequest, StartRequest,
    StartResponse, WaitRequest, WaitResponse,
};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use serde_json::json;

use super::interrupt;
use super::listeners::{Drain, Heard};
use super::shim::{Answer, Connection};

/// containerd's namespace of all that is measured.
pub(super) const NAMESPACE: &str = "nacre-bench";
/// What an exec's specification is called on the wire.
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// A shim to measure.
#[derive(Debug, Clone, Default)]
pub(super) struct Peer {
    /// `nacre` or `runc`.
    pub name: &'static str,
    /// The shim's program.
    pub program: PathBuf,
    /// What is in front of its `PATH`.
    pub path: Option<PathBuf>,
    /// The configuration of nacre's, in place of the usual one.
    pub config: Option<PathBuf>,
    /// What else is in its environment.
    pub environment: Vec<(&'static str, PathBuf)>,
}

/// What all containers share: their root, a folder, and the one who hears their events.
pub(super) struct Surroundings {
    pub root: PathBuf,
    folder: tempfile::TempDir,
    events: Heard,
    patience: Duration,
    made: AtomicU64,
}

impl Surroundings {
    /// Makes a root of busybox and its applets, unless there is one.
    pub fn new(rootfs: Option<&Path>, busybox: &Path, patience: Duration) -> Result<Self> {
        let folder = bundles()?;
        let root = match rootfs {
            Some(rootfs) => {
                ensure!(
                    rootfs.join("bin/sh").exists(),
                    "{} has no bin/sh: it is no root file system that can be measured with",
                    rootfs.display()
                );
                std::path::absolute(rootfs)?
            }
            None => {
                let root = folder.path().join("root");
                make_root(&root, busybox)?;
                root
            }
        };
        Self::around(folder, root, patience)
    }

    /// The same over a root that is there, whatever is in it.
    pub fn over(root: &Path, patience: Duration) -> Result<Self> {
        Self::around(bundles()?, root.to_owned(), patience)
    }

    fn around(folder: tempfile::TempDir, root: PathBuf, patience: Duration) -> Result<Self> {
        let events = Heard::listen(&folder.path().join("events.sock"))?;
        Ok(Self {
            root,
            folder,
            events,
            patience,
            made: AtomicU64::new(0),
        })
    }

    /// The longest that one call may take.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Events that have come in so far.
    pub fn events(&self) -> u64 {
        self.events.count()
    }
}

impl Drop for Surroundings {
    fn drop(&mut self) {
        let bundles = fs::read_dir(self.folder.path()).into_iter().flatten();
        for bundle in bundles.flatten() {
            let rootfs = bundle.path().join("rootfs");
            let full = fs::read_dir(&rootfs).is_ok_and(|mut entries| entries.next().is_some());
            if full {
                // Perhaps still the root of somebody else, which must not be removed with the folder.
                eprintln!(
                    "nacre-bench: {} is still mounted, and is left",
                    rootfs.display()
                );
                self.folder.disable_cleanup(true);
            }
        }
        // Made by runc for all of its containers; what others still use is not empty.
        for shared in ["/sys/fs/cgroup", "/run/containerd/runc"] {
            let _ = fs::remove_dir(Path::new(shared).join(NAMESPACE));
        }
    }
}

fn bundles() -> Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix("nacre-bench-")
        .tempdir()
        .context("making a folder for bundles")
}

/// A root that holds busybox, and a link to it for each applet.
fn make_root(root: &Path, busybox: &Path) -> Result<()> {
    for folder in ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp"] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::copy(busybox, root.join("bin/busybox"))
        .with_context(|| format!("copying {}: --busybox names another", busybox.display()))?;
    let list = Command::new(busybox)
        .arg("--list")
        .output()
        .with_context(|| format!("running {}", busybox.display()))?;
    ensure!(
        list.status.success(),
        "{} --list failed: {}",
        busybox.display(),
        list.status
    );
    for applet in String::from_utf8_lossy(&list.stdout).lines() {
        if !["", "busybox"].contains(&applet) {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet))?;
        }
    }
    Ok(())
}

/// FIFOs for the stdio of a process; none: it has none.
#[derive(Debug, Clone, Default)]
pub(super) struct Fifos {
    pub stdin: Option<PathBuf>,
    pub stdout: Option<PathBuf>,
    /// runc's shim wants it where there is a stdout.
    pub stderr: Option<PathBuf>,
}

fn path(fifo: Option<&PathBuf>) -> String {
    fifo.map(|fifo| fifo.display().to_string())
        .unwrap_or_default()
}

/// A bundle, and the shim that was started for it. Dropping it ends both, by force if need be.
pub(super) struct Container<'s> {
    around: &'s Surroundings,
    peer: Peer,
    pub id: String,
    pub folder: PathBuf,
    shim: Option<Connection>,
    pub shim_pid: Option<i32>,
    _log: Drain,
}

impl<'s> Container<'s> {
    /// Makes the bundle of a container that runs `args`. Nothing is started yet.
    pub fn bundle(around: &'s Surroundings, peer: &Peer, args: &[&str]) -> Result<Self> {
        Self::bundle_with(around, peer, args, &Joined::default())
    }

    /// The same, with what it has in common with the host.
    pub fn bundle_with(
        around: &'s Surroundings,
        peer: &Peer,
        args: &[&str],
        joined: &Joined<'_>,
    ) -> Result<Self> {
        let number = around.made.fetch_add(1, Ordering::Relaxed);
        let id = format!("bench-{}-{}-{number}", std::process::id(), peer.name);
        let folder = around.folder.path().join(&id);
        fs::create_dir_all(folder.join("rootfs"))?;
        let spec = specification(args, joined, &format!("/{NAMESPACE}/{id}"));
        fs::write(folder.join("config.json"), serde_json::to_vec(&spec)?)?;
        let log = Drain::start(folder.join("log"))?;
        Ok(Self {
            around,
            peer: peer.clone(),
            id,
            folder,
            shim: None,
            shim_pid: None,
            _log: log,
        })
    }

    /// A new FIFO in the bundle.
    pub fn fifo(&self, name: &str) -> Result<PathBuf> {
        let fifo = self.folder.join(name);
        mkfifo(&fifo, Mode::S_IRWXU).with_context(|| format!("making {}", fifo.display()))?;
        Ok(fifo)
    }

    fn command(&self, action: &str) -> Command {
        let mut command = Command::new(&self.peer.program);
        command.current_dir(&self.folder).stdin(Stdio::null());
        command.args(["-namespace", NAMESPACE, "-id", &self.id]);
        let address = self.around.folder.path().join("containerd.sock");
        command.arg("-address").arg(address);
        if action == "delete" {
            command.arg("-bundle").arg(&self.folder);
        }
        command.arg(action);
        command
            .env("TTRPC_ADDRESS", self.around.events.socket())
            .env("GOMAXPROCS", "2")
            .env("MAX_SHIM_VERSION", "2");
        if let Some(config) = &self.peer.config {
            command.env("NACRE_CONFIG", config);
        }
        command.envs(self.peer.environment.iter().cloned());
        if let Some(first) = &self.peer.path {
            let mut paths = vec![first.clone()];
            if let Some(path) = std::env::var_os("PATH") {
                paths.extend(std::env::split_paths(&path));
            }
            let joined = std::env::join_paths(paths).unwrap_or_else(|_| OsString::new());
            command.env("PATH", joined);
        }
        command
    }

    fn run(&self, action: &str) -> Result<Vec<u8>> {
        let output = self
            .command(action)
            .output()
            .with_context(|| format!("running {}", self.peer.program.display()))?;
        ensure!(
            output.status.success(),
            "{} {action}: {}: {}",
            self.peer.program.display(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(output.stdout)
    }

    /// `start`: runs the program until it has answered.
    pub fn start_shim(&self) -> Result<Answer> {
        Answer::parse(&self.run("start")?)
    }

    /// Dials, and asks for the shim's pid.
    pub fn connect(&mut self, answer: &Answer) -> Result<()> {
        let connection = Connection::dial(answer, self.around.patience)?;
        let mut request = ConnectRequest::new();
        request.id.clone_from(&self.id);
        let response: ConnectResponse = connection.task("Connect", &request)?;
        self.shim_pid = i32::try_from(response.shim_pid).ok().filter(|pid| *pid > 0);
        self.shim = Some(connection);
        Ok(())
    }

    /// The connection, after [`Container::connect`]; none once a signal has come.
    pub fn shim(&self) -> Result<&Connection> {
        interrupt::check()?;
        self.shim.as_ref().context("the shim is not connected")
    }

    /// Create, with the shared root bound to the bundle's.
    pub fn create(&self, stdio: &Fifos) -> Result<()> {
        let root = &self.around.root;
        self.create_over(stdio, ("bind", root, &["rbind", "rw"]))
    }

    /// Create, with a root of one mount: its type, source and options.
    pub fn create_over(
        &self,
        stdio: &Fifos,
        (kind, source, options): (&str, &Path, &[&str]),
    ) -> Result<()> {
        let mut request = CreateTaskRequest::new();
        request.id.clone_from(&self.id);
        request.bundle = self.folder.display().to_string();
        request.stdin = path(stdio.stdin.as_ref());
        request.stdout = path(stdio.stdout.as_ref());
        request.stderr = path(stdio.stderr.as_ref());
        let mut root = Mount::new();
        root.type_ = kind.to_owned();
        root.source = source.display().to_string();
        root.options = options.iter().map(|option| (*option).to_owned()).collect();
        request.rootfs.push(root);
        let _: CreateTaskResponse = self.shim()?.task("Create", &request)?;
        Ok(())
    }

    /// Start of the init (empty `exec`) or of an exec.
    pub fn start(&self, exec: &str) -> Result<()> {
        let mut request = StartRequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec.to_owned();
        let _: StartResponse = self.shim()?.task("Start", &request)?;
        Ok(())
    }

    /// Adds an exec.
    pub fn exec(&self, exec: &str, args: &[&str], stdio: &Fifos) -> Result<()> {
        let mut request = ExecProcessRequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec.to_owned();
        request.stdin = path(stdio.stdin.as_ref());
        request.stdout = path(stdio.stdout.as_ref());
        request.stderr = path(stdio.stderr.as_ref());
        let spec = request.spec.mut_or_insert_default();
        spec.type_url = PROCESS_TYPE.to_owned();
        spec.value = serde_json::to_vec(&process(args))?;
        let _: Empty = self.shim()?.task("Exec", &request)?;
        Ok(())
    }

    /// Ends a process's stdin.
    pub fn close_stdin(&self, exec: &str) -> Result<()> {
        let mut request = containerd_shim_protos::api::CloseIORequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec.to_owned();
        request.stdin = true;
        let _: Empty = self.shim()?.task("CloseIO", &request)?;
        Ok(())
    }

    /// Waits for a process's end; its exit status.
    pub fn wait(&self, exec: &str) -> Result<u32> {
        let mut request = WaitRequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec.to_owned();
        let response: WaitResponse = self.shim()?.task("Wait", &request)?;
        Ok(response.exit_status)
    }

    /// SIGKILL for the init and all else in the container.
    pub fn kill(&self) -> Result<()> {
        let mut request = KillRequest::new();
        request.id.clone_from(&self.id);
        request.signal = libc::SIGKILL as u32;
        request.all = true;
        let _: Empty = self.shim()?.task("Kill", &request)?;
        Ok(())
    }

    /// Frees a process.
    pub fn delete(&self, exec: &str) -> Result<()> {
        let mut request = DeleteRequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec.to_owned();
        let _: DeleteResponse = self.shim()?.task("Delete", &request)?;
        Ok(())
    }

    /// Tells the shim to end, and waits until its process has.
    pub fn shut_down(&mut self) -> Result<()> {
        let mut request = ShutdownRequest::new();
        request.id.clone_from(&self.id);
        // The connection may end before the answer.
        let _ = self.shim()?.task::<Empty>("Shutdown", &request);
        self.shim = None;
        if let Some(pid) = self.shim_pid {
            let began = Instant::now();
            while alive(pid) {
                interrupt::check()?;
                ensure!(
                    began.elapsed() < self.around.patience,
                    "the shim of {} (process {pid}) does not end",
                    self.id
                );
                std::thread::sleep(Duration::from_millis(1));
            }
            self.shim_pid = None;
        }
        Ok(())
    }

    /// From nothing to a container whose init runs.
    pub fn running(around: &'s Surroundings, peer: &Peer, args: &[&str]) -> Result<Self> {
        let mut container = Self::bundle(around, peer, args)?;
        let answer = container.start_shim()?;
        container.connect(&answer)?;
        container.create(&Fifos::default())?;
        container.start("")?;
        Ok(container)
    }

    /// The ordinary end of one.
    pub fn end(mut self) -> Result<()> {
        self.kill()?;
        self.wait("")?;
        self.delete("")?;
        self.shut_down()
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        self.shim = None;
        if let Some(pid) = self.shim_pid.take().filter(|pid| alive(*pid)) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            let began = Instant::now();
            while alive(pid) && began.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        // containerd, too, calls it after every shim; it frees what a dead one has left.
        if let Err(error) = self.run("delete") {
            eprintln!("nacre-bench: {error:#}");
        }
        let rootfs = self.folder.join("rootfs");
        while umount2(&rootfs, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
        // Never into a root that would still be mounted there.
        let _ = fs::remove_dir(&rootfs);
        if !rootfs.exists() {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

fn alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// What a container has in common with the host.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Joined<'a> {
    /// Directories that are bound into it: from where, to where.
    pub binds: &'a [(&'a Path, &'a str)],
    /// Its network namespace. Without one, runc's container has the host's, and nacre's loopback.
    pub netns: Option<&'a Path>,
}

/// The specification of a container that runs `args`.
pub(super) fn specification(args: &[&str], joined: &Joined<'_>, cgroup: &str) -> serde_json::Value {
    let mut mounts = vec![
        json!({ "destination": "/proc", "type": "proc", "source": "proc" }),
        json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] }),
    ];
    mounts.extend(joined.binds.iter().map(|(from, to)| {
        json!({ "destination": to, "type": "bind", "source": from, "options": ["bind", "rw"] })
    }));
    let mut namespaces = ["pid", "mount", "ipc", "uts"]
        .map(|kind| json!({ "type": kind }))
        .to_vec();
    namespaces.extend(
        joined
            .netns
            .map(|path| json!({ "type": "network", "path": path })),
    );
    json!({
        "ociVersion": "1.1.0",
        "process": process(args),
        "root": { "path": "rootfs" },
        "hostname": "bench",
        "mounts": mounts,
        "linux": { "cgroupsPath": cgroup, "namespaces": namespaces },
    })
}

/// The process of a container or an exec.
pub(super) fn process(args: &[&str]) -> serde_json::Value {
    json!({
        "user": { "uid": 0, "gid": 0 },
        "args": args,
        "env": ["PATH=/bin:/usr/bin:/sbin:/usr/sbin"],
        "cwd": "/",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_lives_and_a_reaped_one_does_not() {
        assert!(alive(std::process::id() as i32));
        let mut child = Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        child.wait().unwrap();
        assert!(!alive(pid));
    }
}
