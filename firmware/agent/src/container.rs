//! The containers of this guest: making, starting, signalling and freeing
//! them, and telling the host of their ends. Each has its processes by exec
//! id, the empty one being its init.
//!
//! Locks: the table of containers first, then one container's processes; both
//! are held for look-ups only, never across an await.

use std::collections::HashMap;
use std::collections::hash_map;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use nacre_protocol::agent::{CreateContainerRequest, GuestMount, StatsResponse};
use oci_spec::runtime::LinuxCapabilities;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tracing::{info, warn};

use crate::bundle::{Bundle, check_id, write_json};
use crate::cgroup::{self, Cgroup};
use crate::device_rules;
use crate::error::{Doing, Error};
use crate::events::Events;
use crate::exec::Added;
use crate::helper;
use crate::init;
use crate::net;
use crate::process::{Input, Process, State};
use crate::reaper::{Exit, Reaper};
use crate::resources;
use crate::runtime::{self, Gate};
use crate::shares;
use crate::spec;
use crate::stats;
use crate::stdio::{Connections, Terminal};
use crate::users::Users;

/// How long killed processes may take to be gone.
pub(crate) const KILL_LIMIT: Duration = Duration::from_secs(2);

/// How long processes may take to be frozen or thawed.
const FREEZE_LIMIT: Duration = Duration::from_secs(3);

/// Status of an exec that could not be made.
const NEVER_MADE: u32 = 255;

/// How long a process that could not run its program may take to end by itself.
const OWN_END_LIMIT: Duration = Duration::from_millis(1500);

/// All containers. Clones share them.
#[derive(Clone)]
pub struct Containers(pub(crate) Arc<Shared>);

pub(crate) struct Shared {
    table: Mutex<Table>,
    pub(crate) reaper: Reaper,
    events: Events,
}

#[derive(Default)]
struct Table {
    entries: HashMap<String, Entry>,
    closed: bool,
}

enum Entry {
    /// `unwanted` since a Delete came: it goes when it is made.
    Creating {
        unwanted: bool,
    },
    Ready(Arc<Container>),
    Deleting,
}

/// One container.
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) ground: Ground,
    /// Its users, if they are its own.
    pub(crate) users: Option<Users>,
    /// The capabilities of its specification.
    pub(crate) capabilities: Option<LinuxCapabilities>,
    /// Whether it has a seccomp profile.
    pub(crate) has_filter: bool,
    pub(crate) processes: Mutex<HashMap<String, Slot>>,
    memory_kills: Mutex<u64>,
    memory_watch: OnceLock<AbortHandle>,
}

impl Drop for Container {
    fn drop(&mut self) {
        // The kernel does not say that the watched file is gone.
        if let Some(watch) = self.memory_watch.get() {
            watch.abort();
        }
    }
}

/// What a container stands on, whatever its processes do.
pub(crate) struct Ground {
    pub(crate) bundle: Arc<Bundle>,
    pub(crate) cgroup: Cgroup,
}

/// A process, and what is kept for its start.
pub(crate) struct Slot {
    pub(crate) process: Arc<Process>,
    pub(crate) pending: Option<Pending>,
}

/// What a start uses up.
pub(crate) enum Pending {
    /// An init waits behind it.
    Gate(Gate),
    /// An exec is made of it.
    Exec(Box<Added>),
}

impl Containers {
    /// No containers yet.
    pub fn new(reaper: Reaper, events: Events) -> Containers {
        Containers(Arc::new(Shared {
            table: Mutex::default(),
            reaper,
            events,
        }))
    }

    /// Makes a container, and answers with the pid of its init. A failure leaves nothing.
    ///
    /// # Errors
    /// `InvalidArgument`, `AlreadyExists`; `FailedPrecondition` during shutdown; `Internal` otherwise.
    pub async fn create(&self, request: CreateContainerRequest) -> Result<u32, Error> {
        let id = request.container_id.clone();
        check_id(&id)?;
        {
            let mut table = self.0.table.lock().expect("containers");
            if table.closed {
                return Err(Error::FailedPrecondition(format!(
                    "container {id}: the guest is shutting down"
                )));
            }
            match table.entries.entry(id.clone()) {
                hash_map::Entry::Vacant(place) => {
                    place.insert(Entry::Creating { unwanted: false });
                }
                hash_map::Entry::Occupied(_) => {
                    return Err(Error::AlreadyExists(format!("container {id} exists")));
                }
            }
        }
        let made = self.make(request).await;
        let container = {
            let mut table = self.0.table.lock().expect("containers");
            let entry = table.entries.get(&id);
            let unwanted = matches!(entry, Some(Entry::Creating { unwanted: true }));
            match made {
                Ok((container, pid)) if !unwanted => {
                    table.entries.insert(id, Entry::Ready(container));
                    return Ok(pid);
                }
                Ok((container, _)) => {
                    table.entries.insert(id.clone(), Entry::Deleting);
                    container
                }
                Err(error) => {
                    table.entries.remove(&id);
                    return Err(error);
                }
            }
        };
        if let Err(error) = self.clear(&id, container).await {
            warn!("container {id} was deleted while it was being made: {error}");
        }
        Err(Error::FailedPrecondition(format!(
            "container {id} was deleted while it was being made"
        )))
    }

    async fn make(&self, request: CreateContainerRequest) -> Result<(Arc<Container>, u32), Error> {
        let id = request.container_id.as_str();
        let cgroup = Cgroup::create(id)?;
        let ground = match Bundle::create(id) {
            Ok(bundle) => Ground {
                bundle: Arc::new(bundle),
                cgroup,
            },
            Err(error) => {
                let _ = cgroup.remove();
                return Err(error);
            }
        };
        match self.furnish(&request, &ground).await {
            Ok(furnished) => {
                let pid = furnished.pid.unsigned_abs();
                Ok((self.settle(id, ground, furnished), pid))
            }
            Err(error) => {
                if let Err(left) = ground.clear().await {
                    warn!("after the failure to make container {id}: {left}");
                }
                Err(error)
            }
        }
    }

    /// Mounts, streams and the init. On failure the caller clears the ground.
    async fn furnish(
        &self,
        request: &CreateContainerRequest,
        ground: &Ground,
    ) -> Result<Furnished, Error> {
        let id = request.container_id.as_str();
        let stdio = request.stdio.clone().unwrap_or_default();
        let adapted = spec::adapt(
            &request.spec_json,
            &ground.cgroup.spec_path(),
            stdio.terminal,
            spec::kernel_has_apparmor(),
        )?;
        let limits = resources::changes(&adapted.resources, |file| ground.cgroup.read(file))?;
        ground.cgroup.change(&limits)?;
        let rules = adapted.resources.devices().as_deref().unwrap_or(&[]);
        if let Some(program) = device_rules::compile(rules)? {
            ground.cgroup.guard(&program)?;
        }
        if shares::wanted(request) {
            blocking(shares::mount_once).await?;
        }
        if adapted.shared_network {
            blocking(net::share_once).await?;
        }
        ground.mount(request.rootfs.clone()).await?;
        ground.bundle.fill(&adapted.spec)?;
        let directory = ground.bundle.path();
        if let Some(filter) = &adapted.filter {
            write_json(&directory.join(helper::FILTER), filter)?;
        }
        if let Some(own) = &adapted.own {
            write_json(&directory.join(helper::OWN), own)?;
        }

        let connections = Connections::dial(&stdio).await?;
        let (ends, rest) = connections.ends(stdio.terminal, adapted.owner)?;
        let expectation = self.0.reaper.expect();
        let created =
            runtime::create(&expectation, ground.bundle.path(), id, ends, stdio.terminal).await?;
        let ended = expectation.claim(created.pid);
        drop(expectation);

        let terminal = match created.terminal {
            Some(master) => Some(Terminal::new(
                master,
                stdio.columns,
                stdio.rows,
                adapted.owner.0,
            )?),
            None => None,
        };
        let pumps = rest.pumps(terminal.as_ref())?;
        if adapted.own_network
            && let Err(error) = init::loopback_up_in(created.pid)
        {
            warn!("bringing up the loopback interface of container {id}: {error}");
        }
        pumps.start(id);
        Ok(Furnished {
            pid: created.pid,
            process: Process::new(created.pid, terminal),
            users: adapted.users,
            capabilities: adapted.capabilities,
            has_filter: adapted.filter.is_some(),
            gate: created.gate,
            ended,
        })
    }

    fn settle(&self, id: &str, ground: Ground, furnished: Furnished) -> Arc<Container> {
        let Furnished {
            process,
            users,
            capabilities,
            has_filter,
            gate,
            ended,
            ..
        } = furnished;
        let process = Arc::new(process);
        let slot = Slot {
            process: process.clone(),
            pending: Some(Pending::Gate(gate)),
        };
        let container = Arc::new(Container {
            id: id.to_owned(),
            ground,
            users,
            capabilities,
            has_filter,
            processes: Mutex::new(HashMap::from([(String::new(), slot)])),
            memory_kills: Mutex::new(0),
            memory_watch: OnceLock::new(),
        });
        self.tell_end(container.clone(), String::new(), process, ended);
        self.watch_memory(&container);
        container
    }

    /// Makes the transition and tells the host when the kernel has reaped a process.
    pub(crate) fn tell_end(
        &self,
        container: Arc<Container>,
        exec_id: String,
        process: Arc<Process>,
        ended: oneshot::Receiver<Exit>,
    ) {
        let containers = self.clone();
        tokio::spawn(async move {
            let Ok(exit) = ended.await else {
                return;
            };
            match process.apply(Input::Ended(exit)) {
                Ok(Some(exit)) => {
                    let pid = process.pid().unwrap_or(0);
                    containers.report(&container, &exec_id, pid, exit).await;
                }
                Ok(None) => {}
                Err(refused) => {
                    warn!("the end of {}: {refused}", name(&container.id, &exec_id));
                }
            }
        });
    }

    /// Tells of kills for want of memory as they happen, until the container is gone.
    fn watch_memory(&self, container: &Arc<Container>) {
        let Some(mut kills) = container.ground.cgroup.memory_events() else {
            return;
        };
        let (containers, weak) = (self.clone(), Arc::downgrade(container));
        let watch = tokio::spawn(async move {
            while kills.value("oom_kill").is_some() {
                match weak.upgrade() {
                    Some(container) => containers.report_memory(&container),
                    None => return,
                }
                if kills.changed().await.is_err() {
                    return;
                }
            }
        });
        let _ = container.memory_watch.set(watch.abort_handle());
    }

    fn report_memory(&self, container: &Container) {
        let now = container.ground.cgroup.memory_kills();
        let mut known = container.memory_kills.lock().expect("count of kills");
        if now > *known {
            *known = now;
            info!("container {} is out of memory", container.id);
            self.0.events.out_of_memory(&container.id);
        }
    }

    async fn report(&self, container: &Container, exec_id: &str, pid: i32, exit: Exit) {
        if exec_id.is_empty() {
            container.end_execs().await;
        }
        // A kill for want of memory is told before the exit that it caused.
        self.report_memory(container);
        self.0.events.exit(&container.id, exec_id, pid, exit);
    }

    /// Runs the user's program in a process that was created, and answers with its pid.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` if it is not merely created; `Internal` if the program could not be
    /// run: the process is gone then, and its exit is told as any other.
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<u32, Error> {
        let container = self.find(id)?;
        if !exec_id.is_empty() {
            container.may_run_execs(&format!("starting exec {exec_id}"))?;
        }
        let (process, pending) = {
            let mut processes = container.processes.lock().expect("processes");
            let slot = processes
                .get_mut(exec_id)
                .ok_or_else(|| no_process(id, exec_id))?;
            if slot.process.state() == State::Added && slot.pending.is_none() {
                return Err(Error::FailedPrecondition(format!(
                    "{} is being added",
                    name(id, exec_id)
                )));
            }
            slot.process.apply(Input::Start).map_err(|refused| {
                Error::FailedPrecondition(format!("starting {}: {refused}", name(id, exec_id)))
            })?;
            (slot.process.clone(), slot.pending.take())
        };
        let opened = match pending {
            Some(Pending::Gate(gate)) => gate.open().await,
            Some(Pending::Exec(added)) => self.run_exec(&container, exec_id, *added).await,
            None => Err(Error::Internal("there is nothing to start".into())),
        };
        let opened = opened
            .map_err(|error| Error::Internal(format!("starting {}: {error}", name(id, exec_id))));
        if opened.is_err() {
            see_end(&process, &name(id, exec_id)).await;
        }
        let pid = process.pid().unwrap_or(0);
        if let Ok(Some(exit)) = process.apply(Input::Answered) {
            let (containers, exec_id) = (self.clone(), exec_id.to_owned());
            tokio::spawn(async move {
                // Behind the answer in the runtime's queue.
                tokio::task::yield_now().await;
                tokio::task::yield_now().await;
                containers.report(&container, &exec_id, pid, exit).await;
            });
        }
        opened.map(|()| pid.unsigned_abs())
    }

    /// Sends a signal to one process, or to all of the container.
    ///
    /// # Errors
    /// `InvalidArgument` for a number that is no signal; `NotFound` if the process is not there any more.
    pub fn signal(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let Ok(number @ 1..=64) = i32::try_from(signal) else {
            return Err(Error::InvalidArgument(format!(
                "{signal} is no signal: 1 to 64 are"
            )));
        };
        let container = self.find(id)?;
        let process = container.process(exec_id)?;
        let gone = || Error::NotFound(format!("{} has ended", name(id, exec_id)));
        if all {
            return match container.ground.cgroup.signal(number) {
                true => Ok(()),
                false => Err(gone()),
            };
        }
        let pid = match (process.state(), process.pid()) {
            (State::Added, _) | (State::Starting, None) => {
                return Err(Error::FailedPrecondition(format!(
                    "signal {number} to {}: it is {}",
                    name(id, exec_id),
                    process.state()
                )));
            }
            (state, Some(pid)) if state.lives() => pid,
            _ => return Err(gone()),
        };
        match cgroup::send(pid, number) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(gone()),
            sent => sent.doing(|| format!("signal {number} to {}", name(id, exec_id))),
        }
    }

    /// The pids in a container's cgroup, with the exec ids of those that have one.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn pids(&self, id: &str) -> Result<Vec<(u32, String)>, Error> {
        let container = self.find(id)?;
        let processes = container.processes.lock().expect("processes");
        let exec_of = |pid: i32| {
            processes
                .iter()
                .find(|(_, slot)| slot.process.pid() == Some(pid) && slot.process.state().lives())
                .map(|(exec_id, _)| exec_id.clone())
                .unwrap_or_default()
        };
        let pids = container.ground.cgroup.pids();
        Ok(pids
            .into_iter()
            .map(|pid| (pid.unsigned_abs(), exec_of(pid)))
            .collect())
    }

    /// Freezes every process of a container, and waits until they are. Frozen already is fine.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` if its init has ended; `Internal` if it could not be done in time: it is
    /// thawed then.
    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        let container = self.find(id)?;
        container.must_live("pausing it")?;
        container.ground.cgroup.freeze(true, FREEZE_LIMIT).await
    }

    /// Thaws every process of a container. Not frozen is fine.
    ///
    /// # Errors
    /// As [`Containers::pause`].
    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        let container = self.find(id)?;
        container.must_live("resuming it")?;
        container.ground.cgroup.freeze(false, FREEZE_LIMIT).await
    }

    /// Applies new limits, all or none.
    ///
    /// # Errors
    /// `NotFound`; `InvalidArgument`; `FailedPrecondition` if its init has ended; `Internal` for what the kernel
    /// does not take.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<(), Error> {
        let container = self.find(id)?;
        container.must_live("updating it")?;
        blocking(move || {
            let cgroup = &container.ground.cgroup;
            let resources = resources::parse(&resources)?;
            cgroup.change(&resources::changes(&resources, |file| cgroup.read(file))?)
        })
        .await
    }

    /// What a container uses.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn stats(&self, id: &str) -> Result<StatsResponse, Error> {
        let container = self.find(id)?;
        Ok(stats::stats(|file| container.ground.cgroup.read(file)))
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` if it has no terminal; `InvalidArgument` for a size beyond 65535.
    pub fn resize(&self, id: &str, exec_id: &str, columns: u32, rows: u32) -> Result<(), Error> {
        let container = self.find(id)?;
        if container.size_added(exec_id, columns, rows) {
            return Ok(());
        }
        let process = container.process(exec_id)?;
        match process.terminal() {
            Some(terminal) => terminal.resize(columns, rows),
            None => Err(Error::FailedPrecondition(format!(
                "{} has no terminal",
                name(id, exec_id)
            ))),
        }
    }

    /// Frees a container whose init was not started or is gone. What still runs in it is killed. One that is being made is
    /// freed as soon as it is.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` while the init runs, the container is being made, or another Delete runs; `Internal` with all that
    /// could not be freed: the container stays, and Delete may be called again.
    pub async fn delete(&self, id: &str) -> Result<(), Error> {
        if let Some(Entry::Creating { unwanted }) =
            self.0.table.lock().expect("containers").entries.get_mut(id)
        {
            *unwanted = true;
        }
        let container = self.find(id)?;
        let init = container.process("")?;
        {
            let mut table = self.0.table.lock().expect("containers");
            match init.state() {
                State::Created | State::Exited(_) => {}
                state => {
                    return Err(Error::FailedPrecondition(format!(
                        "deleting container {id}: it is {state}"
                    )));
                }
            }
            match table.entries.get_mut(id) {
                Some(entry @ Entry::Ready(_)) => *entry = Entry::Deleting,
                _ => return Err(busy(id)),
            }
        }
        self.clear(id, container).await
    }

    /// Frees one that is entered as going; it stays if that fails.
    async fn clear(&self, id: &str, container: Arc<Container>) -> Result<(), Error> {
        let cleared = container.clear().await;
        let mut table = self.0.table.lock().expect("containers");
        match cleared {
            Ok(()) => {
                table.entries.remove(id);
                Ok(())
            }
            Err(error) => {
                table.entries.insert(id.to_owned(), Entry::Ready(container));
                Err(error)
            }
        }
    }

    /// Ends all containers: SIGTERM, after `grace` SIGKILL, then everything is unmounted. No container can be
    /// made from now on. What goes wrong is logged.
    pub async fn close(&self, grace: Duration) {
        let all: Vec<Arc<Container>> = {
            let mut table = self.0.table.lock().expect("containers");
            table.closed = true;
            let ready = table.entries.values().filter_map(|entry| match entry {
                Entry::Ready(container) => Some(container.clone()),
                Entry::Creating { .. } | Entry::Deleting => None,
            });
            ready.collect()
        };
        if !grace.is_zero() {
            for container in &all {
                container.ground.cgroup.signal(libc::SIGTERM);
                if container.ground.cgroup.is_frozen() {
                    let _ = container.ground.cgroup.freeze(false, FREEZE_LIMIT).await;
                }
            }
            let deadline = tokio::time::Instant::now() + grace;
            for container in &all {
                let left = deadline.saturating_duration_since(tokio::time::Instant::now());
                let _ = container.ground.cgroup.emptied(left).await;
            }
        }
        for container in &all {
            if let Err(error) = container.clear().await {
                warn!("ending container {}: {error}", container.id);
            }
        }
    }

    pub(crate) fn find(&self, id: &str) -> Result<Arc<Container>, Error> {
        check_id(id)?;
        match self.0.table.lock().expect("containers").entries.get(id) {
            Some(Entry::Ready(container)) => Ok(container.clone()),
            Some(Entry::Creating { .. } | Entry::Deleting) => Err(busy(id)),
            None => Err(Error::NotFound(format!("no container {id}"))),
        }
    }
}

/// What [`Containers::furnish`] has made.
struct Furnished {
    pid: i32,
    process: Process,
    users: Option<Users>,
    capabilities: Option<LinuxCapabilities>,
    has_filter: bool,
    gate: Gate,
    ended: oneshot::Receiver<Exit>,
}

impl Container {
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        let processes = self.processes.lock().expect("processes");
        processes
            .get(exec_id)
            .map(|slot| slot.process.clone())
            .ok_or_else(|| no_process(&self.id, exec_id))
    }

    /// Refuses what `doing` says when the init has ended.
    pub(crate) fn must_live(&self, doing: &str) -> Result<(), Error> {
        match self.process("")?.state() {
            state if state.lives() => Ok(()),
            state => Err(Error::FailedPrecondition(format!(
                "container {}, {doing}: it is {state}",
                self.id
            ))),
        }
    }

    /// Kills what runs, waits for its end to be known, and frees the ground.
    async fn clear(&self) -> Result<(), Error> {
        self.ground.cgroup.signal(libc::SIGKILL);
        let all: Vec<Arc<Process>> = {
            let processes = self.processes.lock().expect("processes");
            processes
                .values()
                .map(|slot| slot.process.clone())
                .collect()
        };
        for process in all {
            if !ended(&process, KILL_LIMIT).await {
                let limit = KILL_LIMIT.as_millis();
                warn!("process {:?} did not end in {limit} ms", process.pid());
            }
        }
        self.ground.clear().await
    }
}

impl Ground {
    async fn mount(&self, mounts: Vec<GuestMount>) -> Result<(), Error> {
        let bundle = self.bundle.clone();
        blocking(move || bundle.mount_all(&mounts)).await
    }

    /// Kills what is left in the cgroup, removes it, unmounts and removes the bundle.
    async fn clear(&self) -> Result<(), Error> {
        self.cgroup.signal(libc::SIGKILL);
        let emptied = self.cgroup.emptied(KILL_LIMIT).await;
        let removed = self.cgroup.remove();
        let bundle = self.bundle.clone();
        let unmounted = blocking(move || bundle.remove()).await;
        let wrong: Vec<String> = [emptied, removed, unmounted]
            .into_iter()
            .filter_map(Result::err)
            .map(|error| error.to_string())
            .collect();
        match wrong.is_empty() {
            true => Ok(()),
            false => Err(Error::Internal(wrong.join("; "))),
        }
    }
}

/// Sees to it that a process that could not be started is gone before the answer, so that Delete works right
/// after it.
async fn see_end(process: &Process, name: &str) {
    let Some(pid) = process.pid() else {
        // It was never made; its end is told all the same.
        let exit = Exit {
            status: NEVER_MADE,
            at_ns: init::realtime_ns(),
        };
        let _ = process.apply(Input::Ended(exit));
        return;
    };
    if !ended(process, OWN_END_LIMIT).await {
        warn!("{name} is killed: it did not end");
        let _ = cgroup::send(pid, libc::SIGKILL);
        ended(process, KILL_LIMIT).await;
    }
}

/// Waits until a process has ended, for as long as `limit`; false if it has not.
async fn ended(process: &Process, limit: Duration) -> bool {
    let mut watch = process.watch();
    let wait = watch.wait_for(|state| !state.lives());
    tokio::time::timeout(limit, wait).await.is_ok()
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Error::Internal(format!("a task failed: {error}"))))
}

fn busy(id: &str) -> Error {
    Error::FailedPrecondition(format!("container {id} is being made or deleted"))
}

pub(crate) fn no_process(id: &str, exec_id: &str) -> Error {
    Error::NotFound(format!("there is no {}", name(id, exec_id)))
}

pub(crate) fn name(id: &str, exec_id: &str) -> String {
    match exec_id {
        "" => format!("container {id}"),
        exec_id => format!("exec {exec_id} of container {id}"),
    }
}
