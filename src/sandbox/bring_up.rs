//! From the VM's first instruction to the agent's hello: one task for each of
//! the three well-known ports, and one that judges how the boot came out.
//! The tasks own their connections and end with the VM; none of them keeps the
//! sandbox alive.

use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nacre_protocol::agent_ttrpc::create_host;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use super::agent::Agent;
use super::clock;
use super::console::{LineSink, Tail, read_log};
use super::error::Error;
use super::gate::Gate;
use super::host::{Containers, EVENT_QUEUE, Hello, HostService};
use super::machine::{GuestStream, Machine, PortListener};
use super::phases::monotonic_ns;
use super::{AgentEvent, Parts, Ready};

/// How long the VM's own end may follow the end of its events connection, which it brings about.
const END_FOLLOWS: Duration = Duration::from_secs(2);

/// How far the boot has come.
#[derive(Clone)]
pub(crate) enum BringUp {
    Booting {
        connected_ns: Option<u64>,
    },
    Ready {
        ready: Arc<Ready>,
        agent: Agent,
        connected_ns: u64,
    },
    Failed(Error),
}

/// Listeners on the well-known ports, made before the guest can dial.
pub(crate) struct Ports {
    pub calls: Box<dyn PortListener>,
    pub events: Box<dyn PortListener>,
    pub log: Box<dyn PortListener>,
}

type Started = (
    JoinSet<()>,
    watch::Receiver<BringUp>,
    mpsc::Receiver<AgentEvent>,
);

/// Starts the tasks. Needs a tokio runtime.
pub(crate) fn start(
    parts: &Parts,
    machine: Arc<dyn Machine>,
    ports: Option<Ports>,
    tail: Tail,
    containers: Containers,
    lines: Option<LineSink>,
) -> Started {
    let (state, state_seen) = watch::channel(BringUp::Booting { connected_ns: None });
    let (events, events_seen) = mpsc::channel(EVENT_QUEUE);
    let mut tasks = JoinSet::new();
    let Some(ports) = ports else {
        // No agent: the state stays, and the senders live as long as the VM.
        tasks.spawn(async move {
            machine.ended().await;
            drop((state, events));
        });
        return (tasks, state_seen, events_seen);
    };
    let (hello, hello_seen) = watch::channel(Hello::Awaited);
    let service = HostService {
        hostname: parts.hostname.clone(),
        build_id: crate::BUILD_ID.to_owned(),
        hello,
        events,
        containers,
        last_sequence: Mutex::new(0),
        complaints: AtomicU32::new(0),
    };
    let id = parts.id.clone();
    tasks.spawn(serve_host(ports.events, service, machine.clone(), id));
    let sink = lines.unwrap_or_else(|| Arc::new(|_| {}));
    tasks.spawn(take_log(ports.log, sink));
    let (calls, calls_seen) = oneshot::channel();
    tasks.spawn(async move {
        if let Some(stream) = first(ports.calls).await {
            // The receiver is gone only when the boot was given up.
            let _ = calls.send((stream, monotonic_ns()));
        }
    });
    let (limit, deadline) = (parts.timeouts.boot, parts.timeouts.agent);
    let keeps_clock = parts.clock;
    let id = parts.id.clone();
    tasks.spawn(async move {
        let judged = {
            let hello = said_hello(calls_seen, hello_seen, &machine, &tail, &state);
            tokio::select! {
                biased;
                judged = hello => judged,
                reason = machine.ended() => Err(Error::Gone { reason, console: tail.text() }),
                () = tokio::time::sleep(limit) => {
                    Err(Error::BootTimeout { after: limit, console: tail.text() })
                }
            }
        };
        match judged {
            Ok((ready, agent, connected_ns)) => {
                tracing::info!(
                    id,
                    agent_build = ready.build_id,
                    host_build = crate::BUILD_ID,
                    kernel = ready.kernel_release,
                    "the agent is ready"
                );
                state.send_replace(BringUp::Ready {
                    ready,
                    agent: agent.clone(),
                    connected_ns,
                });
                if keeps_clock {
                    clock::keep(&agent, &machine, deadline, &id).await;
                }
            }
            Err(error) => {
                state.send_replace(BringUp::Failed(error));
            }
        }
        // The state stays readable as long as its sender lives: until the VM's end.
        machine.ended().await;
    });
    (tasks, state_seen, events_seen)
}

/// The first connection to a port; dropping the listener refuses the others.
async fn first(mut listener: Box<dyn PortListener>) -> Option<GuestStream> {
    listener.accept().await.ok()
}

async fn said_hello(
    calls: oneshot::Receiver<(GuestStream, u64)>,
    mut hello: watch::Receiver<Hello>,
    machine: &Arc<dyn Machine>,
    tail: &Tail,
    state: &watch::Sender<BringUp>,
) -> Result<(Arc<Ready>, Agent, u64), Error> {
    let connected = async {
        let Ok((stream, connected_ns)) = calls.await else {
            return std::future::pending().await;
        };
        state.send_replace(BringUp::Booting {
            connected_ns: Some(connected_ns),
        });
        (
            Agent::new(stream, machine.clone(), tail.clone()),
            connected_ns,
        )
    };
    let said = async {
        let said = hello
            .wait_for(|hello| !matches!(hello, Hello::Awaited))
            .await;
        match said.map(|hello| hello.clone()) {
            Ok(Hello::Said(ready)) => Ok(ready),
            Ok(Hello::Failed(error)) => Err(error),
            // The events connection is over: the VM's end or the deadline says why.
            Ok(Hello::Awaited) | Err(_) => std::future::pending().await,
        }
    };
    let ((agent, connected_ns), ready) = tokio::try_join!(async { Ok(connected.await) }, said)?;
    Ok((ready, agent, connected_ns))
}

/// Serves `Host` on the first connection to the port, until the VM has ended. A VM without that connection is stopped:
/// nothing that ends in it would be told any more.
async fn serve_host(
    listener: Box<dyn PortListener>,
    service: HostService,
    machine: Arc<dyn Machine>,
    id: String,
) {
    let Some(stream) = first(listener).await else {
        return;
    };
    let (over, why) = oneshot::channel();
    let one = futures::stream::once(async move { Ok(Gate::serving(stream, over)) });
    let mut server = Server::new()
        .add_listener(Listener::new(one))
        .register_service(create_host(Arc::new(service)));
    if let Err(error) = server.start().await {
        tracing::error!(%error, "cannot serve the agent's events");
        return;
    }
    // The server ends its connection when it is dropped; the service and its event sender go with it.
    let cause = tokio::select! {
        biased;
        _ = machine.ended() => return,
        cause = why => cause.unwrap_or_else(|_| "it was dropped".to_owned()),
    };
    if tokio::time::timeout(END_FOLLOWS, machine.ended())
        .await
        .is_err()
    {
        tracing::error!(
            id,
            cause,
            "the agent's events connection is over; the VM is stopped"
        );
        machine.stop();
        machine.ended().await;
    }
}

async fn take_log(listener: Box<dyn PortListener>, sink: LineSink) {
    if let Some(stream) = first(listener).await {
        read_log(stream, sink).await;
    }
}
