//! Random guests against random hosts: nothing panics, and the table keeps what it promises
//! after every step.

use proptest::prelude::*;

use super::super::packet::{MAX_PAYLOAD, SHUTDOWN_BOTH};
use super::*;

#[derive(Debug, Clone)]
enum Action {
    Packet(Header, usize),
    Fetch(u32),
    Accept(bool),
    Connect(u32),
    PollConnect,
    Read(usize, usize),
    Write(usize, usize),
    Shutdown(usize),
    Drop(usize),
    Relisten,
    Reset,
}

fn counter() -> impl Strategy<Value = u32> {
    prop_oneof![
        Just(0),
        Just(BUF_ALLOC),
        0..BUF_ALLOC * 2,
        Just(u32::MAX),
        any::<u32>(),
    ]
}

fn header() -> impl Strategy<Value = (Header, usize)> {
    let cids = prop_oneof![20 => Just((GUEST_CID, HOST_CID)), 1 => any::<(u64, u64)>()];
    // The host's connect ports begin at 2^30.
    let host_ports = prop_oneof![4 => 1024..1026u32, 2 => (1 << 30)..(1 << 30) + 6u32];
    let len = prop_oneof![
        0..200u32,
        Just(MAX_PAYLOAD),
        0..MAX_PAYLOAD + 2,
        any::<u32>()
    ];
    let there = prop_oneof![8 => Just(None), 1 => (0..70_000usize).prop_map(Some)];
    (
        (cids, host_ports, 0..4u32, len, there),
        (
            prop_oneof![30 => Just(TYPE_STREAM), 1 => any::<u16>()],
            prop_oneof![
                6 => Just(OP_RW),
                3 => Just(OP_REQUEST),
                3 => Just(OP_RESPONSE),
                20 => 1..8u16,
                1 => any::<u16>(),
            ],
            prop_oneof![0..=SHUTDOWN_BOTH, any::<u32>()],
            counter(),
            counter(),
        ),
    )
        .prop_map(|((cids, dst_port, src_port, len, there), rest)| {
            let (kind, op, flags, buf_alloc, fwd_cnt) = rest;
            let header = Header {
                src_cid: cids.0,
                dst_cid: cids.1,
                src_port,
                dst_port,
                len,
                kind,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            };
            let there = there.unwrap_or(len.min(MAX_PAYLOAD) as usize);
            (header, there)
        })
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        12 => header().prop_map(|(header, there)| Action::Packet(header, there)),
        4 => (1..70_000u32).prop_map(Action::Fetch),
        2 => any::<bool>().prop_map(Action::Accept),
        2 => (0..4u32).prop_map(Action::Connect),
        2 => Just(Action::PollConnect),
        3 => (0..8usize, 0..100_000usize).prop_map(|(i, n)| Action::Read(i, n)),
        3 => (0..8usize, 0..300_000usize).prop_map(|(i, n)| Action::Write(i, n)),
        1 => (0..8usize).prop_map(Action::Shutdown),
        1 => (0..8usize).prop_map(Action::Drop),
        1 => Just(Action::Relisten),
        1 => Just(Action::Reset),
    ]
}

type Connect = Pin<Box<dyn Future<Output = Result<VsockStream, Error>>>>;

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn random_guests_break_nothing(actions in prop::collection::vec(action(), 1..250)) {
        let guest = Guest::new();
        let mut listeners: Vec<_> =
            (1024..1026).map(|port| guest.host.listen(port).unwrap()).collect();
        let mut streams: Vec<VsockStream> = Vec::new();
        let mut connects: Vec<Connect> = Vec::new();
        let bytes = vec![7; 300_000];
        let waker = Waker::noop();
        let mut cx = Context::from_waker(waker);
        for action in actions {
            match action {
                Action::Packet(header, there) => guest.send_with(header, &bytes[..there]),
                Action::Fetch(room) => {
                    let fetched = guest.shared.with(|muxer| {
                        muxer.next_packet(room, |header, data| (header.len, data.concat().len()))
                    });
                    if let Some((len, there)) = fetched {
                        prop_assert_eq!(len as usize, there);
                        prop_assert!(len <= room && len <= MAX_PAYLOAD);
                    }
                }
                Action::Accept(second) => {
                    if let Poll::Ready(stream) =
                        listeners[usize::from(second)].poll_accept(&mut cx)
                    {
                        streams.push(stream.unwrap());
                    }
                }
                Action::Connect(port) => {
                    let host = guest.host.clone();
                    connects.push(Box::pin(async move { host.connect(port).await }));
                }
                Action::PollConnect => {
                    connects.retain_mut(|connect| match connect.as_mut().poll(&mut cx) {
                        Poll::Ready(Ok(stream)) => {
                            streams.push(stream);
                            false
                        }
                        Poll::Ready(Err(_)) => false,
                        Poll::Pending => true,
                    });
                }
                Action::Read(index, limit) => {
                    if let Some(stream) = streams.get_mut(index)
                        && let Some(Ok(data)) = try_read(stream, limit, waker)
                    {
                        prop_assert!(data.iter().all(|byte| *byte == 7));
                    }
                }
                Action::Write(index, len) => {
                    if let Some(stream) = streams.get_mut(index) {
                        let _ = try_write(stream, &bytes[..len], waker);
                    }
                }
                Action::Shutdown(index) => {
                    if let Some(stream) = streams.get_mut(index) {
                        half_close(stream);
                    }
                }
                Action::Drop(index) => {
                    if index < streams.len() {
                        streams.remove(index);
                    } else {
                        connects.pop();
                    }
                }
                Action::Relisten => {
                    listeners.remove(0);
                    listeners.insert(0, guest.host.listen(1024).unwrap());
                }
                Action::Reset => guest.shared.with(|muxer| muxer.cut_all()),
            }
            guest.check();
        }
        // Whatever happened, the host can end it and nothing is left.
        drop((streams, connects, listeners));
        guest.check();
        while guest.receive().is_some() {}
        guest.host.end();
        prop_assert_eq!(guest.host.connections(), 0);
    }
}
