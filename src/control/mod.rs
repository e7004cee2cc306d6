//! Each VM's control socket: what `vmctl list`, `inspect` and `top` speak to. The
//! service is thin: [`serve`] puts a [`Target`] on a Unix socket, [`Client`]
//! asks one. What is answered is an [`Inspection`] or a [`Usage`].

mod resize;
mod timings;
mod usage;
mod wire;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use ttrpc::r#async::TtrpcContext;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::sandbox::clock::ClockReading;
use crate::sandbox::resize::Resized;
use crate::sandbox::{BootPhases, ExitReason};

#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks,
    rust_2018_idioms,
    unused
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/control_stubs.rs"));
}

use generated::{control as proto, control_ttrpc};

pub use timings::{Phase, Series, Timings, ms};
pub use usage::Usage;

/// Name of the socket in a VM's state directory.
pub const SOCKET: &str = "control.sock";

/// A control socket cannot be served or asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket cannot be made.
    #[error("Cannot serve the control socket {}", path.display())]
    Serve {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Nobody answers on the socket.
    #[error("Cannot reach the control socket {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The VM's process did not do it; its words say why, and what was undone.
    #[error("{0}")]
    Refused(String),
    /// The call failed.
    #[error("The control socket {} did not answer {call}: {cause}", path.display())]
    Call {
        /// The socket.
        path: PathBuf,
        /// The call.
        call: &'static str,
        /// What ttrpc said.
        cause: String,
    },
}

/// State of a VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The agent is not ready yet.
    Booting,
    /// The agent is ready.
    Running,
    /// The VM runs, the agent will not be ready any more.
    Failed,
    /// The VM has ended.
    #[default]
    Ended,
}

impl State {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Booting => "booting",
            Self::Running => "running",
            Self::Failed => "failed",
            Self::Ended => "ended",
        }
    }

    fn named(name: &str) -> Self {
        [Self::Booting, Self::Running, Self::Failed]
            .into_iter()
            .find(|state| state.as_str() == name)
            .unwrap_or(Self::Ended)
    }
}

/// A device of the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its virtio-mmio window.
    pub window: Option<u8>,
    /// e.g. `block`.
    pub kind: String,
    /// e.g. the image's path.
    pub detail: String,
    /// Of a network device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic: Option<Traffic>,
}

/// The link of a network device, and what has gone through it since it was plugged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Whether the guest is told that the link is up.
    pub link_up: bool,
    /// Frames that the guest got.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames for the guest that it had no room for, or that the host's kernel could not give.
    pub receive_dropped: u64,
    /// Frames that the guest sent and the host took.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames of the guest that the host refused.
    pub send_dropped: u64,
}

/// Guest memory by its parts, MiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// What the VM began with.
    pub boot_mib: u64,
    /// What is plugged.
    pub plugged_mib: u64,
    /// The most that there may be.
    pub max_mib: u64,
    /// What the guest has given back through the balloon device since it began; memory that is used and given back again counts
    /// again.
    pub given_back_mib: u64,
}

/// A size to be; what is absent stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wanted {
    /// vCPUs.
    pub vcpus: Option<u8>,
    /// MiB, all together.
    pub memory_mib: Option<u64>,
}

/// What was changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Changed {
    /// vCPUs, if they were asked for.
    pub vcpus: Option<Resized>,
    /// Memory, if it was asked for.
    pub memory: Option<Resized>,
}

/// What there is to see of a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Inspection {
    /// Sandbox id.
    pub id: String,
    /// containerd namespace, or `vmctl`.
    pub namespace: String,
    /// Host process that holds the VM.
    pub pid: u32,
    /// How far it is.
    pub state: State,
    /// vCPUs.
    pub vcpus: u32,
    /// Most vCPUs that there may be.
    pub max_vcpus: u32,
    /// Memory in MiB, all together.
    pub memory_mib: u64,
    /// Its parts.
    pub memory: Memory,
    /// Kernel file.
    pub kernel: String,
    /// initrd file.
    pub initrd: String,
    /// The guest's `uname -r`, empty until the agent is ready.
    pub kernel_release: String,
    /// The agent's build, empty until it is ready.
    pub agent_build: String,
    /// Boot phases.
    pub phases: BootPhases,
    /// vCPU exits by reason.
    pub exits: BTreeMap<String, u64>,
    /// Ejects of vCPUs and units of ACPI memory that nobody had asked the guest for.
    pub unasked_ejects: u64,
    /// Containers.
    pub containers: Vec<String>,
    /// Devices.
    pub devices: Vec<Device>,
    /// Phases of the containers' lives, of the last ones that were deleted too.
    pub timings: Vec<Timings>,
}

/// What a control socket serves.
#[async_trait]
pub trait Target: Send + Sync {
    /// What there is to see. Must not wait for the guest.
    fn inspect(&self) -> Inspection;
    /// What the guest uses of its memory, in bytes, if it says so at once.
    async fn memory_used(&self) -> Option<u64>;
    /// How far the guest's wall clock is from the host's, if it says so at once.
    async fn clock(&self) -> Option<ClockReading>;
    /// Changes the VM's size; what went wrong is in words.
    async fn resize(&self, wanted: Wanted) -> Result<Changed, String>;
    /// Ends the VM in order and answers how it ended.
    async fn stop(&self) -> ExitReason;
}

/// A served control socket; dropping it closes and removes it.
pub struct Served {
    path: PathBuf,
    // Its drop ends the connections.
    _server: Server,
    accepting: tokio::task::JoinHandle<()>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.accepting.abort();
        // It may be gone already with its directory.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Serves `target` on a fresh socket of mode 0600 at `path`; a stale one is replaced. Needs a tokio runtime.
pub async fn serve(path: &Path, target: Arc<dyn Target>) -> Result<Served, Error> {
    let failed = |source| Error::Serve {
        path: path.to_owned(),
        source,
    };
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    // The state directory is 0700, so no one slips in before the mode is set.
    let listener = tokio::net::UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let (accepted, connections) = tokio::sync::mpsc::channel(4);
    let accepting = tokio::spawn(async move {
        loop {
            let connection = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept on the control socket");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            if accepted.send(connection).await.is_err() {
                return;
            }
        }
    });
    let connections = futures::stream::unfold(connections, |mut connections| async move {
        connections
            .recv()
            .await
            .map(|stream| (Ok::<_, std::io::Error>(stream), connections))
    });
    let mut server = Server::new()
        .add_listener(Listener::new(connections))
        .register_service(control_ttrpc::create_control(Arc::new(Service(target))));
    server
        .start()
        .await
        .map_err(|error| failed(std::io::Error::other(error.to_string())))?;
    Ok(Served {
        path: path.to_owned(),
        _server: server,
        accepting,
    })
}

/// How long the guest has to say what it uses of its memory.
const USED_WITHIN: Duration = Duration::from_secs(2);

struct Service(Arc<dyn Target>);

impl Service {
    async fn read_usage(&self) -> Result<Usage, String> {
        let used = tokio::time::timeout(USED_WITHIN, self.0.memory_used()).await;
        let used_mib = used.ok().flatten().map(|bytes| bytes >> 20);
        let clock = tokio::time::timeout(USED_WITHIN, self.0.clock()).await;
        let clock = clock.ok().flatten();
        let target = self.0.clone();
        // The kernel looks at every page of the guest.
        tokio::task::spawn_blocking(move || {
            Usage::of_this_process(target.inspect(), used_mib, clock)
        })
        .await
        .map_err(|error| error.to_string())
    }
}

#[async_trait]
impl control_ttrpc::Control for Service {
    async fn inspect(
        &self,
        _context: &TtrpcContext,
        _request: proto::InspectRequest,
    ) -> ttrpc::Result<proto::InspectResponse> {
        Ok(self.0.inspect().into())
    }

    async fn usage(
        &self,
        _context: &TtrpcContext,
        _request: proto::UsageRequest,
    ) -> ttrpc::Result<proto::UsageResponse> {
        let usage = self.read_usage().await;
        usage.map(Into::into).map_err(|error| {
            ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INTERNAL, error))
        })
    }

    async fn resize(
        &self,
        _context: &TtrpcContext,
        request: proto::ResizeRequest,
    ) -> ttrpc::Result<proto::ResizeResponse> {
        let failed = |code, error: String| ttrpc::Error::RpcStatus(ttrpc::get_status(code, error));
        let wanted = resize::wanted(&request)
            .map_err(|error| failed(ttrpc::Code::INVALID_ARGUMENT, error))?;
        let target = self.0.clone();
        // A client that gives up leaves nothing half done.
        let changed = tokio::spawn(async move { target.resize(wanted).await }).await;
        changed
            .unwrap_or_else(|error| Err(error.to_string()))
            .map(Into::into)
            .map_err(|error| failed(ttrpc::Code::FAILED_PRECONDITION, error))
    }

    async fn stop(
        &self,
        _context: &TtrpcContext,
        _request: proto::StopRequest,
    ) -> ttrpc::Result<proto::StopResponse> {
        let mut response = proto::StopResponse::new();
        response.reason = self.0.stop().await.to_string();
        Ok(response)
    }
}

/// Asks a VM's control socket.
pub struct Client {
    path: PathBuf,
    client: control_ttrpc::ControlClient,
}

impl Client {
    /// Connects to the control socket in a VM's state directory.
    pub async fn connect(directory: &Path) -> Result<Self, Error> {
        let path = directory.join(SOCKET);
        let stream = tokio::net::UnixStream::connect(&path)
            .await
            .map_err(|source| Error::Connect {
                path: path.clone(),
                source,
            })?;
        let socket = ttrpc::asynchronous::transport::Socket::new(stream);
        let client = control_ttrpc::ControlClient::new(ttrpc::asynchronous::Client::new(socket));
        Ok(Self { path, client })
    }

    /// What there is to see.
    pub async fn inspect(&self) -> Result<Inspection, Error> {
        let context = ttrpc::context::with_duration(Duration::from_secs(5));
        let answer = self
            .client
            .inspect(context, &proto::InspectRequest::new())
            .await;
        answer
            .map(Inspection::from)
            .map_err(|error| self.failed("Inspect", &error))
    }

    /// What the VM costs on the host.
    pub async fn usage(&self) -> Result<Usage, Error> {
        let context = ttrpc::context::with_duration(Duration::from_secs(5));
        let answer = self
            .client
            .usage(context, &proto::UsageRequest::new())
            .await;
        answer
            .map(Usage::from)
            .map_err(|error| self.failed("Usage", &error))
    }

    /// Changes the VM's size, which may take as long as `within`.
    pub async fn resize(&self, wanted: Wanted, within: Duration) -> Result<Changed, Error> {
        let context = ttrpc::context::with_duration(within);
        let request = resize::request(wanted);
        match self.client.resize(context, &request).await {
            Ok(answer) => Ok(answer.into()),
            Err(ttrpc::Error::RpcStatus(status))
                if status.code.enum_value() == Ok(ttrpc::Code::FAILED_PRECONDITION)
                    || status.code.enum_value() == Ok(ttrpc::Code::INVALID_ARGUMENT) =>
            {
                Err(Error::Refused(status.message))
            }
            Err(error) => Err(self.failed("Resize", &error)),
        }
    }

    /// Ends the VM in order; answers how it ended.
    pub async fn stop(&self) -> Result<String, Error> {
        let context = ttrpc::context::with_duration(Duration::from_secs(15));
        let answer = self.client.stop(context, &proto::StopRequest::new()).await;
        answer
            .map(|answer| answer.reason)
            .map_err(|error| self.failed("Stop", &error))
    }

    fn failed(&self, call: &'static str, error: &ttrpc::Error) -> Error {
        Error::Call {
            path: self.path.clone(),
            call,
            cause: error.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::resize::Step;

    fn inspection() -> Inspection {
        Inspection {
            id: "a".to_owned(),
            namespace: "vmctl".to_owned(),
            pid: 7,
            state: State::Running,
            vcpus: 2,
            max_vcpus: 4,
            memory_mib: 512,
            memory: Memory {
                boot_mib: 256,
                plugged_mib: 256,
                max_mib: 1024,
                given_back_mib: 3,
            },
            kernel: "/k".to_owned(),
            initrd: "/i".to_owned(),
            kernel_release: "6.1".to_owned(),
            agent_build: "0.1.0".to_owned(),
            phases: BootPhases {
                start_ns: 5,
                ready_ns: Some(9),
                ..BootPhases::default()
            },
            exits: BTreeMap::from([("io".to_owned(), 3)]),
            unasked_ejects: 6,
            containers: vec!["c".to_owned()],
            devices: vec![
                Device {
                    window: Some(0),
                    kind: "block".to_owned(),
                    detail: "/d".to_owned(),
                    traffic: None,
                },
                Device {
                    window: Some(1),
                    kind: "net".to_owned(),
                    detail: "eth0".to_owned(),
                    traffic: Some(Traffic {
                        link_up: true,
                        received: 1,
                        received_bytes: 60,
                        receive_dropped: 2,
                        sent: 3,
                        sent_bytes: 180,
                        send_dropped: 4,
                    }),
                },
            ],
            timings: vec![Timings {
                container: "c".to_owned(),
                create: Some(Phase::between(3, 8)),
                exec: Series {
                    count: 2,
                    last_ns: 4,
                    min_ns: 3,
                    max_ns: 5,
                },
                ..Timings::default()
            }],
        }
    }

    struct Fixed;

    #[async_trait]
    impl Target for Fixed {
        fn inspect(&self) -> Inspection {
            inspection()
        }
        async fn memory_used(&self) -> Option<u64> {
            Some(100 << 20)
        }
        async fn clock(&self) -> Option<ClockReading> {
            Some(ClockReading {
                offset_us: -3,
                round_trip_us: 5,
            })
        }
        async fn resize(&self, wanted: Wanted) -> Result<Changed, String> {
            let vcpus = wanted.vcpus.ok_or("no vCPUs")?;
            let step = Step {
                what: "vCPU 1".to_owned(),
                host_us: 1,
                noticed_us: 2,
                online_us: 3,
                total_us: 4,
            };
            Ok(Changed {
                vcpus: Some(Resized {
                    before: 1,
                    now: vcpus.into(),
                    steps: vec![step],
                }),
                memory: None,
            })
        }
        async fn stop(&self) -> ExitReason {
            ExitReason::PowerOff
        }
    }

    #[test]
    fn an_inspection_survives_the_wire_form() {
        assert_eq!(
            Inspection::from(proto::InspectResponse::from(inspection())),
            inspection()
        );
    }

    #[tokio::test]
    async fn a_served_socket_is_private_answers_and_goes_away() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(SOCKET);
        std::fs::write(&path, "stale").unwrap();
        let served = serve(&path, Arc::new(Fixed)).await.unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let client = Client::connect(directory.path()).await.unwrap();
        assert_eq!(client.inspect().await.unwrap(), inspection());
        let usage = client.usage().await.unwrap();
        assert_eq!((&*usage.id, usage.pid, usage.memory_mib), ("a", 7, 512));
        assert_eq!(usage.exits, inspection().exits);
        assert_eq!(usage.unasked_ejects, 6);
        let clock = usage
            .clock
            .map(|clock| (clock.offset_us, clock.round_trip_us));
        assert_eq!(clock, Some((-3, 5)));
        assert!(usage.rss_kib > 0 && usage.uptime_ms > 0, "{usage:?}");
        assert_eq!(
            (usage.used_mib, usage.memory),
            (Some(100), inspection().memory)
        );
        let within = Duration::from_secs(5);
        let wanted = Wanted {
            vcpus: Some(3),
            memory_mib: None,
        };
        let changed = client.resize(wanted, within).await.unwrap();
        assert_eq!(changed, Fixed.resize(wanted).await.unwrap());
        let refused = client.resize(Wanted::default(), within).await.unwrap_err();
        assert_eq!(refused.to_string(), "no vCPUs");
        assert_eq!(
            client.stop().await.unwrap(),
            ExitReason::PowerOff.to_string()
        );
        drop(served);
        assert!(!path.exists());
        assert!(Client::connect(directory.path()).await.is_err());
    }
}
