//! Events for containerd, by its ttrpc service `Events/Forward`. One queue keeps
//! their order; while containerd restarts they wait in it and are tried again.
//! What is sent when is for [`super::task`] to say.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::EventsClient;
use containerd_shim_protos::{api::ForwardRequest, topics};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{MessageField, MessageFull};
use tokio::sync::Notify;
use ttrpc::Code;

/// Events that wait at most; beyond that the oldest is lost, and logged.
const QUEUE_LIMIT: usize = 4096;
/// Time for one delivery.
const DELIVERY: Duration = Duration::from_secs(5);
/// Pauses between deliveries that failed: the first, doubled up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// How often an event is tried that containerd answers with an error.
const REJECTIONS: u32 = 5;
/// ttrpc metadata key that names the namespace.
const NAMESPACE_KEY: &str = "containerd-namespace-ttrpc";

/// An event of a task.
#[derive(Debug, Clone, PartialEq)]
pub enum TaskEvent {
    /// A container was created.
    Create(TaskCreate),
    /// Its init was started.
    Start(TaskStart),
    /// A process ended.
    Exit(TaskExit),
    /// A container was deleted.
    Delete(TaskDelete),
    /// A container ran out of memory.
    Oom(TaskOOM),
    /// An exec was added to a container.
    ExecAdded(TaskExecAdded),
    /// An exec was started.
    ExecStarted(TaskExecStarted),
    /// A container was frozen.
    Paused(TaskPaused),
    /// A container was thawed.
    Resumed(TaskResumed),
}

impl TaskEvent {
    fn topic(&self) -> &'static str {
        match self {
            Self::Create(_) => topics::TASK_CREATE_EVENT_TOPIC,
            Self::Start(_) => topics::TASK_START_EVENT_TOPIC,
            Self::Exit(_) => topics::TASK_EXIT_EVENT_TOPIC,
            Self::Delete(_) => topics::TASK_DELETE_EVENT_TOPIC,
            Self::Oom(_) => topics::TASK_OOM_EVENT_TOPIC,
            Self::ExecAdded(_) => topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            Self::ExecStarted(_) => topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            Self::Paused(_) => topics::TASK_PAUSED_EVENT_TOPIC,
            Self::Resumed(_) => topics::TASK_RESUMED_EVENT_TOPIC,
        }
    }

    fn any(&self) -> Any {
        fn pack<M: MessageFull>(message: &M) -> Any {
            let mut any = Any::new();
            any.type_url = M::descriptor().full_name().to_owned();
            // Writing to a Vec fails only for messages over 2 GiB.
            any.value = message.write_to_bytes().unwrap_or_default();
            any
        }
        match self {
            Self::Create(event) => pack(event),
            Self::Start(event) => pack(event),
            Self::Exit(event) => pack(event),
            Self::Delete(event) => pack(event),
            Self::Oom(event) => pack(event),
            Self::ExecAdded(event) => pack(event),
            Self::ExecStarted(event) => pack(event),
            Self::Paused(event) => pack(event),
            Self::Resumed(event) => pack(event),
        }
    }
}

/// A point in time as protobuf has it.
pub fn timestamp(time: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(time.into())
}

/// Why an event was not delivered.
#[derive(Debug)]
pub enum Undelivered {
    /// containerd is not there, or went away; it may come back.
    Unreachable(String),
    /// containerd answered with an error.
    Rejected(String),
}

/// The way to containerd.
#[async_trait]
pub trait Forward: Send {
    /// Delivers one envelope; returns when containerd has taken it.
    async fn forward(&mut self, envelope: &Envelope) -> Result<(), Undelivered>;
}

/// The queue's shared part.
#[derive(Default)]
struct Queue {
    waiting: Mutex<VecDeque<Envelope>>,
    filled: Notify,
    emptied: Notify,
}

impl Queue {
    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Envelope>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends events in the order of [`Publisher::publish`]. Clones share the queue; its task
/// ends with the runtime.
#[derive(Clone)]
pub struct Publisher {
    namespace: Arc<str>,
    queue: Arc<Queue>,
}

impl Publisher {
    /// Starts the queue's task. Needs a tokio runtime.
    pub fn start(namespace: &str, way: impl Forward + 'static) -> Self {
        let queue = Arc::new(Queue::default());
        tokio::spawn(deliver(queue.clone(), way));
        Self {
            namespace: namespace.into(),
            queue,
        }
    }

    /// Queues an event; never waits.
    pub fn publish(&self, event: &TaskEvent) {
        let mut envelope = Envelope::new();
        envelope.timestamp = timestamp(SystemTime::now());
        envelope.namespace = self.namespace.to_string();
        envelope.topic = event.topic().to_owned();
        envelope.event = MessageField::some(event.any());
        tracing::debug!(topic = event.topic(), "publishing");
        let lost = {
            let mut waiting = self.queue.lock();
            let same = |other: &Envelope| other.event == envelope.event;
            if matches!(event, TaskEvent::Oom(_)) && waiting.iter().skip(1).any(same) {
                // One that waits says it already; the guest decides how many there are.
                return;
            }
            waiting.push_back(envelope);
            // The front one may be on its way.
            if waiting.len() > QUEUE_LIMIT {
                waiting.remove(1)
            } else {
                None
            }
        };
        if let Some(lost) = lost {
            tracing::error!(
                topic = lost.topic,
                "an event is lost: too many wait for containerd"
            );
        }
        self.queue.filled.notify_one();
    }

    /// Whether there is something that containerd has not taken yet.
    pub fn is_behind(&self) -> bool {
        !self.queue.lock().is_empty()
    }

    /// Waits until all that was published is delivered or given up.
    pub async fn flushed(&self) {
        loop {
            let emptied = self.queue.emptied.notified();
            tokio::pin!(emptied);
            // Registered before the look, so that no end is missed.
            emptied.as_mut().enable();
            if self.queue.lock().is_empty() {
                return;
            }
            emptied.await;
        }
    }
}

async fn deliver(queue: Arc<Queue>, mut way: impl Forward) {
    let mut rejections = 0;
    let mut pause = FIRST_PAUSE;
    loop {
        let next = queue.lock().front().cloned();
        let Some(envelope) = next else {
            queue.emptied.notify_waiters();
            queue.filled.notified().await;
            continue;
        };
        let cause = match way.forward(&envelope).await {
            Ok(()) => {
                queue.lock().pop_front();
                (rejections, pause) = (0, FIRST_PAUSE);
                continue;
            }
            Err(Undelivered::Rejected(cause)) => {
                rejections += 1;
                if rejections >= REJECTIONS {
                    tracing::error!(topic = envelope.topic, %cause, "containerd does not take an event; it is dropped");
                    queue.lock().pop_front();
                    (rejections, pause) = (0, FIRST_PAUSE);
                    continue;
                }
                cause
            }
            Err(Undelivered::Unreachable(cause)) => cause,
        };
        tracing::warn!(topic = envelope.topic, %cause, ?pause, "an event was not delivered and is tried again");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// containerd's ttrpc socket. Connects when there is something to say, and again after a failure.
pub struct TtrpcWay {
    /// Path of the socket; empty if containerd named none, and then events go nowhere.
    path: String,
    client: Option<EventsClient>,
}

impl TtrpcWay {
    /// `address` as `TTRPC_ADDRESS` has it: a path, or a `unix://` URL.
    pub fn new(address: &str) -> Self {
        let path = address.strip_prefix("ttrpc+").unwrap_or(address);
        let path = path.strip_prefix("unix://").unwrap_or(path);
        Self {
            path: path.to_owned(),
            client: None,
        }
    }

    async fn once(&mut self, envelope: &Envelope) -> Result<(), Undelivered> {
        let client = match &self.client {
            Some(client) => client.clone(),
            None => {
                let address = format!("unix://{}", self.path);
                let client = ttrpc::asynchronous::Client::connect(&address)
                    .await
                    .map_err(|error| Undelivered::Unreachable(format!("{address}: {error}")))?;
                self.client.insert(EventsClient::new(client)).clone()
            }
        };
        let mut context = ttrpc::context::with_duration(DELIVERY);
        context.add(NAMESPACE_KEY.to_owned(), envelope.namespace.clone());
        let mut request = ForwardRequest::new();
        request.envelope = MessageField::some(envelope.clone());
        let answer = tokio::time::timeout(DELIVERY, client.forward(context, &request)).await;
        let outcome = match answer {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(ttrpc::Error::RpcStatus(status))) => match status.code.enum_value() {
                Ok(Code::UNAVAILABLE | Code::DEADLINE_EXCEEDED | Code::CANCELLED) => {
                    Undelivered::Unreachable(status.message)
                }
                _ => Undelivered::Rejected(status.message),
            },
            Ok(Err(error)) => Undelivered::Unreachable(error.to_string()),
            Err(_) => Undelivered::Unreachable(format!("no answer within {DELIVERY:?}")),
        };
        if matches!(outcome, Undelivered::Unreachable(_)) {
            self.client = None;
        }
        Err(outcome)
    }
}

#[async_trait]
impl Forward for TtrpcWay {
    async fn forward(&mut self, envelope: &Envelope) -> Result<(), Undelivered> {
        if self.path.is_empty() {
            return Ok(());
        }
        let reused = self.client.is_some();
        match self.once(envelope).await {
            // A connection from before containerd's restart says nothing of the one there is now.
            Err(Undelivered::Unreachable(_)) if reused => self.once(envelope).await,
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use protobuf::Message;

    use super::*;

    /// Takes envelopes as its script says, then all of them.
    struct Scripted {
        script: VecDeque<Result<(), Undelivered>>,
        taken: Arc<Mutex<Vec<String>>>,
    }

    #[async_trait]
    impl Forward for Scripted {
        async fn forward(&mut self, envelope: &Envelope) -> Result<(), Undelivered> {
            self.script.pop_front().unwrap_or(Ok(()))?;
            self.taken
                .lock()
                .unwrap()
                .push(format!("{} {}", envelope.namespace, envelope.topic));
            Ok(())
        }
    }

    fn scripted(script: Vec<Result<(), Undelivered>>) -> (Publisher, Arc<Mutex<Vec<String>>>) {
        let taken = Arc::new(Mutex::new(Vec::new()));
        let way = Scripted {
            script: script.into(),
            taken: taken.clone(),
        };
        (Publisher::start("ns", way), taken)
    }

    fn publish_four(publisher: &Publisher) {
        publisher.publish(&TaskEvent::Create(TaskCreate::new()));
        publisher.publish(&TaskEvent::Start(TaskStart::new()));
        publisher.publish(&TaskEvent::Exit(TaskExit::new()));
        publisher.publish(&TaskEvent::Delete(TaskDelete::new()));
    }

    const FOUR: [&str; 4] = [
        "ns /tasks/create",
        "ns /tasks/start",
        "ns /tasks/exit",
        "ns /tasks/delete",
    ];

    #[tokio::test(start_paused = true)]
    async fn order_holds_while_containerd_is_away() {
        let away = || Err(Undelivered::Unreachable("away".into()));
        let (publisher, taken) = scripted((0..20).map(|_| away()).collect());
        publish_four(&publisher);
        publisher.flushed().await;
        assert_eq!(*taken.lock().unwrap(), FOUR);
    }

    #[tokio::test(start_paused = true)]
    async fn an_event_that_is_refused_blocks_the_rest_for_a_while_only() {
        let no = || Err(Undelivered::Rejected("no".into()));
        let (publisher, taken) = scripted((0..REJECTIONS).map(|_| no()).collect());
        publish_four(&publisher);
        publisher.flushed().await;
        assert_eq!(*taken.lock().unwrap(), FOUR[1..]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_queue_is_bounded_and_loses_the_oldest() {
        let (publisher, taken) = scripted(vec![Err(Undelivered::Unreachable("away".into()))]);
        publisher.publish(&TaskEvent::Create(TaskCreate::new()));
        publisher.publish(&TaskEvent::Start(TaskStart::new()));
        for n in 0..QUEUE_LIMIT - 1 {
            let mut oom = TaskOOM::new();
            oom.container_id = n.to_string();
            publisher.publish(&TaskEvent::Oom(oom));
        }
        publisher.flushed().await;
        let taken = taken.lock().unwrap();
        assert_eq!(taken.len(), QUEUE_LIMIT);
        assert_eq!(
            (&*taken[0], &*taken[1]),
            ("ns /tasks/create", "ns /tasks/oom")
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_kills_for_memory_pushes_nothing_out() {
        let (publisher, taken) = scripted(Vec::new());
        publisher.publish(&TaskEvent::Create(TaskCreate::new()));
        for _ in 0..2 * QUEUE_LIMIT {
            publisher.publish(&TaskEvent::Oom(TaskOOM::new()));
        }
        publisher.publish(&TaskEvent::Exit(TaskExit::new()));
        publisher.flushed().await;
        let expected = ["ns /tasks/create", "ns /tasks/oom", "ns /tasks/exit"];
        assert_eq!(*taken.lock().unwrap(), expected);
    }

    #[tokio::test]
    async fn flushed_returns_at_once_when_nothing_waits() {
        let (publisher, _) = scripted(Vec::new());
        publisher.flushed().await;
    }

    #[test]
    fn events_are_packed_as_containerd_names_them() {
        let mut exit = TaskExit::new();
        exit.exit_status = 42;
        let any = TaskEvent::Exit(exit.clone()).any();
        assert_eq!(any.type_url, "containerd.events.TaskExit");
        assert_eq!(TaskExit::parse_from_bytes(&any.value).unwrap(), exit);
    }

    #[test]
    fn addresses_come_bare_or_as_urls() {
        for address in [
            "/run/c.ttrpc",
            "unix:///run/c.ttrpc",
            "ttrpc+unix:///run/c.ttrpc",
        ] {
            assert_eq!(TtrpcWay::new(address).path, "/run/c.ttrpc");
        }
    }
}
