//! A well-behaved guest in a thread: sockets that echo, swallow or pour, over any wire to
//! the host. It holds the host to the credit that it grants.

use std::collections::{HashMap, VecDeque};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use std::os::fd::AsRawFd;

use super::super::muxer::DeviceState;
use super::super::packet::{
    OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
};
use super::*;

/// How packets go between the peer and the host.
pub trait Wire: Send + 'static {
    /// Sends a packet; may wait for room.
    fn send(&mut self, header: &Header, payload: &[u8]);
    /// The host's next packet, if there is one.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)>;
    /// Readable when the host may have sent something.
    fn signal(&self) -> &EventFd;
    /// Largest payload of a packet sent.
    fn most(&self) -> usize {
        64 * 1024
    }
}

/// Straight to the muxer, in the device's place.
pub struct Direct(Arc<Shared>);

impl Direct {
    pub fn new(shared: Arc<Shared>) -> Self {
        shared.lock().device = DeviceState::Running;
        Self(shared)
    }
}

impl Wire for Direct {
    fn send(&mut self, header: &Header, mut payload: &[u8]) {
        self.0.with(|muxer| muxer.receive(header, &mut payload));
    }

    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        self.0
            .with(|muxer| muxer.next_packet(ROOM, |header, data| (*header, data.concat())))
    }

    fn signal(&self) -> &EventFd {
        &self.0.doorbell
    }
}

/// What a socket of the guest does.
#[derive(Debug, Clone, Copy)]
pub enum Role {
    /// Sends back what it gets; closes after the host's end.
    Echo,
    /// Counts and sums what it gets, and reports at the end.
    Sink,
    /// Sends so many bytes of [`pattern`], then closes.
    Source(usize),
}

/// What a [`Role::Sink`] got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    pub guest_port: u32,
    pub len: usize,
    pub sum: u64,
}

pub enum Command {
    Connect(u32, u32, Role),
    Listen(u32, Role),
    Stop,
}

/// Order-dependent sum of bytes (FNV-1a).
pub fn sum(start: u64, bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(start, |sum, byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

struct Socket {
    role: Role,
    established: bool,
    rx: VecDeque<u8>,
    rx_cnt: u32,
    fwd_cnt: u32,
    told: u32,
    tx: VecDeque<u8>,
    tx_cnt: u32,
    host_alloc: u32,
    host_fwd: u32,
    host_shut: u32,
    sent_shut: u32,
    poured: usize,
    report: Report,
}

/// The handle that tests hold. Dropping it stops the thread.
pub struct Peer {
    commands: Sender<Command>,
    wake: EventFd,
    pub reports: Receiver<Report>,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    pub fn start(wire: impl Wire, buf_alloc: u32) -> Self {
        let (commands, receiver) = channel();
        let (reporter, reports) = channel();
        let wake = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut guest = Sockets {
            wire,
            buf_alloc,
            sockets: HashMap::new(),
            listening: HashMap::new(),
            commands: receiver,
            wake: wake.try_clone().unwrap(),
            reporter,
        };
        let thread = Some(std::thread::spawn(move || guest.run()));
        Self {
            commands,
            wake,
            reports,
            thread,
        }
    }

    pub fn connect(&self, host_port: u32, guest_port: u32, role: Role) {
        self.command(Command::Connect(host_port, guest_port, role));
    }

    pub fn listen(&self, guest_port: u32, role: Role) {
        self.command(Command::Listen(guest_port, role));
    }

    fn command(&self, command: Command) {
        let _ = self.commands.send(command);
        let _ = self.wake.write(1);
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.command(Command::Stop);
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            ended.unwrap().expect("the peer found the host at fault");
        }
    }
}

struct Sockets<W> {
    wire: W,
    buf_alloc: u32,
    /// By host port and guest port.
    sockets: HashMap<(u32, u32), Socket>,
    listening: HashMap<u32, Role>,
    commands: Receiver<Command>,
    wake: EventFd,
    reporter: Sender<Report>,
}

impl<W: Wire> Sockets<W> {
    fn run(&mut self) {
        let epoll = Epoll::new().unwrap();
        for fd in [self.wake.as_raw_fd(), self.wire.signal().as_raw_fd()] {
            let event = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, fd, event).unwrap();
        }
        loop {
            let _ = self.wake.read();
            let _ = self.wire.signal().read();
            while let Ok(command) = self.commands.try_recv() {
                match command {
                    Command::Stop => return,
                    Command::Listen(port, role) => drop(self.listening.insert(port, role)),
                    Command::Connect(host, guest, role) => {
                        self.open(host, guest, role, false);
                        self.send(host, guest, OP_REQUEST, 0, &[]);
                    }
                }
            }
            let mut busy = false;
            while let Some((header, payload)) = self.wire.receive() {
                busy = true;
                self.take(&header, payload);
            }
            let ports: Vec<_> = self.sockets.keys().copied().collect();
            for (host, guest) in ports {
                self.work(host, guest);
            }
            if !busy {
                // Far beyond any test's patience: a signal that is lost fails the test.
                let mut events = [EpollEvent::default()];
                let _ = epoll.wait(60_000, &mut events);
            }
        }
    }

    fn open(&mut self, host: u32, guest: u32, role: Role, established: bool) {
        let report = Report {
            guest_port: guest,
            len: 0,
            sum: 0,
        };
        let socket = Socket {
            role,
            established,
            rx: VecDeque::new(),
            rx_cnt: 0,
            fwd_cnt: 0,
            told: 0,
            tx: VecDeque::new(),
            tx_cnt: 0,
            host_alloc: 0,
            host_fwd: 0,
            host_shut: 0,
            sent_shut: 0,
            poured: 0,
            report,
        };
        assert!(self.sockets.insert((host, guest), socket).is_none());
    }

    fn send(&mut self, host: u32, guest: u32, op: u16, flags: u32, payload: &[u8]) {
        let mut header = Header {
            flags,
            len: payload.len() as u32,
            buf_alloc: self.buf_alloc,
            ..Guest::header(op, host, guest)
        };
        if let Some(socket) = self.sockets.get_mut(&(host, guest)) {
            header.fwd_cnt = socket.fwd_cnt;
            socket.told = socket.fwd_cnt;
            socket.tx_cnt = socket.tx_cnt.wrapping_add(header.len);
            socket.sent_shut |= flags;
        }
        self.wire.send(&header, payload);
    }

    fn take(&mut self, header: &Header, payload: Vec<u8>) {
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
        assert_eq!(header.kind, TYPE_STREAM);
        let (host, guest) = (header.src_port, header.dst_port);
        if header.op == OP_REQUEST {
            let Some(role) = self.listening.get(&guest).copied() else {
                return self.send(host, guest, OP_RST, 0, &[]);
            };
            self.open(host, guest, role, true);
            self.credit(header);
            return self.send(host, guest, OP_RESPONSE, 0, &[]);
        }
        if !self.sockets.contains_key(&(host, guest)) {
            if header.op != OP_RST {
                self.send(host, guest, OP_RST, 0, &[]);
            }
            return;
        }
        self.credit(header);
        let socket = self.sockets.get_mut(&(host, guest)).unwrap();
        match header.op {
            OP_RESPONSE => socket.established = true,
            OP_RST => {
                let _ = self.reporter.send(socket.report);
                self.sockets.remove(&(host, guest));
            }
            OP_SHUTDOWN => socket.host_shut |= header.flags,
            OP_RW => {
                assert_eq!(socket.host_shut & SHUTDOWN_SEND, 0, "data after a shutdown");
                socket.rx_cnt = socket.rx_cnt.wrapping_add(header.len);
                let held = socket.rx_cnt.wrapping_sub(socket.told);
                assert!(held <= self.buf_alloc, "{held} bytes beyond the credit");
                socket.rx.extend(payload);
            }
            OP_CREDIT_REQUEST => self.send(host, guest, OP_CREDIT_UPDATE, 0, &[]),
            OP_CREDIT_UPDATE => {}
            op => panic!("op {op} from the host"),
        }
    }

    fn credit(&mut self, header: &Header) {
        let socket = self
            .sockets
            .get_mut(&(header.src_port, header.dst_port))
            .unwrap();
        socket.host_alloc = header.buf_alloc;
        socket.host_fwd = header.fwd_cnt;
    }

    fn work(&mut self, host: u32, guest: u32) {
        let most = self.wire.most();
        let Some(socket) = self.sockets.get_mut(&(host, guest)) else {
            return;
        };
        if !socket.established {
            return;
        }
        if socket.host_shut & SHUTDOWN_RECEIVE != 0 {
            // As a write that fails: the socket has nothing more to say.
            socket.tx.clear();
            if let Role::Source(len) = socket.role {
                socket.poured = len;
            } else {
                socket.role = Role::Sink;
            }
        }
        let room = (256 * 1024usize).saturating_sub(socket.tx.len());
        let mut taken = 0;
        match socket.role {
            Role::Echo => {
                taken = socket.rx.len().min(room);
                socket.tx.extend(socket.rx.drain(..taken));
            }
            Role::Sink => {
                taken = socket.rx.len();
                socket.report.len += taken;
                socket.report.sum = sum(socket.report.sum, socket.rx.drain(..));
            }
            Role::Source(len) => {
                let count = room.min(len - socket.poured);
                let bytes =
                    (socket.poured..socket.poured + count).map(|i| (i * 31 + i / 251) as u8);
                socket.tx.extend(bytes);
                socket.poured += count;
            }
        }
        socket.fwd_cnt = socket.fwd_cnt.wrapping_add(taken as u32);
        let free = |socket: &Socket| {
            let in_flight = socket.tx_cnt.wrapping_sub(socket.host_fwd);
            socket.host_alloc.saturating_sub(in_flight) as usize
        };
        loop {
            let socket = &mut self.sockets.get_mut(&(host, guest)).unwrap();
            let count = socket.tx.len().min(free(socket)).min(most);
            if count == 0 {
                break;
            }
            let payload: Vec<u8> = socket.tx.drain(..count).collect();
            self.send(host, guest, OP_RW, 0, &payload);
        }
        let socket = &self.sockets[&(host, guest)];
        if socket.fwd_cnt.wrapping_sub(socket.told) > self.buf_alloc / 2 {
            self.send(host, guest, OP_CREDIT_UPDATE, 0, &[]);
        }
        let socket = &self.sockets[&(host, guest)];
        let said_all = socket.tx.is_empty()
            && match socket.role {
                Role::Echo | Role::Sink => {
                    socket.rx.is_empty() && socket.host_shut & SHUTDOWN_SEND != 0
                }
                Role::Source(len) => socket.poured == len,
            };
        if socket.host_shut == SHUTDOWN_BOTH && socket.rx.is_empty() {
            let _ = self.reporter.send(socket.report);
            self.send(host, guest, OP_RST, 0, &[]);
            self.sockets.remove(&(host, guest));
        } else if said_all && socket.sent_shut == 0 {
            self.send(host, guest, OP_SHUTDOWN, SHUTDOWN_BOTH, &[]);
        }
    }
}
