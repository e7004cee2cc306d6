//! The task service of a shim, called directly: typed calls whose refusals keep
//! their code, and containers out of a bundle.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use containerd_shim_protos::Client;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PidsRequest, PidsResponse, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::ttrpc::{Code, Error, Request};
use containerd_shim_protos::types::mount::Mount;
use serde_json::json;

/// Why a call was refused.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    /// None when the connection ended before the answer.
    pub code: Option<Code>,
    pub message: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", name(self.code), self.message)
    }
}

impl std::error::Error for Refusal {}

/// The code's name in the protocol; a connection that ended has a name too.
pub(crate) fn name(code: Option<Code>) -> String {
    code.map_or_else(
        || "the connection's end".to_owned(),
        |code| format!("{code:?}"),
    )
}

/// An answer or a refusal.
pub(crate) type Answer<T> = std::result::Result<T, Refusal>;

/// Fails unless the call was refused with this code.
pub(crate) fn expect_refusal<T: std::fmt::Debug>(
    what: &str,
    answer: Answer<T>,
    code: Code,
) -> Result<String> {
    match answer {
        Ok(answer) => bail!("{what} is answered with {answer:?}"),
        Err(refusal) if refusal.code == Some(code) => {
            eprintln!("  {what}: {refusal}");
            Ok(refusal.message)
        }
        Err(refusal) => bail!("{what} is refused with {refusal} instead of {code:?}"),
    }
}

/// Where a process's streams go; empty for none.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stdio {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
}

/// A connection to a shim's task service. Clones share it and may call at once.
#[derive(Clone)]
pub(crate) struct Tasks(Client);

impl Tasks {
    /// Dials once.
    pub fn dial(path: &str) -> Result<Self> {
        let client = Client::connect(&format!("unix://{path}"))
            .with_context(|| format!("dialling {path}"))?;
        Ok(Tasks(client))
    }

    fn call<A: Message>(&self, method: &str, request: &impl Message) -> Answer<A> {
        let mut frame = Request::new();
        frame.service = "containerd.task.v2.Task".to_owned();
        frame.method = method.to_owned();
        // An emulated machine is slow; what must be quick is measured where it is asked for.
        frame.timeout_nano = 120_000_000_000;
        let broken = |message: String| Refusal {
            code: None,
            message,
        };
        frame.payload = request
            .write_to_bytes()
            .map_err(|error| broken(error.to_string()))?;
        match self.0.request(frame) {
            Ok(response) => match response.status.code.enum_value_or_default() {
                Code::OK => A::parse_from_bytes(&response.payload)
                    .map_err(|error| broken(error.to_string())),
                code => Err(Refusal {
                    code: Some(code),
                    message: response.status.message.clone(),
                }),
            },
            Err(Error::RpcStatus(status)) => Err(Refusal {
                code: Some(status.code.enum_value_or_default()),
                message: status.message,
            }),
            Err(error) => Err(broken(error.to_string())),
        }
    }

    /// Create of a container whose root is in its bundle.
    pub fn create(&self, id: &str, bundle: &Path, stdio: &Stdio) -> Answer<CreateTaskResponse> {
        self.create_over(id, bundle, stdio, &[])
    }

    /// Create of a container with this root.
    pub fn create_over(
        &self,
        id: &str,
        bundle: &Path,
        stdio: &Stdio,
        root: &[Mount],
    ) -> Answer<CreateTaskResponse> {
        let mut request = CreateTaskRequest::new();
        request.id = id.to_owned();
        request.bundle = bundle.display().to_string();
        request.stdin.clone_from(&stdio.stdin);
        request.stdout.clone_from(&stdio.stdout);
        request.stderr.clone_from(&stdio.stderr);
        request.rootfs = root.to_vec();
        self.call("Create", &request)
    }

    pub fn start(&self, id: &str, exec_id: &str) -> Answer<StartResponse> {
        let mut request = StartRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        self.call("Start", &request)
    }

    /// Adds `sh -c SCRIPT`.
    pub fn exec(&self, id: &str, exec_id: &str, script: &str, stdio: &Stdio) -> Answer<Empty> {
        let process = json!({
            "user": { "uid": 0, "gid": 0 },
            "args": ["sh", "-c", script],
            "env": ["PATH=/bin"],
            "cwd": "/",
        });
        let mut spec = Any::new();
        spec.type_url = "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned();
        spec.value = process.to_string().into_bytes();
        let mut request = ExecProcessRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        request.stdin.clone_from(&stdio.stdin);
        request.stdout.clone_from(&stdio.stdout);
        request.stderr.clone_from(&stdio.stderr);
        request.spec = MessageField::some(spec);
        self.call("Exec", &request)
    }

    pub fn kill(&self, id: &str, exec_id: &str, signal: i32, all: bool) -> Answer<Empty> {
        let mut request = KillRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        request.signal = signal as u32;
        request.all = all;
        self.call("Kill", &request)
    }

    pub fn wait(&self, id: &str, exec_id: &str) -> Answer<WaitResponse> {
        let mut request = WaitRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        self.call("Wait", &request)
    }

    pub fn delete(&self, id: &str, exec_id: &str) -> Answer<DeleteResponse> {
        let mut request = DeleteRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        self.call("Delete", &request)
    }

    pub fn state(&self, id: &str, exec_id: &str) -> Answer<StateResponse> {
        let mut request = StateRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        self.call("State", &request)
    }

    pub fn pids(&self, id: &str) -> Answer<PidsResponse> {
        let mut request = PidsRequest::new();
        request.id = id.to_owned();
        self.call("Pids", &request)
    }

    pub fn connect(&self, id: &str) -> Answer<ConnectResponse> {
        let mut request = ConnectRequest::new();
        request.id = id.to_owned();
        self.call("Connect", &request)
    }

    pub fn close_stdin(&self, id: &str, exec_id: &str) -> Answer<Empty> {
        let mut request = CloseIORequest::new();
        request.id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        request.stdin = true;
        self.call("CloseIO", &request)
    }

    pub fn checkpoint(&self, id: &str) -> Answer<Empty> {
        let mut request = CheckpointTaskRequest::new();
        request.id = id.to_owned();
        self.call("Checkpoint", &request)
    }

    pub fn shutdown(&self, id: &str) -> Answer<Empty> {
        let mut request = ShutdownRequest::new();
        request.id = id.to_owned();
        request.now = true;
        self.call("Shutdown", &request)
    }
}

/// A FIFO that both sides may open.
pub(crate) fn fifo(folder: &Path, name: &str) -> Result<(PathBuf, String)> {
    let path = folder.join(name);
    let _ = fs::remove_file(&path);
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600))
        .with_context(|| format!("making {}", path.display()))?;
    let text = path.display().to_string();
    Ok((path, text))
}
