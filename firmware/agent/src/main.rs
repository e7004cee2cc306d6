//! The first process of nacre's guests. It makes the machine usable, dials
//! the host, and does what the host asks: containers, disks, power-off. An
//! agent without its host has no purpose: when the connection ends, so does
//! the machine. A panic of the agent is a panic of the guest's kernel, which
//! the VMM sees as such, with the words on the console.

#![cfg_attr(not(test), no_main)]
#![cfg_attr(test, allow(dead_code))]

mod bundle;
mod cgroup;
mod confinement;
mod container;
mod device_rules;
mod devices;
mod error;
mod events;
mod exec;
mod helper;
mod hotplug;
mod init;
mod log;
mod modules;
mod net;
mod process;
mod reaper;
mod resources;
mod runtime;
mod seccomp;
mod service;
mod shares;
mod spec;
mod stats;
mod stdio;
mod uevents;
mod users;
mod vsock;

use std::path::Path;
use std::time::Duration;

use nacre_protocol::agent::ReadyRequest;
use nacre_protocol::agent_ttrpc::{HostClient, create_agent};
use nacre_protocol::{PORT_CALLS, PORT_EVENTS, PORT_LOG, PROTOCOL_VERSION};
use tokio::sync::{oneshot, watch};
use tracing::{Level, error, info, warn};
use ttrpc::asynchronous::transport::{Listener, Socket};
use ttrpc::asynchronous::{Client, Server};

use crate::container::Containers;
use crate::error::{Doing, Error};
use crate::events::Events;
use crate::hotplug::Hotplug;
use crate::hotplug::pressure::MemoryWatch;
use crate::modules::Group;
use crate::reaper::Reaper;
use crate::service::Service;
use crate::vsock::Watched;

/// How long the host may take to answer Ready.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// How long, after Shutdown, the host may take to close the connection before the power goes.
const LAST_ANSWER_LIMIT: Duration = Duration::from_millis(300);

/// The C runtime's entry, in place of Rust's: that one aborts where there are no standard streams and no
/// /dev/null, which is how a first process may begin.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn main(_argc: libc::c_int, _argv: *const *const libc::c_char) -> libc::c_int {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if let Some(code) = helper::run(&arguments) {
        return code;
    }
    if std::process::id() != 1 {
        eprintln!("nacre-agent is the first process of a guest; it does nothing here");
        return 2;
    }
    init::mark_phase(nacre_protocol::PHASE_INIT);
    first_process()
}

fn first_process() -> ! {
    let init_us = init::boottime_us();
    // SAFETY: ignoring SIGPIPE touches no memory; writes to what is closed then fail with an error.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    // The exit that follows an abort of the first process is the kernel's panic.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("nacre-agent: {panic}");
        std::process::abort();
    }));
    let prepared = init::prepare();
    log::install(log::Sink::Host, log_level());
    if let Err(error) = prepared {
        error!("preparing the guest: {error}");
        init::power_off();
    }
    hotplug::policy::set(Path::new("/sys"));
    modules::load(Path::new(modules::DIRECTORY), Group::Boot);
    let modules_us = init::boottime_us();

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(16)
        .build();
    let served = match runtime {
        Ok(runtime) => runtime.block_on(serve(init_us, modules_us)),
        Err(error) => Err(error).doing(|| "starting the runtime".into()),
    };
    match served {
        Ok(()) => info!("powering off"),
        Err(error) => error!("powering off: {error}"),
    }
    init::power_off()
}

/// More is logged when the kernel's command line asks for it.
fn log_level() -> Level {
    let asked = std::fs::read_to_string("/proc/cmdline")
        .is_ok_and(|line| line.split_whitespace().any(|word| word == "nacre.debug"));
    match asked {
        true => Level::DEBUG,
        false => Level::INFO,
    }
}

/// Serves the host until it asks for the end, or is gone.
async fn serve(init_us: u64, modules_us: u64) -> Result<(), Error> {
    #[cfg(feature = "unix-transport")]
    start_host()?;

    let reaper = Reaper::start().doing(|| "listening for the ends of children".into())?;
    let (events, queue) = Events::new();
    let hotplug = Hotplug::new(reaper.clone());
    let memory_watch = MemoryWatch::start(Path::new(init::CGROUP_ROOT), events.clone());
    let containers = Containers::new(reaper, events);
    let (loaded, modules) = watch::channel(Group::Boot);
    let (down, mut is_down) = watch::channel(false);

    let (calls, mut calls_ended) = Watched::new(vsock::dial(PORT_CALLS).await?);
    // Kept to the end: dropping it would close the connection.
    let service = Service::new(containers, hotplug, memory_watch, modules, down);
    let _server = serve_calls(calls, service).await?;
    let (to_host, host_ended) = Watched::new(vsock::dial(PORT_EVENTS).await?);
    let host = HostClient::new(Client::new(Socket::new(to_host)));
    let log = vsock::dial(PORT_LOG).await?;
    tokio::spawn(async move {
        if let Err(error) = log::deliver(log).await {
            warn!("the host takes no more log: {error}");
        }
    });

    say_ready(&host, init_us, modules_us).await?;
    // After Ready, so that readiness does not wait for them; calls that need them do.
    modules::load_behind(loaded).doing(|| "starting a thread to load modules".into())?;
    let delivery = tokio::spawn(events::deliver(host, queue));

    let lost =
        |what: &str| Error::Internal(format!("the host has closed the connection for {what}"));
    tokio::select! {
        _ = is_down.wait_for(|down| *down) => {}
        _ = &mut calls_ended => return Err(lost("calls")),
        _ = host_ended => return Err(lost("events")),
        _ = delivery => return Err(lost("events")),
    }
    last_answer(calls_ended).await;
    Ok(())
}

/// The answer to Shutdown is on its way; the host closes the connection when it has it.
async fn last_answer(calls_ended: oneshot::Receiver<()>) {
    let _ = tokio::time::timeout(LAST_ANSWER_LIMIT, calls_ended).await;
}

/// Serves on a connection that was dialled, as if it had been accepted.
async fn serve_calls(
    connection: Watched<vsock::Stream>,
    service: Service,
) -> Result<Server, Error> {
    use futures::StreamExt;
    let one = futures::stream::once(async { Ok(connection) }).chain(futures::stream::pending());
    let mut server = Server::new()
        .add_listener(Listener::new(one))
        .register_service(create_agent(std::sync::Arc::new(service)));
    server
        .start()
        .await
        .map_err(|error| Error::Internal(format!("serving the host's calls: {error}")))?;
    Ok(server)
}

/// Says that the agent is up, and takes the clock and the name that the host answers with.
async fn say_ready(host: &HostClient, init_us: u64, modules_us: u64) -> Result<(), Error> {
    let kernel_release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    let online = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN);
    let request = ReadyRequest {
        protocol_version: PROTOCOL_VERSION,
        build_id: build_id(),
        kernel_release,
        vcpus_online: online.ok().flatten().map_or(0, |count| count as u32),
        memory_total_bytes: memory_total(),
        init_us,
        modules_us,
        ready_us: init::boottime_us(),
        ..Default::default()
    };
    let asked = std::time::Instant::now();
    let answer = host
        .ready(ttrpc::context::with_duration(READY_LIMIT), &request)
        .await
        .map_err(|error| Error::Internal(format!("the host did not take Ready: {error}")))?;
    // The host's time is half a round trip old.
    let old = u64::try_from((asked.elapsed() / 2).as_nanos()).unwrap_or(0);
    let realtime_ns = match answer.realtime_ns {
        0 => 0,
        told => told.saturating_add(old),
    };
    init::set_clock_and_name(realtime_ns, &answer.hostname);
    info!(
        "ready: {} on Linux {}, {} vCPU, {} MiB",
        request.build_id,
        request.kernel_release,
        request.vcpus_online,
        request.memory_total_bytes >> 20
    );
    Ok(())
}

fn build_id() -> String {
    match option_env!("NACRE_COMMIT") {
        Some(commit) => format!("{} ({commit})", env!("CARGO_PKG_VERSION")),
        None => env!("CARGO_PKG_VERSION").into(),
    }
}

/// Bytes of memory that the kernel manages.
fn memory_total() -> u64 {
    // SAFETY: an all-zero sysinfo is a valid one, and the call only writes into it.
    unsafe {
        let mut info: libc::sysinfo = std::mem::zeroed();
        match libc::sysinfo(&mut info) {
            0 => info.totalram * u64::from(info.mem_unit),
            _ => 0,
        }
    }
}

/// Starts the program that plays the host, where there is no vsock.
#[cfg(feature = "unix-transport")]
fn start_host() -> Result<(), Error> {
    std::fs::create_dir_all("/run/host").doing(|| "making /run/host".into())?;
    std::process::Command::new("/host")
        .spawn()
        .doing(|| "starting /host".into())?;
    Ok(())
}
