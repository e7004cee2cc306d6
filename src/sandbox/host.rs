//! The `Host` service that the agent calls: its hello and its events. Events
//! are taken once each, in order; what names no container of ours or makes no
//! sense is acknowledged and dropped with a warning, so that the agent goes on.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use nacre_protocol::PROTOCOL_VERSION;
use nacre_protocol::agent::event_request::Event;
use nacre_protocol::agent::{Empty, EventRequest, ReadyRequest, ReadyResponse};
use nacre_protocol::agent_ttrpc::Host;
use tokio::sync::{mpsc, watch};
use ttrpc::r#async::TtrpcContext;

use super::console::printable;
use super::error::Error;
use super::phases::monotonic_ns;
use super::{AgentEvent, Ready};

/// Events that may wait for their receiver; the agent keeps the rest.
pub(crate) const EVENT_QUEUE: usize = 256;
/// Longest text that is taken from the agent's hello, in characters.
const HELLO_TEXT: usize = 256;

/// Complaints about one agent that go to the log; more would only fill it.
const COMPLAINTS: u32 = 50;

/// Ids of the containers whose events are passed on.
pub(crate) type Containers = Arc<Mutex<HashSet<String>>>;

/// What the agent's hello has led to.
#[derive(Debug, Clone)]
pub(crate) enum Hello {
    Awaited,
    Said(Arc<Ready>),
    Failed(Error),
}

/// The service's state, one per sandbox.
pub(crate) struct HostService {
    pub hostname: String,
    pub build_id: String,
    pub hello: watch::Sender<Hello>,
    pub events: mpsc::Sender<AgentEvent>,
    pub containers: Containers,
    pub last_sequence: Mutex<u64>,
    pub complaints: AtomicU32,
}

impl HostService {
    /// Says what is wrong with an event, unless too much has been said already.
    fn complain(&self, sequence: u64, container_id: &str, what: &str) {
        let said = self.complaints.fetch_add(1, Ordering::Relaxed);
        if said < COMPLAINTS {
            let container_id = bounded(container_id, 128);
            tracing::warn!(sequence, container_id, "{what}");
        } else if said == COMPLAINTS {
            tracing::warn!("further complaints about the agent's events are not logged");
        } else {
            // Never around to zero.
            self.complaints.store(COMPLAINTS + 1, Ordering::Relaxed);
        }
    }

    fn take_hello(&self, request: &ReadyRequest) -> Result<(), Error> {
        if request.protocol_version != PROTOCOL_VERSION {
            let error = Error::Mismatch {
                agent_version: request.protocol_version,
                agent_build: bounded(&request.build_id, HELLO_TEXT),
                host_version: PROTOCOL_VERSION,
                host_build: self.build_id.clone(),
            };
            self.hello.send_replace(Hello::Failed(error.clone()));
            return Err(error);
        }
        let ready = Ready {
            build_id: bounded(&request.build_id, HELLO_TEXT),
            kernel_release: bounded(&request.kernel_release, HELLO_TEXT),
            vcpus_online: request.vcpus_online,
            memory_total_bytes: request.memory_total_bytes,
            init_us: request.init_us,
            modules_us: request.modules_us,
            ready_us: request.ready_us,
            ready_ns: monotonic_ns(),
        };
        self.hello.send_if_modified(|hello| match hello {
            Hello::Awaited => {
                *hello = Hello::Said(Arc::new(ready));
                true
            }
            // A second hello changes nothing.
            Hello::Said(_) | Hello::Failed(_) => false,
        });
        Ok(())
    }

    /// Takes an event unless it was taken before. Err: keep it and try again.
    fn take_event(&self, request: &EventRequest) -> Result<(), &'static str> {
        let mut last = self
            .last_sequence
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if request.sequence <= *last {
            tracing::debug!(sequence = request.sequence, "the agent repeated an event");
            return Ok(());
        }
        if request.sequence != *last + 1 {
            self.complain(request.sequence, "", "the agent's events skip numbers");
        }
        if let Some(event) = self.judge(request) {
            // One that finds no room would be old news when there is some.
            if matches!(event, AgentEvent::Pressure { .. }) && self.events.capacity() <= 1 {
                *last = request.sequence;
                return Ok(());
            }
            match self.events.try_send(event) {
                Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
                Err(mpsc::error::TrySendError::Full(_)) => return Err("the event queue is full"),
            }
        }
        *last = request.sequence;
        Ok(())
    }

    fn judge(&self, request: &EventRequest) -> Option<AgentEvent> {
        let Some(event) = &request.event else {
            self.complain(request.sequence, "", "dropped an event without content");
            return None;
        };
        if let Event::Pressure(pressure) = event {
            return Some(AgentEvent::Pressure {
                total_bytes: pressure.memory_total_bytes,
                available_bytes: pressure.memory_available_bytes,
            });
        }
        let container_id = match event {
            Event::Exit(exit) => &exit.container_id,
            Event::Oom(oom) => &oom.container_id,
            _ => {
                self.complain(request.sequence, "", "dropped an event of an unknown kind");
                return None;
            }
        };
        let known = {
            let containers = self
                .containers
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            containers.contains(container_id)
        };
        if !known {
            self.complain(
                request.sequence,
                container_id,
                "dropped an event for a container that is not there",
            );
            return None;
        }
        match event {
            Event::Exit(exit) => {
                if exit.exec_id.len() > 1024 {
                    self.complain(
                        request.sequence,
                        container_id,
                        "dropped an exit with an absurd exec id",
                    );
                    return None;
                }
                let status = u8::try_from(exit.status).unwrap_or_else(|_| {
                    self.complain(
                        request.sequence,
                        container_id,
                        "exit status over 255, taken as 255",
                    );
                    255
                });
                Some(AgentEvent::Exit {
                    container_id: container_id.clone(),
                    exec_id: exit.exec_id.clone(),
                    pid: exit.pid,
                    status,
                    exited_at: guest_time(exit.exited_at_ns),
                })
            }
            Event::Oom(_) => Some(AgentEvent::Oom {
                container_id: container_id.clone(),
            }),
            _ => None,
        }
    }
}

/// The guest's clock is believed if it is within an hour of ours, else it is now.
fn guest_time(ns: u64) -> SystemTime {
    let now = SystemTime::now();
    let said = SystemTime::UNIX_EPOCH + Duration::from_nanos(ns);
    let apart = said
        .duration_since(now)
        .or_else(|_| now.duration_since(said))
        .unwrap_or(Duration::MAX);
    if apart <= Duration::from_secs(3600) {
        said
    } else {
        now
    }
}

pub(crate) fn bounded(text: &str, characters: usize) -> String {
    printable(&text.chars().take(characters).collect::<String>())
}

#[async_trait]
impl Host for HostService {
    async fn ready(
        &self,
        _context: &TtrpcContext,
        request: ReadyRequest,
    ) -> ttrpc::Result<ReadyResponse> {
        self.take_hello(&request).map_err(|error| {
            ttrpc::Error::RpcStatus(ttrpc::get_status(
                ttrpc::Code::FAILED_PRECONDITION,
                error.to_string(),
            ))
        })?;
        let realtime = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let mut response = ReadyResponse::new();
        response.realtime_ns = u64::try_from(realtime.as_nanos()).unwrap_or(u64::MAX);
        response.hostname = self.hostname.clone();
        Ok(response)
    }

    async fn event(&self, _context: &TtrpcContext, request: EventRequest) -> ttrpc::Result<Empty> {
        self.take_event(&request).map_err(|why| {
            ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::RESOURCE_EXHAUSTED, why))
        })?;
        Ok(Empty::new())
    }
}

#[cfg(test)]
mod tests {
    use nacre_protocol::agent::{Exit, MemoryPressure, OutOfMemory};

    use super::*;

    fn service() -> (
        HostService,
        mpsc::Receiver<AgentEvent>,
        watch::Receiver<Hello>,
    ) {
        let (events, receiver) = mpsc::channel(2);
        let (hello, said) = watch::channel(Hello::Awaited);
        let service = HostService {
            hostname: "host".to_owned(),
            build_id: "ours".to_owned(),
            hello,
            events,
            containers: Arc::new(Mutex::new(HashSet::from(["c".to_owned()]))),
            last_sequence: Mutex::new(0),
            complaints: AtomicU32::new(0),
        };
        (service, receiver, said)
    }

    fn exit(sequence: u64, container: &str, status: u32) -> EventRequest {
        let mut exit = Exit::new();
        exit.container_id = container.to_owned();
        exit.status = status;
        let mut request = EventRequest::new();
        request.sequence = sequence;
        request.event = Some(Event::Exit(exit));
        request
    }

    #[test]
    fn a_repeated_event_is_acknowledged_and_taken_once() {
        let (service, mut events, _said) = service();
        service.take_event(&exit(1, "c", 7)).unwrap();
        service.take_event(&exit(1, "c", 7)).unwrap();
        assert!(matches!(
            events.try_recv(),
            Ok(AgentEvent::Exit { status: 7, .. })
        ));
        assert!(events.try_recv().is_err());
    }

    #[test]
    fn events_of_unknown_containers_and_kinds_are_dropped() {
        let (service, mut events, _said) = service();
        service.take_event(&exit(1, "other", 0)).unwrap();
        let mut empty = EventRequest::new();
        empty.sequence = 2;
        service.take_event(&empty).unwrap();
        let mut oom = EventRequest::new();
        oom.sequence = 3;
        let mut what = OutOfMemory::new();
        what.container_id = "../c\0".repeat(1 << 16);
        oom.event = Some(Event::Oom(what));
        service.take_event(&oom).unwrap();
        assert!(events.try_recv().is_err());
        service.take_event(&exit(4, "c", 0)).unwrap();
        assert!(events.try_recv().is_ok());
    }

    #[test]
    fn want_of_memory_is_passed_on_while_there_is_room_and_never_takes_the_last_place() {
        let (service, mut events, _said) = service();
        let pressure = |sequence| {
            let mut what = MemoryPressure::new();
            (what.memory_total_bytes, what.memory_available_bytes) = (u64::MAX, 7);
            let mut request = EventRequest::new();
            request.sequence = sequence;
            request.event = Some(Event::Pressure(what));
            request
        };
        for sequence in 1..=5 {
            service.take_event(&pressure(sequence)).unwrap();
        }
        service.take_event(&exit(6, "c", 3)).unwrap();
        let expected = AgentEvent::Pressure {
            total_bytes: u64::MAX,
            available_bytes: 7,
        };
        assert_eq!(events.try_recv().unwrap(), expected);
        assert!(matches!(
            events.try_recv(),
            Ok(AgentEvent::Exit { status: 3, .. })
        ));
    }

    #[test]
    fn complaints_come_to_an_end() {
        let (service, _events, _said) = service();
        for sequence in 1..=u64::from(3 * COMPLAINTS) {
            service.take_event(&exit(sequence, "other", 0)).unwrap();
        }
        assert_eq!(service.complaints.load(Ordering::Relaxed), COMPLAINTS + 1);
    }

    #[test]
    fn an_exit_status_over_255_is_taken_as_255() {
        let (service, mut events, _said) = service();
        service.take_event(&exit(1, "c", 256)).unwrap();
        assert!(matches!(
            events.try_recv(),
            Ok(AgentEvent::Exit { status: 255, .. })
        ));
    }

    #[test]
    fn a_full_queue_refuses_and_the_retry_is_taken() {
        let (service, mut events, _said) = service();
        service.take_event(&exit(1, "c", 1)).unwrap();
        service.take_event(&exit(2, "c", 2)).unwrap();
        service.take_event(&exit(3, "c", 3)).unwrap_err();
        events.try_recv().unwrap();
        service.take_event(&exit(3, "c", 3)).unwrap();
        events.try_recv().unwrap();
        assert!(matches!(
            events.try_recv(),
            Ok(AgentEvent::Exit { status: 3, .. })
        ));
    }

    #[test]
    fn a_hello_of_another_protocol_names_both_builds() {
        let (service, _events, said) = service();
        let mut request = ReadyRequest::new();
        request.protocol_version = PROTOCOL_VERSION + 1;
        request.build_id = "theirs".to_owned();
        let text = service.take_hello(&request).unwrap_err().to_string();
        assert!(text.contains("theirs") && text.contains("ours"), "{text}");
        assert!(matches!(
            &*said.borrow(),
            Hello::Failed(Error::Mismatch { .. })
        ));
    }

    #[test]
    fn a_second_hello_changes_nothing() {
        let (service, _events, said) = service();
        let mut request = ReadyRequest::new();
        request.protocol_version = PROTOCOL_VERSION;
        request.build_id = "first".to_owned();
        service.take_hello(&request).unwrap();
        request.build_id = "second".to_owned();
        service.take_hello(&request).unwrap();
        let Hello::Said(ready) = said.borrow().clone() else {
            panic!("no hello")
        };
        assert_eq!(ready.build_id, "first");
    }

    #[test]
    fn an_absurd_guest_clock_is_replaced() {
        let year_2554 = guest_time(u64::MAX);
        assert!(year_2554 <= SystemTime::now());
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap()
            .as_nanos() as u64;
        assert_eq!(
            guest_time(now),
            SystemTime::UNIX_EPOCH + Duration::from_nanos(now)
        );
    }
}
