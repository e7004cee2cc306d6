//! Execs, freezing, limits and readings of containers that run.

use containerd_shim_protos::api::{ExecProcessRequest, UpdateTaskRequest};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;

use super::*;

const PROCESS: &str = r#"{"terminal":true,"consoleSize":{"height":30,"width":90},"user":{"uid":0,"gid":0},"args":["ls"],"cwd":"/"}"#;

fn any(text: &str) -> MessageField<Any> {
    let mut any = Any::new();
    any.value = text.as_bytes().to_vec();
    MessageField::some(any)
}

pub(super) fn exec_request(exec_id: &str) -> ExecProcessRequest {
    let mut request = ExecProcessRequest::new();
    request.id = "c1".into();
    request.exec_id = exec_id.into();
    request.spec = any(PROCESS);
    request
}

impl Stage {
    async fn exec(&self, exec_id: &str) -> Result<(), Error> {
        self.shim.clone().exec(exec_request(exec_id)).await
    }

    async fn update(&self, resources: &str) -> Result<(), Error> {
        let mut request = UpdateTaskRequest::new();
        request.id = "c1".into();
        request.resources = any(resources);
        self.shim.clone().update(request).await
    }

    fn exec_status(&self, exec_id: &str) -> Status {
        let state = self.shim.state("c1", exec_id).unwrap();
        state.status.enum_value().unwrap()
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.acting.asked.lock().unwrap())
    }
}

#[tokio::test(start_paused = true)]
async fn an_execs_life_is_its_own_and_told_in_order() {
    let stage = Stage::set(Manners::default()).await;
    stage.running("c1").await;
    stage.exec("e1").await.unwrap();
    stage.exec("e2").await.unwrap();
    assert_eq!(stage.exec_status("e1"), Status::CREATED);
    for exec in ["e1", "e2"] {
        assert_eq!(stage.shim.clone().start("c1", exec).await.unwrap(), 4711);
    }
    assert_eq!(stage.exec_status("e1"), Status::RUNNING);
    assert!(matches!(
        stage.shim.clone().delete("c1", "e1").await,
        Err(Error::Precondition(_))
    ));
    stage.acting.exit_of("c1", "e1", 5).await;
    assert_eq!(stage.shim.wait("c1", "e1").await.unwrap().status, 5);
    let (first, other) = (stage.exec_status("e1"), stage.exec_status("e2"));
    assert_eq!((first, other), (Status::STOPPED, Status::RUNNING));
    let answer = stage.shim.clone().delete("c1", "e1").await.unwrap();
    assert_eq!(answer.exit_status, 5);
    assert!(matches!(
        stage.shim.state("c1", "e1"),
        Err(Error::NotFound(_))
    ));
    stage
        .shim
        .clone()
        .kill("c1", "e2", KILL, true)
        .await
        .unwrap();
    assert_eq!(stage.shim.wait("c1", "e2").await.unwrap().status, 137);
    assert_eq!(stage.status("c1"), Status::RUNNING);
    stage.acting.exit("c1", 0).await;
    stage.shim.wait("c1", "").await.unwrap();
    assert_eq!(
        stage.heard().await,
        [
            "create",
            "start",
            "exec-added",
            "exec-added",
            "exec-started",
            "exec-started",
            "exit e1 5",
            "exit e2 137",
            "exit c1 0"
        ]
    );
    assert_eq!(
        stage.asked(),
        ["exec e1 0x0 false", "exec e2 0x0 false", "delete e1"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_terminal_begins_with_the_size_that_was_asked_for() {
    let stage = Stage::set(Manners::default()).await;
    stage.running("c1").await;
    let mut request = exec_request("e1");
    request.terminal = true;
    stage.shim.clone().exec(request).await.unwrap();
    assert_eq!(stage.asked(), ["exec e1 90x30 true"]);
}

#[tokio::test(start_paused = true)]
async fn an_exec_that_may_not_be_has_containerds_code() {
    let stage = Stage::set(Manners::default()).await;
    assert!(matches!(stage.exec("e1").await, Err(Error::NotFound(_))));
    stage.running("c1").await;
    stage.exec("e1").await.unwrap();
    assert!(matches!(
        stage.exec("e1").await,
        Err(Error::AlreadyExists(_))
    ));
    let mut nonsense = exec_request("e2");
    nonsense.spec = any("{");
    assert!(matches!(
        stage.shim.clone().exec(nonsense).await,
        Err(Error::Invalid(_))
    ));
    stage.acting.exit("c1", 0).await;
    stage.shim.wait("c1", "").await.unwrap();
    assert!(matches!(
        stage.exec("e3").await,
        Err(Error::Precondition(_))
    ));
    assert!(matches!(
        stage.shim.clone().start("c1", "e1").await,
        Err(Error::Precondition(_))
    ));
    // One that was never started can be deleted, and has no exit to tell.
    stage.shim.clone().delete("c1", "e1").await.unwrap();
    assert!(matches!(
        stage.shim.clone().delete("c1", "e1").await,
        Err(Error::NotFound(_))
    ));
    assert_eq!(
        stage.heard().await,
        ["create", "start", "exec-added", "exit c1 0"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_created_container_takes_execs_and_its_end_is_theirs() {
    let stage = Stage::set(Manners::default()).await;
    stage.create("c1").await.unwrap();
    for exec in ["e1", "e2"] {
        stage.exec(exec).await.unwrap();
        stage.shim.clone().start("c1", exec).await.unwrap();
    }
    stage.acting.exit_of("c1", "e1", 2).await;
    assert_eq!(stage.shim.wait("c1", "e1").await.unwrap().status, 2);
    assert_eq!(stage.status("c1"), Status::CREATED);
    let answer = stage.shim.clone().delete("c1", "").await.unwrap();
    assert_eq!(answer.exit_status, 137);
    let heard = stage.heard().await;
    assert_eq!(
        heard[heard.len() - 4..],
        ["exit e1 2", "exit e2 137", "exit c1 137", "delete"]
    );
}

#[tokio::test(start_paused = true)]
async fn an_exec_that_the_guest_refuses_is_not_there() {
    let stage = Stage::set(Manners {
        refuses_exec: true,
        ..Manners::default()
    })
    .await;
    stage.running("c1").await;
    assert!(matches!(
        stage.exec("e1").await,
        Err(Error::Precondition(_))
    ));
    assert!(matches!(
        stage.shim.state("c1", "e1"),
        Err(Error::NotFound(_))
    ));
    assert_eq!(stage.heard().await, ["create", "start"]);
}

#[tokio::test(start_paused = true)]
async fn an_exec_that_ends_before_the_answer_to_its_start_is_told_after_it() {
    let stage = Stage::set(Manners {
        exits_at_once: true,
        ..Manners::default()
    })
    .await;
    stage.create("c1").await.unwrap();
    // Its init ends at once too, so its life is set here.
    stage
        .shim
        .lock()
        .containers
        .get_mut("c1")
        .unwrap()
        .init
        .life = crate::shim::lifecycle::Process::Running;
    stage.exec("e1").await.unwrap();
    stage.shim.clone().start("c1", "e1").await.unwrap();
    assert_eq!(stage.shim.wait("c1", "e1").await.unwrap().status, 3);
    assert_eq!(
        stage.heard().await,
        ["create", "exec-added", "exec-started", "exit e1 3"]
    );
}

#[tokio::test(start_paused = true)]
async fn inits_exit_follows_those_of_its_execs_even_if_the_guest_forgets_one() {
    let stage = Stage::set(Manners::default()).await;
    stage.running("c1").await;
    for exec in ["e1", "e2"] {
        stage.exec(exec).await.unwrap();
        stage.shim.clone().start("c1", exec).await.unwrap();
    }
    stage.acting.exit("c1", 0).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(stage.status("c1"), Status::RUNNING);
    stage.acting.exit_of("c1", "e2", 1).await;
    assert_eq!(stage.shim.wait("c1", "").await.unwrap().status, 0);
    let heard = stage.heard().await;
    assert_eq!(
        heard[heard.len() - 3..],
        ["exit e2 1", "exit e1 137", "exit c1 0"]
    );
}

#[tokio::test(start_paused = true)]
async fn the_guests_death_ends_execs_before_their_init() {
    let stage = Stage::set(Manners::default()).await;
    stage.running("c1").await;
    stage.exec("e1").await.unwrap();
    stage.exec("never-started").await.unwrap();
    stage.shim.clone().start("c1", "e1").await.unwrap();
    stage.fake.end(ExitReason::Panic);
    assert_eq!(stage.shim.wait("c1", "").await.unwrap().status, 137);
    let heard = stage.heard().await;
    assert_eq!(heard[heard.len() - 2..], ["exit e1 137", "exit c1 137"]);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_free_an_exec_keeps_its_vm() {
    let stage = Stage::set(Manners {
        mute: true,
        ..Manners::default()
    })
    .await;
    stage.running("c1").await;
    stage.exec("e1").await.unwrap();
    stage.shim.clone().delete("c1", "e1").await.unwrap();
    assert_eq!(stage.sandbox.exit_reason(), None);
    assert_eq!(stage.status("c1"), Status::RUNNING);
}

#[tokio::test(start_paused = true)]
async fn a_frozen_container_says_so_and_takes_no_exec_until_it_is_thawed() {
    let stage = Stage::set(Manners::default()).await;
    stage.create("c1").await.unwrap();
    assert!(matches!(
        stage.shim.clone().pause("c1").await,
        Err(Error::Precondition(_))
    ));
    stage.shim.clone().start("c1", "").await.unwrap();
    assert!(matches!(
        stage.shim.clone().resume("c1").await,
        Err(Error::Precondition(_))
    ));
    stage.shim.clone().pause("c1").await.unwrap();
    assert_eq!(stage.status("c1"), Status::PAUSED);
    assert!(matches!(
        stage.shim.clone().pause("c1").await,
        Err(Error::Precondition(_))
    ));
    assert!(matches!(
        stage.exec("e1").await,
        Err(Error::Precondition(_))
    ));
    stage.shim.clone().resume("c1").await.unwrap();
    assert_eq!(stage.status("c1"), Status::RUNNING);
    stage.shim.clone().pause("c1").await.unwrap();
    stage
        .shim
        .clone()
        .kill("c1", "", KILL, false)
        .await
        .unwrap();
    assert_eq!(stage.shim.wait("c1", "").await.unwrap().status, 137);
    assert_eq!(stage.status("c1"), Status::STOPPED);
    stage.shim.clone().delete("c1", "").await.unwrap();
    assert_eq!(stage.asked(), ["pause", "resume", "pause"]);
    assert_eq!(
        stage.heard().await,
        [
            "create",
            "start",
            "paused",
            "resumed",
            "paused",
            "exit c1 137",
            "delete"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn new_limits_reach_the_guest_and_the_vm_grows_before_and_shrinks_after() {
    let stage = Stage::set(Manners::default()).await;
    stage.acting.fake.obey();
    stage.running("c1").await;
    let (cpu, memory) = ("\"cpu\":{\"quota\":", "\"memory\":{\"limit\":");
    // What is asked for: a change of the VM's size each, and the vCPUs and MiB that it has then.
    let table = [
        (
            r#"{"cpu":{"quota":50000,"period":100000,"cpus":"3"},"pids":{"limit":9}}"#.to_owned(),
            vec![],
            (1, 256),
        ),
        (
            format!("{{{cpu}150001}},{memory}536870912}}}}"),
            vec![
                "128 MiB online",
                "128 MiB online",
                "128 MiB online",
                "cpu 1 online",
            ],
            (2, 640),
        ),
        // What is not mentioned stays.
        (
            format!("{{{cpu}400000}}}}"),
            vec!["cpu 2 online", "cpu 3 online"],
            (4, 640),
        ),
        (
            format!("{{{cpu}100000}},{memory}402653184}}}}"),
            vec![
                "128 MiB offline",
                "cpu 3 offline",
                "cpu 2 offline",
                "cpu 1 offline",
            ],
            (1, 512),
        ),
        // The size of the boot stays. Two units go offline by one call, before each is ejected.
        (
            format!("{{{memory}1048576}}}}"),
            vec!["256 MiB offline", "128 MiB offline", "128 MiB offline"],
            (1, 256),
        ),
    ];
    for (resources, expected, size) in table {
        stage.update(&resources).await.unwrap();
        let asked = stage.asked();
        assert!(
            asked.len() == 1 && !asked[0].contains("cpus"),
            "{resources}: {asked:?}"
        );
        let sized = std::mem::take(&mut *stage.acting.sized.lock().unwrap());
        assert_eq!(sized, expected, "{resources}");
        let sandbox = stage.shim.sandbox_now().unwrap();
        assert_eq!((sandbox.vcpus(), sandbox.memory_mib()), size, "{resources}");
    }
}

#[tokio::test(start_paused = true)]
async fn limits_that_the_vm_can_never_have_are_refused_with_the_figures() {
    let stage = Stage::set(Manners::default()).await;
    stage.acting.fake.obey();
    stage.running("c1").await;
    for (resources, words) in [
        (
            r#"{"memory":{"limit":1073741824}}"#,
            ["1024 MiB", "768 MiB"],
        ),
        (
            r#"{"cpu":{"quota":450000,"period":100000}}"#,
            ["5 CPUs", "can have 4"],
        ),
        ("nonsense", ["c1", "Cannot read"]),
    ] {
        let error = stage.update(resources).await.unwrap_err();
        assert!(matches!(&error, Error::Invalid(_)), "{error}");
        for word in words {
            assert!(error.to_string().contains(word), "{error}");
        }
    }
    assert!(stage.asked().is_empty());
    assert!(stage.acting.sized.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_does_not_grow_leaves_the_old_limits() {
    // Nobody obeys: what is plugged is never noticed, and the agent says nothing of it.
    let stage = Stage::set(Manners {
        mute_cpus: true,
        ..Manners::default()
    })
    .await;
    stage.running("c1").await;
    let update = stage.update(r#"{"cpu":{"quota":200000,"period":100000}}"#);
    let error = update.await.unwrap_err().to_string();
    assert!(
        error.contains("vCPU 1") && error.contains("unplugged again"),
        "{error}"
    );
    assert!(stage.asked().is_empty());
    assert_eq!(stage.shim.sandbox_now().unwrap().vcpus(), 1);
}

#[tokio::test(start_paused = true)]
async fn readings_are_containerds_message() {
    let stage = Stage::set(Manners::default()).await;
    stage.running("c1").await;
    let any = stage.shim.clone().stats("c1").await.unwrap();
    assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
    let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
    assert_eq!(metrics.memory.usage, 4096);
    stage.acting.exit("c1", 0).await;
    stage.shim.wait("c1", "").await.unwrap();
    assert!(matches!(
        stage.shim.clone().stats("c1").await,
        Err(Error::NotFound(_))
    ));
}

#[tokio::test(start_paused = true)]
async fn pids_carry_the_execs_that_there_are_and_no_others() {
    let stage = Stage::set(Manners {
        lies: true,
        ..Manners::default()
    })
    .await;
    stage.running("c1").await;
    stage.exec("e1").await.unwrap();
    let pids = stage.shim.pids("c1").await.unwrap();
    let named: Vec<_> = pids
        .iter()
        .map(|process| (process.pid, process.info.is_some()))
        .collect();
    assert_eq!(named, [(7, false), (8, true), (9, false)]);
}

#[tokio::test(start_paused = true)]
async fn an_ended_init_is_listed_until_its_exit_is_told() {
    let stage = Stage::set(Manners::default()).await;
    stage.running("c1").await;
    stage.shim.publisher.flushed().await;
    stage.heard.is_away(true);
    stage.acting.exit("c1", 4).await;
    stage.shim.wait("c1", "").await.unwrap();
    stage.fake.end(ExitReason::Panic);
    let pids = async || {
        let pids = stage.shim.pids("c1").await?;
        Ok::<Vec<u32>, Error>(pids.iter().map(|process| process.pid).collect())
    };
    assert_eq!(pids().await.unwrap(), [101]);
    stage.heard.is_away(false);
    assert_eq!(stage.heard().await, ["create", "start", "exit c1 4"]);
    assert!(pids().await.is_err(), "there is no process, nor a guest");
}

#[tokio::test(start_paused = true)]
async fn running_out_of_memory_is_told_once_a_second_at_most() {
    let stage = Stage::set(Manners::default()).await;
    stage.running("c1").await;
    for _ in 0..3 {
        let mut oom = wire::OutOfMemory::new();
        oom.container_id = "c1".into();
        stage
            .acting
            .tell(wire::event_request::Event::Oom(oom))
            .await;
    }
    stage.acting.exit("c1", 137).await;
    stage.shim.wait("c1", "").await.unwrap();
    assert_eq!(
        stage.heard().await,
        ["create", "start", "oom", "exit c1 137"]
    );
}
