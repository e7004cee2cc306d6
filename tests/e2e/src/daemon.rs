//! A private containerd: its own root, state and socket, ended and removed when dropped.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;

use crate::context::{self, Daemon, IMAGE, NAMESPACE, Programs, Version};
use crate::disk;
use crate::poll;
use crate::processes;

/// A containerd that this process started.
pub(crate) struct Running {
    child: Child,
    command: Command,
    /// What it says, appended.
    pub log: PathBuf,
    folder: PathBuf,
    pub daemon: Daemon,
    ready_within: Duration,
}

impl Running {
    /// Starts it, with this level of its log, and imports the image.
    pub fn start(
        version: Version,
        programs: &Programs,
        image: &Path,
        logs: &Path,
        level: &str,
        patience: f64,
    ) -> Result<Self> {
        let programs_folder = version.folder()?;
        let folder = PathBuf::from(format!(
            "/run/nacre-e2e-{}-{}",
            version.text(),
            std::process::id()
        ));
        let shims = folder.join("shims");
        fs::create_dir_all(&shims).with_context(|| format!("making {}", shims.display()))?;
        let (root, state) = (folder.join("root"), folder.join("state"));
        let address = folder.join("containerd.sock");
        let config = folder.join("config.toml");
        let scratch = folder.join("scratch.img");
        disk::empty(&scratch, 48)?;
        fs::write(
            &config,
            format!(
                "version = 2\nroot = {root:?}\nstate = {state:?}\n\
                 disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \"io.containerd.cri.v1.runtime\", \
                 \"io.containerd.internal.v1.opt\", \"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.devmapper\", \
                 \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.tracing.processor.v1.otlp\"]\n\
                 [grpc]\naddress = {address:?}\n[ttrpc]\naddress = \"{}.ttrpc\"\n[debug]\nlevel = {level:?}\n\
                 [plugins.\"io.containerd.snapshotter.v1.blockfile\"]\nroot_path = {:?}\nscratch_file = {scratch:?}\n\
                 fs_type = \"ext4\"\nrecreate_scratch = true\n",
                address.display(),
                folder.join("blockfile"),
            ),
        )?;
        let log = logs.join(format!("containerd-{}.log", version.text()));
        let mut command = Command::new(programs_folder.join("containerd"));
        command
            .arg("--config")
            .arg(&config)
            .env("PATH", search_path(&shims, programs, &programs_folder)?)
            .env("NACRE_KERNEL", &programs.kernel)
            .env("NACRE_INITRD", &programs.initrd)
            .stdin(Stdio::null());
        let child = spawn(&mut command, &log)?;
        let daemon = Daemon {
            version,
            pid: child.id() as i32,
            ctr: programs_folder.join("ctr"),
            address,
            root,
            state,
            shims,
        };
        let mut running = Running {
            child,
            command,
            log,
            folder,
            daemon,
            ready_within: Duration::from_secs_f64(60.0 * patience),
        };
        running.wait_until_ready()?;
        // Each opens its database, for good, when it first has something to do. The older containerd has no erofs.
        for snapshotter in ["overlayfs", "native", "blockfile", "erofs"] {
            for action in ["prepare", "remove"] {
                let _ = running.ctr(&["snapshots", "--snapshotter", snapshotter, action, "first"]);
            }
        }
        running
            .ctr(&["images", "import", "--local", &image.to_string_lossy()])
            .or_else(|_| {
                // 1.7 imports locally without being told, and does not know the option.
                running.ctr(&["images", "import", &image.to_string_lossy()])
            })?;
        Ok(running)
    }

    /// Ends it by this signal; its containers go on.
    pub fn stop(&mut self, by: Signal) -> Result<()> {
        processes::signal(self.daemon.pid, by);
        poll::until("containerd's end", Duration::from_secs(20), || {
            Ok(self.child.try_wait()?)
        })?;
        Ok(())
    }

    /// Starts it again where it was.
    pub fn start_again(&mut self) -> Result<()> {
        self.child = spawn(&mut self.command, &self.log)?;
        self.daemon.pid = self.child.id() as i32;
        self.wait_until_ready()
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + self.ready_within;
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!(
                    "containerd {} ended at once: {status}",
                    self.daemon.version.text()
                );
            }
            match self.ctr(&["version"]) {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context("containerd does not answer"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    }

    /// Runs `ctr` in the suite's namespace.
    pub fn ctr(&self, arguments: &[&str]) -> Result<()> {
        let output = Command::new(&self.daemon.ctr)
            .arg("--address")
            .arg(&self.daemon.address)
            .args(["--namespace", NAMESPACE])
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .context("running ctr")?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            bail!("ctr {}: {}", arguments.join(" "), text.trim());
        }
        Ok(())
    }

    /// What containers and tasks are still known.
    pub fn known(&self) -> Vec<String> {
        let mut known = Vec::new();
        for (kind, arguments) in [
            ("task", &["tasks", "list", "-q"][..]),
            ("container", &["containers", "list", "-q"]),
            ("snapshot", &["snapshots", "list"]),
        ] {
            let output = Command::new(&self.daemon.ctr)
                .arg("--address")
                .arg(&self.daemon.address)
                .args(["--namespace", NAMESPACE])
                .args(arguments)
                .output();
            let Ok(output) = output else { continue };
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            for line in text.lines() {
                // Snapshots of images stay; those of containers are active.
                if kind != "snapshot" {
                    known.push(format!("{kind} {line}"));
                } else if line.contains("Active") {
                    known.push(format!(
                        "snapshot {}",
                        line.split_whitespace().next().unwrap_or("")
                    ));
                }
            }
        }
        known
    }

    /// Removes every container of the suite.
    pub fn sweep(&self) {
        for line in self.known() {
            let _ = match line.split_once(' ') {
                Some(("task", id)) => {
                    let _ = self.ctr(&["tasks", "kill", "-s", "SIGKILL", id]);
                    self.ctr(&["tasks", "delete", "--force", id])
                }
                Some(("container", id)) => self.ctr(&["containers", "delete", id]),
                Some(("snapshot", id)) => self.ctr(&["snapshots", "delete", id]),
                _ => Ok(()),
            };
        }
    }

    /// Whether it still runs.
    pub fn alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.sweep();
        let _ = self.ctr(&["images", "delete", "--sync", IMAGE]);
        processes::signal(self.daemon.pid, Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.alive() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Where containerd finds shims and runc.
fn search_path(shims: &Path, programs: &Programs, containerd: &Path) -> Result<std::ffi::OsString> {
    let mut path = vec![
        shims.to_owned(),
        programs.bin.clone(),
        containerd.to_owned(),
    ];
    if let Some(runc) = std::env::var_os("NACRE_RUNC").map(PathBuf::from) {
        path.extend(runc.parent().map(Path::to_owned));
    }
    path.extend(std::env::split_paths(
        &std::env::var_os("PATH").unwrap_or_default(),
    ));
    Ok(std::env::join_paths(path)?)
}

fn spawn(command: &mut Command, log: &Path) -> Result<Child> {
    let log = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("opening {}", log.display()))?;
    command
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("starting containerd")
}

/// Where a log of the suite goes if nobody says it.
pub(crate) fn default_logs() -> Result<PathBuf> {
    let logs = match std::env::var_os("NACRE_OUT") {
        Some(folder) => PathBuf::from(folder),
        None => std::env::temp_dir().join(format!("nacre-e2e-logs-{}", std::process::id())),
    };
    fs::create_dir_all(&logs).with_context(|| format!("making {}", logs.display()))?;
    Ok(logs)
}

/// The programs that the cases of nacre need.
pub(crate) fn check_nacre(programs: &context::Programs) -> Result<()> {
    for file in [
        &programs.shim(),
        &programs.vmctl(),
        &programs.kernel,
        &programs.initrd,
    ] {
        if !file.is_file() {
            bail!("there is no {}", file.display());
        }
    }
    Ok(())
}
