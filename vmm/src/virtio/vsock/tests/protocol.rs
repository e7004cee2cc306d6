//! What a guest may do to the protocol, row by row: nothing panics or grows, and
//! the other connections live on.

use std::io::ErrorKind::{BrokenPipe, ConnectionReset};

use super::super::connection::TX_BUFFER;
use super::super::muxer::{BACKLOG, MAX_CONNECTIONS, MAX_REPLIES};
use super::super::packet::{
    MAX_PAYLOAD, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
};
use super::*;

/// A guest with one connection from its port 7 to the host's 1024, and a second one that every
/// test finds alive at its end.
struct One {
    guest: Guest,
    listener: VsockListener,
    stream: VsockStream,
    witness: VsockStream,
}

impl One {
    fn new() -> Self {
        let guest = Guest::new();
        let mut listener = guest.host.listen(1024).unwrap();
        let stream = guest.connect(&mut listener, 7);
        let witness = guest.connect(&mut listener, 8);
        Self {
            guest,
            listener,
            stream,
            witness,
        }
    }

    /// The stream was killed, with one RST, and the witness was not.
    fn assert_killed(&mut self) {
        assert_eq!(self.guest.ops(), [OP_RST]);
        assert_eq!(kind(read(&mut self.stream, 1)), ConnectionReset);
        assert_eq!(kind(write(&mut self.stream, b"x")), ConnectionReset);
        assert_eq!(self.guest.host.counters().violations, 1);
        self.assert_witness();
    }

    fn assert_witness(&mut self) {
        self.guest.data(1024, 8, b"alive");
        assert_eq!(read(&mut self.witness, 99).unwrap(), b"alive");
        assert_eq!(write(&mut self.witness, b"too").unwrap(), 3);
        let (header, payload) = self.guest.receive().unwrap();
        assert_eq!(
            (header.op, header.dst_port, &payload[..]),
            (OP_RW, 8, &b"too"[..])
        );
        assert_eq!(self.guest.ops(), NOTHING);
    }
}

#[test]
fn packets_with_a_wrong_cid_are_dropped_without_an_answer() {
    let mut one = One::new();
    for (src_cid, dst_cid) in [
        (4, 2),
        (2, 2),
        (0, 2),
        (u64::MAX, 2),
        (3, 1),
        (3, 3),
        (3, 0),
        (3, u64::MAX),
    ] {
        for op in [OP_REQUEST, OP_RW, OP_RST, OP_SHUTDOWN] {
            for guest_port in [7, 9] {
                one.guest.send(Header {
                    src_cid,
                    dst_cid,
                    flags: SHUTDOWN_BOTH,
                    ..Guest::header(op, 1024, guest_port)
                });
            }
        }
    }
    assert_eq!(one.guest.ops(), NOTHING);
    assert_eq!(one.guest.host.counters().wrong_cid, 64);
    assert_eq!(one.guest.host.connections(), 2);
    one.assert_witness();
}

#[test]
fn an_unknown_type_is_answered_with_rst_and_touches_no_connection() {
    let mut one = One::new();
    for kind in [0, 2, 3, u16::MAX] {
        for op in [OP_REQUEST, OP_RW, OP_SHUTDOWN, 99] {
            one.guest.send(Header {
                kind,
                ..Guest::header(op, 1024, 7)
            });
            let (reset, _) = one.guest.receive().unwrap();
            assert_eq!((reset.op, reset.kind), (OP_RST, kind));
            assert_eq!((reset.src_port, reset.dst_port), (1024, 7));
        }
        one.guest.send(Header {
            kind,
            ..Guest::header(OP_RST, 1024, 7)
        });
        assert_eq!(one.guest.ops(), NOTHING);
    }
    one.guest.data(1024, 7, b"still here");
    assert_eq!(read(&mut one.stream, 99).unwrap(), b"still here");
    one.assert_witness();
}

#[test]
fn an_unknown_op_kills_its_connection() {
    for op in [0, 8, u16::MAX] {
        let mut one = One::new();
        one.guest.op(op, 1024, 7);
        one.assert_killed();
        one.guest.op(op, 1024, 77);
        assert_eq!(one.guest.ops(), [OP_RST]);
    }
}

#[test]
fn a_length_beyond_the_buffer_or_the_limit_kills_its_connection() {
    for (len, there) in [
        (5, 4),
        (1, 0),
        (MAX_PAYLOAD + 1, MAX_PAYLOAD as usize + 1),
        (u32::MAX, 100),
        (u32::MAX - 43, 100),
        (1 << 31, MAX_PAYLOAD as usize),
    ] {
        let mut one = One::new();
        one.guest.send_with(
            Header {
                len,
                ..Guest::header(OP_RW, 1024, 7)
            },
            &vec![1; there],
        );
        one.assert_killed();
    }
}

#[test]
fn a_length_below_the_buffer_takes_just_that_and_zero_takes_nothing() {
    let mut one = One::new();
    one.guest.send_with(
        Header {
            len: 3,
            ..Guest::header(OP_RW, 1024, 7)
        },
        b"abcdef",
    );
    one.guest.data(1024, 7, b"");
    assert_eq!(read(&mut one.stream, 99).unwrap(), b"abc");
    assert!(try_read(&mut one.stream, 99, Waker::noop()).is_none());
    one.assert_witness();
}

#[test]
fn data_before_our_response_kills_the_connection() {
    let mut one = One::new();
    one.guest.op(OP_REQUEST, 1024, 9);
    one.guest.data(1024, 9, b"early");
    // The RST comes instead of the response, and there is nothing to accept.
    assert_eq!(one.guest.ops(), [OP_RST]);
    assert!(
        pin!(one.listener.accept())
            .poll(&mut Context::from_waker(Waker::noop()))
            .is_pending()
    );
    assert_eq!(one.guest.host.connections(), 2);
    one.assert_witness();
}

#[test]
fn data_before_the_guests_response_kills_the_connection() {
    let mut one = One::new();
    let host = one.guest.host.clone();
    let mut connect = Box::pin(host.connect(50));
    let mut cx = Context::from_waker(Waker::noop());
    assert!(connect.as_mut().poll(&mut cx).is_pending());
    let (request, _) = one.guest.receive().unwrap();
    assert_eq!((request.op, request.dst_port), (OP_REQUEST, 50));
    one.guest.data(request.src_port, 50, b"early");
    assert_eq!(one.guest.ops(), [OP_RST]);
    assert!(matches!(
        connect.as_mut().poll(&mut cx),
        Poll::Ready(Err(Error::BrokenOff { port: 50 }))
    ));
    drop(connect);
    assert_eq!(one.guest.host.connections(), 2);
    one.assert_witness();
}

#[test]
fn data_after_the_guests_shutdown_kills_the_connection() {
    let mut one = One::new();
    one.guest.data(1024, 7, b"last words");
    one.guest.shutdown(1024, 7, SHUTDOWN_SEND);
    one.guest.data(1024, 7, b"and more");
    assert_eq!(read(&mut one.stream, 99).unwrap(), b"last words");
    one.assert_killed();
}

#[test]
fn a_response_or_a_request_on_a_connection_that_stands_kills_it() {
    for op in [OP_RESPONSE, OP_REQUEST] {
        let mut one = One::new();
        one.guest.op(op, 1024, 7);
        one.assert_killed();
    }
}

#[test]
fn what_belongs_to_no_connection_is_answered_with_rst_unless_it_is_one() {
    let mut one = One::new();
    for op in [
        OP_RESPONSE,
        OP_RW,
        OP_SHUTDOWN,
        OP_CREDIT_UPDATE,
        OP_CREDIT_REQUEST,
    ] {
        one.guest.op(op, 1024, 99);
        assert_eq!(one.guest.ops(), [OP_RST], "op {op}");
    }
    one.guest.op(OP_RST, 1024, 99);
    one.guest.op(OP_RST, 4, 4);
    assert_eq!(one.guest.ops(), NOTHING);
    one.assert_witness();
}

#[test]
fn a_storm_of_rsts_changes_nothing() {
    let mut one = One::new();
    for port in 0..20_000 {
        one.guest.op(OP_RST, 1024, 1000 + port);
    }
    one.guest.op(OP_RST, 1024, 7);
    one.guest.op(OP_RST, 1024, 7);
    assert_eq!(one.guest.ops(), NOTHING);
    assert_eq!(kind(read(&mut one.stream, 1)), ConnectionReset);
    one.assert_witness();
}

#[test]
fn requests_and_rsts_in_turn_leave_nothing_behind() {
    let mut one = One::new();
    for _ in 0..20_000 {
        one.guest.op(OP_REQUEST, 1024, 99);
        one.guest.op(OP_RST, 1024, 99);
    }
    assert_eq!(one.guest.host.connections(), 2);
    assert_eq!(one.guest.ops(), NOTHING);
    one.assert_witness();
}

#[test]
fn a_flood_of_requests_without_receive_buffers_is_bounded() {
    let guest = Guest::new();
    let _listener = guest.host.listen(1024).unwrap();
    for port in 0..5_000 {
        guest.op(OP_REQUEST, 1024, port);
        guest.op(OP_REQUEST, 1025, port);
    }
    assert_eq!(guest.host.connections(), BACKLOG);
    let ops = guest.ops();
    assert_eq!(ops.len(), BACKLOG + MAX_REPLIES);
    assert_eq!(ops.iter().filter(|op| **op == OP_RST).count(), MAX_REPLIES);
    let counters = guest.host.counters();
    assert_eq!(counters.refused, 10_000 - BACKLOG as u64);
    assert_eq!(
        counters.dropped_replies,
        counters.refused - MAX_REPLIES as u64
    );
}

#[test]
fn connecting_to_a_closed_port_is_answered_with_rst() {
    let mut one = One::new();
    one.guest.op(OP_REQUEST, 1023, 7);
    let (reset, _) = one.guest.receive().unwrap();
    assert_eq!(
        (reset.op, reset.src_port, reset.dst_port),
        (OP_RST, 1023, 7)
    );
    assert_eq!(one.guest.host.connections(), 2);
    one.assert_witness();
}

#[test]
fn connections_beyond_the_cap_are_refused_until_one_is_gone() {
    let guest = Guest::new();
    let mut listener = guest.host.listen(1024).unwrap();
    let mut streams: Vec<_> = (0..MAX_CONNECTIONS as u32)
        .map(|port| guest.connect(&mut listener, port))
        .collect();
    guest.op(OP_REQUEST, 1024, 5000);
    assert_eq!(guest.ops(), [OP_RST]);
    assert!(matches!(
        ready(guest.host.connect(1)),
        Err(Error::TooManyConnections {
            limit: MAX_CONNECTIONS
        })
    ));
    // Even those that the guest has left count while the host holds them.
    guest.op(OP_RST, 1024, 0);
    guest.op(OP_REQUEST, 1024, 5000);
    assert_eq!(guest.ops(), [OP_RST]);
    drop(streams.remove(0));
    guest.connect(&mut listener, 5000);
}

#[test]
fn at_the_cap_a_connection_that_waits_for_an_rst_gives_way() {
    let guest = Guest::new();
    let mut listener = guest.host.listen(1024).unwrap();
    let mut streams: Vec<_> = (0..MAX_CONNECTIONS as u32)
        .map(|port| guest.connect(&mut listener, port))
        .collect();
    // The guest never answers their SHUTDOWN.
    streams.truncate(MAX_CONNECTIONS - 2);
    assert_eq!(guest.ops(), [OP_SHUTDOWN; 2]);
    assert_eq!(guest.host.connections(), MAX_CONNECTIONS);
    guest.op(OP_REQUEST, 1024, 5000);
    assert_eq!(guest.ops(), [OP_RST, OP_RESPONSE]);
    guest.op(OP_REQUEST, 1024, 5001);
    assert_eq!(guest.ops(), [OP_RST, OP_RESPONSE]);
    guest.op(OP_REQUEST, 1024, 5002);
    assert_eq!(guest.ops(), [OP_RST]);
    assert_eq!(guest.host.connections(), MAX_CONNECTIONS);
}

#[test]
fn a_full_backlog_refuses_and_accepting_makes_room() {
    let guest = Guest::new();
    let mut listener = guest.host.listen(1024).unwrap();
    for port in 0..BACKLOG as u32 {
        guest.op(OP_REQUEST, 1024, port);
    }
    assert_eq!(guest.ops(), vec![OP_RESPONSE; BACKLOG]);
    guest.op(OP_REQUEST, 1024, 5000);
    assert_eq!(guest.ops(), [OP_RST]);
    let first = ready(listener.accept()).unwrap();
    assert_eq!(first.guest_port(), 0);
    guest.op(OP_REQUEST, 1024, 5000);
    assert_eq!(guest.ops(), [OP_RESPONSE]);
}

#[test]
fn ports_of_a_connection_that_only_waits_for_an_rst_can_be_used_again() {
    let mut one = One::new();
    drop(one.stream);
    assert_eq!(one.guest.ops(), [OP_SHUTDOWN]);
    one.stream = one.guest.connect(&mut one.listener, 7);
    one.guest.data(1024, 7, b"second life");
    assert_eq!(read(&mut one.stream, 99).unwrap(), b"second life");
    one.assert_witness();
}

// ----- credit -----

#[test]
fn a_byte_beyond_our_buffer_kills_the_connection_and_what_came_before_can_be_read() {
    let mut one = One::new();
    let chunk = pattern(MAX_PAYLOAD as usize);
    for _ in 0..4 {
        one.guest.data(1024, 7, &chunk);
    }
    assert_eq!(one.guest.ops(), NOTHING);
    one.guest.data(1024, 7, b"!");
    assert_eq!(one.guest.ops(), [OP_RST]);
    // The full buffer of a killed connection makes no packets and is still the reader's.
    for _ in 0..4 {
        assert_eq!(read(&mut one.stream, chunk.len()).unwrap(), chunk);
        assert_eq!(one.guest.ops(), NOTHING);
    }
    assert_eq!(kind(read(&mut one.stream, 1)), ConnectionReset);
    one.assert_witness();
}

#[test]
fn room_that_the_guest_was_not_told_of_is_not_its_to_use() {
    let mut one = One::new();
    let chunk = pattern(MAX_PAYLOAD as usize);
    for _ in 0..2 {
        one.guest.data(1024, 7, &chunk);
    }
    read(&mut one.stream, chunk.len()).unwrap();
    // It believes that half is free, so there is no update yet.
    assert_eq!(one.guest.ops(), NOTHING);
    for _ in 0..2 {
        one.guest.data(1024, 7, &chunk);
    }
    one.guest.data(1024, 7, b"!");
    assert_eq!(one.guest.ops(), [OP_RST]);
}

#[test]
fn a_credit_update_comes_when_it_is_worth_a_packet_and_carries_the_count() {
    let mut one = One::new();
    let chunk = pattern(MAX_PAYLOAD as usize);
    for _ in 0..4 {
        one.guest.data(1024, 7, &chunk);
    }
    // Single bytes are no reason, a quarter of the buffer is.
    for _ in 0..1000 {
        read(&mut one.stream, 1).unwrap();
    }
    assert_eq!(one.guest.ops(), NOTHING);
    let mut taken = 1000;
    while taken < BUF_ALLOC as usize / 4 {
        taken += read(&mut one.stream, 4096).unwrap().len();
    }
    let (update, _) = one.guest.receive().unwrap();
    assert_eq!(
        (update.op, update.fwd_cnt as usize),
        (OP_CREDIT_UPDATE, taken)
    );
    // The guest may use just that.
    while taken < BUF_ALLOC as usize {
        taken += read(&mut one.stream, 1 << 20).unwrap().len();
    }
    assert_eq!(one.guest.receive().unwrap().0.fwd_cnt, BUF_ALLOC);
    for _ in 0..4 {
        one.guest.data(1024, 7, &chunk);
    }
    one.guest.data(1024, 7, b"!");
    assert_eq!(one.guest.ops(), [OP_RST]);
}

#[test]
fn a_reader_that_empties_the_buffer_tells_a_guest_that_is_short_of_credit() {
    let mut one = One::new();
    let chunk = pattern(MAX_PAYLOAD as usize);
    one.guest.data(1024, 7, &chunk);
    one.guest.data(1024, 7, &chunk);
    read(&mut one.stream, BUF_ALLOC as usize).unwrap();
    assert_eq!(one.guest.ops(), NOTHING);
    one.guest.data(1024, 7, b"x");
    read(&mut one.stream, 1).unwrap();
    assert_eq!(one.guest.ops(), [OP_CREDIT_UPDATE]);
}

#[test]
fn data_to_the_guest_carries_the_credit_update() {
    let mut one = One::new();
    let chunk = pattern(MAX_PAYLOAD as usize);
    for _ in 0..4 {
        one.guest.data(1024, 7, &chunk);
    }
    read(&mut one.stream, BUF_ALLOC as usize).unwrap();
    write(&mut one.stream, b"answer").unwrap();
    let (header, _) = one.guest.receive().unwrap();
    assert_eq!((header.op, header.fwd_cnt), (OP_RW, BUF_ALLOC));
    assert_eq!(one.guest.ops(), NOTHING);
}

#[test]
fn a_flood_of_credit_requests_is_answered_once() {
    let mut one = One::new();
    for _ in 0..20_000 {
        one.guest.op(OP_CREDIT_REQUEST, 1024, 7);
    }
    assert_eq!(one.guest.ops(), [OP_CREDIT_UPDATE]);
    one.assert_witness();
}

#[test]
fn a_guest_without_room_gets_one_credit_request_and_no_data_until_it_has() {
    let guest = Guest::new();
    let mut listener = guest.host.listen(1024).unwrap();
    let mut stream = guest.connect_by(
        &mut listener,
        Header {
            buf_alloc: 0,
            ..Guest::header(OP_REQUEST, 1024, 7)
        },
    );
    write(&mut stream, b"hello").unwrap();
    assert_eq!(guest.ops(), [OP_CREDIT_REQUEST]);
    write(&mut stream, b" world").unwrap();
    for _ in 0..1000 {
        guest.send(Header {
            buf_alloc: 0,
            ..Guest::header(OP_CREDIT_UPDATE, 1024, 7)
        });
        assert_eq!(guest.ops(), NOTHING);
    }
    guest.send(Header {
        buf_alloc: 4,
        ..Guest::header(OP_CREDIT_UPDATE, 1024, 7)
    });
    let (header, payload) = guest.receive().unwrap();
    assert_eq!((header.op, &payload[..]), (OP_RW, &b"hell"[..]));
    assert_eq!(guest.ops(), [OP_CREDIT_REQUEST]);
    guest.send(Header {
        buf_alloc: 100,
        fwd_cnt: 4,
        ..Guest::header(OP_CREDIT_UPDATE, 1024, 7)
    });
    assert_eq!(guest.receive().unwrap().1, b"o world");
    assert_eq!(guest.ops(), NOTHING);
}

#[test]
fn a_guest_that_claims_endless_room_does_not_make_the_host_hold_more() {
    let guest = Guest::new();
    let mut listener = guest.host.listen(1024).unwrap();
    let mut stream = guest.connect_by(
        &mut listener,
        Header {
            buf_alloc: u32::MAX,
            ..Guest::header(OP_REQUEST, 1024, 7)
        },
    );
    let data = pattern(TX_BUFFER + 1000);
    assert_eq!(write(&mut stream, &data).unwrap(), TX_BUFFER);
    assert!(try_write(&mut stream, &data, Waker::noop()).is_none());
    let mut sent = Vec::new();
    while let Some((header, payload)) = guest.receive() {
        assert_eq!(header.op, OP_RW);
        sent.extend(payload);
    }
    assert_eq!(sent, &data[..TX_BUFFER]);
}

#[test]
fn a_guest_that_never_updates_blocks_the_writer_and_makes_no_packets() {
    let mut one = One::new();
    let (alarm, waker) = alarm();
    let data = pattern(MAX_PAYLOAD as usize);
    let mut written = 0;
    let mut sent = 0;
    loop {
        match try_write(&mut one.stream, &data, &waker) {
            Some(count) => written += count.unwrap(),
            None if one.guest.receive().is_some_and(|(h, _)| h.op == OP_RW) => {
                sent += ROOM as usize;
                while one.guest.receive().is_some_and(|(h, _)| h.op == OP_RW) {
                    sent += ROOM as usize;
                }
            }
            None => break,
        }
    }
    assert_eq!(
        (written, sent),
        (BUF_ALLOC as usize + TX_BUFFER, BUF_ALLOC as usize)
    );
    let woken = alarm.count();
    for _ in 0..1000 {
        assert_eq!(one.guest.ops(), NOTHING);
        assert!(try_write(&mut one.stream, &data, &waker).is_none());
    }
    assert_eq!(alarm.count(), woken);
    one.assert_witness();
}

#[test]
fn a_count_that_goes_back_or_ahead_gives_no_credit() {
    let mut one = One::new();
    let data = pattern(TX_BUFFER);
    write(&mut one.stream, &data).unwrap();
    let mut sent = 0;
    while let Some((Header { op: OP_RW, len, .. }, _)) = one.guest.receive() {
        sent += len;
    }
    assert_eq!(sent, BUF_ALLOC);
    write(&mut one.stream, &data).unwrap();
    one.guest.ops();
    let update = |fwd_cnt| {
        one.guest.send(Header {
            fwd_cnt,
            ..Guest::header(OP_CREDIT_UPDATE, 1024, 7)
        });
        std::iter::from_fn(|| one.guest.receive())
            .map(|(header, _)| header.len)
            .sum::<u32>()
    };
    assert_eq!(update(1000), 1000);
    // Backwards, past what was sent, and around the world.
    for fwd_cnt in [999, 0, sent + 1001, u32::MAX, 1 << 31] {
        assert_eq!(update(fwd_cnt), 0, "fwd_cnt {fwd_cnt}");
    }
    assert_eq!(update(1500), 500);
    one.assert_witness();
}

#[test]
fn a_burst_in_one_direction_arrives_while_the_other_is_blocked() {
    let burst = pattern(240 * 1024);
    // The guest takes nothing and sends much.
    let guest = Guest::new();
    let mut listener = guest.host.listen(1024).unwrap();
    let mut stream = guest.connect_by(
        &mut listener,
        Header {
            buf_alloc: 0,
            ..Guest::header(OP_REQUEST, 1024, 7)
        },
    );
    write(&mut stream, &burst).unwrap();
    assert_eq!(guest.ops(), [OP_CREDIT_REQUEST]);
    for chunk in burst.chunks(MAX_PAYLOAD as usize) {
        guest.data(1024, 7, chunk);
    }
    assert_eq!(read(&mut stream, burst.len()).unwrap(), burst);
    // The host reads nothing and sends much.
    let mut one = One::new();
    for chunk in burst.chunks(MAX_PAYLOAD as usize) {
        one.guest.data(1024, 7, chunk);
    }
    write(&mut one.stream, &burst).unwrap();
    let mut got = Vec::new();
    while let Some((_, payload)) = one.guest.receive() {
        got.extend(payload);
    }
    assert_eq!(got, burst);
    one.assert_witness();
}

// ----- endings -----

#[test]
fn the_guests_half_close_ends_the_reader_and_not_the_writer() {
    let mut one = One::new();
    let (alarm, waker) = alarm();
    assert!(try_read(&mut one.stream, 1, &waker).is_none());
    one.guest.data(1024, 7, b"bye");
    one.guest.shutdown(1024, 7, SHUTDOWN_SEND);
    assert_eq!(alarm.count(), 1);
    assert_eq!(read(&mut one.stream, 99).unwrap(), b"bye");
    assert_eq!(read(&mut one.stream, 99).unwrap(), b"");
    assert_eq!(read(&mut one.stream, 99).unwrap(), b"");
    write(&mut one.stream, b"answer").unwrap();
    assert_eq!(one.guest.receive().unwrap().1, b"answer");
    // Bits that are clear in a later packet take nothing back.
    one.guest.shutdown(1024, 7, 0);
    assert_eq!(read(&mut one.stream, 99).unwrap(), b"");
    // The other half makes it whole.
    one.guest.shutdown(1024, 7, SHUTDOWN_RECEIVE);
    assert_eq!(one.guest.ops(), [OP_RST]);
    assert_eq!(read(&mut one.stream, 99).unwrap(), b"");
    assert_eq!(kind(write(&mut one.stream, b"x")), BrokenPipe);
    one.assert_witness();
}

#[test]
fn our_half_close_follows_the_last_byte_and_leaves_the_reader() {
    let mut one = One::new();
    write(&mut one.stream, &pattern(5000)).unwrap();
    half_close(&mut one.stream);
    assert_eq!(kind(write(&mut one.stream, b"x")), BrokenPipe);
    assert_eq!(one.guest.receive().unwrap().0.op, OP_RW);
    assert_eq!(one.guest.receive().unwrap().0.op, OP_RW);
    let (shutdown, _) = one.guest.receive().unwrap();
    assert_eq!((shutdown.op, shutdown.flags), (OP_SHUTDOWN, SHUTDOWN_SEND));
    half_close(&mut one.stream);
    assert_eq!(one.guest.ops(), NOTHING);
    one.guest.data(1024, 7, b"heard");
    assert_eq!(read(&mut one.stream, 99).unwrap(), b"heard");
    drop(one.stream);
    let (shutdown, _) = one.guest.receive().unwrap();
    assert_eq!((shutdown.op, shutdown.flags), (OP_SHUTDOWN, SHUTDOWN_BOTH));
    one.guest.op(OP_RST, 1024, 7);
    assert_eq!(one.guest.host.connections(), 1);
    assert_eq!(one.guest.ops(), NOTHING);
}

#[test]
fn a_guest_that_takes_no_more_breaks_the_pipe_and_what_was_buffered_is_dropped() {
    let mut one = One::new();
    let (alarm, waker) = alarm();
    while try_write(&mut one.stream, &pattern(4096), &waker).is_some() {}
    one.guest.shutdown(1024, 7, SHUTDOWN_RECEIVE);
    assert_eq!(alarm.count(), 1);
    assert_eq!(kind(write(&mut one.stream, b"x")), BrokenPipe);
    assert_eq!(one.guest.ops(), NOTHING);
    one.guest.data(1024, 7, b"still");
    assert_eq!(read(&mut one.stream, 99).unwrap(), b"still");
    one.assert_witness();
}

#[test]
fn a_full_shutdown_is_answered_with_rst_and_the_data_before_it_can_be_read() {
    let mut one = One::new();
    one.guest.data(1024, 7, b"all of it");
    one.guest.shutdown(1024, 7, SHUTDOWN_BOTH);
    assert_eq!(one.guest.ops(), [OP_RST]);
    assert_eq!(kind(write(&mut one.stream, b"x")), BrokenPipe);
    assert_eq!(read(&mut one.stream, 4).unwrap(), b"all ");
    assert_eq!(read(&mut one.stream, 99).unwrap(), b"of it");
    assert_eq!(read(&mut one.stream, 99).unwrap(), b"");
    drop(one.stream);
    assert_eq!(one.guest.ops(), NOTHING);
    assert_eq!(one.guest.host.connections(), 1);
}

#[test]
fn an_rst_after_a_shutdown_is_an_end_and_without_one_an_error() {
    let mut one = One::new();
    one.guest.data(1024, 7, b"data");
    one.guest.shutdown(1024, 7, SHUTDOWN_SEND);
    one.guest.op(OP_RST, 1024, 7);
    assert_eq!(read(&mut one.stream, 99).unwrap(), b"data");
    assert_eq!(read(&mut one.stream, 99).unwrap(), b"");

    let mut one = One::new();
    one.guest.data(1024, 7, b"data");
    one.guest.op(OP_RST, 1024, 7);
    assert_eq!(read(&mut one.stream, 99).unwrap(), b"data");
    assert_eq!(kind(read(&mut one.stream, 99)), ConnectionReset);
    assert_eq!(one.guest.ops(), NOTHING);
    one.assert_witness();
}

#[test]
fn a_guest_that_connects_speaks_and_leaves_before_it_is_accepted_is_still_heard() {
    let mut one = One::new();
    one.guest.op(OP_REQUEST, 1024, 9);
    assert_eq!(one.guest.ops(), [OP_RESPONSE]);
    one.guest.data(1024, 9, b"quick");
    one.guest.shutdown(1024, 9, SHUTDOWN_BOTH);
    assert_eq!(one.guest.ops(), [OP_RST]);
    let mut stream = ready(one.listener.accept()).unwrap();
    assert_eq!(read(&mut stream, 99).unwrap(), b"quick");
    assert_eq!(read(&mut stream, 99).unwrap(), b"");
    drop(stream);
    assert_eq!(one.guest.host.connections(), 2);
    one.assert_witness();
}
