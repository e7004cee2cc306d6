//! One VM and all that is in it: boot, the agent's connections, disks, stdio
//! streams, and the ordered end. The shim and `vmctl` stand on this; neither
//! speaks to the VMM or to ttrpc by itself.
//!
//! A [`Sandbox`] is made by [`Sandbox::boot`], owned by whoever holds a clone,
//! and its VM is stopped when the last clone is dropped.

mod agent;
pub mod annotations;
mod bring_up;
mod calls;
pub mod cgroup;
pub mod clock;
mod console;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fake;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod gate;
mod host;
mod machine;
mod network;
mod phases;
pub mod resize;
mod running;
pub mod shares;
pub mod size;
pub mod spec;
mod stdio;
pub mod storage;
#[cfg(test)]
pub(crate) mod tests;
mod vm;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use nacre_fs::{FileServer, Limits};
use nacre_protocol::PORT_STDIO_FIRST;
use nacre_protocol::agent::ShutdownRequest;
use tokio::sync::{OnceCell, mpsc, watch};
use tokio::task::JoinSet;

pub use console::{ConsoleSink, GuestLine, LineSink, Source, Tail};
pub use error::{Error, chain};
pub use machine::GuestStream;
pub(crate) use machine::PortListener;
pub use nacre_fs::{Access, Caching};
pub use nacre_protocol::agent::{GuestDirectory, GuestMount, Process, StatsResponse, Stdio};
pub use nacre_vmm::config::PlugConfig;
pub use nacre_vmm::{DiskConfig, ExitReason};
pub use network::Nics;
pub use phases::{BootPhases, monotonic_ns, process_start_ns};
pub use resize::MemoryWay;
pub use stdio::StdioListener;

use agent::Agent;
use bring_up::BringUp;
use host::Containers;
use machine::{Machine, Nic};

use crate::config::{self, Config};
use crate::control::{Device, Inspection, State};

/// How long the guest has to end its processes, unmount and power off.
const SHUTDOWN: Duration = Duration::from_secs(2);

/// Deadlines of a sandbox.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// From the VM's start to the agent's hello.
    pub boot: Duration,
    /// Of each call to the agent but Create.
    pub agent: Duration,
    /// Of Create, which mounts the root and makes the container.
    pub create: Duration,
    /// For the guest to dial a stdio port once it has been told of it.
    pub stdio: Duration,
    /// Of each vCPU and each step of memory that the guest is to take or to give back.
    pub resize: Duration,
}

/// One sandbox to be.
#[derive(Debug)]
pub struct SandboxConfig {
    /// Sandbox id; names the VM in logs and thread names.
    pub id: String,
    /// containerd namespace, or `vmctl`.
    pub namespace: String,
    /// State directory of this VM; made by the caller, with its record.
    pub directory: PathBuf,
    /// Host name of the guest.
    pub hostname: String,
    /// Guest kernel.
    pub kernel: PathBuf,
    /// initrd, with the agent unless `agent` is false.
    pub initrd: Option<PathBuf>,
    /// Whether the guest has our agent. Without, there is no vsock device, and the sandbox is never
    /// ready: it can only be looked at, ended, and waited for.
    pub agent: bool,
    /// Kernel command line, whole.
    pub cmdline: String,
    /// vCPUs at boot.
    pub vcpus: u8,
    /// Memory at boot, MiB.
    pub memory_mib: u64,
    /// What may be plugged while it runs.
    pub plug: PlugConfig,
    /// How memory comes and goes.
    pub memory_way: MemoryWay,
    /// Disks that are there from the start.
    pub disks: Vec<DiskConfig>,
    /// What serves the host's files to the guest.
    pub share: config::Share,
    /// Where the console and the agent's log go.
    pub console: ConsoleSink,
    /// Deadlines.
    pub timeouts: Timeouts,
    /// When this process's `main` began, CLOCK_MONOTONIC nanoseconds, for the boot phases.
    pub main_ns: Option<u64>,
}

impl SandboxConfig {
    /// A sandbox with the configuration's kernel, initrd, command line, default size and deadlines.
    pub fn new(config: &Config, namespace: &str, id: &str, directory: PathBuf) -> Self {
        Self {
            id: id.to_owned(),
            namespace: namespace.to_owned(),
            directory,
            hostname: id.chars().take(63).collect(),
            kernel: config.kernel.clone(),
            initrd: Some(config.initrd.clone()),
            agent: true,
            cmdline: cmdline(&config.base_cmdline, &config.cmdline),
            vcpus: config.size.default_vcpus,
            memory_mib: config.size.default_memory.mib(),
            plug: PlugConfig {
                balloon: config.hotplug.memory.give_back,
                ..PlugConfig::default()
            },
            memory_way: config.hotplug.memory.way,
            disks: Vec::new(),
            share: config.share.clone(),
            console: ConsoleSink::default(),
            timeouts: config.timeouts(),
            main_ns: None,
        }
    }
}

/// A kernel command line and words to append.
pub fn cmdline(base: &str, append: &str) -> String {
    format!("{base} {append}").trim().to_owned()
}

/// What the agent said at its hello. The texts are the guest's: at most 256 characters, printable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// Version and build of the agent.
    pub build_id: String,
    /// The guest's `uname -r`.
    pub kernel_release: String,
    /// vCPUs online.
    pub vcpus_online: u32,
    /// Memory that the guest's kernel manages, in bytes.
    pub memory_total_bytes: u64,
    /// Guest CLOCK_BOOTTIME at the start of init, microseconds.
    pub init_us: u64,
    /// Guest CLOCK_BOOTTIME with the boot modules loaded, microseconds.
    pub modules_us: u64,
    /// Guest CLOCK_BOOTTIME at the hello, microseconds.
    pub ready_us: u64,
    /// Host CLOCK_MONOTONIC at the hello, nanoseconds.
    pub ready_ns: u64,
}

/// Something happened in the guest, to a container that was created here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentEvent {
    /// A process has ended and its stdio streams are closed by the guest.
    Exit {
        /// Its container.
        container_id: String,
        /// Empty: the container's init.
        exec_id: String,
        /// Guest pid.
        pid: u32,
        /// Exit status; death by signal is 128 + n.
        status: u8,
        /// By the guest's clock, if that is within an hour of ours.
        exited_at: SystemTime,
    },
    /// The container's cgroup ran out of memory.
    Oom {
        /// The container.
        container_id: String,
    },
    /// Containers stall for want of memory; by the guest's figures, in bytes.
    Pressure {
        /// MemTotal.
        total_bytes: u64,
        /// MemAvailable.
        available_bytes: u64,
    },
}

/// A disk in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachedDisk {
    /// Its virtio-mmio window.
    pub window: u8,
    /// Its path in the guest, e.g. `/dev/vda`.
    pub device: String,
}

/// One VM with its agent; clones share it.
#[derive(Clone)]
pub struct Sandbox(Arc<Inner>);

/// A [`Sandbox`] that does not keep the VM alive.
#[derive(Clone)]
pub struct WeakSandbox(Weak<Inner>);

impl WeakSandbox {
    /// The sandbox, if someone still holds it.
    pub fn upgrade(&self) -> Option<Sandbox> {
        self.0.upgrade().map(Sandbox)
    }
}

struct Inner {
    id: String,
    namespace: String,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    vcpus: u8,
    max_vcpus: u8,
    memory_mib: u64,
    memory_way: MemoryWay,
    agent: bool,
    main_ns: Option<u64>,
    timeouts: Timeouts,
    machine: Arc<dyn Machine>,
    tail: Tail,
    state: watch::Receiver<BringUp>,
    events: Mutex<Option<mpsc::Receiver<AgentEvent>>>,
    containers: Containers,
    /// What comes and goes, and what is shared.
    devices: Arc<Mutex<Vec<Device>>>,
    /// By their windows; locked after `devices`.
    nics: Mutex<BTreeMap<u8, Arc<dyn Nic>>>,
    files: FileServer,
    next_share: AtomicU32,
    resizing: tokio::sync::Semaphore,
    /// What is plugged, or is going, without the guest's word for it.
    unacknowledged: Mutex<BTreeSet<resize::Plugged>>,
    next_port: AtomicU32,
    end: OnceCell<ExitReason>,
    tasks: Mutex<JoinSet<()>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.machine.stop();
        self.tasks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .abort_all();
    }
}

impl Sandbox {
    /// Starts the VM and returns at once; the boot goes on in the background. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Machine`] with the thing that could not be opened or made.
    pub fn boot(config: SandboxConfig) -> Result<Self, Error> {
        let tail = Tail::default();
        let SandboxConfig { console, .. } = config;
        let lines = console.lines.clone();
        let config = SandboxConfig { console, ..config };
        let parts = Parts::of(&config)?;
        let (machine, ports) = vm::start(config, &parts.files, tail.clone())?;
        Ok(Self::over(parts, machine, ports, tail, lines))
    }

    fn over(
        parts: Parts,
        machine: Arc<dyn Machine>,
        ports: Option<bring_up::Ports>,
        tail: Tail,
        lines: Option<LineSink>,
    ) -> Self {
        let containers = Containers::default();
        let (tasks, state, events) = bring_up::start(
            &parts,
            machine.clone(),
            ports,
            tail.clone(),
            containers.clone(),
            lines,
        );
        Self(Arc::new(Inner {
            id: parts.id,
            namespace: parts.namespace,
            kernel: parts.kernel,
            initrd: parts.initrd,
            vcpus: parts.vcpus,
            max_vcpus: parts.max_vcpus,
            memory_mib: parts.memory_mib,
            memory_way: parts.memory_way,
            agent: parts.agent,
            main_ns: parts.main_ns,
            timeouts: parts.timeouts,
            machine,
            tail,
            state,
            events: Mutex::new(Some(events)),
            containers,
            devices: Arc::new(Mutex::new(parts.disks)),
            nics: Mutex::default(),
            files: parts.files,
            next_share: AtomicU32::new(1),
            resizing: tokio::sync::Semaphore::new(1),
            unacknowledged: Mutex::default(),
            next_port: AtomicU32::new(PORT_STDIO_FIRST),
            end: OnceCell::new(),
            tasks: Mutex::new(tasks),
        }))
    }

    /// Completes when the agent is ready, or fails with why it never will be: the VM's end with the
    /// last console lines, a protocol mismatch, or the boot deadline. After a failure the VM may
    /// still run; [`Sandbox::shutdown`] ends it.
    pub async fn ready(&self) -> Result<Arc<Ready>, Error> {
        self.up().await.map(|(ready, _)| ready)
    }

    async fn up(&self) -> Result<(Arc<Ready>, Agent), Error> {
        let mut state = self.0.state.clone();
        let settled = state
            .wait_for(|state| !matches!(state, BringUp::Booting { .. }))
            .await;
        let settled = settled.map(|state| state.clone());
        match settled {
            Ok(BringUp::Ready { ready, agent, .. }) => match self.0.machine.exit_reason() {
                None => Ok((ready, agent)),
                Some(reason) => Err(self.gone(reason)),
            },
            Ok(BringUp::Failed(error)) => Err(error),
            Ok(BringUp::Booting { .. }) | Err(_) => {
                let reason = self.0.machine.ended().await;
                Err(self.gone(reason))
            }
        }
    }

    fn gone(&self, reason: ExitReason) -> Error {
        Error::Gone {
            reason,
            console: self.0.tail.text(),
        }
    }

    async fn agent(&self) -> Result<Agent, Error> {
        self.up().await.map(|(_, agent)| agent)
    }

    /// A handle that does not keep the VM alive.
    pub fn downgrade(&self) -> WeakSandbox {
        WeakSandbox(Arc::downgrade(&self.0))
    }

    /// Connects to a vsock port that something in the guest listens on; the stream, and the host's port of it.
    ///
    /// # Errors
    /// [`Error::Machine`] if the guest refuses, or there is no vsock device.
    pub async fn connect(&self, port: u32) -> Result<(GuestStream, u32), Error> {
        self.0.machine.connect(port).await
    }

    /// Listens on a vsock port of the host for the guest's connections.
    ///
    /// # Errors
    /// [`Error::Machine`] if the port has a listener, is one of those for stdio, or there is no vsock device.
    pub(crate) fn listen(&self, port: u32) -> Result<Box<dyn PortListener>, Error> {
        if port >= PORT_STDIO_FIRST {
            return Err(Error::Machine {
                doing: format!("listen on vsock port {port}"),
                cause: format!("ports from {PORT_STDIO_FIRST} on are for stdio"),
            });
        }
        self.0.machine.listen(port)
    }

    /// A fresh port with a listener, for one stdio stream; its number goes into [`Stdio`].
    pub fn stdio_listener(&self) -> Result<StdioListener, Error> {
        let port = self.0.next_port.fetch_add(1, Ordering::Relaxed);
        let listener = self.0.machine.listen(port)?;
        Ok(StdioListener::new(
            port,
            listener,
            self.0.timeouts.stdio,
            self.clone(),
        ))
    }

    fn containers(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.0
            .containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The agent's events in order; the one receiver, given once. The channel ends after the VM has
    /// ended (and all events before it are received); [`Sandbox::ended`] then says how.
    pub fn events(&self) -> Option<mpsc::Receiver<AgentEvent>> {
        self.0
            .events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Ordered end: the agent ends its processes, unmounts and powers off (2 s at most), then the VM
    /// is stopped if it still runs. A VM whose agent is not there yet is stopped at once. Idempotent.
    pub async fn shutdown(&self) -> ExitReason {
        self.0.end.get_or_init(|| self.end()).await.clone()
    }

    async fn end(&self) -> ExitReason {
        let agent = match &*self.0.state.borrow() {
            BringUp::Ready { agent, .. } => Some(agent.clone()),
            BringUp::Booting { .. } | BringUp::Failed(_) => None,
        };
        if let Some(agent) = agent
            && self.0.machine.exit_reason().is_none()
        {
            let powered_off = async {
                let request = ShutdownRequest::new();
                let asked = agent
                    .call(
                        "shutting down".to_owned(),
                        SHUTDOWN,
                        |client, context| async move { client.shutdown(context, &request).await },
                    )
                    .await;
                match asked {
                    Ok(_) | Err(Error::Gone { .. }) => {
                        self.0.machine.ended().await;
                    }
                    Err(error) => {
                        tracing::warn!(id = self.0.id, %error, "the agent did not shut down, stopping the VM");
                    }
                }
            };
            if tokio::time::timeout(SHUTDOWN, powered_off).await.is_err() {
                tracing::warn!(
                    id = self.0.id,
                    "the guest did not power off in time, stopping the VM"
                );
            }
        }
        self.0.machine.stop();
        self.0.machine.ended().await
    }

    /// Stops the VM at once, without asking the guest. Idempotent.
    pub fn stop(&self) {
        self.0.machine.stop();
    }

    /// Completes when the VM has ended.
    pub async fn ended(&self) -> ExitReason {
        self.0.machine.ended().await
    }

    /// How the VM ended, if it has.
    pub fn exit_reason(&self) -> Option<ExitReason> {
        self.0.machine.exit_reason()
    }

    /// The last 64 KiB of the console, printable.
    pub fn console_tail(&self) -> String {
        self.0.tail.text()
    }

    /// Phases of the boot that have been reached.
    pub fn phases(&self) -> BootPhases {
        let vm = self.0.machine.phases();
        let mut phases = BootPhases {
            process_ns: process_start_ns(),
            main_ns: self.0.main_ns,
            start_ns: vm.start_ns,
            kvm_ns: vm.kvm_ns,
            loaded_ns: vm.loaded_ns,
            first_run_ns: vm.first_run_ns,
            first_exit_ns: vm.first_exit_ns,
            init_ns: vm
                .marks
                .iter()
                .find(|(mark, _)| *mark == nacre_protocol::PHASE_INIT)
                .map(|(_, ns)| *ns),
            ..BootPhases::default()
        };
        match &*self.0.state.borrow() {
            BringUp::Booting { connected_ns } => phases.connected_ns = *connected_ns,
            BringUp::Ready {
                ready,
                connected_ns,
                ..
            } => {
                phases.connected_ns = Some(*connected_ns);
                phases.ready_ns = Some(ready.ready_ns);
                phases.guest_init_us = Some(ready.init_us);
                phases.guest_modules_us = Some(ready.modules_us);
                phases.guest_ready_us = Some(ready.ready_us);
            }
            BringUp::Failed(_) => {}
        }
        phases
    }

    /// What there is to see from outside, for the control socket.
    pub fn inspect(&self) -> Inspection {
        let (state, ready) = match (&*self.0.state.borrow(), self.0.machine.exit_reason()) {
            (_, Some(_)) => (State::Ended, None),
            (BringUp::Booting { .. }, None) => (State::Booting, None),
            (BringUp::Ready { ready, .. }, None) => (State::Running, Some(ready.clone())),
            (BringUp::Failed(_), None) => (State::Failed, None),
        };
        let mut containers: Vec<String> = self.containers().iter().cloned().collect();
        containers.sort();
        Inspection {
            id: self.0.id.clone(),
            namespace: self.0.namespace.clone(),
            pid: std::process::id(),
            state,
            vcpus: u32::from(self.vcpus()),
            max_vcpus: u32::from(self.0.max_vcpus),
            memory_mib: self.memory_mib(),
            memory: self.memory_parts(),
            kernel: self.0.kernel.display().to_string(),
            initrd: self
                .0
                .initrd
                .as_ref()
                .map(|path| path.display().to_string())
                .unwrap_or_default(),
            kernel_release: ready
                .as_ref()
                .map(|ready| ready.kernel_release.clone())
                .unwrap_or_default(),
            agent_build: ready
                .map(|ready| ready.build_id.clone())
                .unwrap_or_default(),
            phases: self.phases(),
            exits: self.0.machine.exits().into_iter().collect(),
            unasked_ejects: self.0.machine.unasked_ejects(),
            containers,
            devices: self.devices(),
            // Whoever serves the containers' calls knows.
            timings: Vec::new(),
        }
    }
}

/// A server that shares nothing yet.
fn file_server(config: &config::Share) -> Result<FileServer, Error> {
    let limits = Limits {
        workers: usize::from(config.workers),
        ..Limits::default()
    };
    FileServer::new(limits).map_err(|error| Error::machine("make the file server", &error))
}

/// What is kept of a configuration while the VM takes the rest.
struct Parts {
    id: String,
    namespace: String,
    hostname: String,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    vcpus: u8,
    max_vcpus: u8,
    memory_mib: u64,
    memory_way: MemoryWay,
    agent: bool,
    disks: Vec<Device>,
    files: FileServer,
    timeouts: Timeouts,
    /// Whether the guest's clock is kept.
    clock: bool,
    main_ns: Option<u64>,
}

impl Parts {
    fn of(config: &SandboxConfig) -> Result<Self, Error> {
        let first = usize::from(vm::first_disk_window(config));
        let disk = |(index, disk): (usize, &DiskConfig)| Device {
            window: u8::try_from(first + index).ok(),
            kind: "block".to_owned(),
            detail: disk.source.to_string(),
            traffic: None,
        };
        Ok(Self {
            id: config.id.clone(),
            namespace: config.namespace.clone(),
            hostname: config.hostname.clone(),
            kernel: config.kernel.clone(),
            initrd: config.initrd.clone(),
            vcpus: config.vcpus,
            max_vcpus: config.plug.max_vcpus.max(config.vcpus),
            memory_mib: config.memory_mib,
            memory_way: config.memory_way,
            agent: config.agent,
            disks: config.disks.iter().enumerate().map(disk).collect(),
            files: file_server(&config.share)?,
            timeouts: config.timeouts,
            clock: true,
            main_ns: config.main_ns,
        })
    }
}
