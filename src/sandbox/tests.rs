//! The sandbox against a machine in memory and an agent of our own making,
//! which is as hostile as each case wants it. Time is paused: a deadline that
//! passes costs nothing.

mod hostile;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use nacre_protocol::agent::event_request::Event;
use nacre_protocol::agent::{
    BindDiskRequest, BindDiskResponse, CreateContainerRequest, CreateContainerResponse, Empty,
    EventRequest, Exit, ShutdownRequest,
};
use nacre_protocol::agent_ttrpc::{Agent as AgentService, HostClient};
use nacre_protocol::{PORT_CALLS, PORT_EVENTS};
use nacre_vmm::{DiskConfig, ExitReason};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::asynchronous::transport::Socket;
use ttrpc::asynchronous::{Client, TtrpcContext};

use super::console::ConsoleWriter;
use super::fake::TIMEOUTS;
pub(crate) use super::fake::{Fake, Guest, agent, boot, context, hello};
use super::*;

/// An agent that makes containers, refuses disks and powers off.
struct Good(Arc<Fake>);

#[async_trait]
impl AgentService for Good {
    async fn create_container(
        &self,
        _context: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        if request.container_id == "refused" {
            let status = ttrpc::get_status(ttrpc::Code::INTERNAL, "no\x1b[31m room".to_owned());
            return Err(ttrpc::Error::RpcStatus(status));
        }
        let mut answer = CreateContainerResponse::new();
        answer.pid = 77;
        Ok(answer)
    }

    async fn bind_disk(
        &self,
        _context: &TtrpcContext,
        _request: BindDiskRequest,
    ) -> ttrpc::Result<BindDiskResponse> {
        let status = ttrpc::get_status(ttrpc::Code::NOT_FOUND, "no such window".to_owned());
        Err(ttrpc::Error::RpcStatus(status))
    }

    async fn shutdown(
        &self,
        _context: &TtrpcContext,
        _request: ShutdownRequest,
    ) -> ttrpc::Result<Empty> {
        self.0.end(ExitReason::PowerOff);
        Ok(Empty::new())
    }
}

/// An agent that never answers.
struct Mute;

#[async_trait]
impl AgentService for Mute {
    async fn create_container(
        &self,
        _context: &TtrpcContext,
        _request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        std::future::pending().await
    }

    async fn shutdown(
        &self,
        _context: &TtrpcContext,
        _request: ShutdownRequest,
    ) -> ttrpc::Result<Empty> {
        std::future::pending().await
    }
}

async fn create(sandbox: &Sandbox, id: &str) -> Result<u32, Error> {
    sandbox
        .create_container(id, Vec::new(), Vec::new(), false, Stdio::new())
        .await
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

#[tokio::test(start_paused = true)]
async fn ready_after_the_hello_and_calls_are_answered() {
    let (sandbox, fake, _) = boot();
    assert_eq!(sandbox.inspect().state, State::Booting);
    let _guest = agent(&fake, Good(fake.clone())).await;
    let ready = sandbox.ready().await.unwrap();
    assert_eq!(
        (ready.build_id.as_str(), ready.kernel_release.as_str()),
        ("theirs", "6.1")
    );
    assert_eq!(create(&sandbox, "c").await.unwrap(), 77);
    let seen = sandbox.inspect();
    assert_eq!(
        (seen.state, seen.containers),
        (State::Running, vec!["c".to_owned()])
    );
    assert!(seen.phases.ready_ns.is_some() && seen.phases.connected_ns.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_call_before_the_hello_waits_for_it() {
    let (sandbox, fake, _) = boot();
    let early = tokio::spawn({
        let sandbox = sandbox.clone();
        async move { create(&sandbox, "c").await }
    });
    tokio::time::sleep(Duration::from_secs(20)).await;
    let _guest = agent(&fake, Good(fake.clone())).await;
    assert_eq!(early.await.unwrap().unwrap(), 77);
}

#[tokio::test(start_paused = true)]
async fn the_vms_end_fails_ready_at_once_with_reason_and_console() {
    let (sandbox, fake, tail) = boot();
    let mut console = ConsoleWriter::new(None, tail, None);
    std::io::Write::write_all(&mut console, b"Kernel panic - not syncing\n").unwrap();
    let began = tokio::time::Instant::now();
    fake.end(ExitReason::Panic);
    let error = sandbox.ready().await.unwrap_err();
    assert_eq!(error.exit_reason(), Some(&ExitReason::Panic));
    assert!(error.to_string().contains("not syncing"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_eq!(sandbox.inspect().state, State::Ended);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_does_not_come_is_a_boot_timeout() {
    let (sandbox, fake, _) = boot();
    let error = sandbox.ready().await.unwrap_err();
    assert!(
        matches!(error, Error::BootTimeout { after, .. } if after == TIMEOUTS.boot),
        "{error}"
    );
    assert_eq!(sandbox.inspect().state, State::Failed);
    assert_eq!(fake.exit_reason(), None);
    assert_eq!(sandbox.shutdown().await, ExitReason::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_a_hello_is_not_ready() {
    let (sandbox, fake, _) = boot();
    let _calls = fake.dial(PORT_CALLS).unwrap();
    let _events = fake.dial(PORT_EVENTS).unwrap();
    assert!(matches!(
        sandbox.ready().await,
        Err(Error::BootTimeout { .. })
    ));
}

#[tokio::test(start_paused = true)]
async fn another_protocol_names_both_builds() {
    let (sandbox, fake, _) = boot();
    let _calls = fake.dial(PORT_CALLS).unwrap();
    let host = HostClient::new(Client::new(Socket::new(fake.dial(PORT_EVENTS).unwrap())));
    let mut other = hello();
    other.protocol_version += 1;
    let refused = host.ready(context(), &other).await.unwrap_err().to_string();
    assert!(refused.contains("theirs"), "{refused}");
    let error = sandbox.ready().await.unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    assert!(error.to_string().contains("theirs") && error.to_string().contains(crate::BUILD_ID));
}

#[tokio::test(start_paused = true)]
async fn only_the_first_connection_to_a_well_known_port_is_taken() {
    let (sandbox, fake, _) = boot();
    let _guest = agent(&fake, Good(fake.clone())).await;
    sandbox.ready().await.unwrap();
    assert!(fake.dial(PORT_CALLS).is_err());
    assert!(fake.dial(PORT_EVENTS).is_err());
}

#[tokio::test(start_paused = true)]
async fn a_mute_agent_is_a_timeout_and_the_next_call_has_its_own() {
    let (sandbox, fake, _) = boot();
    let _guest = agent(&fake, Mute).await;
    for _ in 0..2 {
        let error = create(&sandbox, "c").await.unwrap_err();
        assert!(
            matches!(&error, Error::Timeout { after, .. } if *after == TIMEOUTS.create),
            "{error}"
        );
    }
    // A Create that failed leaves no container.
    assert!(sandbox.inspect().containers.is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_vms_end_fails_a_call_at_once() {
    let (sandbox, fake, _) = boot();
    let _guest = agent(&fake, Mute).await;
    sandbox.ready().await.unwrap();
    let began = tokio::time::Instant::now();
    let call = tokio::spawn({
        let sandbox = sandbox.clone();
        async move { create(&sandbox, "c").await }
    });
    tokio::time::sleep(Duration::from_millis(10)).await;
    fake.end(ExitReason::TripleFault { vcpu: 0 });
    let error = call.await.unwrap().unwrap_err();
    assert!(matches!(
        error.exit_reason(),
        Some(ExitReason::TripleFault { vcpu: 0 })
    ));
    assert!(began.elapsed() < Duration::from_secs(1));
    assert!(
        create(&sandbox, "d")
            .await
            .unwrap_err()
            .exit_reason()
            .is_some()
    );
}

#[tokio::test(start_paused = true)]
async fn a_refusal_carries_the_agents_code_and_printable_words() {
    let (sandbox, fake, _) = boot();
    let _guest = agent(&fake, Good(fake.clone())).await;
    let error = create(&sandbox, "refused").await.unwrap_err();
    assert_eq!(error.code(), Some(ttrpc::Code::INTERNAL));
    let text = error.to_string();
    assert!(text.contains("room") && !text.contains('\x1b'), "{text:?}");
}

#[tokio::test(start_paused = true)]
async fn a_closed_connection_is_told_as_such_while_the_vm_runs() {
    let (sandbox, fake, _) = boot();
    let calls = fake.dial(PORT_CALLS).unwrap();
    let host = HostClient::new(Client::new(Socket::new(fake.dial(PORT_EVENTS).unwrap())));
    host.ready(context(), &hello()).await.unwrap();
    sandbox.ready().await.unwrap();
    drop(calls);
    let error = create(&sandbox, "c").await.unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn events_come_once_in_order_and_end_with_the_vm() {
    let (sandbox, fake, _) = boot();
    let guest = agent(&fake, Good(fake.clone())).await;
    create(&sandbox, "c").await.unwrap();
    let mut events = sandbox.events().unwrap();
    assert!(sandbox.events().is_none());
    for request in [
        exit(1, "c", 1),
        exit(1, "c", 1),
        exit(2, "stranger", 5),
        exit(3, "c", 300),
    ] {
        guest.host.event(context(), &request).await.unwrap();
    }
    for expected in [1, 255] {
        match events.recv().await {
            Some(AgentEvent::Exit { status, .. }) => assert_eq!(status, expected),
            other => panic!("{other:?}"),
        }
    }
    fake.end(ExitReason::PowerOff);
    assert_eq!(events.recv().await, None);
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_events_is_held_in_the_guest() {
    let (sandbox, fake, _) = boot();
    let guest = agent(&fake, Good(fake.clone())).await;
    create(&sandbox, "c").await.unwrap();
    let mut refused = 0;
    for sequence in 1..=300 {
        let sent = guest
            .host
            .event(context(), &exit(sequence - refused, "c", 0))
            .await;
        refused += u64::from(sent.is_err());
    }
    assert_eq!(refused, 300 - host::EVENT_QUEUE as u64);
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_the_guest_does_not_bind_is_unplugged() {
    let (sandbox, fake, _) = boot();
    let _guest = agent(&fake, Good(fake.clone())).await;
    let disk = DiskConfig::file("/d", true, "");
    let error = sandbox.attach_disk(disk, 0).await.unwrap_err();
    assert_eq!(error.code(), Some(ttrpc::Code::NOT_FOUND));
    assert_eq!(*fake.unplugged.lock().unwrap(), [2]);
    assert!(sandbox.inspect().devices.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_stdio_port_takes_one_connection_within_its_time() {
    let (sandbox, fake, _) = boot();
    let listener = sandbox.stdio_listener().unwrap();
    let other = sandbox.stdio_listener().unwrap();
    assert_ne!(listener.port(), other.port());
    let port = listener.port();
    let mut dialled = fake.dial(port).unwrap();
    let mut stream = listener.accept().await.unwrap();
    assert!(fake.dial(port).is_err());
    dialled.write_all(b"x").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'x');
    let error = other.accept().await.unwrap_err();
    assert!(
        matches!(error, Error::Timeout { after, .. } if after == TIMEOUTS.stdio),
        "{error}"
    );
    let last = sandbox.stdio_listener().unwrap();
    fake.end(ExitReason::Reboot);
    assert_eq!(
        last.accept().await.unwrap_err().exit_reason(),
        Some(&ExitReason::Reboot)
    );
}

#[tokio::test(start_paused = true)]
async fn shutdown_lets_the_guest_power_off_and_is_idempotent() {
    let (sandbox, fake, _) = boot();
    let _guest = agent(&fake, Good(fake.clone())).await;
    sandbox.ready().await.unwrap();
    assert_eq!(sandbox.shutdown().await, ExitReason::PowerOff);
    assert_eq!(sandbox.shutdown().await, ExitReason::PowerOff);
}

#[tokio::test(start_paused = true)]
async fn shutdown_of_a_mute_guest_stops_it_after_two_seconds() {
    let (sandbox, fake, _) = boot();
    let _guest = agent(&fake, Mute).await;
    sandbox.ready().await.unwrap();
    let began = tokio::time::Instant::now();
    assert_eq!(sandbox.shutdown().await, ExitReason::Stopped);
    assert!(
        began.elapsed() <= SHUTDOWN + Duration::from_millis(100),
        "{:?}",
        began.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn shutdown_while_booting_does_not_wait() {
    let (sandbox, _fake, _) = boot();
    let began = tokio::time::Instant::now();
    assert_eq!(sandbox.shutdown().await, ExitReason::Stopped);
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn dropping_the_last_clone_stops_the_vm() {
    let (sandbox, fake, _) = boot();
    let weak = sandbox.downgrade();
    let clone = sandbox.clone();
    drop(sandbox);
    assert_eq!(fake.exit_reason(), None);
    assert!(weak.upgrade().is_some());
    drop(clone);
    assert_eq!(fake.exit_reason(), Some(ExitReason::Stopped));
    assert!(weak.upgrade().is_none());
}
