//! Requests of sound, mistaken and hostile drivers. The host's end is in
//! `host`, a comparison with a model in `model`.

mod host;
mod model;

use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{BATCH, SLOTS_PER_TURN, Service};
use super::*;
use crate::event_loop::{EventLoop, EventLoopHandle};
use crate::memory::GuestMemory;
use crate::memory::layout::{GIB, MIB};
use crate::memory::stand_in::StandIn;
use crate::virtio::device::{Activation, ActiveQueue, Interrupt};
use crate::virtio::queue::driver::{DATA, Driver, END, GAP, ISLAND, Part, SEAM};

const BASE: u64 = 4 * GIB;
const SLOT: u64 = SLOT_UNIT;
const REGION: u64 = 16 * SLOT;
const BLOCK: u64 = BLOCK_BYTES;
const PER_SLOT: u16 = (SLOT / BLOCK) as u16;

const CONFIG: MemConfig = MemConfig {
    base: BASE,
    region_bytes: REGION,
    slot_bytes: SLOT,
};

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

const REQUEST: u64 = DATA;
const RESPONSE: u64 = DATA + 0x1000;

/// A device that is served by hand.
struct Rig {
    memory: Arc<GuestMemory>,
    kvm: Arc<StandIn>,
    driver: Driver,
    device: Mem,
    host: MemHost,
    service: Service,
    kick: Arc<EventFd>,
    interrupt: Interrupt,
    _events: EventLoop,
}

fn quiet_loop() -> (EventLoop, EventLoopHandle) {
    EventLoop::start("test-loop", |message| panic!("unexpected: {message}")).expect("an event loop")
}

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an eventfd")
}

fn boot_memory() -> (Arc<GuestMemory>, Arc<StandIn>) {
    StandIn::memory(&[(0, SEAM), (SEAM, GAP - SEAM), (ISLAND, END - ISLAND)])
}

fn driver_of(memory: &GuestMemory) -> Driver {
    Driver::new((*memory.ram().memory()).clone(), 16)
}

impl Rig {
    fn new(requested: u64) -> Self {
        let (memory, kvm) = boot_memory();
        let (events, handle) = quiet_loop();
        let (device, host) = Mem::new(CONFIG, Arc::clone(&memory), handle).expect("a device");
        host.set_requested(requested).expect("requested");
        let driver = driver_of(&memory);
        let kick = Arc::new(eventfd());
        let interrupt = Interrupt::new(eventfd());
        let service = device.service(activation(&memory, driver.queue(false), &kick, &interrupt));
        Self {
            service: service.expect("one queue"),
            memory,
            kvm,
            driver,
            device,
            host,
            kick,
            interrupt,
            _events: events,
        }
    }

    /// One request in one descriptor each way, served to its end: type and state of the response.
    fn ask(&mut self, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
        self.put(REQUEST, kind, address, blocks);
        self.driver.fill(RESPONSE, &[0xee; 10]);
        self.driver
            .chain(&[(REQUEST, 24, false), (RESPONSE, 10, true)]);
        for _ in 0..1000 {
            self.service.turn();
            if let Some((_, len)) = self.driver.used() {
                assert_eq!(len, 10);
                self.device.checker()();
                return (self.driver.read(RESPONSE), self.driver.read(RESPONSE + 8));
            }
            assert_eq!(self.kick.read().ok(), Some(1), "there is more to come");
        }
        panic!("no answer");
    }

    fn put(&self, at: u64, kind: u16, address: u64, blocks: u16) {
        self.driver.fill(at, &[0xee; 24]);
        self.driver.write(at, kind);
        self.driver.write(at + 8, address);
        self.driver.write(at + 16, blocks);
    }

    fn plug(&mut self, address: u64, blocks: u16) {
        assert_eq!(self.ask(PLUG, address, blocks), (ACK, 0), "{address:#x}");
    }

    /// The slots of the region that KVM knows, as numbers.
    fn slots(&self) -> Vec<u64> {
        let slots = self.kvm.slots().into_iter();
        slots
            .filter(|(base, _)| *base >= BASE)
            .map(|(base, size)| {
                assert_eq!(size, SLOT);
                (base - BASE) / SLOT
            })
            .collect()
    }

    fn write(&self, address: u64, value: u64) -> bool {
        let ram = self.memory.ram().memory();
        ram.write_obj(value, GuestAddress(address)).is_ok()
    }

    fn value(&self, address: u64) -> Option<u64> {
        let ram = self.memory.ram().memory();
        ram.read_obj(GuestAddress(address)).ok()
    }
}

fn activation(
    memory: &GuestMemory,
    queue: Queue,
    kick: &Arc<EventFd>,
    interrupt: &Interrupt,
) -> Activation {
    Activation {
        ram: memory.ram(),
        interrupt: interrupt.clone(),
        queues: vec![ActiveQueue {
            queue,
            kick: Arc::clone(kick),
        }],
        features: 0,
    }
}

#[test]
fn requests_are_answered_as_the_specification_says() {
    let end = BASE + 4 * SLOT;
    for (kind, address, blocks, expected) in [
        (PLUG, BASE, 1, (ACK, 0)),
        (PLUG, end - BLOCK, 1, (ACK, 0)),
        (PLUG, BASE, 0, (ERROR, 0)),
        (PLUG, BASE + 4096, 1, (ERROR, 0)),
        (PLUG, BASE + BLOCK / 2, 1, (ERROR, 0)),
        (PLUG, BASE - BLOCK, 1, (ERROR, 0)),
        (PLUG, BASE - BLOCK, 2, (ERROR, 0)),
        (PLUG, 0, 1, (ERROR, 0)),
        (PLUG, end, 1, (ERROR, 0)),
        (PLUG, end - BLOCK, 2, (ERROR, 0)),
        (PLUG, BASE + REGION, 1, (ERROR, 0)),
        (PLUG, u64::MAX - BLOCK + 1, 1, (ERROR, 0)),
        (PLUG, u64::MAX - BLOCK + 1, 2, (ERROR, 0)),
        (PLUG, u64::MAX, u16::MAX, (ERROR, 0)),
        (PLUG, BASE, u16::MAX, (ERROR, 0)),
        // Blocks 64 to 71 are plugged.
        (PLUG, BASE + SLOT, 1, (ERROR, 0)),
        (PLUG, BASE + SLOT - BLOCK, 2, (ERROR, 0)),
        (PLUG, BASE + SLOT + 8 * BLOCK, 4, (ACK, 0)),
        (PLUG, BASE, PER_SLOT * 3, (ERROR, 0)),
        (UNPLUG, BASE + SLOT, 8, (ACK, 0)),
        (UNPLUG, BASE + SLOT + 7 * BLOCK, 1, (ACK, 0)),
        (UNPLUG, BASE + SLOT, 0, (ERROR, 0)),
        (UNPLUG, BASE + SLOT, 9, (ERROR, 0)),
        (UNPLUG, BASE + SLOT - BLOCK, 2, (ERROR, 0)),
        (UNPLUG, BASE, 1, (ERROR, 0)),
        (UNPLUG, BASE + SLOT + 1, 1, (ERROR, 0)),
        (UNPLUG, end, 1, (ERROR, 0)),
        (UNPLUG, u64::MAX - BLOCK + 1, 2, (ERROR, 0)),
        (STATE, BASE + SLOT, 8, (ACK, PLUGGED)),
        (STATE, BASE + SLOT, 9, (ACK, MIXED)),
        (STATE, BASE, PER_SLOT, (ACK, UNPLUGGED)),
        (STATE, BASE, PER_SLOT + 1, (ACK, MIXED)),
        (STATE, BASE, PER_SLOT * 4, (ACK, MIXED)),
        (STATE, BASE, 0, (ERROR, 0)),
        (STATE, BASE + 4096, 1, (ERROR, 0)),
        (STATE, end, 1, (ERROR, 0)),
        (STATE, end - BLOCK, 2, (ERROR, 0)),
        (STATE, u64::MAX - BLOCK + 1, u16::MAX, (ERROR, 0)),
        (UNPLUG_ALL, u64::MAX, 0, (ACK, 0)),
        (4, BASE, 1, (ERROR, 0)),
        (u16::MAX, BASE, 1, (ERROR, 0)),
    ] {
        let mut rig = Rig::new(4 * SLOT);
        rig.plug(BASE + SLOT, 8);
        let before = rig.host.status().plugged;
        let got = rig.ask(kind, address, blocks);
        let what = format!("request {kind}: {blocks} blocks at {address:#x}");
        assert_eq!(got, expected, "{what}");
        let change = u64::from(blocks) * BLOCK;
        let plugged = match (kind, got.0) {
            (PLUG, ACK) => before + change,
            (UNPLUG, ACK) => before - change,
            (UNPLUG_ALL, ACK) => 0,
            _ => before,
        };
        assert_eq!(rig.host.status().plugged, plugged, "{what}");
        assert!(!rig.interrupt.needs_reset(), "{what}");
    }
}

#[test]
fn more_than_was_requested_is_not_plugged() {
    let mut rig = Rig::new(4 * BLOCK);
    assert_eq!(rig.ask(PLUG, BASE, 5), (NACK, 0));
    assert_eq!(rig.slots(), [0; 0], "nothing was made");
    rig.plug(BASE, 3);
    assert_eq!(rig.ask(PLUG, BASE + 3 * BLOCK, 2), (NACK, 0));
    rig.plug(BASE + 3 * BLOCK, 1);
    assert_eq!(rig.ask(PLUG, BASE + 4 * BLOCK, 1), (NACK, 0));
    rig.host.set_requested(BLOCK).expect("requested");
    assert_eq!(rig.ask(PLUG, BASE + 4 * BLOCK, 1), (NACK, 0));
    assert_eq!(rig.ask(UNPLUG, BASE, 4), (ACK, 0));
    rig.plug(BASE + 8 * BLOCK, 1);
    assert_eq!(rig.ask(PLUG, BASE, 1), (NACK, 0));
    rig.host.set_requested(0).expect("requested");
    assert_eq!(rig.ask(UNPLUG, BASE + 8 * BLOCK, 1), (ACK, 0));
    assert_eq!(rig.ask(PLUG, BASE, 1), (NACK, 0));
}

#[test]
fn a_slot_is_there_while_one_of_its_blocks_is_plugged() {
    let mut rig = Rig::new(REGION);
    assert_eq!(rig.slots(), [0; 0]);
    rig.plug(BASE + 5 * SLOT - BLOCK, 2);
    assert_eq!((rig.slots(), rig.host.status().slots), (vec![4, 5], 2));
    assert!(rig.write(BASE + 5 * SLOT - 8, 7));
    assert!(!rig.write(BASE + 3 * SLOT, 7), "no slot, no memory");
    rig.plug(BASE + 5 * SLOT + BLOCK, 1);
    assert_eq!(rig.ask(UNPLUG, BASE + 5 * SLOT, 1), (ACK, 0));
    assert_eq!(rig.slots(), [4, 5]);
    assert_eq!(rig.ask(UNPLUG, BASE + 5 * SLOT + BLOCK, 1), (ACK, 0));
    assert_eq!((rig.slots(), rig.host.status().slots), (vec![4], 1));
    assert_eq!(rig.value(BASE + 5 * SLOT), None);
    assert_eq!(rig.value(BASE + 5 * SLOT - 8), Some(7));
    assert_eq!(rig.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!((rig.slots(), rig.memory.size()), (vec![], 3 * MIB));
    rig.plug(BASE + 4 * SLOT, PER_SLOT);
    assert_eq!(rig.value(BASE + 5 * SLOT - 8), Some(0), "fresh memory");
}

#[test]
fn what_is_unplugged_in_a_slot_that_stays_is_given_back() {
    let mut rig = Rig::new(SLOT);
    rig.plug(BASE, 4);
    for block in 0..4 {
        assert!(rig.write(BASE + block * BLOCK, 0x1111));
        assert!(rig.write(BASE + (block + 1) * BLOCK - 8, 0x2222));
    }
    assert_eq!(rig.ask(UNPLUG, BASE + BLOCK, 2), (ACK, 0));
    let expected = [Some(0x1111), Some(0), Some(0), Some(0x1111)];
    for (block, expected) in expected.into_iter().enumerate() {
        assert_eq!(rig.value(BASE + block as u64 * BLOCK), expected, "{block}");
    }
    assert_eq!(rig.value(BASE + 3 * BLOCK - 8), Some(0));
    assert_eq!(rig.value(BASE + 4 * BLOCK - 8), Some(0x2222));
}

#[test]
fn the_usable_region_grows_with_the_request_and_shrinks_when_all_is_unplugged() {
    let mut rig = Rig::new(0);
    let usable = |rig: &Rig| rig.host.status().usable;
    assert_eq!(usable(&rig), 0);
    assert_eq!(rig.ask(PLUG, BASE, 1), (ERROR, 0), "nothing is usable");
    for (requested, expected) in [
        (BLOCK, SLOT),
        (SLOT, SLOT),
        (SLOT + BLOCK, 2 * SLOT),
        (BLOCK, 2 * SLOT),
        (0, 2 * SLOT),
        (REGION, REGION),
        (3 * BLOCK, REGION),
    ] {
        rig.host.set_requested(requested).expect("requested");
        assert_eq!(usable(&rig), expected, "{requested:#x}");
    }
    rig.plug(BASE + REGION - BLOCK, 1);
    assert_eq!(rig.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(usable(&rig), SLOT);
    assert_eq!(rig.ask(STATE, BASE + SLOT, 1), (ERROR, 0));
    rig.host.set_requested(0).expect("requested");
    assert_eq!(rig.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(usable(&rig), 0);
}

#[test]
fn a_host_without_slots_is_busy_and_takes_back_what_it_made() {
    let (memory, kvm) = StandIn::limited(&[(0, SEAM), (SEAM, GAP - SEAM)], 4);
    let mut rig = Rig::new(REGION);
    let (device, host) = Mem::new(CONFIG, Arc::clone(&memory), quiet_loop().1).expect("a device");
    host.set_requested(REGION).expect("requested");
    rig.driver = driver_of(&memory);
    let active = activation(&memory, rig.driver.queue(false), &rig.kick, &rig.interrupt);
    rig.service = device.service(active).expect("one queue");
    (rig.memory, rig.kvm, rig.device, rig.host) = (memory, kvm, device, host);

    rig.plug(BASE, 1);
    assert_eq!(rig.ask(PLUG, BASE + BLOCK, 2 * PER_SLOT), (BUSY, 0));
    assert_eq!(rig.slots(), [0], "the one in use stays");
    let status = rig.host.status();
    assert_eq!((status.plugged, status.failures), (BLOCK, 1));
    let failure = rig.host.last_failure().expect("a failure");
    assert!(failure.contains("slots of this VM are taken"), "{failure}");
    rig.plug(BASE + BLOCK, PER_SLOT);
    assert_eq!(rig.slots(), [0, 1]);
}

#[test]
fn what_kvm_refuses_is_busy_and_works_later() {
    let mut rig = Rig::new(REGION);
    rig.kvm.refuse_additions(true);
    for _ in 0..3 {
        assert_eq!(rig.ask(PLUG, BASE, 1), (BUSY, 0));
    }
    assert_eq!((rig.slots(), rig.host.status().plugged), (vec![], 0));
    assert_eq!(rig.host.status().failures, 3);
    rig.kvm.refuse_additions(false);
    rig.plug(BASE, 1);

    // What KVM does not let go is empty at least, and goes with the next try.
    assert!(rig.write(BASE, 7));
    rig.kvm.refuse_removals(true);
    assert_eq!(rig.ask(UNPLUG, BASE, 1), (ACK, 0));
    let status = rig.host.status();
    assert_eq!((rig.slots(), status.plugged, status.slots), (vec![0], 0, 1));
    assert_eq!(rig.value(BASE), Some(0));
    rig.kvm.refuse_removals(false);
    assert_eq!(rig.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!((rig.slots(), rig.host.status().slots), (vec![], 0));
}

#[test]
fn a_region_over_other_memory_is_never_plugged() {
    let mut rig = Rig::new(REGION);
    rig.memory.add_region(BASE + BLOCK, BLOCK).expect("added");
    assert_eq!(rig.ask(PLUG, BASE, 1), (BUSY, 0));
    rig.plug(BASE + SLOT, 1);
}

#[test]
fn blocks_that_cannot_be_given_back_stay_plugged() {
    let mut rig = Rig::new(SLOT);
    rig.plug(BASE, 4);
    let ram = rig.memory.ram().memory();
    let page = ram
        .get_slice(GuestAddress(BASE + 3 * BLOCK), 4096)
        .expect("plugged");
    let locked = page.ptr_guard_mut().as_ptr();
    // SAFETY: the page is of a mapping that `ram` keeps; locking changes nothing of it.
    let result = unsafe { libc::mlock(locked.cast(), 4096) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    assert_eq!(rig.ask(UNPLUG, BASE + 2 * BLOCK, 2), (BUSY, 0));
    assert_eq!(rig.ask(UNPLUG_ALL, 0, 0), (BUSY, 0));
    let status = rig.host.status();
    assert_eq!((status.plugged, status.failures), (4 * BLOCK, 2));
    assert_eq!(rig.ask(STATE, BASE, 4), (ACK, PLUGGED));
    assert_eq!(rig.ask(UNPLUG, BASE, 2), (ACK, 0), "others can");
    // SAFETY: as above.
    unsafe { libc::munlock(locked.cast(), 4096) };
    assert_eq!(rig.ask(UNPLUG, BASE + 2 * BLOCK, 2), (ACK, 0));
    assert_eq!(rig.slots(), [0; 0]);
}

#[test]
fn a_request_for_many_slots_takes_several_turns_and_is_answered_once() {
    let mut rig = Rig::new(REGION);
    for (kind, blocks, slots) in [(PLUG, 16 * PER_SLOT, 8), (UNPLUG_ALL, 0, 16)] {
        rig.put(REQUEST, kind, BASE, blocks);
        rig.driver
            .chain(&[(REQUEST, 24, false), (RESPONSE, 10, true)]);
        rig.service.turn();
        assert_eq!(rig.driver.used(), None);
        assert_eq!(rig.slots().len(), slots, "after {SLOTS_PER_TURN}");
        // The request is not read again.
        rig.put(REQUEST, STATE, 0, 0);
        let mut turns = 1;
        while rig.kick.read().is_ok() {
            rig.service.turn();
            turns += 1;
        }
        assert_eq!(rig.driver.used(), Some((0, 10)), "{kind}");
        assert_eq!(rig.driver.read::<u16>(RESPONSE), ACK);
        assert_eq!(rig.driver.used(), None);
        assert!((2..=5).contains(&turns), "{turns} turns");
        rig.driver = driver_of(&rig.memory);
        let active = activation(
            &rig.memory,
            rig.driver.queue(false),
            &rig.kick,
            &rig.interrupt,
        );
        rig.service = rig.device.service(active).expect("one queue");
        rig.driver.write(crate::virtio::queue::driver::USED, 0_u32);
    }
    assert_eq!(rig.slots(), [0; 0]);
}

#[test]
fn a_chain_that_the_driver_changes_meanwhile_harms_nobody_else() {
    let mut rig = Rig::new(REGION);
    rig.put(REQUEST, PLUG, BASE, 16 * PER_SLOT);
    rig.driver
        .chain(&[(REQUEST, 24, false), (RESPONSE, 10, true)]);
    rig.service.turn();
    // Its second descriptor now has no room.
    rig.driver.descriptor(
        crate::virtio::queue::driver::DESCRIPTORS,
        1,
        RESPONSE,
        9,
        crate::virtio::queue::driver::WRITE,
        0,
    );
    while rig.kick.read().is_ok() {
        rig.service.turn();
    }
    assert_eq!(rig.driver.used(), Some((0, 0)));
    assert_eq!(rig.host.status().plugged, REGION);
    assert_eq!(rig.ask(STATE, BASE, 1), (ACK, PLUGGED));
}

#[test]
fn a_reset_changes_no_block_and_ends_what_is_under_way() {
    let mut rig = Rig::new(REGION);
    rig.plug(BASE, 3);
    rig.put(REQUEST, PLUG, BASE + SLOT, 15 * PER_SLOT);
    rig.driver
        .chain(&[(REQUEST, 24, false), (RESPONSE, 10, true)]);
    rig.service.turn();
    assert_eq!(rig.slots().len(), 9);
    rig.device.abandon();
    assert_eq!(rig.host.status().plugged, 3 * BLOCK);

    // The next driver gets the slots tidied up first, and is not made to wait for its kick.
    rig.driver = driver_of(&rig.memory);
    rig.driver.write(crate::virtio::queue::driver::USED, 0_u32);
    rig.driver
        .write(crate::virtio::queue::driver::AVAILABLE, 0_u32);
    let active = activation(
        &rig.memory,
        rig.driver.queue(false),
        &rig.kick,
        &rig.interrupt,
    );
    rig.service = rig.device.service(active).expect("one queue");
    while rig.kick.read().is_ok() {
        rig.service.turn();
    }
    assert_eq!(rig.slots(), [0]);
    assert_eq!(rig.host.status().slots, 1);
    assert_eq!(rig.ask(STATE, BASE, 4), (ACK, MIXED));
    assert_eq!(rig.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(rig.slots(), [0; 0]);
}

#[test]
fn chains_of_the_wrong_form_are_answered_as_far_as_they_can_be() {
    let sixteen: Vec<Part> = (0..8).map(|n| (REQUEST + n * 3, 3, false)).collect();
    let cases: [(&str, Vec<Part>, u32, Option<u16>); 9] = [
        ("no room", vec![(REQUEST, 24, false)], 0, None),
        (
            "too little room",
            vec![(REQUEST, 24, false), (RESPONSE, 9, true)],
            0,
            None,
        ),
        (
            "short request",
            vec![(REQUEST, 23, false), (RESPONSE, 10, true)],
            10,
            Some(ERROR),
        ),
        ("no request", vec![(RESPONSE, 10, true)], 10, Some(ERROR)),
        (
            "long request",
            vec![(REQUEST, 4096, false), (RESPONSE, 10, true)],
            10,
            Some(ACK),
        ),
        (
            "much room",
            vec![(REQUEST, 24, false), (RESPONSE, 0x8000, true)],
            10,
            Some(ACK),
        ),
        (
            "response in pieces",
            vec![
                (REQUEST, 24, false),
                (RESPONSE, 1, true),
                (RESPONSE + 1, 9, true),
            ],
            10,
            Some(ACK),
        ),
        (
            "request in pieces",
            [sixteen, vec![(RESPONSE, 10, true)]].concat(),
            10,
            Some(ACK),
        ),
        (
            "request outside memory",
            vec![(GAP - 8, 24, false), (RESPONSE, 10, true)],
            0,
            None,
        ),
    ];
    for (what, parts, used, answer) in cases {
        let mut rig = Rig::new(SLOT);
        rig.put(REQUEST, PLUG, BASE, 1);
        rig.driver.fill(RESPONSE, &[0xee; 16]);
        rig.driver.chain(&parts);
        rig.service.turn();
        assert_eq!(rig.driver.used(), Some((0, used)), "{what}");
        let response = (used > 0).then(|| rig.driver.read(RESPONSE));
        assert_eq!(response, answer, "{what}");
        let plugged = u64::from(answer == Some(ACK)) * BLOCK;
        assert_eq!(rig.host.status().plugged, plugged, "{what}");
        assert!(!rig.interrupt.needs_reset(), "{what}");
        assert_eq!(rig.driver.bytes(RESPONSE + 10, 6), [0xee; 6], "{what}");
    }
}

/// Request and response lie in the block that the request unplugs, and later ones where it was.
#[test]
fn a_request_in_memory_that_it_unplugs_fails_alone() {
    let mut rig = Rig::new(SLOT);
    rig.plug(BASE, 1);
    let ram = rig.memory.ram().memory();
    let mut request = [0; 24];
    request[0] = UNPLUG as u8;
    request[8..16].copy_from_slice(&BASE.to_le_bytes());
    request[16] = 1;
    ram.write_slice(&request, GuestAddress(BASE))
        .expect("plugged");
    drop(ram);
    for expected in [10, 0] {
        rig.driver
            .chain(&[(BASE, 24, false), (BASE + 64, 10, true)]);
        rig.service.turn();
        let used = rig.driver.used().expect("returned");
        assert_eq!(used.1, expected);
    }
    assert_eq!(rig.host.status().plugged, 0);
    assert!(!rig.interrupt.needs_reset());
    rig.plug(BASE, 1);
}

#[test]
fn a_ring_in_memory_that_goes_away_stops_the_device_until_its_reset() {
    let mut rig = Rig::new(SLOT);
    rig.plug(BASE, 1);
    let mut queue = Queue::new(16).expect("a queue");
    use virtio_queue::QueueT;
    let (low, high) = (BASE as u32, (BASE >> 32) as u32);
    queue.set_desc_table_address(Some(low), Some(high));
    queue.set_avail_ring_address(Some(low + 0x1000), Some(high));
    queue.set_used_ring_address(Some(low + 0x2000), Some(high));
    queue.set_ready(true);
    assert!(queue.is_valid(&*rig.memory.ram().memory()));
    let active = activation(&rig.memory, queue, &rig.kick, &rig.interrupt);
    let mut other = rig.device.service(active).expect("one queue");
    other.turn();
    assert!(!rig.interrupt.needs_reset());
    assert_eq!(rig.ask(UNPLUG, BASE, 1), (ACK, 0));
    other.turn();
    assert!(rig.interrupt.needs_reset());
}

#[test]
fn a_turn_serves_a_few_requests_and_a_storm_of_kicks_costs_nothing() {
    let mut rig = Rig::new(SLOT);
    rig.put(REQUEST, STATE, BASE, 1);
    for _ in 0..BATCH + 2 {
        rig.driver
            .chain(&[(REQUEST, 24, false), (RESPONSE, 10, true)]);
    }
    rig.service.turn();
    assert_eq!(std::iter::from_fn(|| rig.driver.used()).count(), BATCH);
    assert_eq!(rig.kick.read().ok(), Some(1));
    rig.service.turn();
    assert_eq!(std::iter::from_fn(|| rig.driver.used()).count(), 2);
    let raised = rig.interrupt.irqfd().read().ok();
    assert_eq!(raised, Some(2), "one for each turn that used a chain");
    for _ in 0..1000 {
        rig.service.turn();
    }
    assert!(rig.kick.read().is_err());
    assert!(rig.interrupt.irqfd().read().is_err());
}
