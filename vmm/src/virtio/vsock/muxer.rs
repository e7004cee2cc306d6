//! The table of connections: routes the guest's packets to them, picks the next
//! packet for the guest, and keeps listeners and ports.
//!
//! It is plain state behind one mutex (see `Shared` in `stream`) and never
//! blocks. All that a guest can make it hold is bounded: connections by
//! [`MAX_CONNECTIONS`], those not accepted yet by [`BACKLOG`] a listener,
//! answers to packets that belong to no connection by [`MAX_REPLIES`], bytes by
//! the buffers of each connection.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::task::Waker;

use super::Error;
use super::connection::{Connection, Deferred, Progress, Verdict};
use super::packet::{
    HOST_CID, Header, MAX_PAYLOAD, OP_REQUEST, OP_RST, OP_RW, Payload, TYPE_STREAM,
};
use super::phase::{Cause, Phase};

/// Connections at once, those included that are over but that the host still holds.
pub const MAX_CONNECTIONS: usize = 1024;
/// Connections of one listener that wait to be accepted; one more is refused.
pub const BACKLOG: usize = 128;
/// RSTs that wait for a receive buffer; further ones are dropped and counted.
pub const MAX_REPLIES: usize = 256;

/// First port that the host connects from; its listeners' fresh ports end below.
const FIRST_CONNECT_PORT: u32 = 1 << 30;
/// First port of [`Muxer::listen_fresh`]: above what services use.
const FIRST_FRESH_PORT: u32 = 1 << 16;
/// VMADDR_PORT_ANY, which is no port.
const PORT_ANY: u32 = u32::MAX;

/// Names a connection for as long as the process lives; never used twice.
pub type ConnectionId = u64;

/// Host port and guest port of a connection that is not over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Ports {
    host: u32,
    guest: u32,
}

/// Who holds the host's end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    /// The listener on the host port, until it is accepted.
    Listener,
    /// A stream, or a connect that is under way.
    Host,
    /// Nobody: it flushes, or waits for the guest's RST.
    Nobody,
}

#[derive(Debug)]
struct Entrant {
    connection: Connection,
    holder: Holder,
    /// Whether its id is in `ready`.
    queued: bool,
}

#[derive(Debug, Default)]
struct Listener {
    backlog: VecDeque<ConnectionId>,
    acceptor: Option<Waker>,
}

/// What the device waits for before it takes packets again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceState {
    /// The guest's driver is not there; packets wait.
    Inactive,
    /// At work, or about to be, or waiting for receive buffers, of which the guest's kick tells.
    Running,
    /// For a packet: whoever makes one rings the doorbell.
    NeedsPackets,
}

/// What the guest did that it should not have, for logs and tests.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counters {
    /// Packets with a CID that is not the guest's or the host's; dropped.
    pub wrong_cid: u64,
    /// Connections reset because the guest broke the protocol.
    pub violations: u64,
    /// Connections refused: no listener, backlog or table full.
    pub refused: u64,
    /// RSTs not sent because too many waited already.
    pub dropped_replies: u64,
    /// Descriptor chains that held no packet.
    pub bad_chains: u64,
}

/// Violations that are logged as warnings; a guest does not fill the host's log.
const LOUD_VIOLATIONS: u64 = 4;

fn log_violation(ports: Ports, count: u64) {
    let Ports { host, guest } = ports;
    if count <= LOUD_VIOLATIONS {
        tracing::warn!(
            host,
            guest,
            "the guest broke the vsock protocol; its connection is reset"
        );
    } else {
        tracing::debug!(host, guest, count, "the guest broke the vsock protocol");
    }
}

/// The muxer.
#[derive(Debug)]
pub struct Muxer {
    guest_cid: u64,
    connections: HashMap<ConnectionId, Entrant>,
    /// Those that are not over, by ports.
    live: HashMap<Ports, ConnectionId>,
    /// Ids of connections with something to send, each once, served in turn.
    ready: VecDeque<ConnectionId>,
    replies: VecDeque<Header>,
    listeners: HashMap<u32, Listener>,
    next_id: ConnectionId,
    next_connect_port: u32,
    next_fresh_port: u32,
    ended: bool,
    /// What the device waits for; kept here so that it changes under the lock.
    pub device: DeviceState,
    /// Set when the doorbell has to be rung after the lock.
    pub ring: bool,
    /// Wakers for after the lock.
    pub later: Deferred,
    /// Misdeeds of the guest.
    pub counters: Counters,
}

impl Muxer {
    /// An empty table for the guest with this CID.
    pub fn new(guest_cid: u64) -> Self {
        Self {
            guest_cid,
            connections: HashMap::new(),
            live: HashMap::new(),
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            listeners: HashMap::new(),
            next_id: 0,
            next_connect_port: FIRST_CONNECT_PORT,
            next_fresh_port: FIRST_FRESH_PORT,
            ended: false,
            device: DeviceState::Inactive,
            ring: false,
            later: Deferred::default(),
            counters: Counters::default(),
        }
    }

    // ----- the guest's side -----

    /// Takes one packet from the guest.
    pub fn receive(&mut self, header: &Header, payload: &mut dyn Payload) {
        if self.ended {
            return;
        }
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            self.counters.wrong_cid += 1;
            return;
        }
        if header.kind != TYPE_STREAM {
            return self.reply_reset(header);
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let malformed = header.op == OP_RW
            && (header.len > MAX_PAYLOAD || payload.len() < u64::from(header.len));
        let known = self.live.get(&ports).copied();
        match known {
            Some(id) if malformed => {
                self.update(id, |connection, later| {
                    connection.stop(Cause::Violation, later);
                    Verdict::Reset
                });
            }
            Some(id) if header.op == OP_REQUEST && self.phase(id) == Some(Phase::Closing) => {
                // The guest uses the ports again, so it is through with the old connection.
                self.update(id, |connection, later| {
                    connection.stop(Cause::Finished, later);
                    Verdict::Forget
                });
                self.accept(ports, header);
            }
            Some(id) => {
                self.update(id, |connection, later| {
                    connection.receive(header, payload, later)
                });
            }
            None if header.op == OP_REQUEST => self.accept(ports, header),
            None => self.reply_reset(header),
        }
    }

    /// Whether there is something for the guest. When not, the device is from now on told of it.
    pub fn has_packet(&mut self) -> bool {
        if self.replies.is_empty() && self.ready.is_empty() {
            self.device = DeviceState::NeedsPackets;
            return false;
        }
        true
    }

    /// Hands the next packet, with at most `room` (1 or more) bytes of payload, to `sink`.
    /// When there is none, the device is from now on told of one.
    pub fn next_packet<R>(
        &mut self,
        room: u32,
        sink: impl FnOnce(&Header, [&[u8]; 2]) -> R,
    ) -> Option<R> {
        if let Some(reset) = self.replies.pop_front() {
            return Some(sink(&reset, [&[], &[]]));
        }
        while let Some(id) = self.ready.pop_front() {
            let Some(entrant) = self.connections.get_mut(&id) else {
                continue;
            };
            entrant.queued = false;
            if !entrant.connection.has_packet() {
                continue;
            }
            let result = entrant.connection.next_packet(room, &mut self.later, sink);
            self.settle(id, Verdict::Keep);
            return result;
        }
        self.device = DeviceState::NeedsPackets;
        None
    }

    fn accept(&mut self, ports: Ports, request: &Header) {
        let full = self.connections.len() >= MAX_CONNECTIONS && !self.forget_closing();
        let Some(listener) = self.listeners.get_mut(&ports.host) else {
            return self.refuse(request);
        };
        if full || listener.backlog.len() >= BACKLOG {
            return self.refuse(request);
        }
        let id = self.next_id;
        self.next_id += 1;
        listener.backlog.push_back(id);
        self.later.wake(&mut listener.acceptor);
        self.insert(id, ports, Connection::incoming(request), Holder::Listener);
    }

    fn refuse(&mut self, request: &Header) {
        self.counters.refused += 1;
        self.reply_reset(request);
    }

    fn reply_reset(&mut self, header: &Header) {
        if header.op == OP_RST {
            return;
        }
        self.push_reply(header.reset());
    }

    fn push_reply(&mut self, reset: Header) {
        if self.replies.len() >= MAX_REPLIES {
            self.counters.dropped_replies += 1;
            return;
        }
        self.replies.push_back(reset);
        self.ring_if_wanted();
    }

    // ----- the table -----

    fn insert(&mut self, id: ConnectionId, ports: Ports, connection: Connection, holder: Holder) {
        self.live.insert(ports, id);
        self.connections.insert(
            id,
            Entrant {
                connection,
                holder,
                queued: false,
            },
        );
        self.settle(id, Verdict::Keep);
    }

    fn phase(&self, id: ConnectionId) -> Option<Phase> {
        self.connections
            .get(&id)
            .map(|entrant| entrant.connection.phase())
    }

    /// Changes a connection and does what follows from it.
    fn update(
        &mut self,
        id: ConnectionId,
        change: impl FnOnce(&mut Connection, &mut Deferred) -> Verdict,
    ) {
        let Some(entrant) = self.connections.get_mut(&id) else {
            return;
        };
        let verdict = change(&mut entrant.connection, &mut self.later);
        self.settle(id, verdict);
    }

    /// Brings the table in line with a connection that has changed.
    fn settle(&mut self, id: ConnectionId, verdict: Verdict) {
        let Some(entrant) = self.connections.get_mut(&id) else {
            return;
        };
        let connection = &entrant.connection;
        if verdict == Verdict::Keep {
            if connection.has_packet() && !entrant.queued {
                entrant.queued = true;
                self.ready.push_back(id);
                self.ring_if_wanted();
            }
            return;
        }
        let ports = Ports {
            host: connection.host_port,
            guest: connection.guest_port,
        };
        let phase = connection.phase();
        let holder = entrant.holder;
        if std::mem::take(&mut entrant.queued) {
            self.ready.retain(|ready| *ready != id);
        }
        let was_live = self.live.get(&ports) == Some(&id);
        if was_live {
            self.live.remove(&ports);
            if phase == Phase::Closed(Cause::Violation) {
                self.counters.violations += 1;
                log_violation(ports, self.counters.violations);
            }
        }
        if was_live && verdict == Verdict::Reset {
            self.push_reply(Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: ports.host,
                dst_port: ports.guest,
                kind: TYPE_STREAM,
                op: OP_RST,
                ..Header::default()
            });
        }
        let keep = match holder {
            Holder::Host => true,
            // What it said before it went is still to be heard.
            Holder::Listener => phase == Phase::Closed(Cause::Finished),
            Holder::Nobody => false,
        };
        if !keep {
            self.connections.remove(&id);
            if holder == Holder::Listener
                && let Some(listener) = self.listeners.get_mut(&ports.host)
            {
                listener.backlog.retain(|waiting| *waiting != id);
            }
        }
    }

    /// Makes room by giving up on one connection that only waits for the guest's RST.
    fn forget_closing(&mut self) -> bool {
        let closing = self
            .connections
            .iter()
            .filter(|(_, entrant)| entrant.connection.phase() == Phase::Closing)
            .map(|(id, _)| *id)
            .min();
        let Some(id) = closing else { return false };
        self.update(id, |connection, later| {
            connection.stop(Cause::Finished, later);
            Verdict::Reset
        });
        true
    }

    fn ring_if_wanted(&mut self) {
        if self.device == DeviceState::NeedsPackets {
            self.device = DeviceState::Running;
            self.ring = true;
        }
    }

    // ----- the host's side -----

    /// Opens a port for the guest to connect to.
    pub fn listen(&mut self, port: u32) -> Result<(), Error> {
        if self.ended {
            return Err(Error::Ended);
        }
        if port == PORT_ANY {
            return Err(Error::InvalidPort { port });
        }
        match self.listeners.entry(port) {
            Entry::Occupied(_) => Err(Error::PortInUse { port }),
            Entry::Vacant(vacant) => {
                vacant.insert(Listener::default());
                Ok(())
            }
        }
    }

    /// Opens a port that was not used for a long time; gives the port.
    pub fn listen_fresh(&mut self) -> Result<u32, Error> {
        // A span far larger than any table, so a free port is found soon.
        for _ in 0..=self.listeners.len() {
            let port = self.next_fresh_port;
            self.next_fresh_port = if port + 1 == FIRST_CONNECT_PORT {
                FIRST_FRESH_PORT
            } else {
                port + 1
            };
            match self.listen(port) {
                Ok(()) => return Ok(port),
                Err(Error::PortInUse { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::PortInUse {
            port: self.next_fresh_port,
        })
    }

    /// Closes a port and resets what was not accepted.
    pub fn unlisten(&mut self, port: u32) {
        let Some(mut listener) = self.listeners.remove(&port) else {
            return;
        };
        self.later.discard(&mut listener.acceptor);
        for id in listener.backlog {
            self.release(id, |connection, later| {
                let over = matches!(connection.phase(), Phase::Closed(_));
                connection.stop(Cause::Ended, later);
                if over {
                    Verdict::Forget
                } else {
                    Verdict::Reset
                }
            });
        }
    }

    /// Takes the next connection of a listener, or lets `waker` wait for it.
    pub fn poll_accept(
        &mut self,
        port: u32,
        waker: &Waker,
    ) -> Option<Result<(ConnectionId, u32), Error>> {
        let Some(listener) = self.listeners.get_mut(&port) else {
            return Some(Err(Error::Ended));
        };
        while let Some(id) = listener.backlog.pop_front() {
            if let Some(entrant) = self.connections.get_mut(&id) {
                entrant.holder = Holder::Host;
                return Some(Ok((id, entrant.connection.guest_port)));
            }
        }
        if self.ended {
            return Some(Err(Error::Ended));
        }
        self.later.register(&mut listener.acceptor, waker);
        None
    }

    /// Begins a connection to a port of the guest; gives its id and the host's port.
    pub fn connect(&mut self, guest_port: u32) -> Result<(ConnectionId, u32), Error> {
        if self.ended {
            return Err(Error::Ended);
        }
        if guest_port == PORT_ANY {
            return Err(Error::InvalidPort { port: guest_port });
        }
        if self.connections.len() >= MAX_CONNECTIONS && !self.forget_closing() {
            return Err(Error::TooManyConnections {
                limit: MAX_CONNECTIONS,
            });
        }
        // There are more ports than connections can be, so a free pair is found soon.
        let ports = loop {
            let host = self.next_connect_port;
            self.next_connect_port = if host + 1 == PORT_ANY {
                FIRST_CONNECT_PORT
            } else {
                host + 1
            };
            let ports = Ports {
                host,
                guest: guest_port,
            };
            if !self.live.contains_key(&ports) && !self.listeners.contains_key(&host) {
                break ports;
            }
        };
        let id = self.next_id;
        self.next_id += 1;
        let connection = Connection::outgoing(self.guest_cid, ports.host, guest_port);
        self.insert(id, ports, connection, Holder::Host);
        Ok((id, ports.host))
    }

    /// Tells how a [`Muxer::connect`] went, or lets `waker` wait for it.
    pub fn poll_connected(&mut self, id: ConnectionId, waker: &Waker) -> Option<Result<(), Cause>> {
        let Some(entrant) = self.connections.get_mut(&id) else {
            return Some(Err(Cause::Ended));
        };
        match entrant.connection.phase() {
            Phase::Requesting | Phase::Requested => {
                entrant.connection.wait_writable(waker, &mut self.later);
                None
            }
            Phase::Closed(cause) if cause != Cause::Finished => Some(Err(cause)),
            _ => Some(Ok(())),
        }
    }

    /// Reads for a stream, or lets `waker` wait.
    pub fn poll_read(
        &mut self,
        id: ConnectionId,
        limit: usize,
        waker: &Waker,
        take: impl FnMut(&[u8]),
    ) -> Progress {
        let Some(entrant) = self.connections.get_mut(&id) else {
            return Progress::Cut(Cause::Ended);
        };
        let progress = entrant.connection.read(limit, take);
        if progress == Progress::Wait {
            entrant.connection.wait_readable(waker, &mut self.later);
        }
        self.settle(id, Verdict::Keep);
        progress
    }

    /// Writes for a stream, or lets `waker` wait.
    pub fn poll_write<'b>(
        &mut self,
        id: ConnectionId,
        buffers: impl IntoIterator<Item = &'b [u8]>,
        waker: &Waker,
    ) -> Progress {
        let Some(entrant) = self.connections.get_mut(&id) else {
            return Progress::Cut(Cause::Ended);
        };
        let progress = entrant.connection.write(buffers);
        if progress == Progress::Wait {
            entrant.connection.wait_writable(waker, &mut self.later);
        }
        self.settle(id, Verdict::Keep);
        progress
    }

    /// Half-closes for a stream.
    pub fn shut_down_sending(&mut self, id: ConnectionId) {
        self.update(id, |connection, _| {
            connection.shut_down_sending();
            Verdict::Keep
        });
    }

    /// The stream is dropped: flush, then close.
    pub fn close(&mut self, id: ConnectionId) {
        self.release(id, Connection::close);
    }

    /// A connect is given up.
    pub fn abort(&mut self, id: ConnectionId) {
        self.release(id, |connection, later| {
            let verdict = connection.close(later);
            connection.stop(Cause::Ended, later);
            if verdict == Verdict::Keep {
                Verdict::Reset
            } else {
                verdict
            }
        });
    }

    fn release(
        &mut self,
        id: ConnectionId,
        change: impl FnOnce(&mut Connection, &mut Deferred) -> Verdict,
    ) {
        if let Some(entrant) = self.connections.get_mut(&id) {
            entrant.holder = Holder::Nobody;
        }
        self.update(id, change);
    }

    // ----- the device's side -----

    /// Cuts all connections: the guest has reset the device, or the VM has ended.
    pub fn cut_all(&mut self) {
        self.replies.clear();
        let ids: Vec<_> = self.connections.keys().copied().collect();
        for id in ids {
            self.update(id, |connection, later| {
                connection.stop(Cause::Ended, later);
                Verdict::Forget
            });
        }
    }

    /// Ends it all; nothing comes after.
    pub fn end(&mut self) {
        self.ended = true;
        self.device = DeviceState::Inactive;
        self.cut_all();
        for listener in self.listeners.values_mut() {
            self.later.wake(&mut listener.acceptor);
        }
    }

    /// Connections in the table.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Holds the table to what it promises.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn check(&self) {
        use super::connection::{BUF_ALLOC, TX_BUFFER};
        assert!(self.connections.len() <= MAX_CONNECTIONS);
        assert!(self.replies.len() <= MAX_REPLIES);
        for (ports, id) in &self.live {
            let connection = &self.connections[id].connection;
            assert_eq!(
                (ports.host, ports.guest),
                (connection.host_port, connection.guest_port)
            );
            assert!(!matches!(connection.phase(), Phase::Closed(_)));
        }
        let mut waiting = 0;
        let mut over = 0;
        for (id, entrant) in &self.connections {
            let connection = &entrant.connection;
            assert!(connection.unread() <= BUF_ALLOC as usize);
            assert!(connection.unsent() <= TX_BUFFER);
            assert!(connection.memory() <= BUF_ALLOC as usize + TX_BUFFER);
            assert_eq!(entrant.queued, self.ready.contains(id));
            assert!(entrant.queued || !connection.has_packet(), "{connection:?}");
            waiting += usize::from(entrant.holder == Holder::Listener);
            if let Phase::Closed(cause) = connection.phase() {
                over += 1;
                assert_eq!(connection.unsent(), 0);
                match entrant.holder {
                    Holder::Host => {}
                    Holder::Listener => assert_eq!(cause, Cause::Finished),
                    Holder::Nobody => panic!("a dead connection that nobody holds"),
                }
            }
        }
        assert_eq!(self.connections.len(), self.live.len() + over);
        let unique: std::collections::HashSet<_> = self.ready.iter().collect();
        assert_eq!(unique.len(), self.ready.len());
        assert!(
            self.ready
                .iter()
                .all(|id| self.connections.contains_key(id))
        );
        let mut backlog = 0;
        for (port, listener) in &self.listeners {
            assert!(listener.backlog.len() <= BACKLOG);
            backlog += listener.backlog.len();
            for id in &listener.backlog {
                assert_eq!(self.connections[id].connection.host_port, *port);
                assert_eq!(self.connections[id].holder, Holder::Listener);
            }
        }
        assert_eq!(backlog, waiting);
        if self.device == DeviceState::NeedsPackets {
            assert!(self.ready.is_empty() && self.replies.is_empty());
        }
    }
}
