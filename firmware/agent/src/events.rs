//! Tells the host what happened: one queue, numbered, delivered in order, each
//! event kept until the host has acknowledged it.

use std::time::Duration;

use nacre_protocol::agent::event_request::Event;
use nacre_protocol::agent::{EventRequest, Exit, MemoryPressure, OutOfMemory};
use nacre_protocol::agent_ttrpc::HostClient;
use tokio::sync::{mpsc, oneshot};
use tracing::warn;

use crate::reaper;

/// How long one delivery may take before it is tried again.
const DEADLINE: Duration = Duration::from_secs(10);
/// The pause before an event is tried again: the first, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// The queue's near end. There is one event for each process and each kill for memory, and one
/// [`MemoryPressure`] at a time, so that the queue is bounded by what runs.
#[derive(Clone)]
pub struct Events(mpsc::UnboundedSender<Queued>);

/// An event in the queue.
pub struct Queued {
    event: Event,
    /// Closed when the host has acknowledged the event.
    _undelivered: Option<oneshot::Sender<()>>,
}

/// Completes, with an error that says nothing, when the host has acknowledged an event.
pub type Delivered = oneshot::Receiver<()>;

impl Events {
    /// A queue; the far end goes to [`deliver`].
    pub fn new() -> (Events, mpsc::UnboundedReceiver<Queued>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Events(sender), receiver)
    }

    /// A process has ended; `exec_id` is empty for a container's init.
    pub fn exit(&self, container_id: &str, exec_id: &str, pid: i32, exit: reaper::Exit) {
        let event = Exit {
            container_id: container_id.into(),
            exec_id: exec_id.into(),
            pid: pid.unsigned_abs(),
            status: exit.status,
            exited_at_ns: exit.at_ns,
            ..Default::default()
        };
        self.send(Event::Exit(event), None);
    }

    /// The kernel has killed a process of the container for want of memory.
    pub fn out_of_memory(&self, container_id: &str) {
        let event = OutOfMemory {
            container_id: container_id.into(),
            ..Default::default()
        };
        self.send(Event::Oom(event), None);
    }

    /// Containers are stalled for want of memory. The caller waits for the delivery before it says so again.
    pub fn memory_pressure(&self, total_bytes: u64, available_bytes: u64) -> Delivered {
        let event = MemoryPressure {
            memory_total_bytes: total_bytes,
            memory_available_bytes: available_bytes,
            ..Default::default()
        };
        let (undelivered, delivered) = oneshot::channel();
        self.send(Event::Pressure(event), Some(undelivered));
        delivered
    }

    fn send(&self, event: Event, undelivered: Option<oneshot::Sender<()>>) {
        let _ = self.0.send(Queued {
            event,
            _undelivered: undelivered,
        });
    }
}

impl Queued {
    /// What happened.
    #[cfg(test)]
    pub fn event(&self) -> &Event {
        &self.event
    }
}

/// Delivers until the queue's near ends are gone. A host that is gone shows on the connection; here every
/// refusal is a reason to try again.
pub async fn deliver(host: HostClient, mut queue: mpsc::UnboundedReceiver<Queued>) {
    let mut sequence = 0;
    while let Some(queued) = queue.recv().await {
        sequence += 1;
        let request = EventRequest {
            sequence,
            event: Some(queued.event.clone()),
            ..Default::default()
        };
        let (mut pause, longest) = PAUSES;
        while let Err(error) = host
            .event(ttrpc::context::with_duration(DEADLINE), &request)
            .await
        {
            warn!("event {sequence} was not acknowledged, and is tried again: {error}");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }
}
