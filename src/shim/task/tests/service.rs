//! The task service's edges: what it has not, what is not there yet, and what the guest says of nothing.

use ttrpc::asynchronous::transport::{Listener, Socket};
use ttrpc::asynchronous::{Client, Server};

use super::super::services;
use super::*;
use crate::shim::cleanup::Phase;

#[tokio::test(start_paused = true)]
async fn services_that_are_not_there_are_unimplemented() {
    let stage = Stage::set(Manners::default()).await;
    let (ours, theirs) = tokio::io::duplex(1 << 16);
    let one = futures::stream::once(async move { Ok::<_, std::io::Error>(ours) });
    let mut server = Server::new()
        .add_listener(Listener::new(one))
        .register_service(services(&stage.shim));
    server.start().await.unwrap();
    let client = Client::new(Socket::new(theirs));
    for (service, method) in [
        ("containerd.services.transfer.v1.Transfer", "Transfer"),
        ("containerd.services.streaming.v1.Streaming", "Stream"),
        ("containerd.runtime.sandbox.v1.Sandbox", "CreateSandbox"),
        ("containerd.task.v3.Task", "Checkpoint"),
    ] {
        let mut request = ttrpc::proto::Request::new();
        request.service = service.to_owned();
        request.method = method.to_owned();
        let error = client.request(request).await.unwrap_err();
        let ttrpc::Error::RpcStatus(status) = &error else {
            panic!("{service}: {error}")
        };
        assert_eq!(status.code(), ttrpc::Code::UNIMPLEMENTED, "{service}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_still_being_made_has_no_state() {
    let stage = Stage::set(Manners {
        mute_create: true,
        ..Manners::default()
    })
    .await;
    let creating = tokio::spawn(stage.shim.clone().create(stage.request("c1")));
    while !stage.shim.lock().containers.contains_key("c1") {
        tokio::task::yield_now().await;
    }
    assert!(matches!(
        stage.shim.state("c1", ""),
        Err(Error::NotFound(_))
    ));
    assert!(creating.await.unwrap().is_err());
}

#[tokio::test(start_paused = true)]
async fn exits_of_what_is_not_there_change_nothing() {
    let stage = Stage::set(Manners::default()).await;
    stage.running("c1").await;
    for (id, exec_id) in [
        ("c1", "../c1"),
        ("c1", "c1"),
        ("c1", "\0"),
        ("../c1", ""),
        ("c2", ""),
    ] {
        stage.acting.exit_of(id, exec_id, 9).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(stage.status("c1"), Status::RUNNING);
    // And init's exit counts once, whatever is said after it.
    for status in [4, 5] {
        stage.acting.exit("c1", status).await;
    }
    assert_eq!(stage.shim.wait("c1", "").await.unwrap().status, 4);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(stage.heard().await, ["create", "start", "exit c1 4"]);
}

#[tokio::test(start_paused = true)]
async fn every_way_in_which_a_vm_ends_is_an_exit_and_the_end_of_the_shim() {
    for reason in [
        ExitReason::PowerOff,
        ExitReason::Reboot,
        ExitReason::Panic,
        ExitReason::TripleFault { vcpu: 0 },
        ExitReason::KvmError {
            vcpu: 0,
            message: "KVM_RUN".into(),
        },
        ExitReason::Internal {
            message: "vCPU 0: a panic of our own".into(),
        },
        ExitReason::Stopped,
    ] {
        let stage = Stage::set(Manners::default()).await;
        stage.running("c1").await;
        stage.fake.end(reason.clone());
        assert_eq!(stage.shim.wait("c1", "").await.unwrap().status, 137);
        let ended = tokio::time::timeout(Duration::from_secs(10), stage.shim.ending()).await;
        assert!(ended.is_ok(), "{reason}");
        assert_eq!(
            stage.heard().await,
            ["create", "start", "exit c1 137"],
            "{reason}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_answers_nothing_is_killed_and_deleted_in_five_seconds_each() {
    let stage = Stage::set(Manners {
        mute: true,
        ..Manners::default()
    })
    .await;
    stage.running("c1").await;
    let began = tokio::time::Instant::now();
    stage.shim.clone().kill("c1", "", KILL, true).await.unwrap();
    assert_eq!(stage.shim.wait("c1", "").await.unwrap().status, 137);
    assert!(began.elapsed() <= Duration::from_secs(5));
    let began = tokio::time::Instant::now();
    stage.shim.clone().delete("c1", "").await.unwrap();
    assert!(began.elapsed() <= Duration::from_secs(5));
    assert_eq!(stage.shares(), 0);
}

#[tokio::test(start_paused = true)]
async fn shutdown_answers_when_the_output_on_its_way_is_delivered() {
    let stage = Stage::set(Manners::default()).await;
    let fifo = stage.directory.path().join("stdout");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Not a blocking task of the runtime, which would hold its paused time.
    let reading = {
        let fifo = fifo.clone();
        std::thread::spawn(move || std::fs::read(fifo).unwrap())
    };
    let mut request = stage.request("c1");
    request.stdout = fifo.to_str().unwrap().to_owned();
    stage.shim.clone().create(request).await.unwrap();
    stage.shim.clone().start("c1", "").await.unwrap();
    let mut stdout = stage.acting.stdout.lock().unwrap().take().unwrap();
    let acting = stage.acting.clone();
    let program = tokio::spawn(async move {
        // Slow to begin and with pauses, and gone right after its last word.
        for word in ["a", "b", "c"] {
            tokio::time::sleep(Duration::from_millis(700)).await;
            stdout.write_all(word.as_bytes()).await.unwrap();
        }
        drop(stdout);
        acting.exit("c1", 0).await;
    });
    stage.shim.shut_down();
    let began = tokio::time::Instant::now();
    let answered = async {
        stage.shim.drained().await;
        began.elapsed()
    };
    let (failures, answered) = tokio::join!(stage.shim.clean_up(), answered);
    assert!(failures.is_empty(), "{failures}");
    program.await.unwrap();
    assert_eq!(reading.join().unwrap(), b"abc");
    let expected = Duration::from_millis(2100)..Duration::from_millis(2900);
    assert!(expected.contains(&answered), "{answered:?}");
    assert_eq!(stage.heard().await, ["create", "start", "exit c1 0"]);
}

#[tokio::test(start_paused = true)]
async fn shutdown_does_not_wait_for_a_program_that_is_silent() {
    let stage = Stage::set(Manners::default()).await;
    stage.running("c1").await;
    stage.shim.shut_down();
    let began = tokio::time::Instant::now();
    let answered = async {
        stage.shim.drained().await;
        began.elapsed()
    };
    let (failures, answered) = tokio::join!(stage.shim.clean_up(), answered);
    assert!(failures.is_empty(), "{failures}");
    assert!(answered < Duration::from_millis(1200), "{answered:?}");
}

/// A program whose output goes to a file and comes in pieces of `size` bytes, each `pause` after the one before; none: until
/// the guest ends. Answers with what was kept of it, how long Shutdown waited for it, and its exit.
async fn printing(
    pieces: Option<u32>,
    size: usize,
    pause: Duration,
) -> (u64, Duration, Vec<String>) {
    let stage = Stage::set(Manners::default()).await;
    let file = stage.directory.path().join("log");
    let mut request = stage.request("c1");
    request.stdout = format!("file://{}", file.display());
    stage.shim.clone().create(request).await.unwrap();
    stage.shim.clone().start("c1", "").await.unwrap();
    let mut stdout = stage.acting.stdout.lock().unwrap().take().unwrap();
    let acting = stage.acting.clone();
    let program = tokio::spawn(async move {
        let mut printed = 0;
        while pieces.is_none_or(|pieces| printed < pieces) {
            tokio::time::sleep(pause).await;
            if stdout.write_all(&vec![7; size]).await.is_err() {
                return;
            }
            printed += 1;
        }
        drop(stdout);
        acting.exit("c1", 0).await;
    });
    stage.shim.shut_down();
    let began = tokio::time::Instant::now();
    let answered = async {
        stage.shim.drained().await;
        began.elapsed()
    };
    let (_, answered) = tokio::join!(stage.shim.clean_up(), answered);
    program.abort();
    let kept = std::fs::metadata(file).map_or(0, |metadata| metadata.len());
    (kept, answered, stage.heard().await)
}

#[tokio::test(start_paused = true)]
async fn shutdown_waits_for_output_that_keeps_coming_on_a_busy_machine() {
    // 8 MiB, at about 1 MiB a second.
    let size = 64 << 10;
    let (kept, answered, heard) = printing(Some(128), size, Duration::from_millis(60)).await;
    assert_eq!(kept, 8 << 20);
    assert!(
        (Duration::from_secs(7)..Duration::from_secs(9)).contains(&answered),
        "{answered:?}"
    );
    assert_eq!(heard, ["create", "start", "exit c1 0"]);
}

#[tokio::test(start_paused = true)]
async fn shutdown_does_not_wait_for_a_program_that_prints_for_ever() {
    for (size, pause, limit) in [
        // A steady log is cut at the end of the phase's share.
        (100, 300, 3),
        // As is what has printed enough by then.
        (1 << 20, 50, 3),
        // What comes as a burst does has its time, and no more.
        (64 << 10, 150, 18),
    ] {
        let (_, answered, heard) = printing(None, size, Duration::from_millis(pause)).await;
        let limit = Duration::from_secs(limit);
        let expected = limit.saturating_sub(Duration::from_millis(500))..limit * 11 / 10;
        assert!(expected.contains(&answered), "{size} bytes: {answered:?}");
        assert_eq!(heard, ["create", "start", "exit c1 137"], "{size} bytes");
    }
}

#[tokio::test(start_paused = true)]
async fn shutdown_takes_no_pause_for_the_end_while_the_guest_is_busy_or_does_not_answer() {
    for (mute, busy) in [(true, false), (false, true)] {
        let stage = Stage::set(Manners {
            mute,
            busy,
            ..Manners::default()
        })
        .await;
        stage.running("c1").await;
        stage.shim.shut_down();
        let began = tokio::time::Instant::now();
        let answered = async {
            stage.shim.drained().await;
            began.elapsed()
        };
        let (failures, answered) = tokio::join!(stage.shim.clean_up(), answered);
        assert!(failures.is_empty(), "{failures}");
        let share = Phase::Stdio.share();
        assert!((share..share * 11 / 10).contains(&answered), "{answered:?}");
    }
}
