//! The device through its queues: chains of all shapes, floods, and a driver for the
//! peer's thread that obeys EVENT_IDX, so that a kick or interrupt too few hangs it.

use std::collections::VecDeque;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::device::{BUDGET, Vsock, Worker};
use super::super::packet::{HEADER_SIZE, MAX_PAYLOAD, OP_CREDIT_UPDATE};
use super::peer::Wire;
use super::*;
use crate::event_loop::EventLoop;
use crate::virtio::device::{Activation, ActiveQueue, GuestRam, Interrupt, VirtioDevice};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Bytes set aside for a queue's rings.
const RINGS: u64 = 0x4000;
/// Descriptors of a queue.
const SIZE: u16 = 128;
/// A seam between two regions of guest memory.
const SEAM: u64 = 4 << 20;

fn memory() -> GuestMemoryMmap {
    let regions = [
        (GuestAddress(0), SEAM as usize),
        (GuestAddress(SEAM), 12 << 20),
    ];
    GuestMemoryMmap::from_ranges(&regions).unwrap()
}

/// The driver's half of a queue.
struct Ring {
    memory: GuestMemoryMmap,
    base: u64,
    avail: u16,
    used: u16,
    event_idx: bool,
    kick: Arc<EventFd>,
}

impl Ring {
    fn new(memory: &GuestMemoryMmap, index: u64, event_idx: bool) -> Self {
        Self {
            memory: memory.clone(),
            base: index * RINGS,
            avail: 0,
            used: 0,
            event_idx,
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        }
    }

    fn avail_at(&self) -> u64 {
        self.base + 0x1000
    }

    fn used_at(&self) -> u64 {
        self.base + 0x2000
    }

    fn active(&self) -> ActiveQueue {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(self.base as u32), None);
        queue.set_avail_ring_address(Some(self.avail_at() as u32), None);
        queue.set_used_ring_address(Some(self.used_at() as u32), None);
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        ActiveQueue {
            queue,
            kick: Arc::clone(&self.kick),
        }
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = self.base + 16 * u64::from(index);
        self.put(at, addr);
        self.put(at + 8, len);
        self.put(at + 12, flags);
        self.put(at + 14, next);
    }

    /// Makes descriptors from `head` on into a chain and makes it available, without a kick.
    fn chain(&mut self, head: u16, parts: &[(u64, u32)], writable: bool) {
        let last = parts.len() as u16 - 1;
        for (index, (addr, len)) in (0..).zip(parts) {
            let flags = if index < last { NEXT } else { 0 } | if writable { WRITE } else { 0 };
            self.descriptor(head + index, *addr, *len, flags, head + index + 1);
        }
        self.publish(head);
    }

    fn publish(&mut self, head: u16) {
        let slot = u64::from(self.avail % SIZE);
        self.put(self.avail_at() + 4 + 2 * slot, head);
        self.avail = self.avail.wrapping_add(1);
        std::sync::atomic::fence(Ordering::SeqCst);
        self.put(self.avail_at() + 2, self.avail);
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// Kicks if the device asks for it, `added` chains after the last time.
    fn kick(&self, added: u16) {
        let wanted = if self.event_idx {
            let event: u16 = self.get(self.used_at() + 4 + 8 * u64::from(SIZE));
            self.avail.wrapping_sub(event).wrapping_sub(1) < added
        } else {
            self.get::<u16>(self.used_at()) & 1 == 0
        };
        if wanted {
            self.kick.write(1).unwrap();
        }
    }

    /// The next used chain: head and length. When there is none, an interrupt is asked for.
    fn take_used(&mut self) -> Option<(u16, u32)> {
        for _ in 0..2 {
            if self.get::<u16>(self.used_at() + 2) != self.used {
                std::sync::atomic::fence(Ordering::SeqCst);
                let at = self.used_at() + 4 + 8 * u64::from(self.used % SIZE);
                self.used = self.used.wrapping_add(1);
                return Some((self.get::<u32>(at) as u16, self.get(at + 4)));
            }
            self.put(self.avail_at() + 4 + 2 * u64::from(SIZE), self.used);
            std::sync::atomic::fence(Ordering::SeqCst);
        }
        None
    }
}

/// Queues and a worker that is turned by hand.
struct Bench {
    guest: Guest,
    worker: Worker,
    interrupt: Interrupt,
    rx: Ring,
    tx: Ring,
    event: Ring,
}

/// Where the tests put packets.
const DATA: u64 = 0x10_0000;

impl Bench {
    fn new() -> Self {
        let guest = Guest::new();
        let ram = memory();
        let [rx, tx, event] = [0, 1, 2].map(|index| Ring::new(&ram, index, true));
        let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let worker = Worker::new(
            Arc::clone(&guest.shared),
            Activation {
                ram: GuestRam::new(ram),
                interrupt: interrupt.clone(),
                queues: vec![rx.active(), tx.active(), event.active()],
                features: 0,
            },
        )
        .unwrap();
        guest.shared.lock().device = super::super::muxer::DeviceState::Running;
        Self {
            guest,
            worker,
            interrupt,
            rx,
            tx,
            event,
        }
    }

    /// Sends a packet that lies at DATA, over these parts.
    fn send(&mut self, header: Header, payload: &[u8], parts: &[(u64, u32)]) {
        let bytes = [&header.encode()[..], payload].concat();
        let mut done = 0;
        for (addr, len) in parts {
            let end = bytes.len().min(done + *len as usize);
            self.tx
                .memory
                .write_slice(&bytes[done..end], GuestAddress(*addr))
                .unwrap();
            done = end;
        }
        self.tx.chain(0, parts, false);
        self.worker.turn();
        assert_eq!(self.tx.take_used(), Some((0, 0)));
    }

    fn request(&mut self, guest_port: u32) {
        let header = Guest::header(OP_REQUEST, 1024, guest_port);
        self.send(header, &[], &[(DATA, HEADER_SIZE as u32)]);
    }

    fn rings(&self) -> bool {
        self.guest.shared.doorbell.read().is_ok()
    }

    fn interrupts(&self) -> u64 {
        self.interrupt.irqfd().read().unwrap_or(0)
    }

    /// Reads a packet of `used` bytes from these parts.
    fn packet(&self, parts: &[(u64, u32)], used: u32) -> (Header, Vec<u8>) {
        let mut bytes = Vec::new();
        for (addr, len) in parts {
            let mut part = vec![0; (*len as usize).min(used as usize - bytes.len())];
            self.rx
                .memory
                .read_slice(&mut part, GuestAddress(*addr))
                .unwrap();
            bytes.extend(part);
        }
        let (header, payload) = bytes.split_at(HEADER_SIZE);
        (Header::decode(header.try_into().unwrap()), payload.to_vec())
    }
}

#[test]
fn packets_of_many_descriptors_arrive_both_ways() {
    let sixteen_ones: Vec<_> = (0..16).map(|i| (DATA + 2 * i, 1)).collect();
    let shapes: Vec<Vec<(u64, u32)>> = vec![
        vec![(DATA, 5044)],
        vec![(DATA, 44), (DATA + 0x2000, 5000)],
        vec![(DATA, 43), (DATA + 0x100, 1), (DATA + 0x2000, 5000)],
        vec![(DATA, 45), (DATA + 0x2000, 4999)],
        vec![(DATA, 20), (DATA + 0x100, 0), (DATA + 0x2000, 5024)],
        [
            sixteen_ones,
            vec![(DATA + 0x100, 28), (DATA + 0x2000, 5000)],
        ]
        .concat(),
        vec![(DATA, 44), (SEAM - 2000, 5000)],
        vec![(SEAM - 20, 5044)],
        (0..101).map(|i| (DATA + 0x100 * i, 50)).collect(),
    ];
    for shape in shapes {
        let mut bench = Bench::new();
        let mut listener = bench.guest.host.listen(1024).unwrap();
        bench.request(7);
        let mut stream = ready(listener.accept()).unwrap();
        bench.rx.chain(0, &[(DATA, 100)], true);
        bench.worker.turn();
        assert_eq!(bench.rx.take_used(), Some((0, 44)), "{shape:x?}");
        let (header, _) = bench.packet(&[(DATA, 100)], 44);
        assert_eq!(header.op, OP_RESPONSE);

        let data = pattern(5000);
        let mut header = Guest::header(OP_RW, 1024, 7);
        header.len = 5000;
        bench.send(header, &data, &shape);
        assert_eq!(read(&mut stream, 9999).unwrap(), data, "{shape:x?}");

        write(&mut stream, &data).unwrap();
        bench.rx.chain(0, &shape, true);
        bench.worker.turn();
        let Some((0, used)) = bench.rx.take_used() else {
            panic!("{shape:x?}")
        };
        let (header, payload) = bench.packet(&shape, used);
        assert_eq!((header.op, header.len as usize), (OP_RW, payload.len()));
        let room: u32 = shape.iter().map(|(_, len)| len).sum();
        let fits = data.len().min(room as usize - HEADER_SIZE);
        assert_eq!(payload, data[..fits], "{shape:x?}");
    }
}

#[test]
fn our_header_is_read_by_another_implementation() {
    use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;
    use virtio_queue::QueueOwnedT;
    use virtio_vsock::packet::VsockPacket;

    let header = Header {
        src_cid: 0x0102_0304_0506_0708,
        dst_cid: 0x1112_1314_1516_1718,
        src_port: 0x2122_2324,
        dst_port: 0x3132_3334,
        len: 0x100,
        kind: 0x4142,
        op: 0x5152,
        flags: 0x6162_6364,
        buf_alloc: 0x7172_7374,
        fwd_cnt: 0x8182_8384,
    };
    assert_eq!(u32::from(WRITE), VRING_DESC_F_WRITE);
    assert_eq!(Header::decode(&header.encode()), header);
    let ram = memory();
    let mut ring = Ring::new(&ram, 0, false);
    ring.chain(0, &[(DATA, 44), (DATA + 0x1000, 0x100)], false);
    ram.write_slice(&header.encode(), GuestAddress(DATA))
        .unwrap();
    let mut queue = ring.active().queue;
    let mut chain = queue.iter(&ram).unwrap().next().unwrap();
    let packet = VsockPacket::from_tx_virtq_chain(&ram, &mut chain, MAX_PAYLOAD).unwrap();
    assert_eq!(packet.src_cid(), header.src_cid);
    assert_eq!(packet.dst_cid(), header.dst_cid);
    assert_eq!(packet.src_port(), header.src_port);
    assert_eq!(packet.dst_port(), header.dst_port);
    assert_eq!(packet.len(), header.len);
    assert_eq!(packet.type_(), header.kind);
    assert_eq!(packet.op(), header.op);
    assert_eq!(packet.flags(), header.flags);
    assert_eq!(packet.buf_alloc(), header.buf_alloc);
    assert_eq!(packet.fwd_cnt(), header.fwd_cnt);
}

#[test]
fn chains_without_a_packet_are_returned_and_counted() {
    let mut bench = Bench::new();
    let bad: [&[(u64, u32)]; 4] = [
        &[(DATA, 43)],
        &[(DATA, 0)],
        &[(1 << 40, 44)],
        &[(u64::MAX - 10, 44)],
    ];
    for parts in bad {
        bench.tx.chain(0, parts, false);
        bench.worker.turn();
        assert_eq!(bench.tx.take_used(), Some((0, 0)));
    }
    // Writable where readable is needed.
    bench.tx.chain(0, &[(DATA, 44)], true);
    bench.worker.turn();
    assert_eq!(bench.tx.take_used(), Some((0, 0)));
    // A loop.
    bench.tx.descriptor(0, DATA, 44, NEXT, 0);
    bench.tx.publish(0);
    bench.worker.turn();
    assert_eq!(bench.tx.take_used(), Some((0, 0)));
    assert!(bench.guest.host.counters().bad_chains >= 3);
    assert!(!bench.interrupt.needs_reset());

    // Buffers that cannot take a header and a byte are returned empty, the packet stays.
    bench.request(7);
    let bad: [(&[(u64, u32)], bool); 3] = [
        (&[(DATA, 44)], true),
        (&[(DATA, 100)], false),
        (&[(DATA, 0), (DATA, 10)], true),
    ];
    for (parts, writable) in bad {
        bench.rx.chain(0, parts, writable);
        bench.worker.turn();
        assert_eq!(bench.rx.take_used(), Some((0, 0)));
    }
    bench.rx.chain(0, &[(DATA, 45)], true);
    bench.worker.turn();
    assert_eq!(bench.rx.take_used(), Some((0, 44)));
}

#[test]
fn a_payload_that_is_shorter_than_its_length_kills_the_connection() {
    let mut bench = Bench::new();
    let mut listener = bench.guest.host.listen(1024).unwrap();
    bench.request(7);
    let mut stream = ready(listener.accept()).unwrap();
    bench.rx.chain(0, &[(DATA, 100)], true);
    bench.worker.turn();
    let mut header = Guest::header(OP_RW, 1024, 7);
    header.len = 100;
    bench.send(header, &[1; 99], &[(DATA, 143)]);
    assert_eq!(kind(read(&mut stream, 1)), io::ErrorKind::ConnectionReset);
}

#[test]
fn a_broken_ring_needs_a_reset_and_cuts_the_streams() {
    let mut bench = Bench::new();
    let mut listener = bench.guest.host.listen(1024).unwrap();
    bench.request(7);
    let mut stream = ready(listener.accept()).unwrap();
    bench.tx.put(bench.tx.avail_at() + 2, 40_000u16);
    bench.worker.turn();
    assert!(bench.interrupt.needs_reset());
    assert_eq!(kind(read(&mut stream, 1)), io::ErrorKind::ConnectionReset);
    let interrupts = bench.interrupts();
    assert!(interrupts > 0);
    for _ in 0..100 {
        bench.worker.turn();
    }
    assert_eq!(bench.interrupts(), 0);
}

#[test]
fn a_request_flood_without_receive_buffers_neither_spins_nor_grows() {
    let mut bench = Bench::new();
    let _listener = bench.guest.host.listen(1024).unwrap();
    for port in 0..2000 {
        bench.request(port);
        // No turn is owed: the device waits for buffers.
        assert!(!bench.rings());
        bench.guest.check();
    }
    assert_eq!(bench.guest.host.connections(), super::super::BACKLOG);
    // Buffers come one by one, and each takes a packet.
    for _ in 0..10 {
        bench.rx.chain(0, &[(DATA, 4096)], true);
        bench.worker.turn();
        assert_eq!(bench.rx.take_used(), Some((0, 44)));
        assert!(!bench.rings());
    }
}

#[test]
fn a_turn_ends_though_the_guest_sends_and_takes_without_end() {
    let mut bench = Bench::new();
    let mut listener = bench.guest.host.listen(1024).unwrap();
    bench.request(7);
    let mut stream = ready(listener.accept()).unwrap();
    // One header, and every slot of the ring names it.
    let header = Guest::header(OP_CREDIT_UPDATE, 1024, 99);
    bench
        .tx
        .memory
        .write_slice(&header.encode(), GuestAddress(DATA))
        .unwrap();
    for _ in 0..SIZE {
        bench.tx.chain(0, &[(DATA, 44)], false);
    }
    let turns = usize::from(SIZE) / BUDGET;
    for _ in 0..turns {
        bench.worker.turn();
        // What is left is owed, and the device sees to it by itself.
        assert!(bench.rings());
        let used = std::iter::from_fn(|| bench.tx.take_used()).count();
        assert_eq!(used, BUDGET);
    }
    bench.worker.turn();
    assert!(!bench.rings());
    // The RSTs fill all buffers; what the host writes waits for more.
    write(&mut stream, &pattern(10_000)).unwrap();
    for index in 0..SIZE {
        bench.rx.chain(index, &[(DATA, 4096)], true);
    }
    bench.interrupts();
    for _ in 0..turns {
        bench.worker.turn();
        assert_eq!(bench.interrupts(), 1);
        assert!(bench.rings());
        let used = std::iter::from_fn(|| bench.rx.take_used()).count();
        assert_eq!(used, BUDGET);
    }
    bench.worker.turn();
    assert!(!bench.rings());
    for index in 0..SIZE {
        bench.rx.chain(index, &[(DATA, 4096)], true);
    }
    bench.worker.turn();
    // The response and three of data; the buffers that are left stay the guest's.
    let used = std::iter::from_fn(|| bench.rx.take_used()).count();
    assert_eq!(used, 1 + 3);
    assert!(!bench.rings());
    write(&mut stream, b"more").unwrap();
    assert!(bench.rings());
}

#[test]
fn the_event_queue_is_left_alone() {
    let mut bench = Bench::new();
    bench.event.chain(0, &[(DATA, 4)], true);
    bench.worker.turn();
    assert_eq!(bench.event.take_used(), None);
    assert_eq!(bench.interrupts(), 0);
}

#[test]
fn the_configuration_space_is_the_cid() {
    let (event_loop, handle) = EventLoop::start("test-vsock", |_| {}).unwrap();
    let (mut vsock, host) = Vsock::new(0x0807_0605_0403, handle).unwrap();
    assert_eq!((vsock.kind(), vsock.device_id()), ("vsock", 19));
    assert_eq!(vsock.queue_sizes().len(), 3);
    vsock.write_config(0, &[9; 8]);
    for (offset, expected) in [
        (0, [3, 4, 5, 6, 7, 8, 0, 0]),
        (4, [7, 8, 0, 0, 0, 0, 0, 0]),
        (8, [0; 8]),
        (u64::MAX, [0; 8]),
    ] {
        let mut data = [0xff; 8];
        vsock.read_config(offset, &mut data);
        assert_eq!(data, expected);
    }
    drop(vsock);
    assert!(matches!(host.listen(1), Err(Error::Ended)));
    drop(event_loop);
}

#[test]
fn too_few_queues_are_refused_and_a_reset_allows_another_activation() {
    let (event_loop, handle) = EventLoop::start("test-vsock", |_| {}).unwrap();
    let (mut vsock, host) = Vsock::new(GUEST_CID, handle).unwrap();
    let ram = memory();
    let activation = |count: u64| Activation {
        ram: GuestRam::new(ram.clone()),
        interrupt: Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        queues: (0..count)
            .map(|i| Ring::new(&ram, i, true).active())
            .collect(),
        features: 0,
    };
    assert!(vsock.activate(activation(2)).is_err());
    vsock.reset();
    vsock.activate(activation(3)).unwrap();
    assert!(vsock.activate(activation(3)).is_err());
    vsock.reset();
    vsock.reset();
    vsock.activate(activation(3)).unwrap();
    host.listen(1).unwrap();
    drop(event_loop);
    // The loop is gone first, as when a VM ends.
    vsock.reset();
    drop(vsock);
}

/// A driver over a real device on a real event loop: the wire of a peer.
pub struct Driver {
    pub host: VsockHost,
    // In the order of their drops.
    _vsock: Vsock,
    _event_loop: EventLoop,
    rx: Ring,
    tx: Ring,
    interrupt: Interrupt,
    free_tx: VecDeque<u16>,
    received: VecDeque<(Header, Vec<u8>)>,
}

/// Buffers of each direction, and what each takes.
const BUFFERS: u16 = 32;
const RX_AREA: u64 = 1 << 20;
const TX_AREA: u64 = 8 << 20;
const TX_STRIDE: u64 = 0x1_1000;

impl Driver {
    pub fn start(event_idx: bool) -> Self {
        let (event_loop, handle) =
            EventLoop::start("test-vsock", |message| panic!("{message}")).unwrap();
        let (mut vsock, host) = Vsock::new(GUEST_CID, handle).unwrap();
        let ram = memory();
        let [mut rx, tx, event] = [0, 1, 2].map(|index| Ring::new(&ram, index, event_idx));
        let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap());
        for buffer in 0..BUFFERS {
            Self::post(&mut rx, buffer);
        }
        let activation = Activation {
            ram: GuestRam::new(ram),
            interrupt: interrupt.clone(),
            queues: vec![rx.active(), tx.active(), event.active()],
            features: 0,
        };
        vsock.activate(activation).unwrap();
        Self {
            host,
            _vsock: vsock,
            _event_loop: event_loop,
            rx,
            tx,
            interrupt,
            free_tx: (0..BUFFERS).collect(),
            received: VecDeque::new(),
        }
    }

    fn rx_parts(buffer: u16) -> Vec<(u64, u32)> {
        let at = RX_AREA + 0x2000 * u64::from(buffer);
        match buffer % 3 {
            // As kernels before 6.2 do, as those since do, and as none does.
            0 => vec![(at, 44), (at + 0x100, 4096)],
            1 => vec![(at, 3700)],
            _ => vec![(at, 30), (at + 0x100, 1000), (at + 0x1000, 3000)],
        }
    }

    fn post(rx: &mut Ring, buffer: u16) {
        rx.chain(buffer * 4, &Self::rx_parts(buffer), true);
    }

    fn collect(&mut self) {
        while let Some((head, _)) = self.tx.take_used() {
            self.free_tx.push_back(head / 4);
        }
        let mut posted = 0;
        while let Some((head, used)) = self.rx.take_used() {
            let mut bytes = Vec::new();
            for (addr, len) in Self::rx_parts(head / 4) {
                let mut part = vec![0; (len as usize).min(used as usize - bytes.len())];
                self.rx
                    .memory
                    .read_slice(&mut part, GuestAddress(addr))
                    .unwrap();
                bytes.extend(part);
            }
            let payload = bytes.split_off(HEADER_SIZE);
            let header = Header::decode(&bytes.try_into().unwrap());
            self.received.push_back((header, payload));
            Self::post(&mut self.rx, head / 4);
            posted += 1;
        }
        if posted > 0 {
            self.rx.kick(posted);
        }
    }
}

impl Wire for Driver {
    fn send(&mut self, header: &Header, payload: &[u8]) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        let buffer = loop {
            if let Some(buffer) = self.free_tx.pop_front() {
                break buffer;
            }
            assert!(std::time::Instant::now() < deadline, "no chain came back");
            std::thread::yield_now();
            self.collect();
        };
        let at = TX_AREA + TX_STRIDE * u64::from(buffer);
        let bytes = [&header.encode()[..], payload].concat();
        self.tx
            .memory
            .write_slice(&bytes, GuestAddress(at))
            .unwrap();
        let len = bytes.len() as u64;
        let parts: Vec<_> = [0, 44, 1044, len]
            .windows(2)
            .filter(|pair| pair[0] < pair[1].min(len))
            .map(|pair| (at + pair[0], (pair[1].min(len) - pair[0]) as u32))
            .collect();
        self.tx.chain(buffer * 4, &parts, false);
        self.tx.kick(1);
    }

    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        self.interrupt.acknowledge(1);
        if self.received.is_empty() {
            self.collect();
        }
        self.received.pop_front()
    }

    fn signal(&self) -> &EventFd {
        self.interrupt.irqfd()
    }
}
