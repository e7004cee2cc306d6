//! The task service: what containerd calls, over one sandbox and the containers
//! in it. One lock guards the lives of all of them; it is held for looking and
//! changing only, never while the guest or a disk is waited for.

mod create;
mod delete;
mod ending;
mod error;
mod exec;
mod exits;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod hooks;
mod limits;
mod network;
mod process;
mod resize;
mod service;
mod storage;
#[cfg(test)]
mod tests;
mod timings;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use super::cleanup::Cleanup;
use super::events::Publisher;
use super::lifecycle::{self, SandboxEvent};
use super::stdio::{Limits, Paths, ProcessIo};
use crate::config::Config;
use crate::control::{self, Timings};
use crate::hooks::HostHooks;
use crate::hotplug::Controller;
use crate::network::Network;
use crate::record::{Record, Resource};
use crate::sandbox::annotations::Overrides;
use crate::sandbox::cgroup::{Share, VmCgroup};
use crate::sandbox::{Sandbox, size};

use resize::LastSteps;
use storage::Storage;
use timings::{Past, Startup};

pub use ending::Ending;
pub use error::Error;
pub use service::services;

/// How long the agent may take to kill or to free something before the VM is stopped instead.
const AGENT_PATIENCE: Duration = Duration::from_secs(5);
/// Exit status of a process that went down with its VM: 128 + SIGKILL.
const KILLED: u32 = 137;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Exit {
    status: u32,
    at: SystemTime,
    /// Which process of the guest it was, 0 if it is not the guest who says so.
    guest_pid: u32,
}

impl Exit {
    fn killed() -> Self {
        Self {
            status: KILLED,
            at: SystemTime::now(),
            guest_pid: 0,
        }
    }
}

/// A container's init, or an exec in it.
struct Process {
    life: lifecycle::Process,
    paths: Paths,
    io: Option<ProcessIo>,
    /// An exit that came before what it must follow.
    held: Option<Exit>,
    /// Its program ran, or may have.
    ran: bool,
    /// How long its Exec took, nanoseconds.
    adding_ns: u64,
    /// Set once, when all output is delivered and the exit event is queued.
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    fn new(paths: Paths) -> Self {
        Self {
            life: lifecycle::Process::Created,
            paths,
            io: None,
            held: None,
            ran: false,
            adding_ns: 0,
            exit: watch::channel(None).0,
        }
    }
}

/// A container and what was made for it.
struct Container {
    life: lifecycle::Container,
    bundle: String,
    init: Process,
    execs: HashMap<String, Process>,
    /// Its root and its bind mounts, once it is made.
    storage: Option<Storage>,
    /// Its init in the guest, 0 until it is made.
    guest_pid: u32,
    timings: Timings,
    /// Its hooks on the host, and the record of what its poststop hooks are owed.
    hooks: Option<(Arc<HostHooks>, Resource)>,
    /// Its part in the limits of the VM's cgroup.
    share: Option<Arc<Share>>,
    /// Whether it has a network namespace, once its specification is read.
    has_network: bool,
    /// Its limits, once its specification is read: the VM is sized by them.
    limits: Option<size::Limits>,
}

impl Container {
    /// Whether an exit can be of this container's init, and not of one that had the id before and was deleted
    /// before the guest told of its end.
    fn is_of_its_init(&self, exit: &Exit) -> bool {
        self.guest_pid == exit.guest_pid || self.guest_pid == 0 || exit.guest_pid == 0
    }

    /// Whether its Create is done, well. A shim that is told to end may still have one under way.
    fn is_made(&self) -> bool {
        match self.life {
            lifecycle::Container::Idle | lifecycle::Container::Creating => false,
            lifecycle::Container::ShuttingDown => {
                self.storage.is_some() || self.init.life != lifecycle::Process::Created
            }
            _ => true,
        }
    }

    fn process(&self, exec_id: &str) -> Option<&Process> {
        if exec_id.is_empty() {
            Some(&self.init)
        } else {
            self.execs.get(exec_id)
        }
    }

    fn process_mut(&mut self, exec_id: &str) -> Option<&mut Process> {
        if exec_id.is_empty() {
            Some(&mut self.init)
        } else {
            self.execs.get_mut(exec_id)
        }
    }

    /// The processes whose exit will be told: init, and the execs that were asked to run.
    fn ending_processes(&self) -> impl Iterator<Item = (&str, &Process)> {
        self.processes()
            .filter(|(exec_id, process)| exec_id.is_empty() || process.life.is_begun())
    }

    fn processes(&self) -> impl Iterator<Item = (&str, &Process)> {
        let execs = self
            .execs
            .iter()
            .map(|(id, process)| (id.as_str(), process));
        std::iter::once(("", &self.init)).chain(execs)
    }
}

struct State {
    life: lifecycle::Sandbox,
    containers: HashMap<String, Container>,
    past: Past,
}

impl State {
    /// A process of a container that is made.
    fn made(&mut self, id: &str, exec_id: &str) -> Result<&mut Process, Error> {
        let container = self
            .containers
            .get_mut(id)
            .ok_or_else(|| no_container(id))?;
        if matches!(
            container.life,
            lifecycle::Container::Idle | lifecycle::Container::Creating
        ) {
            return Err(Error::Precondition(format!(
                "Container {id:?} is {}",
                container.life
            )));
        }
        container
            .process_mut(exec_id)
            .ok_or_else(|| no_process(id, exec_id))
    }
}

/// What the shim is about.
pub struct Identity {
    /// containerd's namespace.
    pub namespace: String,
    /// Id of the sandbox: the container that it was started for, or its pod.
    pub sandbox: String,
    /// Id of the container that it was started for.
    pub container: String,
    /// The pid that containerd and its plug-ins are told: ours, since its network namespace is the container's.
    pub pid: u32,
    /// What the annotations asked for of the container that it was started for.
    pub overrides: Overrides,
    /// That container's limits, by which the VM was sized.
    pub limits: size::Limits,
}

/// The sandbox as its boot left it: none yet, there, or why not.
type Boot = Option<Result<Sandbox, String>>;

/// Everything that the calls share. Owned by the daemon; it is done with when [`Shim::ending`] says so.
pub struct Shim {
    identity: Identity,
    config: Config,
    record: Arc<Record>,
    /// None: its containers have loopback only.
    network: Option<Arc<Network>>,
    cgroup: Option<Arc<VmCgroup>>,
    limits: Limits,
    state: Mutex<State>,
    boot: watch::Sender<Boot>,
    control: Mutex<Option<control::Served>>,
    publisher: Publisher,
    controller: OnceLock<Controller>,
    last_steps: LastSteps,
    startup: Startup,
    end: watch::Sender<bool>,
    /// The end has got beyond the output of processes.
    drained: watch::Sender<bool>,
    cleanup: Cleanup,
}

impl Shim {
    /// A shim without a sandbox yet.
    pub fn new(
        identity: Identity,
        config: Config,
        record: Arc<Record>,
        network: Option<Arc<Network>>,
        cgroup: Option<Arc<VmCgroup>>,
        limits: Limits,
        publisher: Publisher,
    ) -> Arc<Self> {
        Arc::new(Self {
            identity,
            config,
            record,
            network,
            cgroup,
            limits,
            state: Mutex::new(State {
                life: lifecycle::Sandbox::Booting,
                containers: HashMap::new(),
                past: Past::default(),
            }),
            boot: watch::channel(None).0,
            control: Mutex::default(),
            publisher,
            controller: OnceLock::new(),
            last_steps: LastSteps::default(),
            startup: Startup::default(),
            end: watch::channel(false).0,
            drained: watch::channel(false).0,
            cleanup: Cleanup::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether any call has come in.
    pub fn called(&self) -> bool {
        self.startup.called()
    }

    /// Takes note of a call.
    fn touch(&self) {
        self.startup.touch();
    }

    /// Told to end, by whomever: nothing new begins from here on. Idempotent.
    pub fn shut_down(&self) {
        let mut state = self.lock();
        // Allowed in every state.
        state.life = state
            .life
            .after(SandboxEvent::Shutdown)
            .unwrap_or(state.life);
        for container in state.containers.values_mut() {
            container.life = container
                .life
                .after(lifecycle::ContainerEvent::Shutdown)
                .unwrap_or(container.life);
        }
        drop(state);
        self.end.send_replace(true);
    }

    /// Completes when the shim was told to end.
    pub async fn ending(&self) {
        // The sender is in self, so it cannot be gone.
        let _ = self.end.subscribe().wait_for(|end| *end).await;
    }

    /// Completes when the output that processes had written is delivered, or its time is over. Only of use once the
    /// shim was told to end.
    async fn drained(&self) {
        // The sender is in self, so it cannot be gone.
        let _ = self.drained.subscribe().wait_for(|drained| *drained).await;
    }

    /// Keeps the control socket served until the end.
    pub(super) fn keep_control(&self, served: control::Served) {
        *self.control.lock().unwrap_or_else(PoisonError::into_inner) = Some(served);
    }

    /// Runs the clean-up phases, once.
    pub async fn clean_up(self: &Arc<Self>) -> String {
        self.cleanup
            .run(Arc::new(Ending::of(self.clone())))
            .await
            .to_string()
    }

    /// By how much later than usual the clean-up may end.
    pub fn granted(&self) -> Duration {
        self.cleanup.granted()
    }

    /// The sandbox, when its VM is made; its guest may still boot.
    async fn sandbox(&self) -> Result<Sandbox, Error> {
        let mut boot = self.boot.subscribe();
        let made = boot.wait_for(Option::is_some).await;
        match made.as_deref() {
            Ok(Some(Ok(sandbox))) => Ok(sandbox.clone()),
            Ok(Some(Err(cause))) => Err(Error::Failed(cause.clone())),
            // Unreachable: the sender is in self, and None was waited away.
            Ok(None) | Err(_) => Err(Error::Failed("The sandbox was never made".to_owned())),
        }
    }

    /// The sandbox, if its VM was made.
    fn sandbox_now(&self) -> Option<Sandbox> {
        self.boot
            .borrow()
            .as_ref()
            .and_then(|made| made.as_ref().ok().cloned())
    }
}

fn no_container(id: &str) -> Error {
    Error::NotFound(format!("There is no container {id:?} here"))
}

fn no_process(id: &str, exec_id: &str) -> Error {
    Error::NotFound(format!("There is no exec {exec_id:?} in container {id:?}"))
}
