//! Frames for and from good, poor and hostile drivers; what is full stays full without spinning, and goes on when it is not.

mod event_idx;
mod read_errors;
mod tap;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::service::{BATCH, Service};
use super::tap::Errors;
use super::*;
use crate::event_loop::EventLoop;
use crate::virtio::device::{Activation, ActiveQueue, GuestRam, INTERRUPT_CONFIG, VirtioDevice};
use crate::virtio::queue::driver::{
    AVAILABLE, DATA, DESCRIPTORS, Driver, END, ISLAND, NEXT, SEAM, USED, WRITE, memory,
};

/// The transmit queue's rings are this far above those of the receive queue.
const BESIDE: u64 = 0x8000;
const SIZE: u16 = 8;

/// A socket that keeps frames apart in place of a TAP interface.
struct Bench {
    driver: Driver,
    wire: UnixDatagram,
    shared: Arc<Shared>,
    interrupt: Interrupt,
    service: Service,
}

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an eventfd")
}

fn wires() -> (UnixDatagram, Tap) {
    let (ours, theirs) = UnixDatagram::pair().expect("sockets");
    for end in [&ours, &theirs] {
        end.set_nonblocking(true).expect("set");
    }
    (ours, Tap::of_frames(OwnedFd::from(theirs)))
}

/// A queue whose rings are beside those of the driver's, for sending.
fn transmit_queue(driver: &Driver, event_idx: bool) -> virtio_queue::Queue {
    let mut queue = driver.queue(event_idx);
    queue.set_desc_table_address(Some((DESCRIPTORS + BESIDE / 2) as u32), Some(0));
    queue.set_avail_ring_address(Some((AVAILABLE + BESIDE) as u32), Some(0));
    queue.set_used_ring_address(Some((USED + BESIDE) as u32), Some(0));
    queue
}

fn queues(driver: &Driver, event_idx: bool) -> [ActiveQueue; 2] {
    let active = |queue| ActiveQueue {
        queue,
        kick: Arc::new(eventfd()),
    };
    [
        active(driver.queue(event_idx)),
        active(transmit_queue(driver, event_idx)),
    ]
}

/// Offers one chain for sending.
fn send(driver: &Driver, number: u16, parts: &[(u64, u32, bool)]) {
    let slot = number % SIZE;
    for (i, &(address, len, writable)) in parts.iter().enumerate() {
        let index = (slot + i as u16) % SIZE;
        let more = if i + 1 < parts.len() { NEXT } else { 0 };
        let flags = more | if writable { WRITE } else { 0 };
        let next = (index + 1) % SIZE;
        driver.descriptor(DESCRIPTORS + BESIDE / 2, index, address, len, flags, next);
    }
    let available = AVAILABLE + BESIDE;
    driver.write(available + 4 + u64::from(slot) * 2, slot);
    driver.write(available + 2, number + 1);
}

fn sent(driver: &Driver) -> u16 {
    driver.read(USED + BESIDE + 2)
}

impl Bench {
    fn new(mergeable: bool) -> Self {
        let driver = Driver::new(memory(), SIZE);
        let (wire, tap) = wires();
        let shared = Arc::new(Shared::default());
        let interrupt = Interrupt::new(eventfd());
        let service = Service::new(
            (Arc::new(tap), Arc::clone(&shared)),
            (GuestRam::new(driver.memory.clone()), interrupt.clone()),
            queues(&driver, false),
            (mergeable, Some(1500)),
        )
        .expect("a service");
        Self {
            driver,
            wire,
            shared,
            interrupt,
            service,
        }
    }

    fn counters(&self) -> NetCounters {
        let shared = Arc::clone(&self.shared);
        NetHost { shared }.counters()
    }
}

/// A header that says nothing, and bytes that count.
fn frame(len: usize, first: u8) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    frame.extend((0..len).map(|i| first.wrapping_add(i as u8)));
    frame
}

#[test]
fn a_frame_comes_with_its_header_in_one_buffer() {
    let mut bench = Bench::new(false);
    bench.driver.chain(&[(DATA, 2000, true)]);
    bench.wire.send(&frame(100, 7)).unwrap();
    bench.service.receive().unwrap();
    assert_eq!(bench.driver.used(), Some((0, 112)));
    let got = bench.driver.bytes(DATA, 113);
    assert_eq!(got[..10], [0; 10]);
    assert_eq!(got[10..12], [1, 0], "num_buffers");
    assert_eq!(got[12..112], frame(100, 7)[12..]);
    assert_eq!(got[112], 0, "not a byte beyond");
    assert_eq!(bench.counters().received, 1);
    assert_eq!(bench.counters().received_bytes, 100);
    assert_eq!(bench.interrupt.irqfd().read().ok(), Some(1));
}

#[test]
fn a_large_frame_comes_in_as_many_buffers_as_it_needs_and_shows_at_once() {
    let mut bench = Bench::new(true);
    for at in 0..4 {
        bench.driver.chain(&[(DATA + at * 0x1000, 600, true)]);
    }
    bench.wire.send(&frame(1400, 1)).unwrap();
    bench.wire.send(&frame(50, 9)).unwrap();
    bench.service.receive().unwrap();
    assert_eq!(bench.driver.used(), Some((0, 600)));
    assert_eq!(bench.driver.used(), Some((1, 600)));
    assert_eq!(bench.driver.used(), Some((2, 212)));
    assert_eq!(bench.driver.used(), Some((3, 62)));
    let mut got = bench.driver.bytes(DATA, 600);
    got.extend(bench.driver.bytes(DATA + 0x1000, 600));
    got.extend(bench.driver.bytes(DATA + 0x2000, 212));
    assert_eq!(got[10..12], [3, 0], "num_buffers");
    assert_eq!(got[12..], frame(1400, 1)[12..]);
}

#[test]
fn a_frame_without_room_is_held_and_the_buffers_stay_the_drivers() {
    let mut bench = Bench::new(true);
    bench.driver.chain(&[(DATA, 600, true)]);
    bench.wire.send(&frame(1000, 1)).unwrap();
    bench.wire.send(&frame(10, 2)).unwrap();
    for _ in 0..3 {
        bench.service.receive().unwrap();
        assert_eq!(bench.driver.used(), None);
    }
    bench.driver.chain(&[(DATA + 0x1000, 600, true)]);
    bench.driver.chain(&[(DATA + 0x2000, 600, true)]);
    bench.service.receive().unwrap();
    assert_eq!(bench.driver.used(), Some((0, 600)));
    assert_eq!(bench.driver.used(), Some((1, 412)));
    assert_eq!(bench.driver.used(), Some((2, 22)));
    assert_eq!(bench.counters().receive_dropped, 0);
}

#[test]
fn a_frame_that_no_buffers_will_ever_hold_is_dropped_and_the_next_comes() {
    for mergeable in [false, true] {
        let mut bench = Bench::new(mergeable);
        for at in 0..u64::from(SIZE) {
            bench.driver.chain(&[(DATA + at * 0x100, 100, true)]);
        }
        bench.wire.send(&frame(1000, 1)).unwrap();
        bench.wire.send(&frame(20, 2)).unwrap();
        bench.service.receive().unwrap();
        assert_eq!(bench.driver.used(), Some((0, 32)), "{mergeable}");
        assert_eq!(bench.driver.used(), None);
        let counters = bench.counters();
        assert_eq!((counters.received, counters.receive_dropped), (1, 1));
    }
}

#[test]
fn hostile_buffers_are_given_back_and_the_frame_goes_into_the_good_ones() {
    let mut bench = Bench::new(true);
    bench.driver.chain(&[(DATA, 40, true)]);
    bench.driver.chain(&[(END, 40, true)]);
    bench.driver.chain(&[(DATA + 0x1000, 40, false)]);
    bench.driver.chain(&[(DATA + 0x2000, 0, true)]);
    // One across two regions.
    bench.driver.chain(&[(SEAM - 10, 100, true)]);
    bench.wire.send(&frame(60, 5)).unwrap();
    bench.service.receive().unwrap();
    // What cannot be comes first, so that the frame's buffers follow each other.
    let used: Vec<_> = std::iter::from_fn(|| bench.driver.used()).collect();
    assert_eq!(used, [(1, 0), (0, 40), (2, 0), (3, 0), (4, 32)]);
    let mut got = bench.driver.bytes(DATA, 40);
    got.extend(bench.driver.bytes(SEAM - 10, 32));
    assert_eq!(got[12..], frame(60, 5)[12..]);
    assert_eq!(got[10..12], [4, 0]);
}

#[test]
fn a_ring_that_cannot_be_breaks_the_device_until_a_reset() {
    let mut bench = Bench::new(true);
    bench.driver.chain(&[(DATA, 100, true)]);
    bench.driver.write(AVAILABLE + 2, 1000_u16);
    bench.wire.send(&frame(60, 5)).unwrap();
    assert!(bench.service.receive().is_err());
}

#[test]
fn one_turn_gives_a_few_frames() {
    let mut bench = Bench::new(false);
    for number in 0..u64::from(SIZE) {
        bench.driver.chain(&[(DATA + number * 0x100, 100, true)]);
        bench.wire.send(&frame(1, 0)).unwrap();
    }
    bench.service.receive().unwrap();
    assert_eq!(
        std::iter::from_fn(|| bench.driver.used()).count(),
        usize::from(SIZE).min(BATCH)
    );
    assert_eq!(
        bench.interrupt.irqfd().read().ok(),
        Some(1),
        "one interrupt for all"
    );
}

#[test]
fn an_interrupt_is_sent_where_the_driver_wants_it() {
    for (event, wanted) in [(0, true), (1, true), (2, false), (0xffff, false)] {
        let mut bench = Bench::new(false);
        let [receive, _] = queues(&bench.driver, true);
        let mut queue = receive.queue;
        bench.driver.want_interrupt_after(event);
        let mut batch = crate::virtio::queue::UsedBatch::default();
        batch.push(3, 10);
        batch.push(4, 20);
        let memory = &bench.driver.memory;
        assert_eq!(
            batch.publish(&mut queue, memory).unwrap(),
            wanted,
            "{event}"
        );
        assert!(
            !batch.publish(&mut queue, memory).unwrap(),
            "nothing to tell"
        );
        assert_eq!(bench.driver.used(), Some((3, 10)));
        assert_eq!(bench.driver.used(), Some((4, 20)));
        batch.push(SIZE, 0);
        assert!(batch.publish(&mut queue, &bench.driver.memory).is_err());
        assert_eq!(bench.driver.used(), None);
    }
}

#[test]
fn frames_of_the_guest_reach_the_host_whole() {
    let mut bench = Bench::new(false);
    let out = frame(1000, 3);
    bench.driver.fill(DATA, &out[..5]);
    bench.driver.fill(SEAM - 100, &out[5..]);
    send(
        &bench.driver,
        0,
        &[(DATA, 5, false), (SEAM - 100, 1007, false)],
    );
    bench.service.transmit().unwrap();
    let mut got = [0; 2000];
    assert_eq!(bench.wire.recv(&mut got).unwrap(), 1012);
    assert_eq!(got[..1012], out);
    assert_eq!(sent(&bench.driver), 1);
    assert_eq!(bench.counters().sent_bytes, 1000);
}

#[test]
fn what_is_no_frame_is_dropped_and_given_back() {
    let mut bench = Bench::new(false);
    let hostile: [&[(u64, u32, bool)]; 6] = [
        &[(DATA, 12, false)],
        &[(DATA, 0, false)],
        &[(DATA, 100, true)],
        &[(END - 10, 100, false)],
        &[(ISLAND, FRAME_BYTES as u32 + 1, false)],
        &[(DATA, u32::MAX, false)],
    ];
    for (number, parts) in hostile.iter().enumerate() {
        send(&bench.driver, number as u16, parts);
        bench.service.transmit().unwrap();
        assert_eq!(sent(&bench.driver), number as u16 + 1);
    }
    assert!(bench.wire.recv(&mut [0; 10]).is_err(), "nothing came");
    assert_eq!(bench.counters().sent, 0);
    // Those in guest memory are counted; chains that cannot be are the queue's.
    assert_eq!(bench.counters().send_dropped, 4);
}

/// A header of a frame that segments are to be made of.
fn to_be_cut(kind: u8, size: u16) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[1] = kind;
    header[4..6].copy_from_slice(&size.to_le_bytes());
    header
}

#[test]
fn what_is_longer_than_the_link_takes_is_dropped() {
    let mut bench = Bench::new(false);
    // TCP over IPv4, and with ECN over IPv6.
    let (four, six) = (1, 4 | 0x80);
    for (number, (header, len, passes)) in [
        ([0; HEADER_BYTES], 1522, true),
        ([0; HEADER_BYTES], 1523, false),
        (to_be_cut(0x80, 9000), 1523, false),
        (to_be_cut(four, 1460), 9000, true),
        (to_be_cut(four, 1461), 9000, false),
        (to_be_cut(six, 1440), 9000, true),
        (to_be_cut(six, u16::MAX), 9000, false),
        (to_be_cut(0x7f, 1461), 100, false),
    ]
    .into_iter()
    .enumerate()
    {
        let mut out = frame(len, 1);
        out[..HEADER_BYTES].copy_from_slice(&header);
        bench.driver.fill(DATA, &out);
        let bytes = u32::try_from(out.len()).unwrap();
        send(&bench.driver, number as u16, &[(DATA, bytes, false)]);
        bench.service.transmit().unwrap();
        let mut got = vec![0; 10_000];
        match bench.wire.recv(&mut got) {
            Ok(bytes) => assert!(passes && got[..bytes] == out, "{number}"),
            Err(_) => assert!(!passes, "{number}"),
        }
    }
    assert_eq!(bench.counters().send_dropped, 5);
}

#[test]
fn frames_of_before_are_not_for_a_new_driver() {
    let driver = Driver::new(memory(), SIZE);
    let (wire, tap) = wires();
    let shared = Arc::new(Shared::default());
    for _ in 0..5 {
        wire.send(&frame(10, 0)).unwrap();
    }
    let ram = GuestRam::new(driver.memory.clone());
    let mut service = Service::new(
        (Arc::new(tap), Arc::clone(&shared)),
        (ram, Interrupt::new(eventfd())),
        queues(&driver, false),
        (true, None),
    )
    .unwrap();
    let mut driver = driver;
    driver.chain(&[(DATA, 100, true)]);
    service.receive().unwrap();
    assert_eq!(driver.used(), None);
    assert_eq!(shared.receive_dropped.load(Ordering::Relaxed), 5);
}

/// A device behind its event loop, as a VM has it.
struct Device {
    net: Net,
    host: NetHost,
    driver: Driver,
    interrupt: Interrupt,
    kicks: [Arc<EventFd>; 2],
    wire: UnixDatagram,
    errors: Errors,
    _events: EventLoop,
}

fn config() -> NetConfig {
    NetConfig {
        name: "eth0".to_owned(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: Some(1400),
        link: true,
    }
}

impl Device {
    fn active() -> Self {
        Self::named("eth0")
    }

    fn named(name: &str) -> Self {
        let (events, handle) =
            EventLoop::start("test", |message| panic!("unexpected: {message}")).unwrap();
        let (wire, tap) = wires();
        let errors = Arc::clone(&tap.errors);
        let config = NetConfig {
            name: name.to_owned(),
            ..config()
        };
        let (net, host) = Net::new(config, tap, handle).unwrap();
        let driver = Driver::new(memory(), SIZE);
        let interrupt = Interrupt::new(eventfd());
        let mut device = Self {
            net,
            host,
            driver,
            interrupt,
            kicks: [Arc::new(eventfd()), Arc::new(eventfd())],
            wire,
            errors,
            _events: events,
        };
        device.activate();
        device
    }

    fn activate(&mut self) {
        let queues = queues(&self.driver, false);
        self.kicks = [Arc::clone(&queues[0].kick), Arc::clone(&queues[1].kick)];
        let activation = Activation {
            ram: GuestRam::new(self.driver.memory.clone()),
            interrupt: self.interrupt.clone(),
            queues: queues.into(),
            features: 1 << VIRTIO_NET_F_MRG_RXBUF,
        };
        self.net.activate(activation).expect("active");
    }

    /// Sends frames until the host takes none; how many were offered, the last of which waits.
    fn send_until_full(&mut self) -> u16 {
        self.driver.fill(DATA, &frame(300, 1));
        let mut offered: u16 = 0;
        loop {
            send(&self.driver, offered, &[(DATA, 312, false)]);
            offered += 1;
            self.kicks[1].write(1).unwrap();
            let limit = Instant::now() + Duration::from_millis(500);
            while sent(&self.driver) != offered && Instant::now() < limit {
                std::thread::sleep(Duration::from_millis(1));
            }
            if sent(&self.driver) != offered {
                return offered;
            }
            assert!(offered < 5000, "the socket takes everything");
        }
    }

    /// Takes so many frames of the guest off the wire.
    fn drain(&self, count: u16) {
        let mut taken = 0;
        let mut bytes = [0; 1000];
        until("the frames of the guest", || {
            while self.wire.recv(&mut bytes).is_ok() {
                taken += 1;
            }
            taken == count
        });
    }
}

/// How often a thread of this process has come to run, and how long it has run, in ticks of the scheduler's clock.
fn switches(name: &str) -> (u64, u64) {
    let mut sum = (0, 0);
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        if read("comm").trim() != name {
            continue;
        }
        let number = |text: &str| text.trim().parse::<u64>().unwrap_or_default();
        for line in read("status").lines() {
            if let Some((_, count)) = line.split_once("ctxt_switches:") {
                sum.0 += number(count);
            }
        }
        let stat = read("stat");
        let times = stat.split(' ').skip(13).take(2);
        sum.1 += times.map(number).sum::<u64>();
    }
    assert_ne!(sum.0, 0, "there is no thread {name}");
    sum
}

fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(20);
    while !reached() {
        assert!(Instant::now() < limit, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The thread has ended what it was at, and is not woken for nothing then.
fn rests(name: &str) {
    until("the thread rests", || {
        let before = switches(name);
        std::thread::sleep(Duration::from_millis(200));
        switches(name) == before
    });
}

#[test]
fn both_sides_full_and_then_drained_go_on_and_do_not_spin() {
    let mut device = Device::named("full");
    // The host takes nothing, and the guest has no buffers.
    let mut on_wire = 0;
    while device.wire.send(&frame(500, on_wire as u8)).is_ok() {
        on_wire += 1;
    }
    let offered = device.send_until_full();
    // Nothing can be done, and nothing is.
    rests("net-full");
    // The host drains: what waited goes, and then what the guest has room for.
    device.drain(offered);
    until("the last one's return", || sent(&device.driver) == offered);
    let mut received = 0;
    while received < on_wire {
        device.driver.chain(&[(DATA + 0x1000, 600, true)]);
        device.kicks[0].write(1).unwrap();
        let mut came = None;
        until("a frame for the guest", || {
            came = device.driver.used();
            came.is_some()
        });
        assert_eq!(came.map(|(_, len)| len), Some(512));
        let got = device.driver.bytes(DATA + 0x1000, 512);
        assert_eq!(got[12..], frame(500, received as u8)[12..], "{received}");
        received += 1;
    }
    let counters = device.host.counters();
    assert_eq!(counters.received, on_wire as u64);
    assert_eq!(counters.sent, u64::from(offered));
    assert_eq!((counters.receive_dropped, counters.send_dropped), (0, 0));
}

#[test]
fn a_reset_and_a_new_driver_begin_anew() {
    let mut device = Device::active();
    device.wire.send(&frame(10, 1)).unwrap();
    for _ in 0..3 {
        device.net.reset();
        device.driver = Driver::new(memory(), SIZE);
        device.activate();
        device.driver.chain(&[(DATA, 100, true)]);
        device.wire.send(&frame(20, 2)).unwrap();
        until("a frame", || device.driver.used() == Some((0, 32)));
    }
}

#[test]
fn the_guest_reads_address_mtu_and_link_and_is_told_of_changes() {
    let device = Device::active();
    let read = || {
        let mut bytes = [0xff; 16];
        device.net.read_config(0, &mut bytes);
        bytes
    };
    let mut wanted = [0; 16];
    wanted[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    wanted[6] = 1;
    wanted[10..12].copy_from_slice(&1400_u16.to_le_bytes());
    assert_eq!(read(), wanted);
    let mut part = [0; 2];
    device.net.read_config(10, &mut part);
    assert_eq!(part, 1400_u16.to_le_bytes());
    device.net.read_config(u64::MAX, &mut part);
    assert_eq!(part, [0; 2]);
    device.host.set_link(true);
    assert_eq!(device.interrupt.status(), 0, "it is up already");
    device.host.set_link(false);
    assert_eq!(device.interrupt.status(), INTERRUPT_CONFIG);
    assert_ne!(device.interrupt.generation(), 0);
    wanted[6] = 0;
    assert_eq!(read(), wanted);
    let mut shown = [0; 16];
    device.interrupt.page().read(0x100, &mut shown);
    assert_eq!(shown, wanted, "the guest reads it without asking");
    device.host.set_link(true);
    wanted[6] = 1;
    assert_eq!(read(), wanted);
}

#[test]
fn frames_that_nobody_takes_are_dropped() {
    let mut device = Device::active();
    let (other, _) = UnixDatagram::pair().unwrap();
    device.wire = other;
    device.driver.fill(DATA, &frame(30, 1));
    send(&device.driver, 0, &[(DATA, 42, false)]);
    device.kicks[1].write(1).unwrap();
    until("the frame that nobody takes", || sent(&device.driver) == 1);
    assert_eq!(device.host.counters().send_dropped, 1);
}

#[test]
fn an_interface_that_ends_takes_the_link_down_and_costs_nothing() {
    let (_events, handle) =
        EventLoop::start("test", |message| panic!("unexpected: {message}")).unwrap();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let config = NetConfig {
        name: "ends".to_owned(),
        ..config()
    };
    let (mut net, host) = Net::new(config, Tap::of_frames(theirs.into()), handle).unwrap();
    let driver = Driver::new(memory(), SIZE);
    let interrupt = Interrupt::new(eventfd());
    let activation = Activation {
        ram: GuestRam::new(driver.memory.clone()),
        interrupt: interrupt.clone(),
        queues: queues(&driver, false).into(),
        features: 0,
    };
    net.activate(activation).unwrap();
    assert!(host.link());
    drop(ours);
    until("the link is down", || !host.link());
    assert_eq!(interrupt.status(), INTERRUPT_CONFIG);
    rests("net-ends");
}

#[test]
fn what_cannot_be_configured_is_named() {
    for (config, words) in [
        (
            NetConfig {
                mtu: Some(67),
                ..config()
            },
            "An MTU of 67 bytes is not possible",
        ),
        (
            NetConfig {
                mac: [1, 0, 0x5e, 0, 0, 1],
                ..config()
            },
            "01:00:5e:00:00:01 is no address of one interface",
        ),
        (
            NetConfig {
                mac: [0; 6],
                ..config()
            },
            "00:00:00:00:00:00",
        ),
    ] {
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    for name in ["", "a/b", "a b", "sixteen-bytes-it"] {
        let error = Tap::open(name).unwrap_err().to_string();
        assert!(error.contains(&format!("{name:?} is no name")), "{error}");
    }
}
