//! Streams under real tasks, with a well-behaved guest at the other end: everything
//! arrives, in order, both ways, and nobody waits for ever.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::peer::{Direct, Peer, Report, Role, sum};
use super::queues::Driver;
use super::*;

const MIB: usize = 1 << 20;

/// Fails, rather than hangs, when a wake was lost.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(30), future)
        .await
        .expect("nobody was woken")
}

fn direct(buf_alloc: u32) -> (VsockHost, Peer) {
    let shared = Shared::new(GUEST_CID).unwrap();
    let host = VsockHost::new(Arc::clone(&shared));
    (host, Peer::start(Direct::new(shared), buf_alloc))
}

/// Writes and reads at once through an echo, and compares.
async fn echo(stream: VsockStream, len: usize, chunk: usize) {
    let data = Arc::new(pattern(len));
    let (mut reader, mut writer) = tokio::io::split(stream);
    let sent = Arc::clone(&data);
    let writing = tokio::spawn(async move {
        for part in sent.chunks(chunk) {
            writer.write_all(part).await.unwrap();
        }
        writer.shutdown().await.unwrap();
        writer
    });
    let mut got = Vec::with_capacity(len);
    soon(reader.read_to_end(&mut got)).await.unwrap();
    assert_eq!(got.len(), len);
    assert!(got == *data, "bytes in another order");
    soon(writing).await.unwrap();
}

async fn echo_both_ways(host: VsockHost, peer: Peer) {
    let mut listener = host.listen(1024).unwrap();
    peer.connect(1024, 7, Role::Echo);
    let stream = soon(listener.accept()).await.unwrap();
    echo(stream, 8 * MIB, 100_000).await;
    peer.listen(50, Role::Echo);
    let stream = loop {
        // The peer may not have heard of its command yet.
        match soon(host.connect(50)).await {
            Ok(stream) => break stream,
            Err(Error::Refused { port: 50 }) => tokio::time::sleep(Duration::from_millis(1)).await,
            Err(error) => panic!("{error}"),
        }
    };
    echo(stream, 8 * MIB, 3_333).await;
    drop(peer);
    assert_eq!(
        host.counters(),
        super::super::Counters {
            refused: host.counters().refused,
            ..Default::default()
        }
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_mib_come_back_whole_from_an_echo() {
    let (host, peer) = direct(BUF_ALLOC);
    echo_both_ways(host, peer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_mib_come_back_whole_through_the_queues() {
    for event_idx in [false, true] {
        let driver = Driver::start(event_idx);
        let host = driver.host.clone();
        let peer = Peer::start(driver, BUF_ALLOC);
        echo_both_ways(host, peer).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_peer_buffer_only_slows_things_down() {
    let (host, peer) = direct(1000);
    let mut listener = host.listen(1024).unwrap();
    peer.connect(1024, 7, Role::Echo);
    let stream = soon(listener.accept()).await.unwrap();
    echo(stream, MIB, 50_000).await;
}

async fn hundred_at_once(host: VsockHost, peer: Peer) {
    let mut listener = host.listen(1024).unwrap();
    let mut tasks = Vec::new();
    for port in 0..100 {
        peer.connect(1024, port, Role::Echo);
    }
    for index in 0..100usize {
        let stream = soon(listener.accept()).await.unwrap();
        tasks.push(tokio::spawn(echo(stream, 100_000 + index * 1000, 7_000)));
    }
    for task in tasks {
        soon(task).await.unwrap();
    }
    // All RSTs have come.
    soon(async {
        while host.connections() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    drop(peer);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_connections_at_once_do_not_mix() {
    let (host, peer) = direct(BUF_ALLOC);
    hundred_at_once(host, peer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_connections_at_once_do_not_mix_through_the_queues() {
    let driver = Driver::start(true);
    let host = driver.host.clone();
    let peer = Peer::start(driver, BUF_ALLOC);
    hundred_at_once(host, peer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_that_is_written_and_dropped_arrives_whole() {
    let (host, peer) = direct(BUF_ALLOC);
    let data = pattern(8 * MIB);
    let mut listener = host.listen(1024).unwrap();
    peer.connect(1024, 7, Role::Sink);
    let mut stream = soon(listener.accept()).await.unwrap();
    soon(stream.write_all(&data)).await.unwrap();
    drop(stream);
    let report = tokio::task::spawn_blocking(move || {
        let report = peer.reports.recv_timeout(Duration::from_secs(30));
        drop(peer);
        report.unwrap()
    })
    .await
    .unwrap();
    let expected = Report {
        guest_port: 7,
        len: data.len(),
        sum: sum(0, data),
    };
    assert_eq!(report, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_guest_pours_and_leaves_is_read_whole() {
    let (host, peer) = direct(BUF_ALLOC);
    let mut listener = host.listen(1024).unwrap();
    peer.connect(1024, 7, Role::Source(8 * MIB));
    let mut stream = soon(listener.accept()).await.unwrap();
    let mut got = Vec::new();
    soon(stream.read_to_end(&mut got)).await.unwrap();
    assert!(got == pattern(8 * MIB));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_that_are_dropped_at_any_moment_leave_nothing() {
    let (host, peer) = direct(BUF_ALLOC);
    let mut listener = host.listen(1024).unwrap();
    for round in 0..200u32 {
        let role = match round % 3 {
            0 => Role::Echo,
            1 => Role::Source(300_000),
            _ => Role::Sink,
        };
        peer.connect(1024, round, role);
        let mut stream = soon(listener.accept()).await.unwrap();
        tokio::spawn(async move {
            let work = async {
                let mut buffer = vec![0; 10_000];
                loop {
                    // Errors are the end here.
                    if stream.write_all(&buffer[..5000]).await.is_err() {
                        return;
                    }
                    match stream.read(&mut buffer).await {
                        Ok(0) | Err(_) => return,
                        Ok(_) => {}
                    }
                }
            };
            let _ = timeout(Duration::from_micros(u64::from(round) * 20), work).await;
        });
    }
    soon(async {
        while host.connections() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    assert_eq!(host.counters().violations, 0);
    drop(peer);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_the_vm_ends_every_task() {
    let driver = Driver::start(true);
    let host = driver.host.clone();
    let peer = Peer::start(driver, BUF_ALLOC);
    let mut listener = host.listen(1024).unwrap();
    let mut tasks = Vec::new();
    for port in 0..10 {
        peer.connect(1024, port, Role::Sink);
        let mut stream = soon(listener.accept()).await.unwrap();
        tasks.push(tokio::spawn(async move {
            let mut buffer = [0; 10];
            stream.read(&mut buffer).await.map(|_| ())
        }));
    }
    tasks.push(tokio::spawn({
        let host = host.clone();
        async move {
            match host.listen(9).unwrap().accept().await {
                Ok(_) => Ok(()),
                Err(error) => Err(error.into()),
            }
        }
    }));
    tokio::time::sleep(Duration::from_millis(20)).await;
    // The driver goes, and the device with it.
    drop(peer);
    for task in tasks {
        let error = soon(task).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
    assert!(matches!(soon(listener.accept()).await, Err(Error::Ended)));
}
