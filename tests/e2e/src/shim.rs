//! Drives the shim's program directly, as containerd would: bundles, start,
//! delete, and calls over its socket.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api::{
    ConnectRequest, ConnectResponse, DeleteResponse, ShutdownRequest,
};
use containerd_shim_protos::bootstrap_api::BootstrapParams;
use nacre::bench::shim::{self, Answer};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use protobuf::Message;
use serde_json::json;

use crate::context::{Context, NAMESPACE, Runtime};
use crate::ctr::{self, Output};
use crate::image;
use crate::poll;
use crate::processes::{self, Process};

/// How long a call may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// How containerd says what it wants on `start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// 2.3 and later: `BootstrapParams` on stdin.
    Params,
    /// 1.7 to 2.2: `MAX_SHIM_VERSION=2`.
    Version2,
    /// 1.6: nothing.
    Bare,
}

/// A bundle with a small container in it, and the shim that was started for it.
/// What it made is undone when dropped.
#[derive(Debug)]
pub(crate) struct Bundle<'a> {
    context: &'a Context,
    pub namespace: String,
    pub id: String,
    pub folder: PathBuf,
    /// Set for the shim's program, beside what containerd sets.
    pub environment: Vec<(&'static str, String)>,
}

/// Writes a small container's configuration with this program into a folder, and makes its empty root.
pub(crate) fn write_config(
    folder: &Path,
    annotations: &[(&str, &str)],
    args: &[&str],
) -> Result<()> {
    fs::create_dir_all(folder.join("rootfs"))?;
    let annotations: serde_json::Map<String, serde_json::Value> = annotations
        .iter()
        .map(|(key, value)| ((*key).to_owned(), json!(value)))
        .collect();
    let spec = json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": args,
            "env": ["PATH=/bin"],
            "cwd": "/",
        },
        "root": { "path": "rootfs" },
        "hostname": "bundle",
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
        "annotations": annotations,
        "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" }, { "type": "network" }] },
    });
    Ok(fs::write(
        folder.join("config.json"),
        serde_json::to_vec_pretty(&spec)?,
    )?)
}

impl<'a> Bundle<'a> {
    /// A bundle with these annotations in its config.json, and nothing in its root.
    pub fn new(
        context: &'a Context,
        namespace: &str,
        id: &str,
        annotations: &[(&str, &str)],
    ) -> Result<Self> {
        Bundle::with_program(context, namespace, id, annotations, &["sleep", "1000"])
    }

    /// A bundle in the suite's namespace with the image's files, whose program is `sh -c SCRIPT`.
    pub fn script(context: &'a Context, name: &str, script: &str) -> Result<Self> {
        let args = ["sh", "-c", script];
        let bundle = Bundle::with_program(context, NAMESPACE, &context.id(name), &[], &args)?;
        image::unpack(&context.programs.busybox, &bundle.folder.join("rootfs"))?;
        Ok(bundle)
    }

    fn with_program(
        context: &'a Context,
        namespace: &str,
        id: &str,
        annotations: &[(&str, &str)],
        args: &[&str],
    ) -> Result<Self> {
        let folder = context.path("bundles").join(id);
        write_config(&folder, annotations, args)?;
        Ok(Bundle {
            context,
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            folder,
            environment: Vec::new(),
        })
    }

    /// A bundle in the suite's namespace without annotations.
    pub fn plain(context: &'a Context, name: &str) -> Result<Self> {
        Bundle::new(context, NAMESPACE, &context.id(name), &[])
    }

    fn command(&self, action: &str) -> Command {
        let mut command = Command::new(self.context.programs.shim());
        command.current_dir(&self.folder);
        command.args(["-namespace", &self.namespace, "-id", &self.id]);
        command.args(["-address", "/run/no-containerd-here.sock"]);
        if action == "delete" {
            command.arg("-bundle").arg(&self.folder);
        }
        command.arg(action);
        command
            .env("TTRPC_ADDRESS", "/run/no-containerd-here.sock.ttrpc")
            .env("GOMAXPROCS", "2");
        command.env_remove("MAX_SHIM_VERSION");
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// `start` as a containerd of that dialect calls it.
    pub fn start(&self, dialect: Dialect) -> Result<Output> {
        let input = match dialect {
            Dialect::Params => {
                let mut params = BootstrapParams::new();
                params.instance_id.clone_from(&self.id);
                params.namespace.clone_from(&self.namespace);
                params.containerd_version = "v2.3.0".into();
                params.containerd_ttrpc_address = "/run/no-containerd-here.sock.ttrpc".into();
                params.containerd_grpc_address = "/run/no-containerd-here.sock".into();
                params.write_to_bytes()?
            }
            Dialect::Version2 | Dialect::Bare => Vec::new(),
        };
        self.start_with(dialect, &input)
    }

    /// `start` in the environment of that dialect, with this on its standard input.
    pub fn start_with(&self, dialect: Dialect, input: &[u8]) -> Result<Output> {
        let mut command = self.command("start");
        if dialect == Dialect::Version2 {
            command.env("MAX_SHIM_VERSION", "2");
        }
        ctr::run_with_input(&mut command, input)
    }

    /// `start`, the address out of its answer, and that nothing else was said.
    pub fn started(&self, dialect: Dialect) -> Result<String> {
        let output = self.start(dialect)?;
        output.expect_code(0)?;
        ensure!(
            output.stderr.is_empty(),
            "start wrote to stderr: {:?}",
            output.err()
        );
        address_in(dialect, &output.stdout)
    }

    /// `delete`, and its answer.
    pub fn delete(&self) -> Result<DeleteResponse> {
        let output = ctr::run(&mut self.command("delete"))?;
        output.expect_code(0)?;
        DeleteResponse::parse_from_bytes(&output.stdout)
            .with_context(|| format!("delete answered with {:?}", output.out()))
    }

    /// The daemon's processes.
    pub fn processes(&self) -> Vec<Process> {
        processes::shims(Runtime::Nacre.shim(), &self.id)
    }

    /// Kills the daemon at once, and waits until it is gone.
    pub fn kill(&self) -> Result<()> {
        let found = self.processes();
        ensure!(
            !found.is_empty(),
            "there is no shim process for {}",
            self.id
        );
        for process in &found {
            eprintln!("  killing {}", process.describe());
            processes::signal(process.pid, Signal::SIGKILL);
        }
        self.wait_until_gone(5)
    }

    /// Waits until no process of the daemon is there.
    pub fn wait_until_gone(&self, seconds: u64) -> Result<()> {
        let what = format!("the end of the shim of {}", self.id);
        poll::until(&what, self.context.seconds(seconds), || {
            Ok(self.processes().is_empty().then_some(()))
        })
    }
}

impl Drop for Bundle<'_> {
    fn drop(&mut self) {
        for process in self.processes() {
            processes::signal(process.pid, Signal::SIGKILL);
        }
        let _ = self.wait_until_gone(5);
        let _ = self.delete();
    }
}

/// The socket's path in what `start` answered, in the dialect that was asked for.
pub(crate) fn address_in(dialect: Dialect, answer: &[u8]) -> Result<String> {
    let (form, version) = match dialect {
        Dialect::Bare => (answer.starts_with(b"unix://"), 2),
        Dialect::Version2 => (answer.starts_with(b"{"), 2),
        Dialect::Params => (!answer.starts_with(b"unix://"), 3),
    };
    ensure!(
        form,
        "a containerd of {dialect:?} gets {:?}",
        String::from_utf8_lossy(answer)
    );
    let answer = Answer::parse(answer)?;
    ensure!(
        answer.version == version,
        "version {} instead of {version}",
        answer.version
    );
    Ok(answer.socket)
}

/// A connection to a shim.
pub(crate) struct Connection(shim::Connection);

impl Connection {
    /// Dials once, as containerd does.
    pub fn dial(path: &str) -> Result<Self> {
        let answer = Answer {
            socket: path.to_owned(),
            version: 3,
        };
        shim::Connection::dial(&answer, PATIENCE).map(Connection)
    }

    /// A call by the name of its service.
    pub fn call(&self, service: &str, method: &str, payload: Vec<u8>) -> Result<Vec<u8>> {
        self.0.call(service, method, payload)
    }

    /// Connect of this service; the answer has the shim's pid.
    pub fn connect(&self, service: &str, id: &str) -> Result<ConnectResponse> {
        let mut request = ConnectRequest::new();
        request.id = id.to_owned();
        let payload = self.call(service, "Connect", request.write_to_bytes()?)?;
        Ok(ConnectResponse::parse_from_bytes(&payload)?)
    }

    /// Shutdown; the connection may end before its answer.
    pub fn shutdown(&self, id: &str) -> Result<()> {
        let mut request = ShutdownRequest::new();
        request.id = id.to_owned();
        request.now = true;
        let _ = self.call(
            "containerd.task.v2.Task",
            "Shutdown",
            request.write_to_bytes()?,
        );
        Ok(())
    }
}

/// Becomes a program in a mount namespace whose /dev has a few devices and no kvm.
pub(crate) fn exec_without_kvm(command: &[OsString]) -> anyhow::Error {
    let prepare = || -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace")?;
        // Mounts made outside still arrive, and none goes back.
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_SLAVE | MsFlags::MS_REC,
            None::<&str>,
        )
        .context("making mounts one-way")?;
        mount(
            Some("dev"),
            "/dev",
            Some("tmpfs"),
            MsFlags::MS_NOSUID,
            Some("mode=755"),
        )
        .context("an empty /dev")?;
        for (name, major, minor) in [
            ("null", 1, 3),
            ("zero", 1, 5),
            ("full", 1, 7),
            ("random", 1, 8),
            ("urandom", 1, 9),
            ("tty", 5, 0),
        ] {
            use nix::sys::stat::{Mode, SFlag, makedev, mknod};
            let path = format!("/dev/{name}");
            mknod(
                path.as_str(),
                SFlag::S_IFCHR,
                Mode::from_bits_truncate(0o666),
                makedev(major, minor),
            )
            .with_context(|| format!("making {path}"))?;
        }
        Ok(())
    };
    if let Err(error) = prepare() {
        return error.context("hiding /dev/kvm");
    }
    let Some((program, arguments)) = command.split_first() else {
        return anyhow::anyhow!("no program");
    };
    anyhow::Error::from(Command::new(program).args(arguments).exec())
        .context("starting the program")
}
