//! What the host's side does: connecting, dropping, wakers, the doorbell, the end of the VM.

use std::io::ErrorKind::{BrokenPipe, ConnectionReset};

use super::super::connection::TX_BUFFER;
use super::super::muxer::{DeviceState, Muxer};
use super::super::packet::{OP_CREDIT_UPDATE, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;

fn poll<F: Future>(future: &mut Pin<Box<F>>, waker: &Waker) -> Poll<F::Output> {
    future.as_mut().poll(&mut Context::from_waker(waker))
}

#[test]
fn streams_fit_ttrpc_and_tasks() {
    fn fits<T: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static>() {}
    fits::<VsockStream>();
    fn shared<T: Clone + Send + Sync + 'static>() {}
    shared::<VsockHost>();
    fn sends<T: Send + 'static>(_: T) {}
    let guest = Guest::new();
    let host = guest.host.clone();
    sends(async move { host.connect(1).await });
    sends(async move { guest.host.listen(1)?.accept().await });
}

#[test]
fn ports_are_checked_and_free_again_after_a_drop() {
    let guest = Guest::new();
    let listener = guest.host.listen(1024).unwrap();
    assert!(matches!(
        guest.host.listen(1024),
        Err(Error::PortInUse { port: 1024 })
    ));
    drop(listener);
    guest.host.listen(1024).unwrap();
    assert!(matches!(
        guest.host.listen(u32::MAX),
        Err(Error::InvalidPort { port: u32::MAX })
    ));
    assert!(matches!(
        ready(guest.host.connect(u32::MAX)),
        Err(Error::InvalidPort { port: u32::MAX })
    ));
    let fresh: Vec<_> = (0..100)
        .map(|_| guest.host.listen_fresh().unwrap())
        .collect();
    let mut ports: Vec<_> = fresh.iter().map(VsockListener::port).collect();
    assert!(ports.iter().all(|port| (65536..1 << 30).contains(port)));
    ports.dedup();
    assert_eq!(ports.len(), 100);
    drop(fresh);
    assert!(!ports.contains(&guest.host.listen_fresh().unwrap().port()));
}

#[test]
fn connecting_sends_a_request_and_the_response_makes_the_stream() {
    let guest = Guest::new();
    let (alarm, waker) = alarm();
    let host = guest.host.clone();
    let mut connect = Box::pin(host.connect(50));
    assert!(poll(&mut connect, &waker).is_pending());
    let (request, _) = guest.receive().unwrap();
    assert_eq!((request.op, request.dst_port), (OP_REQUEST, 50));
    assert_eq!(request.buf_alloc, BUF_ALLOC);
    assert!(poll(&mut connect, &waker).is_pending());
    guest.op(OP_RESPONSE, request.src_port, 50);
    assert_eq!(alarm.count(), 1);
    let Poll::Ready(Ok(mut stream)) = poll(&mut connect, &waker) else {
        panic!("connected")
    };
    write(&mut stream, b"hello").unwrap();
    assert_eq!(guest.receive().unwrap().1, b"hello");
    guest.data(stream.host_port(), 50, b"back");
    assert_eq!(read(&mut stream, 99).unwrap(), b"back");
}

#[test]
fn a_refused_connection_says_so_and_leaves_nothing() {
    let guest = Guest::new();
    let host = guest.host.clone();
    let (alarm, waker) = alarm();
    let mut connect = Box::pin(host.connect(50));
    assert!(poll(&mut connect, &waker).is_pending());
    let (request, _) = guest.receive().unwrap();
    guest.op(OP_RST, request.src_port, 50);
    assert_eq!(alarm.count(), 1);
    assert!(matches!(
        poll(&mut connect, &waker),
        Poll::Ready(Err(Error::Refused { port: 50 }))
    ));
    drop(connect);
    assert_eq!((guest.ops(), guest.host.connections()), (vec![], 0));
}

#[test]
fn a_connect_that_is_given_up_tells_the_guest_only_what_it_knows_of() {
    let guest = Guest::new();
    let host = guest.host.clone();
    let waker = Waker::noop();
    // Before the request went out.
    let mut connect = Box::pin(host.connect(50));
    assert!(poll(&mut connect, waker).is_pending());
    drop(connect);
    assert_eq!((guest.ops(), guest.host.connections()), (vec![], 0));
    // After it, and after the response.
    for answered in [false, true] {
        let mut connect = Box::pin(host.connect(50));
        assert!(poll(&mut connect, waker).is_pending());
        let (request, _) = guest.receive().unwrap();
        if answered {
            guest.op(OP_RESPONSE, request.src_port, 50);
        }
        drop(connect);
        assert_eq!((guest.ops(), guest.host.connections()), (vec![OP_RST], 0));
    }
}

#[test]
fn many_connections_to_one_port_have_ports_of_their_own() {
    let guest = Guest::new();
    let host = guest.host.clone();
    let mut connects: Vec<_> = (0..50).map(|_| Box::pin(host.connect(50))).collect();
    for connect in &mut connects {
        assert!(poll(connect, Waker::noop()).is_pending());
    }
    let mut ports: Vec<_> = std::iter::from_fn(|| guest.receive())
        .map(|(header, _)| header.src_port)
        .collect();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 50);
}

#[test]
fn a_dropped_stream_sends_what_it_has_before_it_closes_and_takes_nothing_more() {
    let guest = Guest::new();
    let mut listener = guest.host.listen(1024).unwrap();
    let mut stream = guest.connect(&mut listener, 7);
    let data = pattern(TX_BUFFER);
    // As much as fits beyond what the guest has room for.
    assert_eq!(write(&mut stream, &data).unwrap(), TX_BUFFER);
    let mut got = Vec::new();
    while let Some((Header { op: OP_RW, .. }, payload)) = guest.receive() {
        got.extend(payload);
    }
    assert_eq!(write(&mut stream, &data).unwrap(), TX_BUFFER);
    drop(stream);
    // It takes no more at once, but has more to say.
    let closing: Vec<_> = std::iter::from_fn(|| guest.receive())
        .map(|(header, _)| (header.op, header.flags))
        .collect();
    assert_eq!(closing[0], (OP_SHUTDOWN, SHUTDOWN_RECEIVE));
    // What the guest was still sending is dropped, and acknowledged so that it is not stuck.
    for _ in 0..100 {
        guest.data(1024, 7, &pattern(50_000));
        while let Some((header, _)) = guest.receive() {
            assert_eq!(header.op, OP_CREDIT_UPDATE);
        }
    }
    assert_eq!(guest.host.connections(), 1);
    // Credit flows slowly.
    let mut flags = 0;
    while flags == 0 {
        guest.send(Header {
            fwd_cnt: got.len() as u32 - BUF_ALLOC + 10_000,
            ..Guest::header(OP_CREDIT_UPDATE, 1024, 7)
        });
        while let Some((header, payload)) = guest.receive() {
            got.extend(payload);
            if header.op == OP_SHUTDOWN {
                flags = header.flags;
            }
        }
    }
    assert_eq!(flags, SHUTDOWN_BOTH);
    assert_eq!(got, [data.clone(), data].concat());
    // Late packets are dropped, the guest's close is answered.
    guest.data(1024, 7, b"late");
    guest.op(OP_CREDIT_UPDATE, 1024, 7);
    assert_eq!(guest.ops(), NOTHING);
    guest.shutdown(1024, 7, SHUTDOWN_BOTH);
    assert_eq!((guest.ops(), guest.host.connections()), (vec![OP_RST], 0));
}

#[test]
fn a_stream_dropped_before_the_response_went_out_still_says_all() {
    let guest = Guest::new();
    let mut listener = guest.host.listen(1024).unwrap();
    guest.op(OP_REQUEST, 1024, 7);
    let mut stream = ready(listener.accept()).unwrap();
    write(&mut stream, b"brief").unwrap();
    drop(stream);
    let packets: Vec<_> = std::iter::from_fn(|| guest.receive())
        .map(|(header, payload)| (header.op, header.flags, payload))
        .collect();
    assert_eq!(
        packets,
        [
            (OP_RESPONSE, 0, vec![]),
            (OP_SHUTDOWN, SHUTDOWN_RECEIVE, vec![]),
            (OP_RW, 0, b"brief".to_vec()),
            (OP_SHUTDOWN, SHUTDOWN_BOTH, vec![]),
        ]
    );
    guest.op(OP_RST, 1024, 7);
    assert_eq!(guest.host.connections(), 0);
}

#[test]
fn a_dropped_listener_resets_what_it_has_not_accepted_and_only_that() {
    let guest = Guest::new();
    let mut listener = guest.host.listen(1024).unwrap();
    let mut stream = guest.connect(&mut listener, 1);
    guest.op(OP_REQUEST, 1024, 2);
    assert_eq!(guest.ops(), [OP_RESPONSE]);
    guest.op(OP_REQUEST, 1024, 3);
    guest.op(OP_REQUEST, 1024, 4);
    guest.shutdown(1024, 4, SHUTDOWN_BOTH);
    drop(listener);
    let mut resets: Vec<_> = std::iter::from_fn(|| guest.receive())
        .map(|(header, _)| (header.op, header.dst_port))
        .collect();
    resets.sort_unstable();
    assert_eq!(resets, [(OP_RST, 2), (OP_RST, 3), (OP_RST, 4)]);
    assert_eq!(guest.host.connections(), 1);
    guest.data(1024, 1, b"on");
    assert_eq!(read(&mut stream, 9).unwrap(), b"on");
    guest.op(OP_REQUEST, 1024, 5);
    assert_eq!(guest.ops(), [OP_RST]);
}

#[test]
fn writes_are_partial_when_room_is_short_and_the_writer_is_woken_once_half_is_free() {
    let guest = Guest::new();
    let mut listener = guest.host.listen(1024).unwrap();
    let mut stream = guest.connect(&mut listener, 7);
    let (alarm, waker) = alarm();
    let data = pattern(TX_BUFFER - 10);
    assert_eq!(write(&mut stream, &data).unwrap(), TX_BUFFER - 10);
    assert_eq!(write(&mut stream, b"0123456789abc").unwrap(), 10);
    assert!(try_write(&mut stream, b"abc", &waker).is_none());
    assert_eq!(write(&mut stream, b"").unwrap(), 0);
    let mut got = Vec::new();
    while alarm.count() == 0 {
        got.extend(guest.receive().expect("more").1);
    }
    assert_eq!(got.len(), TX_BUFFER / 2);
    assert_eq!(write(&mut stream, b"abc").unwrap(), 3);
    while let Some((_, payload)) = guest.receive() {
        got.extend(payload);
    }
    assert_eq!(got.len(), BUF_ALLOC as usize);
    assert_eq!(got, [&data[..], b"0123456789"].concat());
    assert_eq!(alarm.count(), 1);
}

#[test]
fn vectored_writes_arrive_as_one() {
    let guest = Guest::new();
    let mut listener = guest.host.listen(1024).unwrap();
    let mut stream = guest.connect(&mut listener, 7);
    let parts = [b"one ".as_slice(), b"", b"two ", b"three"].map(io::IoSlice::new);
    let written =
        Pin::new(&mut stream).poll_write_vectored(&mut Context::from_waker(Waker::noop()), &parts);
    assert!(matches!(written, Poll::Ready(Ok(13))));
    assert_eq!(guest.receive().unwrap().1, b"one two three");
}

#[test]
fn reader_and_writer_wait_apart_and_the_last_waker_counts() {
    let guest = Guest::new();
    let mut listener = guest.host.listen(1024).unwrap();
    let mut stream = guest.connect(&mut listener, 7);
    let (old, old_waker) = alarm();
    let (reader, reader_waker) = alarm();
    let (writer, writer_waker) = alarm();
    while try_write(&mut stream, &[0; 4096], &writer_waker).is_some() {}
    assert!(try_read(&mut stream, 1, &old_waker).is_none());
    assert!(try_read(&mut stream, 1, &reader_waker).is_none());
    guest.data(1024, 7, b"x");
    assert_eq!((old.count(), reader.count(), writer.count()), (0, 1, 0));
    guest.ops();
    assert_eq!((old.count(), reader.count(), writer.count()), (0, 1, 1));
}

#[test]
fn a_waker_that_drops_a_stream_when_it_is_dropped_does_not_deadlock() {
    struct Holding(#[expect(dead_code)] VsockStream);
    impl Wake for Holding {
        fn wake(self: Arc<Self>) {}
    }
    let guest = Guest::new();
    let mut listener = guest.host.listen(1024).unwrap();
    let mut stream = guest.connect(&mut listener, 1);
    let others: Vec<_> = (2..6)
        .map(|port| guest.connect(&mut listener, port))
        .collect();
    for other in others {
        let waker = Waker::from(Arc::new(Holding(other)));
        // Replaces, and so drops, the one before.
        assert!(try_read(&mut stream, 1, &waker).is_none());
    }
    drop(stream);
    assert_eq!(guest.ops(), [OP_SHUTDOWN; 5]);
}

#[test]
fn the_doorbell_rings_once_until_the_device_has_looked() {
    let guest = Guest::new();
    let mut listener = guest.host.listen(1024).unwrap();
    let mut stream = guest.connect(&mut listener, 7);
    let rings = || guest.shared.doorbell.read().unwrap_or(0);
    assert_eq!(rings(), 0);
    // Nobody is there to hear it.
    write(&mut stream, b"x").unwrap();
    guest
        .shared
        .with(|muxer| muxer.device = DeviceState::Inactive);
    write(&mut stream, b"x").unwrap();
    assert_eq!(rings(), 0);
    // The device has looked and found nothing.
    assert_eq!(guest.ops(), [OP_RW]);
    for _ in 0..10 {
        write(&mut stream, b"x").unwrap();
    }
    assert_eq!(rings(), 1);
    // It is at work.
    guest.receive();
    write(&mut stream, b"x").unwrap();
    assert_eq!(rings(), 0);
    assert_eq!(guest.ops(), [OP_RW]);
    half_close(&mut stream);
    assert_eq!(rings(), 1);
}

#[test]
fn the_end_wakes_everyone_and_leaves_what_was_received() {
    let guest = Guest::new();
    let mut listener = guest.host.listen(1024).unwrap();
    let mut stream = guest.connect(&mut listener, 7);
    let mut blocked = guest.connect(&mut listener, 8);
    let (alarm, waker) = alarm();
    guest.data(1024, 7, b"last");
    assert!(try_read(&mut blocked, 1, &waker).is_none());
    while try_write(&mut blocked, &[0; 4096], &waker).is_some() {}
    let host = guest.host.clone();
    let mut connect = Box::pin(host.connect(50));
    assert!(poll(&mut connect, &waker).is_pending());
    {
        let mut accept = Box::pin(listener.accept());
        assert!(poll(&mut accept, &waker).is_pending());
        guest.host.end();
        assert_eq!(alarm.count(), 4);
        assert!(matches!(
            poll(&mut accept, &waker),
            Poll::Ready(Err(Error::Ended))
        ));
    }
    assert!(matches!(
        poll(&mut connect, &waker),
        Poll::Ready(Err(Error::Ended))
    ));
    assert_eq!(read(&mut stream, 99).unwrap(), b"last");
    assert_eq!(kind(read(&mut stream, 99)), ConnectionReset);
    assert_eq!(kind(read(&mut blocked, 99)), ConnectionReset);
    assert_eq!(kind(write(&mut blocked, b"x")), ConnectionReset);
    half_close(&mut blocked);
    assert!(matches!(guest.host.listen(1), Err(Error::Ended)));
    assert!(matches!(ready(guest.host.connect(1)), Err(Error::Ended)));
    guest.op(OP_REQUEST, 1024, 9);
    assert_eq!(guest.ops(), NOTHING);
    guest.host.end();
    drop((stream, blocked, connect, listener));
    assert_eq!(guest.host.connections(), 0);
}

#[test]
fn a_device_reset_cuts_the_connections_and_keeps_the_listeners() {
    let guest = Guest::new();
    let mut listener = guest.host.listen(1024).unwrap();
    let mut stream = guest.connect(&mut listener, 7);
    guest.op(OP_REQUEST, 1024, 8);
    guest.op(OP_REQUEST, 9999, 8);
    guest.shared.with(Muxer::cut_all);
    assert_eq!(guest.ops(), NOTHING);
    assert_eq!(kind(read(&mut stream, 99)), ConnectionReset);
    assert_eq!(guest.host.connections(), 1);
    let mut again = guest.connect(&mut listener, 7);
    drop(stream);
    guest.data(1024, 7, b"new");
    assert_eq!(read(&mut again, 9).unwrap(), b"new");
}

#[test]
fn a_writer_whose_guest_half_closed_both_ways_finds_the_pipe_broken() {
    let guest = Guest::new();
    let mut listener = guest.host.listen(1024).unwrap();
    let mut stream = guest.connect(&mut listener, 7);
    half_close(&mut stream);
    assert_eq!(guest.ops(), [OP_SHUTDOWN]);
    guest.shutdown(1024, 7, SHUTDOWN_SEND);
    assert_eq!(read(&mut stream, 9).unwrap(), b"");
    assert_eq!(kind(write(&mut stream, b"x")), BrokenPipe);
    // Each side has said all, and the connection waits for one of them to close.
    assert_eq!(guest.host.connections(), 1);
    drop(stream);
    let (header, _) = guest.receive().unwrap();
    assert_eq!((header.op, header.flags), (OP_SHUTDOWN, SHUTDOWN_BOTH));
}
