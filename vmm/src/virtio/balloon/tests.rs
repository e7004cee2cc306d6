//! Balloons of sound, greedy and broken drivers. Statistics are in `stats`,
//! the configuration and the host's end in `host`.

mod host;
mod stats;

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{BATCH, FEATURE_REPORTING, FEATURE_STATS, Service};
use super::pages::PAGES_PER_REQUEST;
use super::*;
use crate::event_loop::EventLoop;
use crate::memory::GuestMemory;
use crate::memory::layout::MIB;
use crate::memory::stand_in::StandIn;
use crate::virtio::device::{Activation, ActiveQueue, Interrupt};
use crate::virtio::queue::driver::{
    AVAILABLE, DATA, DESCRIPTORS, Driver, END, GAP, INDIRECT, ISLAND, Part, SEAM, WRITE,
};

const INFLATE: u32 = 0;
const DEFLATE: u32 = 1;
const STATS: u32 = 2;
const REPORTING: u32 = 3;
const ASK: u32 = 4;

/// Rings of the queues that a test leaves alone.
const IDLE: u64 = ISLAND + 0x8_0000;
/// What is filled with ones, page by page: not the rings, nor what the requests are in.
const FILLED: [(u64, u64); 3] = [(0x8_0000, SEAM), (SEAM, GAP), (ISLAND, IDLE)];

/// A device that is served by hand, with a driver of one of its queues.
struct Rig {
    memory: Arc<GuestMemory>,
    driver: Driver,
    device: Balloon,
    host: BalloonHost,
    service: Service,
    event: u32,
    kick: Arc<EventFd>,
    interrupt: Interrupt,
    _events: EventLoop,
}

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an eventfd")
}

fn boot_memory() -> Arc<GuestMemory> {
    StandIn::memory(&[(0, SEAM), (SEAM, GAP - SEAM), (ISLAND, END - ISLAND)]).0
}

fn idle_queue(memory: &GuestMemory) -> Queue {
    let mut queue = Queue::new(128).expect("a queue");
    queue.set_desc_table_address(Some(IDLE as u32), Some(0));
    queue.set_avail_ring_address(Some(IDLE as u32 + 0x1000), Some(0));
    queue.set_used_ring_address(Some(IDLE as u32 + 0x2000), Some(0));
    queue.set_ready(true);
    assert!(queue.is_valid(&*memory.ram().memory()));
    queue
}

/// An activation with all four queues, of which the driver has `event`'s.
fn activation(
    memory: &GuestMemory,
    driver: &Driver,
    event: u32,
    kick: &Arc<EventFd>,
    interrupt: &Interrupt,
) -> Activation {
    let queues = (0..4).map(|index| {
        if index == event {
            ActiveQueue {
                queue: driver.queue(false),
                kick: Arc::clone(kick),
            }
        } else {
            ActiveQueue {
                queue: idle_queue(memory),
                kick: Arc::new(eventfd()),
            }
        }
    });
    Activation {
        ram: memory.ram(),
        interrupt: interrupt.clone(),
        queues: queues.collect(),
        features: FEATURE_STATS | FEATURE_REPORTING,
    }
}

impl Rig {
    fn new(event: u32) -> Self {
        Self::sized(event, 128)
    }

    fn sized(event: u32, size: u16) -> Self {
        let memory = boot_memory();
        let (events, handle) =
            EventLoop::start("test-loop", |message| panic!("unexpected: {message}"))
                .expect("an event loop");
        let (device, host) = Balloon::new(Arc::clone(&memory), handle).expect("an eventfd");
        let driver = Driver::new((*memory.ram().memory()).clone(), size);
        for (start, end) in FILLED {
            driver.fill(start, &vec![0xff; (end - start) as usize]);
        }
        let kick = Arc::new(eventfd());
        let interrupt = Interrupt::new(eventfd());
        let active = activation(&memory, &driver, event, &kick, &interrupt);
        let service = device.service(active).expect("all queues");
        Self {
            memory,
            driver,
            device,
            host,
            service,
            event,
            kick,
            interrupt,
            _events: events,
        }
    }

    /// Offers a chain and serves it; the used length.
    fn send(&mut self, parts: &[Part]) -> u32 {
        self.driver.chain(parts);
        self.service.turn(self.event);
        assert!(!self.interrupt.needs_reset());
        self.driver.used().expect("returned").1
    }

    /// Inflates by these page numbers.
    fn inflate(&mut self, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.driver.fill(DATA, &bytes);
        assert_eq!(self.send(&[(DATA, bytes.len() as u32, false)]), 0);
    }

    /// The pages of what was filled that are no longer full, as addresses.
    fn gone(&self) -> Vec<u64> {
        let pages = FILLED
            .iter()
            .flat_map(|(start, end)| (*start..*end).step_by(PAGE_BYTES as usize));
        pages
            .filter(|page| {
                let bytes = self.driver.bytes(*page, PAGE_BYTES as usize);
                let gone = bytes.iter().all(|byte| *byte == 0);
                assert!(gone || bytes.iter().all(|byte| *byte == 0xff), "{page:#x}");
                gone
            })
            .collect()
    }
}

fn page(address: u64) -> u32 {
    (address / PAGE_BYTES) as u32
}

#[test]
fn inflated_pages_are_given_back_and_no_others() {
    let outside = page(GAP);
    let seam = page(SEAM);
    let last = page(ISLAND) - 1;
    let cases: [(&str, Vec<u32>, Vec<u64>, u64); 10] = [
        ("none", vec![], vec![], 0),
        ("one", vec![seam], vec![SEAM], 0),
        (
            "neighbours over a seam, backwards",
            vec![seam + 1, seam, seam - 1],
            vec![SEAM - 0x1000, SEAM, SEAM + 0x1000],
            0,
        ),
        ("one twice", vec![seam, seam, seam], vec![SEAM], 0),
        ("outside", vec![outside], vec![], 1),
        (
            "a run that leads out of memory",
            vec![outside - 2, outside - 1, outside, outside + 1],
            vec![GAP - 0x2000, GAP - 0x1000],
            2,
        ),
        (
            "a run that leads into memory",
            vec![last, page(ISLAND)],
            vec![ISLAND],
            1,
        ),
        ("a device's window", vec![0xd_0000, 0xf_ee00], vec![], 2),
        (
            "the last page numbers",
            vec![u32::MAX, u32::MAX - 1, 0x8000_0000],
            vec![],
            3,
        ),
        (
            "numbers that wrap",
            vec![u32::MAX, page(0x8_0000)],
            vec![0x8_0000],
            1,
        ),
    ];
    for (what, pages, gone, refused) in cases {
        let mut rig = Rig::new(INFLATE);
        rig.inflate(&pages);
        assert_eq!(rig.gone(), gone, "{what}");
        let stats = rig.host.stats();
        let bytes = gone.len() as u64 * PAGE_BYTES;
        assert_eq!(
            (stats.inflated_bytes, stats.refused),
            (bytes, refused),
            "{what}"
        );
    }
}

#[test]
fn more_pages_than_were_asked_for_are_the_drivers_affair() {
    let mut rig = Rig::new(INFLATE);
    rig.host.set_target(PAGE_BYTES).expect("a target");
    rig.inflate(&[page(SEAM), page(SEAM) + 7]);
    rig.inflate(&[page(SEAM)]);
    let stats = rig.host.stats();
    assert_eq!((stats.target_bytes, stats.refused), (PAGE_BYTES, 0));
    assert_eq!(stats.inflated_bytes, 3 * PAGE_BYTES, "one came twice");
    assert_eq!(rig.gone(), [SEAM, SEAM + 0x7000]);
}

#[test]
fn a_giant_inflate_request_is_capped() {
    let mut rig = Rig::new(INFLATE);
    let many = 0x1_0000_u32;
    for at in 0..many {
        rig.driver.write(DATA + u64::from(at) * 4, 0xd_0000 + at);
    }
    // Beyond what is looked at.
    let beyond = DATA + PAGES_PER_REQUEST as u64 * 4;
    rig.driver.write(beyond, page(SEAM));
    rig.send(&[(DATA, many * 4, false)]);
    assert_eq!(rig.gone(), [0; 0]);
    assert_eq!(rig.host.stats().refused, u64::from(many));
    // 2^30 numbers, by a table of buffers that are all the same memory.
    let table = DATA + 0x4_8000;
    for index in 0..127 {
        let (flags, next) = if index < 126 { (1, index + 1) } else { (0, 0) };
        let size = (GAP - SEAM) as u32;
        rig.driver.descriptor(table, index, SEAM, size, flags, next);
    }
    rig.driver
        .descriptor(DESCRIPTORS, 1, table, 127 * 16, INDIRECT, 0);
    rig.driver.offer(1);
    let start = Instant::now();
    rig.service.turn(INFLATE);
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(rig.driver.used(), Some((1, 0)));
    assert!(!rig.interrupt.needs_reset());
}

#[test]
fn an_inflate_request_of_odd_form_is_taken_as_far_as_it_goes() {
    for (what, parts, gone) in [
        ("three bytes", vec![(DATA, 3, false)], 0),
        ("a page and a half", vec![(DATA, 6, false)], 1),
        ("writable", vec![(DATA, 4, true)], 0),
        (
            "in pieces",
            vec![(DATA, 1, false), (DATA + 1, 2, false), (DATA + 3, 5, false)],
            2,
        ),
        ("outside memory", vec![(GAP - 4, 8, false)], 0),
        (
            "at the end of the address space",
            vec![(u64::MAX, 8, false)],
            0,
        ),
    ] {
        let mut rig = Rig::new(INFLATE);
        rig.driver.write(DATA, page(SEAM));
        rig.driver.write(DATA + 4, page(SEAM) + 1);
        assert_eq!(rig.send(&parts), 0, "{what}");
        assert_eq!(rig.gone().len(), gone, "{what}");
        assert_eq!(rig.driver.read::<u32>(DATA), page(SEAM), "{what}");
    }
}

#[test]
fn deflating_is_acknowledged_and_changes_nothing() {
    let mut rig = Rig::new(DEFLATE);
    rig.driver.write(DATA, page(SEAM));
    for parts in [
        vec![(DATA, 4, false)],
        vec![(DATA, 3, true)],
        vec![(SEAM, 0x10_0000, false)],
        vec![(GAP, 4, false)],
    ] {
        assert_eq!(rig.send(&parts), 0);
    }
    assert_eq!(rig.gone(), [0; 0]);
    assert_eq!(rig.host.stats(), BalloonStats::default());
}

/// A report: what it is, its buffers, the ranges (address, pages) that go, and how many are refused.
type Report = (&'static str, Vec<Part>, Vec<(u64, u64)>, u64);

#[test]
fn reported_ranges_are_given_back_if_they_are_whole_pages_of_memory() {
    let cases: [Report; 11] = [
        ("one page", vec![(SEAM, 0x1000, true)], vec![(SEAM, 1)], 0),
        (
            "several ranges",
            vec![(SEAM, 0x2000, true), (ISLAND, 0x1000, true)],
            vec![(SEAM, 2), (ISLAND, 1)],
            0,
        ),
        (
            "over a seam",
            vec![(SEAM - 0x1000, 0x3000, true)],
            vec![(SEAM - 0x1000, 3)],
            0,
        ),
        (
            "the same twice",
            vec![(SEAM, 0x1000, true), (SEAM, 0x1000, true)],
            vec![(SEAM, 1)],
            0,
        ),
        ("nothing", vec![(SEAM, 0, true)], vec![], 0),
        ("not aligned", vec![(SEAM + 8, 0x1000, true)], vec![], 1),
        (
            "half a page among whole ones",
            vec![
                (SEAM, 0x1000, true),
                (SEAM + 0x1000, 0x800, true),
                (SEAM + 0x2000, 0x1000, true),
            ],
            vec![(SEAM, 1), (SEAM + 0x2000, 1)],
            1,
        ),
        (
            "a range that may not be written",
            vec![(SEAM, 0x1000, false), (ISLAND, 0x1000, true)],
            vec![(ISLAND, 1)],
            1,
        ),
        ("into a gap", vec![(GAP - 0x1000, 0x2000, true)], vec![], 1),
        (
            "a device's window",
            vec![(SEAM, 0x1000, true), (0xd000_0000, 0x1000, true)],
            vec![],
            1,
        ),
        (
            "wrapping",
            vec![(u64::MAX - 0xfff, 0x2000, true)],
            vec![],
            1,
        ),
    ];
    for (what, parts, gone, refused) in cases {
        let mut rig = Rig::new(REPORTING);
        assert_eq!(rig.send(&parts), 0, "{what}");
        let pages = gone
            .iter()
            .flat_map(|(base, count)| (0..*count).map(move |page| base + page * PAGE_BYTES));
        assert_eq!(rig.gone(), pages.collect::<Vec<_>>(), "{what}");
        let stats = rig.host.stats();
        assert_eq!(stats.refused, refused, "{what}");
        let twice = u64::from(what == "the same twice");
        let bytes = (gone.iter().map(|(_, count)| count).sum::<u64>() + twice) * PAGE_BYTES;
        assert_eq!(stats.reported_bytes, bytes, "{what}");
    }
}

#[test]
fn reports_are_counted_and_memory_that_was_plugged_may_be_reported_until_it_is_gone() {
    let mut rig = Rig::new(REPORTING);
    let plugged = 1 << 32;
    rig.memory.add_region(plugged, MIB).expect("added");
    let ram = rig.memory.ram();
    ram.memory()
        .write_obj(7_u8, GuestAddress(plugged))
        .expect("there");
    rig.send(&[(plugged, MIB as u32, true)]);
    let value = ram.memory().read_obj::<u8>(GuestAddress(plugged)).ok();
    assert_eq!(value, Some(0));
    rig.memory.remove_region_at(plugged).expect("removed");
    rig.send(&[(plugged, MIB as u32, true)]);
    let stats = rig.host.stats();
    assert_eq!((stats.reports, stats.reported_bytes), (1, MIB));
    assert_eq!(stats.refused, 1);
}

#[test]
fn a_report_by_an_indirect_table_is_as_any_other() {
    let mut rig = Rig::new(REPORTING);
    rig.driver.descriptor(DATA, 0, SEAM, 0x1000, WRITE | 1, 1);
    rig.driver.descriptor(DATA, 1, ISLAND, 1, WRITE, 0);
    rig.driver.descriptor(DESCRIPTORS, 0, DATA, 32, INDIRECT, 0);
    rig.driver.offer(0);
    rig.service.turn(REPORTING);
    assert_eq!(rig.driver.used(), Some((0, 0)));
    assert_eq!(rig.gone(), [SEAM]);
    assert_eq!(rig.host.stats().refused, 1);
}

#[test]
fn a_turn_serves_a_few_chains_and_a_storm_of_kicks_costs_nothing() {
    for event in [INFLATE, DEFLATE, REPORTING] {
        let mut rig = Rig::new(event);
        for _ in 0..BATCH + 2 {
            rig.driver.chain(&[(SEAM, 0x1000, event == REPORTING)]);
        }
        rig.service.turn(event);
        assert_eq!(std::iter::from_fn(|| rig.driver.used()).count(), BATCH);
        assert_eq!(rig.kick.read().ok(), Some(1));
        rig.service.turn(event);
        assert_eq!(std::iter::from_fn(|| rig.driver.used()).count(), 2);
        assert_eq!(rig.interrupt.irqfd().read().ok(), Some(2));
        for _ in 0..1000 {
            rig.service.turn(event);
        }
        assert!(rig.kick.read().is_err());
        assert!(rig.interrupt.irqfd().read().is_err());
    }
}

#[test]
fn a_broken_ring_stops_all_queues_until_a_reset() {
    for event in [INFLATE, DEFLATE, STATS, REPORTING] {
        let mut rig = Rig::new(event);
        rig.driver.write(AVAILABLE + 2, 1000_u16);
        rig.service.turn(event);
        assert!(rig.interrupt.needs_reset());
        rig.interrupt.reset();
        for event in [INFLATE, DEFLATE, STATS, REPORTING, ASK] {
            rig.service.turn(event);
        }
        assert!(!rig.interrupt.needs_reset(), "not even looked at");
    }
}

/// A buffer that is now and then whole pages of memory.
fn part() -> impl Strategy<Value = Part> {
    let address = prop_oneof![
        4 => (0x80..0x200_u64).prop_map(|page| page * PAGE_BYTES),
        2 => 0x8_0000..GAP + 0x1000,
        1 => (ISLAND - 0x2000..IDLE).prop_map(|address| address & !0xfff),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => (0..4_u32).prop_map(|n| n * 0x1000), 2 => 0..0x3000_u32, 1 => any::<u32>()];
    (address, len, any::<bool>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever is reported or inflated: only whole pages go, no more of them than were named, and each
    /// chain comes back.
    #[test]
    fn nothing_that_a_driver_names_takes_more_than_it_named(
        mut parts in prop::collection::vec(part(), 1..8),
        sorted in any::<bool>(),
        pages in prop::collection::vec(prop_oneof![8 => 0x80..0x500_u32, 1 => any::<u32>()], 0..50),
    ) {
        if sorted {
            parts.sort_by_key(|part| part.2);
        }
        let mut rig = Rig::new(REPORTING);
        rig.send(&parts);
        let named = |page: u64| {
            parts.iter().any(|&(address, len, writable)| {
                writable && address <= page && page - address + PAGE_BYTES <= u64::from(len)
            })
        };
        prop_assert!(rig.gone().into_iter().all(named));
        let stats = rig.host.stats();
        prop_assert!(stats.reported_bytes >= rig.gone().len() as u64 * PAGE_BYTES);

        let pages: Vec<u32> = pages
            .into_iter()
            .filter(|page| u64::from(*page) * PAGE_BYTES < IDLE || *page > 0x600)
            .collect();
        let mut rig = Rig::new(INFLATE);
        rig.inflate(&pages);
        let gone = rig.gone();
        let all: std::collections::BTreeSet<_> = pages.iter().map(|page| u64::from(*page) * PAGE_BYTES).collect();
        prop_assert!(gone.iter().all(|page| all.contains(page)));
        let stats = rig.host.stats();
        prop_assert_eq!(stats.inflated_bytes / PAGE_BYTES + stats.refused, all.len() as u64);
    }
}
