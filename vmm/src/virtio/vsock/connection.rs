//! The state machine of one connection. It moves no packet by itself: the muxer
//! feeds it what the guest sent and asks it for what is to be sent.
//!
//! # Credit (virtio 1.3 section 5.10.6.3)
//! Each side tells in every header how much it can hold (`buf_alloc`) and how
//! much it has taken out so far (`fwd_cnt`, modulo 2^32). With `tx_cnt` for the
//! bytes that a sender has sent so far, it may send
//!
//! ```text
//! peer_free = peer_buf_alloc - (tx_cnt - peer_fwd_cnt)
//! ```
//!
//! more bytes, and none when that is negative, which a peer that shrinks its
//! `buf_alloc` can make it. A `peer_fwd_cnt` that would go backwards or past
//! `tx_cnt` is ignored: at worst its author gets less. For the other direction
//! we hold the guest to the same formula with what *it was told*: a byte more
//! and the connection is reset, so our buffer never exceeds [`BUF_ALLOC`].
//!
//! An OP_CREDIT_UPDATE is due when the guest believes that less than half of our
//! buffer is free and the reader has since emptied the buffer or taken a quarter
//! of it; any other packet on the way makes it superfluous. When we run out of
//! credit with bytes in hand, one OP_CREDIT_REQUEST goes out for each grant that
//! was used up; never in a loop.
//!
//! # Ending
//! Each direction ends by itself. Our half-close (`SHUTDOWN_SEND`) goes out after
//! the last buffered byte. A stream that is dropped says `SHUTDOWN_RECEIVE` at
//! once and drops what arrives, still sends what it has buffered, as slowly as
//! the guest's credit lets it, then says `SHUTDOWN_SEND`, and is
//! [`Phase::Closing`] until the guest's RST. A guest that has shut down both
//! directions is answered with RST at once; what it sent before stays readable.

use std::task::Waker;

use super::packet::{
    HOST_CID, Header, MAX_PAYLOAD, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE,
    OP_RST, OP_RW, OP_SHUTDOWN, Payload, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
    TYPE_STREAM,
};
use super::phase::{Cause, Phase, Step};
use super::ring::ByteRing;

/// Bytes that we hold for the host's reader of one connection; the guest may send as much unread.
pub const BUF_ALLOC: u32 = 256 * 1024;
/// Bytes that a host's writer may have unsent on one connection.
pub const TX_BUFFER: usize = 256 * 1024;
/// Room that must be free before a writer that waits is woken: one wake for many packets.
const WRITER_LOW_WATER: usize = TX_BUFFER / 2;

/// Wakers that a change under the muxer's lock has freed, for after the lock.
///
/// Waking and dropping a waker can run any code, even a stream's drop, which takes the lock.
#[derive(Debug, Default)]
pub struct Deferred {
    /// To be woken.
    pub wake: Vec<Waker>,
    /// To be dropped.
    pub discard: Vec<Waker>,
}

impl Deferred {
    /// Wakes who waits in the slot, if anyone.
    pub fn wake(&mut self, slot: &mut Option<Waker>) {
        self.wake.extend(slot.take());
    }

    /// Forgets who waits in the slot.
    pub fn discard(&mut self, slot: &mut Option<Waker>) {
        self.discard.extend(slot.take());
    }

    /// Lets `waker` wait in the slot.
    pub fn register(&mut self, slot: &mut Option<Waker>, waker: &Waker) {
        if slot.as_ref().is_none_or(|old| !old.will_wake(waker)) {
            self.discard.extend(slot.replace(waker.clone()));
        }
    }
}

/// What the muxer has to do with the connection after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It lives on.
    Keep,
    /// It is over, and the guest knows.
    Forget,
    /// It is over, and the guest is to be told by OP_RST.
    Reset,
}

/// Whether the guest has been asked for credit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CreditRequest {
    Idle,
    Due,
    Sent,
}

/// What a reader or a writer finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// So many bytes went over; 0 is the end for a reader.
    Moved(usize),
    /// Nothing yet.
    Wait,
    /// The other side takes no more, or we said that we send no more.
    Broken,
    /// The connection was cut.
    Cut(Cause),
}

/// One connection. Counters wrap, as those of the protocol do.
#[derive(Debug)]
pub struct Connection {
    /// Port of the host's side.
    pub host_port: u32,
    /// Port of the guest's side.
    pub guest_port: u32,
    guest_cid: u64,
    phase: Phase,

    /// Received, not yet read.
    rx: ByteRing,
    /// Bytes received so far.
    rx_cnt: u32,
    /// Bytes taken out of `rx` so far.
    fwd_cnt: u32,
    /// The `fwd_cnt` that the guest was told last.
    told_fwd_cnt: u32,
    credit_update: bool,

    /// Written, not yet sent.
    tx: ByteRing,
    /// Bytes sent so far.
    tx_cnt: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    credit_request: CreditRequest,

    /// SHUTDOWN flags that the guest has sent.
    peer_shut: u32,
    /// SHUTDOWN flags that are to be sent, and those sent of them.
    want_shut: u32,
    sent_shut: u32,

    reader: Option<Waker>,
    /// A writer, or who waits for the connection to be made.
    writer: Option<Waker>,
}

impl Connection {
    /// A connection that the host opens.
    pub fn outgoing(guest_cid: u64, host_port: u32, guest_port: u32) -> Self {
        Self {
            host_port,
            guest_port,
            guest_cid,
            phase: Phase::Requesting,
            rx: ByteRing::new(BUF_ALLOC as usize),
            rx_cnt: 0,
            fwd_cnt: 0,
            told_fwd_cnt: 0,
            credit_update: false,
            tx: ByteRing::new(TX_BUFFER),
            tx_cnt: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            credit_request: CreditRequest::Idle,
            peer_shut: 0,
            want_shut: 0,
            sent_shut: 0,
            reader: None,
            writer: None,
        }
    }

    /// A connection that the guest opens with this OP_REQUEST.
    pub fn incoming(request: &Header) -> Self {
        let mut connection = Self::outgoing(request.src_cid, request.dst_port, request.src_port);
        connection.phase = Phase::Accepting;
        connection.take_credit(request);
        connection
    }

    /// Where it is in its life.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Bytes that wait for the reader.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn unread(&self) -> usize {
        self.rx.len()
    }

    /// Bytes that wait for the guest's credit or buffers.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn unsent(&self) -> usize {
        self.tx.len()
    }

    /// Host memory that its buffers hold, in bytes.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn memory(&self) -> usize {
        self.rx.capacity() + self.tx.capacity()
    }

    /// Bytes that the guest lets us send now.
    pub fn peer_free(&self) -> u32 {
        self.peer_buf_alloc
            .saturating_sub(self.tx_cnt.wrapping_sub(self.peer_fwd_cnt))
    }

    /// Takes a packet of the guest's. For OP_RW the caller has checked that `payload` holds `len`
    /// bytes and that these are no more than [`MAX_PAYLOAD`].
    pub fn receive(
        &mut self,
        header: &Header,
        payload: &mut dyn Payload,
        later: &mut Deferred,
    ) -> Verdict {
        let peer_shut = self.peer_shut | (header.flags & SHUTDOWN_BOTH);
        let step = match header.op {
            OP_REQUEST => Step::GotRequest,
            OP_RESPONSE => Step::GotResponse,
            OP_RST => Step::GotReset,
            OP_SHUTDOWN if peer_shut == SHUTDOWN_BOTH => Step::GotFullShutdown,
            OP_SHUTDOWN => Step::GotShutdown,
            OP_RW => Step::GotData,
            OP_CREDIT_UPDATE | OP_CREDIT_REQUEST => Step::GotCredit,
            _ => return self.violate(later),
        };
        let Ok(phase) = self.phase.after(step) else {
            return self.violate(later);
        };
        self.take_credit(header);
        match step {
            Step::GotResponse => {
                self.phase = phase;
                later.wake(&mut self.writer);
            }
            Step::GotReset => {
                let finished =
                    phase == Phase::Closed(Cause::Reset) && self.peer_shut & SHUTDOWN_SEND != 0;
                self.finish(
                    if finished {
                        Phase::Closed(Cause::Finished)
                    } else {
                        phase
                    },
                    later,
                );
                return Verdict::Forget;
            }
            Step::GotFullShutdown => {
                self.peer_shut = peer_shut;
                self.finish(phase, later);
                return Verdict::Reset;
            }
            Step::GotShutdown => {
                self.peer_shut = peer_shut;
                if peer_shut & SHUTDOWN_SEND != 0 {
                    later.wake(&mut self.reader);
                }
                if peer_shut & SHUTDOWN_RECEIVE != 0 {
                    self.tx.release();
                    self.credit_request = CreditRequest::Idle;
                    later.wake(&mut self.writer);
                }
            }
            Step::GotData => return self.receive_data(header.len, payload, later),
            _ => {
                if header.op == OP_CREDIT_REQUEST && self.phase != Phase::Closing {
                    self.credit_update = true;
                }
            }
        }
        Verdict::Keep
    }

    fn receive_data(
        &mut self,
        len: u32,
        payload: &mut dyn Payload,
        later: &mut Deferred,
    ) -> Verdict {
        let unacknowledged = self.rx_cnt.wrapping_sub(self.told_fwd_cnt);
        let within = unacknowledged
            .checked_add(len)
            .is_some_and(|sum| sum <= BUF_ALLOC);
        if self.peer_shut & SHUTDOWN_SEND != 0 || !within {
            return self.violate(later);
        }
        self.rx_cnt = self.rx_cnt.wrapping_add(len);
        if self.want_shut & SHUTDOWN_RECEIVE != 0 {
            // No reader any more; the guest may still be in the middle of what it was saying.
            self.fwd_cnt = self.fwd_cnt.wrapping_add(len);
            self.note_taken();
        } else if len > 0 {
            self.rx.push_with(len as usize, |dst| payload.fill(dst));
            later.wake(&mut self.reader);
        }
        Verdict::Keep
    }

    fn take_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        let in_flight = self.tx_cnt.wrapping_sub(self.peer_fwd_cnt);
        if self.tx_cnt.wrapping_sub(header.fwd_cnt) <= in_flight {
            self.peer_fwd_cnt = header.fwd_cnt;
        }
        if self.peer_free() > 0 {
            self.credit_request = CreditRequest::Idle;
        }
    }

    /// Notes that the buffer has more room, for the guest to hear of when it is worth a packet.
    fn note_taken(&mut self) {
        let untold = self.fwd_cnt.wrapping_sub(self.told_fwd_cnt);
        let believed_used = self.rx_cnt.wrapping_sub(self.told_fwd_cnt);
        if self.phase != Phase::Closing
            && believed_used > BUF_ALLOC / 2
            && (self.rx.is_empty() || untold >= BUF_ALLOC / 4)
        {
            self.credit_update = true;
        }
    }

    /// SHUTDOWN flags that can go out now: that of sending waits for the bytes before it.
    fn due_shut(&self) -> u32 {
        let due = self.want_shut & !self.sent_shut;
        if self.tx.is_empty() {
            due
        } else {
            due & !SHUTDOWN_SEND
        }
    }

    /// Whether there is a packet to send.
    pub fn has_packet(&self) -> bool {
        match self.phase {
            Phase::Requesting | Phase::Accepting => true,
            Phase::Established => {
                self.due_shut() != 0
                    || (!self.tx.is_empty() && self.peer_free() > 0)
                    || self.credit_update
                    || self.credit_request == CreditRequest::Due
            }
            Phase::Requested | Phase::Closing | Phase::Closed(_) => false,
        }
    }

    /// Hands the next packet, with at most `room` (1 or more) bytes of payload, to `sink`.
    pub fn next_packet<R>(
        &mut self,
        room: u32,
        later: &mut Deferred,
        sink: impl FnOnce(&Header, [&[u8]; 2]) -> R,
    ) -> Option<R> {
        if !self.has_packet() {
            return None;
        }
        let mut header = Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            kind: TYPE_STREAM,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        };
        self.told_fwd_cnt = self.fwd_cnt;
        self.credit_update = false;
        let free = self.peer_free();
        let result = match self.phase {
            Phase::Requesting => {
                header.op = OP_REQUEST;
                self.pass(Step::RequestSent);
                sink(&header, [&[], &[]])
            }
            Phase::Accepting => {
                header.op = OP_RESPONSE;
                self.pass(Step::ResponseSent);
                sink(&header, [&[], &[]])
            }
            _ if self.due_shut() != 0 => {
                header.op = OP_SHUTDOWN;
                self.sent_shut |= self.due_shut();
                header.flags = self.sent_shut;
                if self.sent_shut == SHUTDOWN_BOTH {
                    self.pass(Step::CloseSent);
                    self.tx.release();
                }
                sink(&header, [&[], &[]])
            }
            _ if !self.tx.is_empty() && free > 0 => {
                header.op = OP_RW;
                let most = free.min(room).min(MAX_PAYLOAD);
                let count = self.tx.len().min(most as usize);
                header.len = count as u32; // at most MAX_PAYLOAD
                let result = sink(&header, self.tx.front(count));
                self.tx.consume(count);
                self.tx_cnt = self.tx_cnt.wrapping_add(header.len);
                self.ask_for_credit();
                if self.tx.free() >= WRITER_LOW_WATER {
                    later.wake(&mut self.writer);
                }
                result
            }
            _ if self.credit_request == CreditRequest::Due => {
                header.op = OP_CREDIT_REQUEST;
                self.credit_request = CreditRequest::Sent;
                sink(&header, [&[], &[]])
            }
            _ => {
                header.op = OP_CREDIT_UPDATE;
                sink(&header, [&[], &[]])
            }
        };
        Some(result)
    }

    fn ask_for_credit(&mut self) {
        if self.credit_request == CreditRequest::Idle
            && !self.tx.is_empty()
            && self.peer_free() == 0
        {
            self.credit_request = CreditRequest::Due;
        }
    }

    /// Gives up to `limit` received bytes to `take`.
    pub fn read(&mut self, limit: usize, mut take: impl FnMut(&[u8])) -> Progress {
        if self.rx.is_empty() {
            return match self.phase {
                Phase::Closed(Cause::Finished) => Progress::Moved(0),
                Phase::Closed(cause) => Progress::Cut(cause),
                _ if self.peer_shut & SHUTDOWN_SEND != 0 => Progress::Moved(0),
                _ => Progress::Wait,
            };
        }
        let parts = self.rx.front(limit);
        let count = parts[0].len() + parts[1].len();
        parts
            .into_iter()
            .filter(|part| !part.is_empty())
            .for_each(&mut take);
        self.rx.consume(count);
        self.fwd_cnt = self.fwd_cnt.wrapping_add(count as u32); // at most BUF_ALLOC
        self.note_taken();
        Progress::Moved(count)
    }

    /// Takes bytes to send, as many as fit; never waits for room when it took any.
    pub fn write<'b>(&mut self, buffers: impl IntoIterator<Item = &'b [u8]>) -> Progress {
        match self.phase {
            Phase::Closed(Cause::Finished) => return Progress::Broken,
            Phase::Closed(cause) => return Progress::Cut(cause),
            _ if self.want_shut & SHUTDOWN_SEND != 0 => return Progress::Broken,
            _ if self.peer_shut & SHUTDOWN_RECEIVE != 0 => return Progress::Broken,
            _ => {}
        }
        let mut moved = 0;
        let mut wanted = false;
        for buffer in buffers.into_iter().filter(|buffer| !buffer.is_empty()) {
            wanted = true;
            let count = self.tx.push(buffer);
            moved += count;
            if count < buffer.len() {
                break;
            }
        }
        if self.phase == Phase::Established {
            self.ask_for_credit();
        }
        if wanted && moved == 0 {
            Progress::Wait
        } else {
            Progress::Moved(moved)
        }
    }

    /// Lets a reader wait for bytes or the end.
    pub fn wait_readable(&mut self, waker: &Waker, later: &mut Deferred) {
        later.register(&mut self.reader, waker);
    }

    /// Lets a writer wait for room, or a connector for the answer.
    pub fn wait_writable(&mut self, waker: &Waker, later: &mut Deferred) {
        later.register(&mut self.writer, waker);
    }

    /// Half-closes: no more is written, what was written still goes out.
    pub fn shut_down_sending(&mut self) {
        self.want_shut |= SHUTDOWN_SEND;
    }

    /// The host has dropped its end.
    pub fn close(&mut self, later: &mut Deferred) -> Verdict {
        self.want_shut = SHUTDOWN_BOTH;
        self.fwd_cnt = self.rx_cnt;
        self.rx.release();
        later.discard(&mut self.reader);
        later.discard(&mut self.writer);
        match self.phase {
            Phase::Requesting | Phase::Closed(_) => Verdict::Forget,
            Phase::Requested => Verdict::Reset,
            Phase::Accepting | Phase::Established | Phase::Closing => {
                self.note_taken();
                Verdict::Keep
            }
        }
    }

    /// Ends it from outside, whatever its phase.
    pub fn stop(&mut self, cause: Cause, later: &mut Deferred) {
        if let Ok(phase) = self.phase.after(Step::Stop(cause)) {
            self.finish(phase, later);
        }
    }

    /// Takes a step of our own, which its phase always knows.
    fn pass(&mut self, step: Step) {
        match self.phase.after(step) {
            Ok(phase) => self.phase = phase,
            Err(error) => debug_assert!(false, "{error}"),
        }
    }

    fn violate(&mut self, later: &mut Deferred) -> Verdict {
        self.stop(Cause::Violation, later);
        Verdict::Reset
    }

    fn finish(&mut self, phase: Phase, later: &mut Deferred) {
        self.phase = phase;
        self.tx.release();
        later.wake(&mut self.reader);
        later.wake(&mut self.writer);
    }
}

#[cfg(test)]
mod tests {
    use super::super::packet::{OP_CREDIT_REQUEST, OP_CREDIT_UPDATE};
    use super::*;

    /// An established connection whose counters are all at `start`.
    fn established(start: u32) -> Connection {
        let mut connection = Connection::outgoing(3, 1, 2);
        connection.phase = Phase::Established;
        connection.peer_buf_alloc = 1000;
        for counter in [
            &mut connection.rx_cnt,
            &mut connection.fwd_cnt,
            &mut connection.told_fwd_cnt,
            &mut connection.tx_cnt,
            &mut connection.peer_fwd_cnt,
        ] {
            *counter = start;
        }
        connection
    }

    fn credit(buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header {
            op: OP_CREDIT_UPDATE,
            buf_alloc,
            fwd_cnt,
            ..Header::default()
        }
    }

    #[test]
    fn counters_wrap_in_both_directions() {
        let start = u32::MAX - 400;
        let mut connection = established(start);
        let mut later = Deferred::default();
        assert_eq!(connection.write([&[7u8; 5000][..]]), Progress::Moved(5000));
        let sent = |connection: &mut Connection, later: &mut Deferred| {
            connection.next_packet(4096, later, |header, _| (header.op, header.len))
        };
        assert_eq!(sent(&mut connection, &mut later), Some((OP_RW, 1000)));
        assert_eq!(connection.tx_cnt, 599);
        assert_eq!(
            sent(&mut connection, &mut later),
            Some((OP_CREDIT_REQUEST, 0))
        );
        connection.receive(
            &credit(1000, start.wrapping_add(700)),
            &mut &[][..],
            &mut later,
        );
        assert_eq!(sent(&mut connection, &mut later), Some((OP_RW, 700)));
        assert_eq!(
            sent(&mut connection, &mut later),
            Some((OP_CREDIT_REQUEST, 0))
        );

        let mut data = Header {
            op: OP_RW,
            len: 60_000,
            buf_alloc: 1000,
            ..Header::default()
        };
        data.fwd_cnt = connection.peer_fwd_cnt;
        let payload = vec![1; 60_000];
        for _ in 0..50 {
            for _ in 0..4 {
                let verdict = connection.receive(&data, &mut &payload[..], &mut later);
                assert_eq!(verdict, Verdict::Keep);
            }
            assert_eq!(connection.read(1 << 20, |_| {}), Progress::Moved(240_000));
            let update = connection
                .next_packet(1, &mut later, |header, _| *header)
                .unwrap();
            assert_eq!(
                (update.op, update.fwd_cnt),
                (OP_CREDIT_UPDATE, connection.rx_cnt)
            );
        }
        assert!(connection.rx_cnt < start);
    }

    #[test]
    fn a_peer_that_shrinks_its_buffer_below_what_is_in_flight_has_no_room() {
        let mut connection = established(0);
        let mut later = Deferred::default();
        connection.write([&[7u8; 800][..]]);
        connection.next_packet(4096, &mut later, |_, _| ());
        assert_eq!(connection.peer_free(), 200);
        for (buf_alloc, free) in [
            (799, 0),
            (800, 0),
            (801, 1),
            (0, 0),
            (u32::MAX, u32::MAX - 800),
        ] {
            connection.receive(&credit(buf_alloc, 0), &mut &[][..], &mut later);
            assert_eq!(connection.peer_free(), free);
        }
    }

    #[test]
    fn shrinking_and_growing_again_makes_no_endless_requests() {
        let mut connection = established(0);
        let mut later = Deferred::default();
        connection.write([&[7u8; 1001][..]]);
        let mut requests = 0;
        for round in 0..100 {
            while let Some(op) = connection.next_packet(4096, &mut later, |header, _| header.op) {
                requests += usize::from(op == OP_CREDIT_REQUEST);
            }
            connection.receive(&credit(round % 2, 0), &mut &[][..], &mut later);
        }
        assert_eq!(requests, 1);
    }
}
