//! An agent that breaks the protocol, frame by frame. Whatever it sends is over by the call's deadline, costs no
//! other call anything, and comes out as a typed error or as a bounded answer.

use std::future::Future;
use std::io;

use nacre_protocol::agent::{PidsResponse, StatsResponse};
use nacre_protocol::agent_ttrpc::create_agent;
use protobuf::Message;
use tokio::io::DuplexStream;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::proto::Response;

use super::super::gate::{LONGEST_ANSWER, LONGEST_REQUEST};
use super::*;

/// ttrpc's frame types.
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;

fn header(length: u32, stream: u32, kind: u8) -> Vec<u8> {
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend(stream.to_be_bytes());
    frame.extend([kind, 0]);
    frame
}

fn frame(stream: u32, kind: u8, body: &[u8]) -> Vec<u8> {
    let mut frame = header(u32::try_from(body.len()).unwrap(), stream, kind);
    frame.extend(body);
    frame
}

/// A whole answer to a call.
fn answer(stream: u32, message: &impl Message) -> Vec<u8> {
    let mut response = Response::new();
    response.payload = message.write_to_bytes().unwrap();
    frame(stream, RESPONSE, &response.write_to_bytes().unwrap())
}

fn created(pid: u32) -> CreateContainerResponse {
    let mut created = CreateContainerResponse::new();
    created.pid = pid;
    created
}

/// The agent's end of the calls connection, in raw bytes.
struct Raw {
    calls: DuplexStream,
    /// Keeps the events connection.
    _host: HostClient,
}

impl Raw {
    /// Dials and says hello.
    async fn new(fake: &Fake) -> Self {
        let calls = fake.dial(PORT_CALLS).unwrap();
        let events = fake.dial(PORT_EVENTS).unwrap();
        let host = HostClient::new(Client::new(Socket::new(events)));
        host.ready(context(), &hello()).await.unwrap();
        Self { calls, _host: host }
    }

    /// The next request's stream id.
    async fn request(&mut self) -> u32 {
        let mut header = [0; 10];
        self.calls.read_exact(&mut header).await.unwrap();
        let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        let mut body = vec![0; number(0) as usize];
        self.calls.read_exact(&mut body).await.unwrap();
        assert_eq!(header[8], REQUEST);
        number(4)
    }

    /// Sends, unless the host has closed the connection.
    async fn send(&mut self, bytes: &[u8]) {
        let _ = self.calls.write_all(bytes).await;
    }
}

/// Runs one call against an agent that does what `act` does and then nothing more, and what time it took.
async fn against<T, C, A>(
    call: impl FnOnce(Sandbox) -> C,
    act: impl FnOnce(Raw) -> A,
) -> (Result<T, Error>, Duration)
where
    C: Future<Output = Result<T, Error>>,
    A: Future<Output = Raw> + Send + 'static,
{
    let (sandbox, fake, _) = boot();
    let raw = Raw::new(&fake).await;
    let acting = tokio::spawn(act(raw));
    let began = tokio::time::Instant::now();
    let outcome = call(sandbox).await;
    let took = began.elapsed();
    acting.abort();
    (outcome, took)
}

#[tokio::test(start_paused = true)]
async fn frames_that_are_no_answer_end_in_a_typed_error_by_the_deadline() {
    type Bytes = fn(u32) -> Vec<u8>;
    let over = |limit: usize| u32::try_from(limit + 1).unwrap();
    let cases: [(&str, Bytes); 9] = [
        ("no frame", |_| Vec::new()),
        ("half a header", |_| vec![0, 0, 0]),
        ("length 2^32-1", |stream| header(u32::MAX, stream, RESPONSE)),
        ("just over our limit", |stream| {
            let body = vec![0; LONGEST_ANSWER + 1];
            frame(stream, RESPONSE, &body)
        }),
        ("just over ttrpc's limit", |stream| {
            let body = vec![0; (4 << 20) + 1];
            frame(stream, RESPONSE, &body)
        }),
        ("unknown stream", |stream| {
            answer(stream.wrapping_add(1000), &created(1))
        }),
        ("stream 0", |_| answer(0, &created(1))),
        ("no known type", |stream| frame(stream, 99, b"")),
        ("no protobuf", |stream| {
            frame(stream, RESPONSE, &[0xff, 0xff, 0xff])
        }),
    ];
    assert!(over(LONGEST_ANSWER) < 4 << 20);
    for (name, bytes) in cases {
        let (outcome, took) = against(
            async |sandbox| create(&sandbox, "c").await,
            async move |mut raw: Raw| {
                let stream = raw.request().await;
                raw.send(&bytes(stream)).await;
                std::future::pending::<()>().await;
                raw
            },
        )
        .await;
        let error = outcome.unwrap_err();
        let typed = matches!(error, Error::Timeout { .. } | Error::Disconnected { .. });
        assert!(typed, "{name}: {error}");
        let limit = TIMEOUTS.create + Duration::from_secs(2);
        assert!(took <= limit, "{name}: {took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_length_0_is_one_of_all_defaults() {
    let (outcome, _) = against(
        async |sandbox| create(&sandbox, "c").await,
        async |mut raw: Raw| {
            let stream = raw.request().await;
            raw.send(&header(0, stream, RESPONSE)).await;
            raw
        },
    )
    .await;
    assert_eq!(outcome.unwrap(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_repeated_answer_is_not_that_of_the_next_call() {
    let (sandbox, fake, _) = boot();
    let mut raw = Raw::new(&fake).await;
    let acting = tokio::spawn(async move {
        let first = raw.request().await;
        for pid in [1, 2, 3] {
            raw.send(&answer(first, &created(pid))).await;
        }
        let second = raw.request().await;
        assert_ne!(first, second);
        raw.send(&answer(first, &created(4))).await;
        raw.send(&answer(second, &created(5))).await;
        raw.send(&answer(second, &created(6))).await;
        raw
    });
    assert_eq!(create(&sandbox, "c").await.unwrap(), 1);
    assert_eq!(create(&sandbox, "d").await.unwrap(), 5);
    acting.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn one_byte_a_second_costs_its_own_call_the_deadline_and_no_other() {
    let (sandbox, fake, _) = boot();
    let mut raw = Raw::new(&fake).await;
    let acting = tokio::spawn(async move {
        let slow = raw.request().await;
        let mut late = created(1);
        late.special_fields
            .mut_unknown_fields()
            .add_length_delimited(9, vec![0; 60]);
        for byte in answer(slow, &late) {
            raw.send(&[byte]).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let next = raw.request().await;
        raw.send(&answer(next, &created(2))).await;
        raw
    });
    let began = tokio::time::Instant::now();
    let error = create(&sandbox, "c").await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert_eq!(began.elapsed(), TIMEOUTS.create);
    // The rest of the late answer is read and thrown away meanwhile.
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(create(&sandbox, "d").await.unwrap(), 2);
    acting.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn huge_repeated_fields_are_bounded_by_the_frame() {
    let mut pids = PidsResponse::new();
    // Two bytes each: as many as fit.
    let most = (LONGEST_ANSWER - 16) / 2;
    pids.processes = vec![Process::new(); most];
    let (outcome, _) = against(
        async |sandbox| sandbox.pids("c").await,
        async move |mut raw: Raw| {
            let stream = raw.request().await;
            raw.send(&answer(stream, &pids)).await;
            raw
        },
    )
    .await;
    assert_eq!(outcome.unwrap().len(), most);
    let mut stats = StatsResponse::new();
    let many = (0..50_000).map(|n| (format!("x{n}"), 1));
    stats.cpu = many.collect();
    let (outcome, took) = against(
        async |sandbox| sandbox.stats("c").await,
        async move |mut raw: Raw| {
            let stream = raw.request().await;
            raw.send(&answer(stream, &stats)).await;
            std::future::pending::<()>().await;
            raw
        },
    )
    .await;
    let error = outcome.unwrap_err();
    assert!(matches!(error, Error::Disconnected { .. }), "{error}");
    assert!(took < TIMEOUTS.agent, "at once: {took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_device_path_is_taken_as_bounded_printable_words() {
    let path = "../\0/etc\x1b[2J".repeat(20_000);
    let disk = || DiskConfig::file("/d", true, "");
    let mut bound = BindDiskResponse::new();
    bound.device = path;
    let (outcome, _) = against(
        async |sandbox| sandbox.attach_disk(disk(), 0).await,
        async move |mut raw: Raw| {
            let stream = raw.request().await;
            raw.send(&answer(stream, &bound)).await;
            raw
        },
    )
    .await;
    let device = outcome.unwrap().device;
    assert!(device.chars().count() <= 4 * 256, "{}", device.len());
    assert!(!device.contains(['\0', '\x1b']), "{device:?}");
}

#[tokio::test(start_paused = true)]
async fn absurd_exec_ids_are_dropped_and_the_next_event_is_taken() {
    let (sandbox, fake, _) = boot();
    let guest = agent(&fake, Good(fake.clone())).await;
    create(&sandbox, "c").await.unwrap();
    let mut events = sandbox.events().unwrap();
    for (sequence, exec_id) in [
        (1, "x".repeat(1025)),
        (2, "../".repeat(10_000)),
        (3, String::new()),
    ] {
        let mut request = exit(sequence, "c", 0);
        if let Some(Event::Exit(exit)) = &mut request.event {
            exit.exec_id = exec_id;
        }
        guest.host.event(context(), &request).await.unwrap();
    }
    match events.recv().await {
        Some(AgentEvent::Exit { exec_id, .. }) => assert_eq!(exec_id, ""),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn an_event_over_the_limit_ends_the_vm() {
    let (sandbox, fake, _) = boot();
    let guest = agent(&fake, Good(fake.clone())).await;
    create(&sandbox, "c").await.unwrap();
    let most = exit(1, &"../\0".repeat(LONGEST_REQUEST / 8), 0);
    guest.host.event(context(), &most).await.unwrap();
    assert_eq!(fake.exit_reason(), None);
    let over = exit(2, &"x".repeat(1 << 20), 0);
    guest.host.event(context(), &over).await.unwrap_err();
    assert_eq!(sandbox.ended().await, ExitReason::Stopped);
}

#[tokio::test(start_paused = true)]
async fn an_agent_without_its_events_connection_has_no_vm_for_long() {
    let (sandbox, fake, _) = boot();
    let guest = agent(&fake, Good(fake.clone())).await;
    sandbox.ready().await.unwrap();
    let began = tokio::time::Instant::now();
    drop(guest);
    assert_eq!(sandbox.ended().await, ExitReason::Stopped);
    assert!(began.elapsed() <= Duration::from_secs(3));
}

#[tokio::test(start_paused = true)]
async fn frames_of_no_kind_on_the_events_connection_stop_its_reading_and_nothing_else() {
    let (sandbox, fake, _) = boot();
    let calls = fake.dial(PORT_CALLS).unwrap();
    let one = futures::stream::once(async move { Ok::<_, io::Error>(calls) });
    let mut server = Server::new()
        .add_listener(Listener::new(one))
        .register_service(create_agent(Arc::new(Good(fake.clone()))));
    server.start().await.unwrap();
    let mut events = fake.dial(PORT_EVENTS).unwrap();
    let mut sent = Vec::new();
    let mut ready = ttrpc::proto::Request::new();
    ready.service = "nacre.agent.v1.Host".to_owned();
    ready.method = "Ready".to_owned();
    ready.payload = hello().write_to_bytes().unwrap();
    sent.extend(frame(1, REQUEST, &ready.write_to_bytes().unwrap()));
    for stream in 0..1000 {
        sent.extend(frame(stream, 77, b"?"));
    }
    tokio::spawn(async move {
        // Held up in the guest once the host reads no more.
        let _ = events.write_all(&sent).await;
        std::future::pending::<()>().await;
    });
    sandbox.ready().await.unwrap();
    assert_eq!(create(&sandbox, "c").await.unwrap(), 77);
    assert_eq!(fake.exit_reason(), None);
}
