//! The daemon behind a shim's socket: what `start` spawns. It takes its place in
//! the system while it has one thread, then boots the VM and serves until it is told to end.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use nacre_net::Netns;
use oci_spec::runtime::Spec;
use tokio::signal::unix::{SignalKind, signal};
use tracing::Level;

use super::bootstrap::{self, DAEMON_UP, Flags};
use super::events::{Publisher, TtrpcWay};
use super::log;
use super::namespaces::{self, Network};
use super::settings::Patience;
use super::task::{self, Identity, Shim};
use crate::config::Config;
use crate::control;
use crate::hotplug::{Host, Room};
use crate::network::{self, Cni, Names};
use crate::origin;
use crate::record::{self, Owner, PidFile, Record, Resource};
use crate::sandbox::annotations::Overrides;
use crate::sandbox::cgroup::{Cpu, Tree, VmCgroup, Wish};
use crate::sandbox::clock::ClockReading;
use crate::sandbox::size::BootSize;
use crate::sandbox::{
    ConsoleSink, ExitReason, GuestLine, PlugConfig, Sandbox, SandboxConfig, Source, chain,
    monotonic_ns, size,
};

/// How long a predecessor with the same id may take to be gone.
const PREDECESSOR_ENDS: Duration = Duration::from_secs(8);
/// After so long, and what output that keeps coming was granted, an end that hangs is an end by force: what it leaves,
/// `delete` frees from the record.
const ENDS_BY_FORCE: Duration = Duration::from_secs(5);
/// For the answer to Shutdown to be on its way before the process goes.
const LAST_ANSWER: Duration = Duration::from_millis(20);
/// Annotation of all containers that CRI makes.
const CRI_CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// Threads of the runtime; the VM has its own.
const WORKERS: usize = 2;

/// What the daemon has when it is in its place.
struct Place {
    listener: UnixListener,
    socket: PathBuf,
    inode: Option<u64>,
    config: Config,
    sandbox: SandboxConfig,
    identity: Identity,
    record: Arc<Record>,
    network: Option<Arc<network::Network>>,
    cgroup: Option<Arc<VmCgroup>>,
    lock: PidFile,
    begun_ns: Option<u64>,
}

/// Runs the daemon; returns when it has ended in order. `bundle` is the working directory.
///
/// # Errors
/// Why it did not come up. `start` has been told the same.
pub fn run(flags: &Flags, bundle: &Path) -> Result<(), String> {
    let main_ns = monotonic_ns();
    let (listener, mut up) =
        take_stdio().map_err(|error| format!("Cannot take over from start: {error}"))?;
    log::install(bundle, flags.debug, &flags.namespace, &flags.id);
    let tell = |up: &mut std::fs::File, error: String| {
        tracing::error!("the shim does not come up: {error}");
        // Nobody is left to tell if start has gone.
        let _ = up.write_all(error.as_bytes());
        error
    };
    let place = match take_place(flags, bundle, listener, main_ns) {
        Ok(place) => place,
        Err(error) => return Err(tell(&mut up, error)),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_name("shim")
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = record::cleanup(place.record.directory());
            return Err(tell(&mut up, format!("Cannot start the runtime: {error}")));
        }
    };
    runtime.block_on(serve(place, up));
    // Threads that wait for readers that never come must not keep the process.
    runtime.shutdown_background();
    Ok(())
}

/// Takes the socket from stdin and the pipe to `start` from stdout, and puts /dev/null in their places.
fn take_stdio() -> io::Result<(UnixListener, std::fs::File)> {
    let listener: OwnedFd = io::stdin().as_fd().try_clone_to_owned()?;
    let up: OwnedFd = io::stdout().as_fd().try_clone_to_owned()?;
    let null = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    let listener = UnixListener::from(listener);
    listener.set_nonblocking(true)?;
    Ok((listener, up.into()))
}

/// Everything that has to be done by the one thread of a young process.
fn take_place(
    flags: &Flags,
    bundle: &Path,
    listener: UnixListener,
    main_ns: u64,
) -> Result<Place, String> {
    let config = Config::load().map_err(|error| chain(&error))?;
    let spec = bootstrap::load_spec(bundle)?;
    let overrides =
        Overrides::of(&spec, &config.allowed_annotations).map_err(|error| error.to_string())?;
    let wanted = Network::of(&spec).known();
    namespaces::enter(&wanted).map_err(|error| error.to_string())?;

    let socket = listener
        .local_addr()
        .ok()
        .and_then(|address| address.as_pathname().map(Path::to_owned))
        .unwrap_or_default();
    let inode = std::fs::symlink_metadata(&socket)
        .ok()
        .map(|metadata| metadata.ino());

    let id = bootstrap::sandbox_id(&spec, &flags.id);
    let directory = config.vm_dir(&flags.namespace, &id);
    // One that is about to end still has the name; one that was killed has left things behind.
    record::wait_unlocked(&directory, PREDECESSOR_ENDS).map_err(|error| chain(&error))?;
    record::cleanup(&directory).map_err(|error| chain(&error))?;
    let owner = Owner {
        id: id.clone(),
        namespace: flags.namespace.clone(),
    };
    let record = Record::create(&directory, owner).map_err(|error| chain(&error))?;
    let lock = PidFile::hold(&directory).map_err(|error| chain(&error))?;
    let record = Arc::new(record);
    let network = find_network(&config, &spec, &wanted, &flags.namespace, &id, &record)?;

    let limits = size::Limits::of(&spec);
    let size = size::boot_size(&limits, &config.size, size::host_cpus());
    let mut sandbox = SandboxConfig::new(&config, &flags.namespace, &id, directory);
    sandbox.vcpus = size.vcpus;
    sandbox.memory_mib = size.memory_mib;
    overrides.apply(&mut sandbox);
    sandbox.plug = what_may_come(&config, &limits, &sandbox);
    let cgroup = enter_cgroup(&config, &spec, &flags.id, sandbox.memory_mib, &record)?;
    sandbox.console = ConsoleSink {
        lines: Some(Arc::new(guest_line)),
        ..ConsoleSink::default()
    };
    sandbox.main_ns = Some(main_ns);
    let identity = Identity {
        namespace: flags.namespace.clone(),
        sandbox: id,
        container: flags.id.clone(),
        pid: std::process::id(),
        overrides,
        limits,
    };
    Ok(Place {
        listener,
        socket,
        inode,
        config,
        sandbox,
        identity,
        record,
        network,
        cgroup,
        lock,
        begun_ns: flags.begun_ns,
    })
}

/// The network that the VM will have, if it has one of its own.
fn find_network(
    config: &Config,
    spec: &Spec,
    wanted: &Network,
    namespace: &str,
    id: &str,
    record: &Arc<Record>,
) -> Result<Option<Arc<network::Network>>, String> {
    let pid = std::process::id();
    let netns = match wanted {
        Network::Host => {
            tracing::warn!(
                "the spec wants the host's network, which a guest cannot have: it has loopback only"
            );
            return Ok(None);
        }
        // One that is still there when we are gone is then found where it is.
        Network::At(path) => Netns::open(path),
        Network::Fresh => Netns::of_process(pid),
    };
    let netns = netns.map_err(|error| chain(&error))?;
    let network = network::Network::of(Arc::clone(record), netns);
    // CRI fills by itself, in its own time.
    let annotations = spec.annotations().as_ref();
    let is_cris = annotations.is_some_and(|all| all.contains_key(CRI_CONTAINER_TYPE));
    if *wanted != Network::Fresh || is_cris {
        return Ok(Some(Arc::new(network)));
    }
    let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
    let Some(cni) = Cni::of(&config.network, network::cni_id(namespace, id), path) else {
        return Ok(Some(Arc::new(network)));
    };
    let hostname = spec.hostname().clone().unwrap_or_else(|| id.to_owned());
    let names = Names::make(record.directory(), &hostname).map_err(|error| chain(&error))?;
    Ok(Some(Arc::new(network.filled_by(cni, Some(names)))))
}

/// What is announced to the guest at boot, to come later: up to what a VM without limits may have, since Update can take them
/// away, and other containers can come.
fn what_may_come(config: &Config, limits: &size::Limits, vm: &SandboxConfig) -> PlugConfig {
    let host = Host::read();
    let free = Room::ceiling(&size::Limits::default(), &config.size, host);
    let limited = Room::ceiling(limits, &config.size, host);
    let boot = BootSize {
        vcpus: vm.vcpus,
        memory_mib: vm.memory_mib,
    };
    let most = BootSize {
        vcpus: free.vcpus.max(limited.vcpus),
        memory_mib: free.memory_mib.max(limited.memory_mib),
    };
    PlugConfig {
        balloon: vm.plug.balloon,
        ..size::plug(boot, most, vm.memory_way)
    }
}

/// Puts this process into the cgroup that is to hold the VM, if it has one.
fn enter_cgroup(
    config: &Config,
    spec: &Spec,
    id: &str,
    memory_mib: u64,
    record: &Record,
) -> Result<Option<Arc<VmCgroup>>, String> {
    let key = record.directory().file_name().unwrap_or_default();
    let wish = Wish::of(config, &key.to_string_lossy(), spec, memory_mib);
    let Some(place) = wish.place else {
        tracing::debug!(
            "neither spec nor configuration names a cgroup; the VM stays in its shim's"
        );
        return Ok(None);
    };
    let entered = Tree::of_host().and_then(|tree| {
        origin::leaving_cgroups(&tree.here());
        VmCgroup::enter(&tree, &place, wish.memory, (id, Cpu::of(spec)), record)
    });
    match entered {
        Ok(cgroup) => {
            tracing::debug!(paths = ?cgroup.paths(), memory = wish.memory, "the VM has its cgroup");
            Ok(Some(cgroup))
        }
        Err(error) if wish.required => Err(format!(
            "{} (to run VMs without a cgroup where that cannot be, set cgroup_required = false in the configuration)",
            chain(&error)
        )),
        Err(error) => {
            tracing::warn!(error = chain(&error), "the VM is not held by a cgroup");
            Ok(None)
        }
    }
}

/// A line of the guest goes to containerd's log; its rate is bounded where it comes from.
fn guest_line(line: &GuestLine) {
    let (component, message) = match line.source {
        Source::Console => ("console", line.message.as_str()),
        Source::Agent => (line.component.as_str(), line.message.as_str()),
    };
    match line.level {
        Level::ERROR => tracing::error!(component, "{message}"),
        Level::WARN => tracing::warn!(component, "{message}"),
        Level::INFO => tracing::info!(component, "{message}"),
        Level::DEBUG | Level::TRACE => tracing::debug!(component, "{message}"),
    }
}

async fn serve(place: Place, mut up: std::fs::File) {
    let Place {
        listener,
        socket,
        inode,
        config,
        sandbox,
        identity,
        record,
        network,
        cgroup,
        lock,
        begun_ns,
    } = place;
    let way = TtrpcWay::new(&std::env::var("TTRPC_ADDRESS").unwrap_or_default());
    let publisher = Publisher::start(&identity.namespace, way);
    let pid = identity.pid;
    let control_socket = record.directory().join(control::SOCKET);
    let recorded = record.add(Resource::Socket(control_socket.clone()));
    let patience = Patience::of(&config);
    let shim = Shim::new(
        identity,
        config,
        record,
        network,
        cgroup,
        patience.stdio,
        publisher,
    );

    let mut server = ttrpc::asynchronous::Server::new().register_service(task::services(&shim));
    let served = match ttrpc::asynchronous::transport::Listener::try_from(listener) {
        Ok(listener) => {
            server = server.add_listener(listener);
            server.start().await.map_err(|error| error.to_string())
        }
        Err(error) => Err(error.to_string()),
    };
    let served = served.and(recorded.map_err(|error| chain(&error)));
    let word = match &served {
        Ok(()) => vec![DAEMON_UP],
        Err(error) => format!("Cannot serve: {error}").into_bytes(),
    };
    shim.serves(begun_ns);
    // If start has gone, nobody will call, and that ends us too.
    let _ = up.write_all(&word);
    drop(up);
    // Before the first call, but not before start may go on: a host with one CPU would keep it waiting for the kernel's load.
    tokio::spawn(shim.clone().boot(sandbox, control_socket));
    if let Err(error) = served {
        tracing::error!(%error, "cannot serve");
        shim.shut_down();
    }
    tracing::info!(pid, version = crate::BUILD_ID, "the shim serves");

    tokio::spawn(heed_signals(shim.clone()));
    tokio::spawn(heed_silence(shim.clone(), patience.idle));
    shim.ending().await;

    let (ending, began) = (shim.clone(), Instant::now());
    std::thread::spawn(move || {
        loop {
            let limit = ENDS_BY_FORCE + ending.granted();
            match limit.saturating_sub(began.elapsed()) {
                Duration::ZERO => std::process::exit(1),
                left => std::thread::sleep(left),
            }
        }
    });
    // From here on a new shim may have the address.
    bootstrap::release(&socket, inode);
    let failures = shim.clean_up().await;
    if failures.is_empty() {
        tracing::info!("the shim ends");
    } else {
        tracing::warn!(failures, "the shim ends");
    }
    tokio::time::sleep(LAST_ANSWER).await;
    drop(lock);
}

async fn heed_signals(shim: Arc<Shim>) {
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        tracing::warn!("signals are not handled");
        return;
    };
    let name = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tracing::info!(signal = name, "a signal ends the shim");
    shim.shut_down();
}

async fn heed_silence(shim: Arc<Shim>, limit: Duration) {
    tokio::time::sleep(limit).await;
    if !shim.called() {
        tracing::warn!(after = ?limit, "nobody called; the shim ends");
        shim.shut_down();
    }
}

/// What the control socket shows: the VM, and what the shim knows of its containers. The shim holds the socket.
struct ControlTarget {
    sandbox: Sandbox,
    shim: Weak<Shim>,
}

#[async_trait::async_trait]
impl control::Target for ControlTarget {
    fn inspect(&self) -> control::Inspection {
        let timings = self.shim.upgrade().map(|shim| shim.timings());
        control::Inspection {
            timings: timings.unwrap_or_default(),
            ..self.sandbox.inspect()
        }
    }

    async fn memory_used(&self) -> Option<u64> {
        self.sandbox.memory_used().await
    }

    async fn clock(&self) -> Option<ClockReading> {
        self.sandbox.clock().await
    }

    async fn resize(&self, wanted: control::Wanted) -> Result<control::Changed, String> {
        match self.shim.upgrade() {
            Some(shim) => shim.resize_vm(wanted).await,
            None => Err("The shim ends".to_owned()),
        }
    }

    async fn stop(&self) -> ExitReason {
        self.sandbox.shutdown().await
    }
}

impl Shim {
    /// Makes the VM and follows it; its control socket is there as long as it is.
    async fn boot(self: Arc<Self>, config: SandboxConfig, control_socket: PathBuf) {
        // Reading kernel and initrd blocks for a while.
        let made = tokio::task::spawn_blocking(move || Sandbox::boot(config)).await;
        let made = match made {
            Ok(made) => made.map_err(|error| chain(&error)),
            Err(error) => Err(format!("Making the VM broke off: {error}")),
        };
        match &made {
            Ok(sandbox) => {
                let target = ControlTarget {
                    sandbox: sandbox.clone(),
                    shim: Arc::downgrade(&self),
                };
                match control::serve(&control_socket, Arc::new(target)).await {
                    Ok(served) => self.keep_control(served),
                    Err(error) => {
                        tracing::warn!(error = chain(&error), "there is no control socket");
                    }
                }
            }
            Err(error) => tracing::error!(%error, "there is no VM"),
        }
        self.booted(made).await;
    }
}
