//! Body of a fuzz target: a shim with a container and its execs, whose guest
//! sends any event and answers any call with anything or not at all. See
//! [`crate::fuzzing`].

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use async_trait::async_trait;
use containerd_shim_protos::api::{ExecProcessRequest, UpdateTaskRequest};
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::shim::event::Envelope;
use nacre_protocol::agent as wire;
use nacre_protocol::agent_ttrpc::Agent;
use nacre_vmm::ExitReason;
use protobuf::Message;
use tokio::task::JoinSet;
use ttrpc::asynchronous::TtrpcContext;

use super::{Container, Identity, Process, Shim, Timings};
use crate::config::Config;
use crate::record::{Owner, Record};
use crate::sandbox::fake::{agent, boot, context, know};
use crate::sandbox::fuzz::{event, on_stage};
use crate::shim::events::{Forward, Publisher, Undelivered};
use crate::shim::lifecycle;
use crate::shim::stdio::{Limits, Paths};

const ID: &str = "c1";
/// Calls under way at once.
const CALLS: usize = 16;

/// containerd: keeps what it is told.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<Envelope>>>);

#[async_trait]
impl Forward for Heard {
    async fn forward(&mut self, envelope: &Envelope) -> std::result::Result<(), Undelivered> {
        self.0.lock().expect("the events").push(envelope.clone());
        Ok(())
    }
}

/// What the guest does when it is asked something.
enum Answer {
    /// Answers with these bytes, if they are a message of the kind, else with an empty one.
    Bytes(Vec<u8>),
    /// Refuses with a code and a message.
    Refusal(u8, Vec<u8>),
    /// Never answers.
    Nothing,
}

/// The agent: answers in the order in which it was told to, and then with empty messages.
#[derive(Clone, Default)]
struct Liar(Arc<Mutex<VecDeque<Answer>>>);

impl Liar {
    async fn answer<M: Message>(&self) -> ttrpc::Result<M> {
        let next = self.0.lock().expect("the answers").pop_front();
        match next {
            None => Ok(M::new()),
            Some(Answer::Bytes(bytes)) => Ok(M::parse_from_bytes(&bytes).unwrap_or_default()),
            Some(Answer::Refusal(code, message)) => {
                let mut status = ttrpc::proto::Status::new();
                status.code = protobuf::EnumOrUnknown::from_i32(code.into());
                status.message = String::from_utf8_lossy(&message).into_owned();
                Err(ttrpc::Error::RpcStatus(status))
            }
            Some(Answer::Nothing) => std::future::pending().await,
        }
    }
}

macro_rules! lies {
    ($($method:ident($request:ident) -> $response:ident),+ $(,)?) => {
        #[async_trait]
        impl Agent for Liar {
            $(
                async fn $method(
                    &self,
                    _: &TtrpcContext,
                    _: wire::$request,
                ) -> ttrpc::Result<wire::$response> {
                    self.answer().await
                }
            )+
        }
    };
}

lies! {
    unbind_disk(UnbindDiskRequest) -> Empty,
    start(StartRequest) -> StartResponse,
    exec(ExecRequest) -> Empty,
    delete_exec(DeleteExecRequest) -> Empty,
    pause(PauseRequest) -> Empty,
    resume(ResumeRequest) -> Empty,
    update(UpdateRequest) -> Empty,
    stats(StatsRequest) -> StatsResponse,
    signal(SignalRequest) -> Empty,
    pids(PidsRequest) -> PidsResponse,
    resize_pty(ResizePtyRequest) -> Empty,
    delete_container(DeleteContainerRequest) -> Empty,
    shutdown(ShutdownRequest) -> Empty,
}

/// A state directory for all inputs: what they put into it is an empty record.
fn directory() -> PathBuf {
    static DIRECTORY: OnceLock<tempfile::TempDir> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| tempfile::tempdir().expect("a folder"));
    directory.path().join("state")
}

pub(crate) fn run(data: &[u8]) {
    on_stage(play(data));
}

async fn play(data: &[u8]) {
    let (sandbox, fake, _tail) = boot();
    let heard = Heard::default();
    let owner = Owner {
        id: ID.to_owned(),
        namespace: "ns".to_owned(),
    };
    let identity = Identity {
        namespace: "ns".to_owned(),
        sandbox: ID.to_owned(),
        container: ID.to_owned(),
        pid: 4711,
        overrides: Default::default(),
        limits: Default::default(),
    };
    let shim = Shim::new(
        identity,
        Config::default(),
        Arc::new(Record::create(&directory(), owner).expect("a record")),
        None,
        None,
        Limits::default(),
        Publisher::start("ns", heard.clone()),
    );
    shim.lock().containers.insert(ID.to_owned(), container());
    know(&sandbox, ID);
    let following = tokio::spawn(shim.clone().booted(Ok(sandbox.clone())));
    let liar = Liar::default();
    let guest = agent(&fake, liar.clone()).await;

    let mut input = Unstructured::new(data);
    let mut calls = JoinSet::new();
    // What waits for an exec that is never started does so until the shim ends.
    let mut waiting = JoinSet::new();
    let mut sequence = 0_u64;
    while !input.is_empty() {
        let step = input.arbitrary::<u8>().unwrap_or(0);
        if step % 8 < 4 {
            let Ok(mut event) = event(&mut input) else {
                break;
            };
            if step & 0x80 == 0 {
                event.sequence = sequence.wrapping_add(1);
            }
            if guest.host.event(context(), &event).await.is_ok() {
                sequence = sequence.max(event.sequence);
            }
        } else if step % 8 < 7 {
            let Ok(answer) = answer(&mut input) else {
                break;
            };
            liar.0.lock().expect("the answers").push_back(answer);
            let kind = input.arbitrary::<u8>().unwrap_or(0);
            if calls.len() + waiting.len() < CALLS {
                let calls = if kind % 16 == 15 {
                    &mut waiting
                } else {
                    &mut calls
                };
                calls.spawn(call(shim.clone(), kind));
            }
            tokio::task::yield_now().await;
        } else {
            tokio::time::sleep(Duration::from_millis(u64::from(step) * 40)).await;
        }
    }
    // However the VM ends, every process that could end has its exit, told once.
    fake.end(ExitReason::PowerOff);
    while let Some(call) = calls.join_next().await {
        call.expect("a call panicked");
    }
    shim.all_exits().await;
    shim.publisher.flushed().await;
    shim.shut_down();
    following.await.expect("the follower panicked");
    judge(&heard);
}

/// As Create and Exec leave it: an init that runs, one exec that runs, one to be started, one being started.
fn container() -> Container {
    let process = |life, ran| Process {
        life,
        ran,
        ..Process::new(Paths::default())
    };
    let execs = [
        ("e1", process(lifecycle::Process::Running, true)),
        ("e2", process(lifecycle::Process::Created, false)),
    ];
    Container {
        life: lifecycle::Container::Running,
        bundle: "/bundle".to_owned(),
        init: process(lifecycle::Process::Running, true),
        execs: HashMap::from(execs.map(|(id, exec)| (id.to_owned(), exec))),
        storage: None,
        hooks: None,
        share: None,
        has_network: false,
        limits: None,
        guest_pid: 0,
        timings: Timings::of(ID),
    }
}

fn answer(input: &mut Unstructured<'_>) -> Result<Answer> {
    let kind: u8 = input.arbitrary()?;
    let len = usize::from(input.arbitrary::<u8>()?).min(input.len());
    let bytes = input.bytes(len)?.to_vec();
    Ok(match kind % 8 {
        0 => Answer::Nothing,
        1 | 2 => Answer::Refusal(kind / 8, bytes),
        _ => Answer::Bytes(bytes),
    })
}

/// Any of containerd's calls; errors are fine, panics and hangs are not.
async fn call(shim: Arc<Shim>, kind: u8) {
    let exec = ["", "e1", "e2", "e3"][usize::from(kind >> 6)];
    match kind % 16 {
        0 => drop(shim.state(ID, exec)),
        1 => drop(shim.pids(ID).await),
        2 => drop(shim.stats(ID).await),
        3 => drop(shim.kill(ID, exec, 15, false).await),
        4 => drop(shim.kill(ID, exec, 9, kind & 0x20 != 0).await),
        5 | 6 => drop(shim.start(ID, exec).await),
        7 => drop(shim.pause(ID).await),
        8 => drop(shim.resume(ID).await),
        9 => {
            let mut request = UpdateTaskRequest::new();
            request.id = ID.to_owned();
            request.resources.mut_or_insert_default().value = b"{}".to_vec();
            drop(shim.update(request).await);
        }
        10 | 11 => {
            let mut request = ExecProcessRequest::new();
            request.id = ID.to_owned();
            request.exec_id = exec.to_owned();
            request.spec.mut_or_insert_default().value =
                br#"{"user":{"uid":0,"gid":0},"args":["ls"],"cwd":"/"}"#.to_vec();
            drop(shim.exec(request).await);
        }
        12 => drop(shim.resize_pty(ID, exec, 80, 24).await),
        13 => drop(shim.close_stdin(ID, exec)),
        14 if exec.is_empty() => {}
        14 => drop(shim.delete(ID, exec).await),
        _ => drop(shim.wait(ID, exec).await),
    }
}

/// Exits are told once each (an exec's id may be used again after a new Exec), and init's is the last.
fn judge(heard: &Heard) {
    let heard = heard.0.lock().expect("the events");
    let mut begun = HashMap::from([(ID.to_owned(), 1), ("e1".to_owned(), 1)]);
    let mut over = false;
    for envelope in heard.iter() {
        match envelope.topic.as_str() {
            "/tasks/exec-started" => {
                let event =
                    containerd_shim_protos::events::task::TaskExecStarted::parse_from_bytes(
                        &envelope.event.value,
                    )
                    .expect("our own event");
                *begun.entry(event.exec_id).or_default() += 1;
            }
            "/tasks/exit" => {
                let exit =
                    TaskExit::parse_from_bytes(&envelope.event.value).expect("our own event");
                assert!(!over, "{:?} exits after its init", exit.id);
                assert!(exit.exit_status <= 255 && exit.pid == 4711);
                over = exit.id == ID;
                let left: &mut i32 = begun.entry(exit.id.clone()).or_default();
                *left -= 1;
                assert!(*left >= 0, "{:?} exits without having begun", exit.id);
            }
            "/tasks/oom" | "/tasks/exec-added" | "/tasks/paused" | "/tasks/resumed" => {}
            topic => panic!("{topic}, of which nobody asked"),
        }
    }
    assert!(over, "the exit of init was not told");
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    // Events: sequence, container, kind, exec, status, pid, time.
    let exit = |exec: u8, status: u8| {
        let mut bytes = vec![0, 1, 0, 2, exec, status];
        bytes.extend([0; 12]);
        bytes
    };
    let asked = |kind: u8, answer: &[u8], call: u8| {
        let mut bytes = vec![4, kind, answer.len() as u8];
        bytes.extend(answer);
        bytes.push(call);
        bytes
    };
    let empty: &[u8] = &[];
    vec![
        [exit(1, 3), exit(0, 42)].concat(),
        [asked(3, empty, 0x85), exit(2, 7), exit(0, 0)].concat(),
        [asked(0, empty, 0x85), vec![7, 255], exit(0, 0)].concat(),
        [
            asked(3, empty, 0xca),
            asked(1, b"no", 0xc5),
            asked(3, empty, 0xce),
        ]
        .concat(),
        // Pids with an exec that is not there; stats; a kill without an answer.
        [
            asked(
                3,
                &[
                    10, 4, 8, 7, 18, 0, 10, 8, 8, 9, 18, 4, b'n', b'o', b'n', b'e',
                ],
                1,
            ),
            asked(3, &[32, 128, 32, 40, 255, 1], 2),
            asked(0, empty, 4),
            vec![255],
        ]
        .concat(),
        [
            asked(3, empty, 7),
            asked(3, empty, 8),
            asked(3, empty, 9),
            asked(3, empty, 15),
        ]
        .concat(),
        vec![0, 1, 0, 1, 0, 2, 0, 1, 1, 1, 0, 1],
    ]
}
