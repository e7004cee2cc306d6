//! The task service over a machine in memory, whose guest is as slow, mute or
//! mortal as each case wants it. Time is paused: a limit that passes costs nothing.

mod dying;
mod races;
mod running;
mod service;
mod timings;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{CreateTaskRequest, Status};
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::shim::event::Envelope;
use nacre_protocol::agent as wire;
use nacre_protocol::agent_ttrpc::{Agent, HostClient};
use protobuf::Message;
use tokio::io::{AsyncWriteExt, DuplexStream};
use ttrpc::asynchronous::TtrpcContext;

use super::{Error, Identity, Shim};
use crate::config::Config;
use crate::record::{Owner, Record};
use crate::sandbox::tests::{Fake, Guest, agent, boot, context};
use crate::sandbox::{ExitReason, Sandbox};
use crate::shim::events::{Forward, Publisher, Undelivered};
use crate::shim::stdio::Limits;

const KILL: u32 = libc::SIGKILL as u32;

/// containerd: keeps what it is told.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<Envelope>>>, Arc<AtomicBool>);

impl Heard {
    /// It goes away, or comes back.
    fn is_away(&self, away: bool) {
        self.1.store(away, Ordering::Relaxed);
    }
}

#[async_trait]
impl Forward for Heard {
    async fn forward(&mut self, envelope: &Envelope) -> Result<(), Undelivered> {
        if self.1.load(Ordering::Relaxed) {
            return Err(Undelivered::Unreachable("away".to_owned()));
        }
        self.0.lock().unwrap().push(envelope.clone());
        Ok(())
    }
}

/// How a guest behaves.
#[derive(Clone, Copy, Default)]
struct Manners {
    /// Create fails.
    refuses_create: bool,
    /// Create is never answered.
    mute_create: bool,
    /// The program is over before Start is answered.
    exits_at_once: bool,
    /// The program is not there.
    refuses_start: bool,
    /// Starts are never answered.
    mute_start: bool,
    /// Signals, deletes and questions about usage are never answered.
    mute: bool,
    /// That a CPU is to come online is never answered.
    mute_cpus: bool,
    /// Its containers use CPU time.
    busy: bool,
    /// Execs are refused for want of a running container.
    refuses_exec: bool,
    /// Asked for its pids, it names execs that are not there.
    lies: bool,
    /// Every call takes up to so many milliseconds, by lot.
    slow: u64,
    /// The VM ends at this step of Create.
    dies: Option<dying::Step>,
}

/// The agent in the guest.
#[derive(Clone)]
struct Acting {
    fake: Arc<Fake>,
    manners: Manners,
    host: Arc<Mutex<Option<HostClient>>>,
    sequence: Arc<Mutex<u64>>,
    stdout: Arc<Mutex<Option<DuplexStream>>>,
    /// What it was asked for, beyond what every container needs.
    asked: Arc<Mutex<Vec<String>>>,
    /// How the VM's size changed.
    sized: Arc<Mutex<Vec<String>>>,
    lots: Arc<Mutex<races::Lots>>,
    /// Containers so far; the first one's init has the pid 101.
    made: Arc<Mutex<u32>>,
    /// CPU time of them, microseconds.
    used: Arc<Mutex<u64>>,
}

impl Acting {
    /// Takes its time.
    async fn pause(&self) {
        if self.manners.slow > 0 {
            let pause = self.lots.lock().unwrap().below(self.manners.slow);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    /// Ends here, if it is to end at this step.
    async fn reach(&self, step: dying::Step) {
        if self.manners.dies == Some(step) {
            self.fake.end(ExitReason::Panic);
            std::future::pending::<()>().await;
        }
    }

    async fn exit(&self, id: &str, status: u32) {
        self.exit_of(id, "", status).await;
    }

    async fn exit_of(&self, id: &str, exec_id: &str, status: u32) {
        self.exit_of_pid(id, exec_id, 0, status).await;
    }

    async fn exit_of_pid(&self, id: &str, exec_id: &str, pid: u32, status: u32) {
        let mut exit = wire::Exit::new();
        exit.pid = pid;
        exit.container_id = id.to_owned();
        exit.exec_id = exec_id.to_owned();
        exit.status = status;
        self.tell(wire::event_request::Event::Exit(exit)).await;
    }

    /// The VM gets another size; told apart from what it is asked of containers.
    fn size(&self, what: String) {
        self.sized.lock().unwrap().push(what);
    }

    fn ask(&self, what: String) {
        self.asked.lock().unwrap().push(what);
    }

    async fn tell(&self, event: wire::event_request::Event) {
        let mut request = wire::EventRequest::new();
        request.sequence = {
            let mut sequence = self.sequence.lock().unwrap();
            *sequence += 1;
            *sequence
        };
        request.event = Some(event);
        let host = self.host.lock().unwrap().clone().unwrap();
        let told = host.event(context(), &request).await;
        // A VM that has ended tells nothing more.
        assert!(told.is_ok() || self.fake.has_ended(), "{told:?}");
    }

    async fn mute(&self) {
        if self.manners.mute {
            std::future::pending::<()>().await;
        }
    }
}

fn refused<T>(words: &str) -> ttrpc::Result<T> {
    let status = ttrpc::get_status(ttrpc::Code::INTERNAL, words.to_owned());
    Err(ttrpc::Error::RpcStatus(status))
}

#[async_trait]
impl Agent for Acting {
    async fn bind_disk(
        &self,
        _: &TtrpcContext,
        _: wire::BindDiskRequest,
    ) -> ttrpc::Result<wire::BindDiskResponse> {
        self.pause().await;
        self.reach(dying::Step::BindDisk).await;
        let mut answer = wire::BindDiskResponse::new();
        answer.device = "/dev/vda".to_owned();
        Ok(answer)
    }

    async fn online_cpu(
        &self,
        _: &TtrpcContext,
        request: wire::OnlineCpuRequest,
    ) -> ttrpc::Result<wire::OnlineCpuResponse> {
        if self.manners.mute_cpus {
            std::future::pending::<()>().await;
        }
        self.size(format!("cpu {} online", request.uid));
        Ok(wire::OnlineCpuResponse::new())
    }

    async fn offline_cpu(
        &self,
        _: &TtrpcContext,
        request: wire::OfflineCpuRequest,
    ) -> ttrpc::Result<wire::OfflineCpuResponse> {
        self.size(format!("cpu {} offline", request.uid));
        Ok(wire::OfflineCpuResponse::new())
    }

    async fn online_memory(
        &self,
        _: &TtrpcContext,
        request: wire::OnlineMemoryRequest,
    ) -> ttrpc::Result<wire::OnlineMemoryResponse> {
        self.size(format!("{} MiB online", request.bytes >> 20));
        Ok(wire::OnlineMemoryResponse::new())
    }

    async fn offline_memory(
        &self,
        _: &TtrpcContext,
        request: wire::OfflineMemoryRequest,
    ) -> ttrpc::Result<wire::OfflineMemoryResponse> {
        self.size(format!("{} MiB offline", request.bytes >> 20));
        Ok(wire::OfflineMemoryResponse::new())
    }

    async fn resources(
        &self,
        _: &TtrpcContext,
        _: wire::ResourcesRequest,
    ) -> ttrpc::Result<wire::ResourcesResponse> {
        self.mute().await;
        let mut answer = wire::ResourcesResponse::new();
        answer.memory_block_bytes = 128 << 20;
        (answer.memory_total_bytes, answer.memory_available_bytes) = (1 << 30, 974 << 20);
        let slots = self.fake.plugs.cpus().views();
        answer.online_uids = slots.iter().map(|slot| slot.index.into()).collect();
        Ok(answer)
    }

    async fn unbind_disk(
        &self,
        _: &TtrpcContext,
        _: wire::UnbindDiskRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.pause().await;
        Ok(wire::Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: wire::CreateContainerRequest,
    ) -> ttrpc::Result<wire::CreateContainerResponse> {
        if self.manners.refuses_create {
            return refused("no room");
        }
        if self.manners.mute_create {
            std::future::pending::<()>().await;
        }
        self.pause().await;
        self.reach(dying::Step::CreateContainer).await;
        let port = request.stdio.stdout_port;
        if port != 0 {
            *self.stdout.lock().unwrap() = Some(self.fake.dial(port).unwrap());
        }
        self.reach(dying::Step::Stdio).await;
        if self.manners.dies == Some(dying::Step::Answer) {
            self.fake.end(ExitReason::Panic);
        }
        let mut answer = wire::CreateContainerResponse::new();
        answer.pid = {
            let mut made = self.made.lock().unwrap();
            *made += 1;
            100 + *made
        };
        Ok(answer)
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: wire::StartRequest,
    ) -> ttrpc::Result<wire::StartResponse> {
        if self.manners.refuses_start {
            return refused("no such file");
        }
        if self.manners.mute_start {
            std::future::pending::<()>().await;
        }
        self.pause().await;
        if self.manners.exits_at_once {
            self.exit_of(&request.container_id, &request.exec_id, 3)
                .await;
        }
        Ok(wire::StartResponse::new())
    }

    async fn signal(
        &self,
        _: &TtrpcContext,
        request: wire::SignalRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.mute().await;
        self.pause().await;
        if request.signal == KILL {
            self.exit_of(&request.container_id, &request.exec_id, 137)
                .await;
        }
        Ok(wire::Empty::new())
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: wire::ExecRequest,
    ) -> ttrpc::Result<wire::Empty> {
        if self.manners.refuses_exec {
            let status = ttrpc::get_status(ttrpc::Code::FAILED_PRECONDITION, "it has ended");
            return Err(ttrpc::Error::RpcStatus(status));
        }
        let port = request.stdio.stdout_port;
        if port != 0 {
            *self.stdout.lock().unwrap() = Some(self.fake.dial(port).unwrap());
        }
        let stdio = &request.stdio;
        self.ask(format!(
            "exec {} {}x{} {}",
            request.exec_id, stdio.columns, stdio.rows, stdio.terminal
        ));
        Ok(wire::Empty::new())
    }

    async fn delete_exec(
        &self,
        _: &TtrpcContext,
        request: wire::DeleteExecRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.ask(format!("delete {}", request.exec_id));
        self.mute().await;
        Ok(wire::Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, _: wire::PauseRequest) -> ttrpc::Result<wire::Empty> {
        self.ask("pause".into());
        Ok(wire::Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, _: wire::ResumeRequest) -> ttrpc::Result<wire::Empty> {
        self.ask("resume".into());
        Ok(wire::Empty::new())
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: wire::UpdateRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.ask(String::from_utf8(request.resources_json).unwrap());
        Ok(wire::Empty::new())
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        _: wire::StatsRequest,
    ) -> ttrpc::Result<wire::StatsResponse> {
        self.mute().await;
        let mut answer = wire::StatsResponse::new();
        answer.memory_current = 4096;
        if self.manners.busy {
            *self.used.lock().unwrap() += 20_000;
        }
        let used = *self.used.lock().unwrap();
        answer.cpu.insert("usage_usec".to_owned(), used);
        Ok(answer)
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        _: wire::PidsRequest,
    ) -> ttrpc::Result<wire::PidsResponse> {
        let process = |pid, exec_id: &str| {
            let mut process = wire::Process::new();
            process.pid = pid;
            process.exec_id = exec_id.to_owned();
            process
        };
        let mut answer = wire::PidsResponse::new();
        answer.processes = vec![process(7, ""), process(8, "e1")];
        if self.manners.lies {
            answer.processes.push(process(9, "none"));
        }
        Ok(answer)
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        _: wire::DeleteContainerRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.mute().await;
        self.pause().await;
        Ok(wire::Empty::new())
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        _: wire::ShutdownRequest,
    ) -> ttrpc::Result<wire::Empty> {
        self.mute().await;
        self.fake.end(ExitReason::PowerOff);
        Ok(wire::Empty::new())
    }
}

/// A shim with everything around it.
struct Stage {
    directory: tempfile::TempDir,
    shim: Arc<Shim>,
    sandbox: Sandbox,
    fake: Arc<Fake>,
    acting: Acting,
    heard: Heard,
    guest: Option<Guest>,
}

impl Stage {
    async fn set(manners: Manners) -> Self {
        let mut stage = Self::booting(manners);
        stage.say_hello().await;
        stage
    }

    /// A stage whose guest has not dialled yet.
    fn booting(manners: Manners) -> Self {
        Self::on(tempfile::tempdir().unwrap(), manners)
    }

    /// The same in a directory that another shim may have had.
    fn on(directory: tempfile::TempDir, manners: Manners) -> Self {
        let bundle = directory.path().join("bundle");
        std::fs::create_dir_all(bundle.join("rootfs/bin")).unwrap();
        std::fs::write(
            bundle.join("config.json"),
            r#"{"ociVersion":"1.1.0","root":{"path":"rootfs"},"process":{"user":{"uid":0,"gid":0},"args":["true"],"cwd":"/"}}"#,
        )
        .unwrap();
        let (sandbox, fake, _) = boot();
        let heard = Heard::default();
        let owner = Owner {
            id: "c1".into(),
            namespace: "ns".into(),
        };
        let record = Record::create(&directory.path().join("state"), owner).unwrap();
        let identity = Identity {
            namespace: "ns".into(),
            sandbox: "c1".into(),
            container: "c1".into(),
            pid: 4711,
            overrides: Default::default(),
            limits: Default::default(),
        };
        let publisher = Publisher::start("ns", heard.clone());
        let shim = Shim::new(
            identity,
            Config::default(),
            Arc::new(record),
            None,
            None,
            Limits::default(),
            publisher,
        );
        tokio::spawn(shim.clone().booted(Ok(sandbox.clone())));
        let acting = Acting {
            fake: fake.clone(),
            manners,
            host: Arc::default(),
            sequence: Arc::default(),
            stdout: Arc::default(),
            asked: Arc::default(),
            sized: Arc::default(),
            lots: Arc::default(),
            made: Arc::default(),
            used: Arc::default(),
        };
        Self {
            directory,
            shim,
            sandbox,
            fake,
            acting,
            heard,
            guest: None,
        }
    }

    async fn say_hello(&mut self) {
        let guest = agent(&self.fake, self.acting.clone()).await;
        *self.acting.host.lock().unwrap() = Some(guest.host.clone());
        self.guest = Some(guest);
    }

    fn request(&self, id: &str) -> CreateTaskRequest {
        let mut request = CreateTaskRequest::new();
        request.id = id.to_owned();
        request.bundle = self
            .directory
            .path()
            .join("bundle")
            .to_str()
            .unwrap()
            .to_owned();
        request
    }

    async fn create(&self, id: &str) -> Result<u32, Error> {
        self.shim.clone().create(self.request(id)).await
    }

    async fn running(&self, id: &str) {
        assert_eq!(self.create(id).await.unwrap(), 4711);
        assert_eq!(self.shim.clone().start(id, "").await.unwrap(), 4711);
    }

    fn status(&self, id: &str) -> Status {
        let state = self.shim.state(id, "").unwrap();
        state.status.enum_value().unwrap()
    }

    async fn heard(&self) -> Vec<String> {
        self.shim.publisher.flushed().await;
        let heard = self.heard.0.lock().unwrap();
        heard
            .iter()
            .map(|envelope| match envelope.topic.as_str() {
                "/tasks/exit" => {
                    let exit = TaskExit::parse_from_bytes(&envelope.event.value).unwrap();
                    format!("exit {} {}", exit.id, exit.exit_status)
                }
                topic => topic.trim_start_matches("/tasks/").to_owned(),
            })
            .collect()
    }

    /// How much the host shares with the guest.
    fn shares(&self) -> usize {
        self.sandbox.shared().len()
    }
}

#[tokio::test(start_paused = true)]
async fn a_life_from_create_to_delete_is_told_in_order() {
    let stage = Stage::set(Manners::default()).await;
    stage.create("c1").await.unwrap();
    assert_eq!((stage.status("c1"), stage.shares()), (Status::CREATED, 1));
    stage.shim.clone().start("c1", "").await.unwrap();
    assert_eq!(stage.status("c1"), Status::RUNNING);
    let waiting = tokio::spawn({
        let shim = stage.shim.clone();
        async move { shim.wait("c1", "").await }
    });
    stage.acting.exit("c1", 42).await;
    assert_eq!(waiting.await.unwrap().unwrap().status, 42);
    assert_eq!(stage.status("c1"), Status::STOPPED);
    let answer = stage.shim.clone().delete("c1", "").await.unwrap();
    assert_eq!((answer.pid, answer.exit_status), (4711, 42));
    assert_eq!(stage.shares(), 0);
    assert_eq!(
        stage.heard().await,
        ["create", "start", "exit c1 42", "delete"]
    );
    assert!(matches!(
        stage.shim.state("c1", ""),
        Err(Error::NotFound(_))
    ));
}

#[tokio::test(start_paused = true)]
async fn an_exit_before_the_answer_to_start_is_told_after_it() {
    let stage = Stage::set(Manners {
        exits_at_once: true,
        ..Manners::default()
    })
    .await;
    stage.running("c1").await;
    assert_eq!(stage.shim.wait("c1", "").await.unwrap().status, 3);
    assert_eq!(stage.heard().await, ["create", "start", "exit c1 3"]);
}

#[tokio::test(start_paused = true)]
async fn an_exit_waits_for_the_output_before_it() {
    let stage = Stage::set(Manners::default()).await;
    let fifo = stage.directory.path().join("stdout");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let reading = {
        let fifo = fifo.clone();
        tokio::task::spawn_blocking(move || std::fs::read(fifo).unwrap())
    };
    let mut request = stage.request("c1");
    request.stdout = fifo.to_str().unwrap().to_owned();
    stage.shim.clone().create(request).await.unwrap();
    stage.shim.clone().start("c1", "").await.unwrap();
    let mut stdout = stage.acting.stdout.lock().unwrap().take().unwrap();
    stdout.write_all(b"first ").await.unwrap();
    stage.acting.exit("c1", 0).await;
    assert_eq!(stage.status("c1"), Status::RUNNING);
    stdout.write_all(b"last").await.unwrap();
    drop(stdout);
    assert_eq!(stage.shim.wait("c1", "").await.unwrap().status, 0);
    assert_eq!(reading.await.unwrap(), b"first last");
}

#[tokio::test(start_paused = true)]
async fn what_may_not_be_has_containerds_code() {
    let stage = Stage::set(Manners::default()).await;
    stage.running("c1").await;
    assert!(matches!(
        stage.create("c1").await,
        Err(Error::AlreadyExists(_))
    ));
    assert!(matches!(
        stage.shim.clone().start("c1", "").await,
        Err(Error::Precondition(_))
    ));
    assert!(matches!(
        stage.shim.clone().delete("c1", "").await,
        Err(Error::Precondition(_))
    ));
    assert!(matches!(
        stage.shim.clone().kill("none", "", 15, false).await,
        Err(Error::NotFound(_))
    ));
    assert!(matches!(
        stage.shim.wait("c1", "none").await,
        Err(Error::NotFound(_))
    ));
    stage
        .shim
        .clone()
        .kill("c1", "", KILL, false)
        .await
        .unwrap();
    assert_eq!(stage.shim.wait("c1", "").await.unwrap().status, 137);
    assert!(matches!(
        stage.shim.clone().kill("c1", "", KILL, false).await,
        Err(Error::NotFound(_))
    ));
}

#[tokio::test(start_paused = true)]
async fn a_create_that_the_guest_refuses_leaves_nothing() {
    let stage = Stage::set(Manners {
        refuses_create: true,
        ..Manners::default()
    })
    .await;
    let error = stage.create("c1").await.unwrap_err().to_string();
    assert!(error.contains("no room") && error.contains("c1"), "{error}");
    assert_eq!(stage.shares(), 0);
    assert_eq!(stage.sandbox.exit_reason(), Some(ExitReason::PowerOff));
    assert!(matches!(
        stage.shim.state("c1", ""),
        Err(Error::NotFound(_))
    ));
    let error = stage.create("c2").await.unwrap_err().to_string();
    assert!(error.contains("VM is gone"), "{error}");
    assert!(stage.heard().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_create_without_a_root_or_with_a_strange_spec_is_refused() {
    let stage = Stage::set(Manners::default()).await;
    let spec = stage.directory.path().join("bundle/config.json");
    std::fs::write(
        &spec,
        r#"{"ociVersion":"1.1.0","root":{"path":"rootfs"},"mounts":[{"destination":"/data","type":"bind","source":"/dev/null","options":["rbind"]}],"process":{"user":{"uid":0,"gid":0},"args":["true"],"cwd":"/"}}"#,
    )
    .unwrap();
    let error = stage.create("c1").await.unwrap_err();
    assert!(
        matches!(&error, Error::Invalid(words) if words.contains("/dev/null")),
        "{error}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_start_that_fails_leaves_a_container_that_can_be_deleted() {
    let stage = Stage::set(Manners {
        refuses_start: true,
        ..Manners::default()
    })
    .await;
    stage.create("c1").await.unwrap();
    let error = stage.shim.clone().start("c1", "").await.unwrap_err();
    assert!(error.to_string().contains("no such file"), "{error}");
    let answer = stage.shim.clone().delete("c1", "").await.unwrap();
    assert_eq!(answer.exit_status, 127);
}

#[tokio::test(start_paused = true)]
async fn what_may_run_after_a_start_that_is_not_answered_is_killed() {
    for mute in [false, true] {
        let stage = Stage::set(Manners {
            mute_start: true,
            mute,
            ..Manners::default()
        })
        .await;
        stage.create("c1").await.unwrap();
        let error = stage.shim.clone().start("c1", "").await.unwrap_err();
        assert!(error.to_string().contains("did not answer"), "{error}");
        assert_eq!(stage.shim.wait("c1", "").await.unwrap().status, 137);
        assert_eq!(stage.sandbox.exit_reason().is_some(), mute);
    }
}

#[tokio::test(start_paused = true)]
async fn a_container_that_was_never_started_can_be_deleted() {
    let stage = Stage::set(Manners::default()).await;
    stage.create("c1").await.unwrap();
    let answer = stage.shim.clone().delete("c1", "").await.unwrap();
    assert_eq!(answer.exit_status, 137);
    assert_eq!(stage.heard().await, ["create", "exit c1 137", "delete"]);
}

#[tokio::test(start_paused = true)]
async fn an_exit_told_late_is_not_of_the_next_container_of_that_id() {
    let stage = Stage::set(Manners::default()).await;
    stage.create("c1").await.unwrap();
    stage.shim.clone().delete("c1", "").await.unwrap();
    stage.running("c1").await;
    stage.acting.exit_of_pid("c1", "", 101, 137).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(stage.status("c1"), Status::RUNNING);
    stage.acting.exit_of_pid("c1", "", 102, 5).await;
    assert_eq!(stage.shim.wait("c1", "").await.unwrap().status, 5);
}

#[tokio::test(start_paused = true)]
async fn the_guests_death_is_an_exit_of_each_process_and_then_of_the_shim() {
    let stage = Stage::set(Manners::default()).await;
    stage.running("c1").await;
    stage.running("c2").await;
    stage.fake.end(ExitReason::Panic);
    assert_eq!(stage.shim.wait("c1", "").await.unwrap().status, 137);
    assert_eq!(stage.shim.wait("c2", "").await.unwrap().status, 137);
    tokio::time::timeout(Duration::from_secs(10), stage.shim.ending())
        .await
        .expect("the shim ends by itself");
    let mut heard = stage.heard().await;
    let exits: Vec<_> = heard.drain(4..).collect();
    assert_eq!(heard, ["create", "start", "create", "start"]);
    assert_eq!(exits.len(), 2, "one exit each: {exits:?}");
}

#[tokio::test(start_paused = true)]
async fn a_kill_that_is_not_answered_stops_the_vm() {
    let stage = Stage::set(Manners {
        mute: true,
        ..Manners::default()
    })
    .await;
    stage.running("c1").await;
    let began = tokio::time::Instant::now();
    assert!(stage.shim.clone().kill("c1", "", 15, false).await.is_err());
    assert_eq!(
        stage.sandbox.exit_reason(),
        None,
        "only SIGKILL may do that"
    );
    stage.shim.clone().kill("c1", "", KILL, true).await.unwrap();
    assert_eq!(stage.shim.wait("c1", "").await.unwrap().status, 137);
    assert!(began.elapsed() < Duration::from_secs(11));
    assert_eq!(stage.sandbox.exit_reason(), Some(ExitReason::Stopped));
}

#[tokio::test(start_paused = true)]
async fn a_delete_that_is_not_answered_stops_the_vm_and_succeeds() {
    let stage = Stage::set(Manners {
        mute: true,
        ..Manners::default()
    })
    .await;
    stage.running("c1").await;
    stage.acting.exit("c1", 1).await;
    let began = tokio::time::Instant::now();
    let answer = stage.shim.clone().delete("c1", "").await.unwrap();
    assert_eq!(answer.exit_status, 1);
    assert!(began.elapsed() < Duration::from_secs(6));
    assert_eq!(stage.sandbox.exit_reason(), Some(ExitReason::Stopped));
    assert_eq!(stage.shares(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_create_that_the_end_cuts_short_is_no_exit() {
    let stage = Stage::set(Manners {
        mute_create: true,
        ..Manners::default()
    })
    .await;
    let end = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        stage.shim.shut_down();
        stage.shim.clean_up().await
    };
    let (created, failures) = tokio::join!(stage.create("c1"), end);
    assert!(created.is_err());
    assert!(failures.is_empty(), "{failures}");
    assert_eq!(stage.heard().await, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn the_end_frees_all_and_tells_every_exit_within_five_seconds() {
    for mute in [false, true] {
        let stage = Stage::set(Manners {
            mute,
            ..Manners::default()
        })
        .await;
        stage.running("c1").await;
        stage.shim.shut_down();
        assert!(matches!(
            stage.create("c2").await,
            Err(Error::Precondition(_))
        ));
        let began = tokio::time::Instant::now();
        let failures = stage.shim.clean_up().await;
        assert!(began.elapsed() <= Duration::from_secs(5), "{mute}");
        assert!(failures.is_empty(), "{failures}");
        assert!(stage.sandbox.exit_reason().is_some());
        assert!(!Path::new(&stage.directory.path().join("state")).exists());
        assert_eq!(stage.heard().await, ["create", "start", "exit c1 137"]);
    }
}

#[tokio::test(start_paused = true)]
async fn the_rest_of_a_pod_outlives_a_shutdown_for_one() {
    let stage = Stage::set(Manners::default()).await;
    stage.running("c1").await;
    stage.running("c2").await;
    assert!(stage.shim.serves_others("c1"));
    assert!(!stage.shim.serves_others(""), "without an id all is meant");
    stage.acting.exit("c1", 0).await;
    stage.shim.clone().delete("c1", "").await.unwrap();
    assert!(stage.shim.serves_others("c1"));
    assert!(!stage.shim.serves_others("c2"));
}
