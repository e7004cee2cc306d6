//! Bodies of fuzz targets: the agent's connections as a hostile guest speaks on
//! them, and all that it may print. See [`crate::fuzzing`].

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use nacre_protocol::agent::event_request::Event;
use nacre_protocol::agent::{EventRequest, Exit, OutOfMemory, Stdio};
use nacre_protocol::{PORT_CALLS, PORT_EVENTS, PORT_LOG};
use nacre_vmm::ExitReason;
use protobuf::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinSet;

use super::Sandbox;
use super::console::{ConsoleWriter, GuestLine, LINE_BYTES, LineSink, TAIL_BYTES, Tail, read_log};
use super::fake::{boot, hello};

/// Paused time: nothing in a sandbox waits for a day.
const FOREVER: Duration = Duration::from_secs(24 * 3600);
/// How long the guest tries to write where nobody reads.
const PATIENCE: Duration = Duration::from_secs(1);
const SERVICE: &str = "nacre.agent.v1.Host";

/// Runs a play on a runtime whose time is paused. One that hangs panics.
pub(crate) fn on_stage(play: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime
        .block_on(async { tokio::time::timeout(FOREVER, play).await })
        .expect("the guest made its host hang");
}

/// The bytes of the guest's three connections, while the host makes calls.
pub(crate) fn frames(data: &[u8]) {
    on_stage(async {
        let (sandbox, fake, _tail) = boot();
        let mut events = sandbox.events().expect("the first to ask");
        let heard = tokio::spawn(async move {
            let mut heard = 0_usize;
            while events.recv().await.is_some() {
                heard += 1;
            }
            heard
        });
        let mut guest = Wires {
            streams: [PORT_CALLS, PORT_EVENTS, PORT_LOG].map(|port| fake.dial(port).ok()),
            sent: 0,
        };
        let mut calls = JoinSet::new();
        let mut input = Unstructured::new(data);
        while !input.is_empty() && guest.step(&mut input, &sandbox, &mut calls).await.is_ok() {}
        // Where the guest goes away first, and where its VM does.
        if data.len().is_multiple_of(2) {
            guest.streams = [None, None, None];
            tokio::time::sleep(PATIENCE).await;
        }
        fake.end(ExitReason::PowerOff);
        while let Some(call) = calls.join_next().await {
            call.expect("a call panicked");
        }
        // Stopped is one that has closed its events' connection and lived on.
        let reason = sandbox.shutdown().await;
        assert!(
            matches!(reason, ExitReason::PowerOff | ExitReason::Stopped),
            "{reason:?}"
        );
        drop(sandbox);
        let heard = heard.await.expect("the receiver of events panicked");
        assert!(
            heard <= guest.sent,
            "more events than the guest can have sent"
        );
    });
}

struct Wires {
    streams: [Option<DuplexStream>; 3],
    /// Bytes written: an event has at least one.
    sent: usize,
}

impl Wires {
    async fn step(
        &mut self,
        input: &mut Unstructured<'_>,
        sandbox: &Sandbox,
        calls: &mut JoinSet<()>,
    ) -> Result<()> {
        match input.arbitrary::<u8>()? % 16 {
            0..=2 => {
                let wire = usize::from(input.arbitrary::<u8>()? % 3);
                let len = usize::from(input.arbitrary::<u16>()?).min(input.len());
                let bytes = input.bytes(len)?.to_vec();
                self.write(wire, &bytes).await;
            }
            3 => {
                let method =
                    ["Ready", "Event", "Nothing"][usize::from(input.arbitrary::<u8>()? % 3)];
                let stream = 1 + 2 * u32::from(input.arbitrary::<u8>()?);
                let len = usize::from(input.arbitrary::<u8>()?).min(input.len());
                let payload = input.bytes(len)?;
                self.write(1, &request(stream, method, payload)).await;
            }
            4 => {
                let frame = request(1, "Ready", &hello().write_to_bytes().unwrap_or_default());
                self.write(1, &frame).await;
            }
            5..=7 => {
                let event = event(input)?;
                let payload = event.write_to_bytes().unwrap_or_default();
                let stream = 3 + 2 * u32::from(input.arbitrary::<u8>()?);
                self.write(1, &request(stream, "Event", &payload)).await;
            }
            8 | 9 => {
                let stream = u32::from(input.arbitrary::<u8>()?);
                let mut response = ttrpc::proto::Response::new();
                let code = input.arbitrary::<u8>()?;
                if code.is_multiple_of(4) {
                    let mut status = ttrpc::proto::Status::new();
                    status.code = protobuf::EnumOrUnknown::from_i32(i32::from(code / 4));
                    let len = usize::from(input.arbitrary::<u8>()?).min(input.len());
                    status.message = String::from_utf8_lossy(input.bytes(len)?).into_owned();
                    response.status = Some(status).into();
                }
                let len = usize::from(input.arbitrary::<u8>()?).min(input.len());
                response.payload = input.bytes(len)?.to_vec();
                let frame = frame(stream, 2, &response.write_to_bytes().unwrap_or_default());
                self.write(0, &frame).await;
            }
            10..=12 => {
                let kind: u8 = input.arbitrary()?;
                if calls.len() < 32 {
                    let sandbox = sandbox.clone();
                    calls.spawn(async move { call(&sandbox, kind).await });
                }
            }
            13 => {
                let wire = usize::from(input.arbitrary::<u8>()? % 3);
                let mut bytes = [0; 4096];
                if let Some(stream) = &mut self.streams[wire] {
                    let _ = tokio::time::timeout(PATIENCE, stream.read(&mut bytes)).await;
                }
            }
            14 => {
                let wire: u8 = input.arbitrary()?;
                if wire < 3 {
                    self.streams[usize::from(wire)] = None;
                }
            }
            _ => tokio::time::sleep(Duration::from_millis(input.arbitrary::<u16>()?.into())).await,
        }
        Ok(())
    }

    async fn write(&mut self, wire: usize, bytes: &[u8]) {
        if let Some(stream) = &mut self.streams[wire] {
            self.sent += bytes.len();
            let _ = tokio::time::timeout(PATIENCE, stream.write_all(bytes)).await;
            // Lets the host take what it was given.
            for _ in 0..4 {
                tokio::task::yield_now().await;
            }
        }
    }
}

/// Any of the calls that a host makes; what comes of it is the guest's choice.
async fn call(sandbox: &Sandbox, kind: u8) {
    let exec = if kind & 0x80 == 0 { "" } else { "e1" };
    let failed = match kind % 16 {
        0 | 1 => sandbox
            .create_container("c1", b"{}".to_vec(), Vec::new(), false, Stdio::new())
            .await
            .err(),
        2 => sandbox.start("c1", exec).await.err(),
        3 => sandbox.signal("c1", exec, 9, false).await.err(),
        4 => sandbox.pids("c1").await.err(),
        5 => sandbox.stats("c1").await.err(),
        6 => sandbox.resize_pty("c1", exec, 80, 24).await.err(),
        7 => sandbox.delete_container("c1").await.err(),
        8 => sandbox.delete_exec("c1", "e1").await.err(),
        9 => sandbox.pause("c1").await.err(),
        10 => sandbox.update("c1", b"{}".to_vec()).await.err(),
        11 => sandbox.resize_vcpus(1 + kind / 64).await.err(),
        12 => sandbox.resize_memory(256 + u64::from(kind)).await.err(),
        13 => sandbox.resources().await.err(),
        14 => sandbox.watch_memory(u64::from(kind) << 20).await.err(),
        _ => match sandbox.stdio_listener() {
            Ok(listener) => listener.accept().await.err(),
            Err(error) => Some(error),
        },
    };
    if let Some(error) = failed {
        // A message quotes at most 4096 characters of an agent, and the console's 64 KiB.
        let text = super::error::chain(&error);
        assert!(
            text.len() < 8 * TAIL_BYTES,
            "an error of {} bytes",
            text.len()
        );
    }
}

/// An event of a guest: any content, often of what there is.
pub(crate) fn event(input: &mut Unstructured<'_>) -> Result<EventRequest> {
    const CONTAINERS: [&str; 4] = ["c1", "c1", "other", ""];
    const EXECS: [&str; 6] = ["", "e1", "e2", "e3", "none", "../../e1\u{1b}[31m"];
    let mut request = EventRequest::new();
    request.sequence = match input.arbitrary::<u8>()? {
        255 => input.arbitrary()?,
        small => small.into(),
    };
    let container = CONTAINERS[usize::from(input.arbitrary::<u8>()? % 4)];
    request.event = match input.arbitrary::<u8>()? % 8 {
        0 => None,
        1 => {
            let mut oom = OutOfMemory::new();
            oom.container_id = container.to_owned();
            Some(Event::Oom(oom))
        }
        _ => {
            let mut exit = Exit::new();
            exit.container_id = container.to_owned();
            exit.exec_id = EXECS[usize::from(input.arbitrary::<u8>()? % 6)].to_owned();
            exit.status = match input.arbitrary::<u8>()? {
                255 => input.arbitrary()?,
                small => small.into(),
            };
            exit.pid = input.arbitrary()?;
            exit.exited_at_ns = input.arbitrary()?;
            Some(Event::Exit(exit))
        }
    };
    Ok(request)
}

fn frame(stream: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes().to_vec();
    bytes.extend(stream.to_be_bytes());
    bytes.extend([kind, 0]);
    bytes.extend(payload);
    bytes
}

fn request(stream: u32, method: &str, payload: &[u8]) -> Vec<u8> {
    let mut request = ttrpc::proto::Request::new();
    request.service = SERVICE.to_owned();
    request.method = method.to_owned();
    request.payload = payload.to_vec();
    frame(stream, 1, &request.write_to_bytes().unwrap_or_default())
}

pub(crate) fn frames_seeds() -> Vec<Vec<u8>> {
    // The hello; Create, its answer, an exit of the init; two calls, one refused.
    let create = [10, 0, 15, 0, 0, 8, 1, 1, 0];
    let exit = [5, 1, 0, 2, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let start = [10, 2, 15, 0, 0, 8, 3, 4, 2, b'n', b'o', 0];
    let pids = [10, 4, 15, 0, 0, 8, 5, 1, 4, 10, 2, 8, 7];
    let life = [&[4][..], &create, &exit, &start, &pids, &[13, 0, 13, 1]].concat();
    let raw = |wire: u8, bytes: &[u8]| {
        let mut step = vec![0, wire];
        step.extend((bytes.len() as u16).to_le_bytes());
        step.extend(bytes);
        step
    };
    let said = hello().write_to_bytes().unwrap_or_default();
    let log = b"INFO init one\nWARN modules two\n";
    let bytes = [
        raw(2, log),
        raw(1, &request(1, "Ready", &said)),
        vec![10, 0, 15, 10, 0],
        raw(0, &frame(1, 2, b"\x12\x00")),
        // Longer than any frame may be.
        raw(1, &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 3, 1, 0]),
        raw(0, &[0, 0x3f, 0xff, 0xff, 0, 0, 0, 1, 2, 0]),
        vec![15, 255, 255],
    ]
    .concat();
    // The hello; one vCPU more, what the guest has and more memory; yes to the first two, and the rest is not answered.
    let yes = |stream: u8| vec![8, stream, 1, 0];
    let size = [
        vec![4, 10, 64 + 11, 15, 0, 0],
        yes(1),
        vec![10, 13, 10, 0xfc, 15, 0, 0],
        yes(3),
        vec![15, 255, 255],
    ]
    .concat();
    vec![life, bytes, size]
}

/// The serial console and the agent's log: bytes to bounded, printable lines.
pub(crate) fn console(data: &[u8]) {
    let lines = Arc::<Mutex<Vec<GuestLine>>>::default();
    let into = Arc::clone(&lines);
    let sink: LineSink = Arc::new(move |line: &GuestLine| {
        into.lock().expect("the lines").push(line.clone());
    });
    let tail = Tail::default();
    let mut writer = ConsoleWriter::new(None, tail.clone(), Some(Arc::clone(&sink)));
    let (sizes, bytes) = data.split_at(data.len().min(4));
    let mut rest = bytes;
    for size in sizes.iter().cycle() {
        let (now, later) = rest.split_at(rest.len().min(1 + usize::from(*size)));
        if now.is_empty() {
            break;
        }
        writer.write_all(now).expect("the console takes all");
        rest = later;
    }
    on_stage(read_log(bytes, sink));
    // A byte that is no text becomes a character of three.
    let most = 3 * LINE_BYTES + " […]".len();
    let dirty = |text: &str| text.chars().any(|c| c.is_control() && c != '\t');
    for line in lines.lock().expect("the lines").iter() {
        assert!(line.message.len() <= most && line.component.len() <= most);
        assert!(!dirty(&line.message) && !dirty(&line.component), "{line:?}");
    }
    let text = tail.text();
    assert!(text.len() <= 3 * TAIL_BYTES);
    assert!(!text.lines().any(dirty), "{text:?}");
}

pub(crate) fn console_seeds() -> Vec<Vec<u8>> {
    let mut long = vec![255; 3];
    long.extend(vec![b'x'; 2 * LINE_BYTES]);
    long.extend(b"\nINFO a b\n");
    vec![
        b"\x01\x40\x03\x09[    0.000000] Linux version 6.1\r\n\x1b[31mred\x1b[0m\n".to_vec(),
        b"\x00\x01\x02\x03WARN init no clock\nwhat ever\nERROR alone\n\xff\xfe\n".to_vec(),
        long,
    ]
}
