//! The transport as drivers use and abuse it.

use std::sync::Mutex;

use proptest::prelude::*;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INTERRUPT_STATUS};

use super::*;
use crate::virtio::device::{INTERRUPT_CONFIG, INTERRUPT_USED_RING};
use crate::virtio::queue::RING_FEATURES;
use crate::virtio::queue::driver::{AVAILABLE, DESCRIPTORS, END, GAP, USED, memory};

const STATUS: u64 = VIRTIO_MMIO_STATUS as u64;
const DEVICE_FEATURE: u64 = 1 << 3;
const SIZES: [u16; 2] = [8, 4];

/// What the device was asked to do.
#[derive(Default)]
struct Log {
    activations: Vec<Activation>,
    active: bool,
    resets: usize,
    written: Vec<(u64, Vec<u8>)>,
}

struct Dummy {
    log: Arc<Mutex<Log>>,
    fails: bool,
    required: usize,
}

impl VirtioDevice for Dummy {
    fn kind(&self) -> &'static str {
        "dummy"
    }
    fn device_id(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        RING_FEATURES | DEVICE_FEATURE
    }
    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }
    fn required_queues(&self) -> usize {
        self.required
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = (offset + i as u64) as u8;
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        assert!(!data.is_empty() && offset + data.len() as u64 <= WINDOW_SIZE - CONFIG);
        let mut log = self.log.lock().expect("the log");
        log.written.push((offset, data.to_vec()));
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut log = self.log.lock().expect("the log");
        assert!(!log.active, "activated twice without a reset");
        if self.fails {
            return Err(ActivateError {
                device: "dummy",
                why: "not today".to_owned(),
            });
        }
        log.active = true;
        log.activations.push(activation);
        Ok(())
    }
    fn reset(&mut self) {
        let mut log = self.log.lock().expect("the log");
        log.active = false;
        log.resets += 1;
    }
}

/// A driver's view of a window with a dummy in it.
struct Guest {
    window: Window,
    log: Arc<Mutex<Log>>,
}

impl Guest {
    fn new() -> Self {
        Self::with(false, SIZES.len())
    }

    fn with(fails: bool, required: usize) -> Self {
        let log = Arc::new(Mutex::new(Log::default()));
        let mut window = Window::new(GuestRam::new(memory()), page()).expect("a window");
        let device = Dummy {
            log: Arc::clone(&log),
            fails,
            required,
        };
        window.plug(Box::new(device)).expect("plugged");
        Self { window, log }
    }

    fn get(&self, register: u32) -> u32 {
        let mut data = [0xee; 4];
        self.window.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, register: u32, value: u32) {
        self.window.write(register.into(), &value.to_le_bytes());
    }

    fn status(&self) -> u32 {
        self.get(VIRTIO_MMIO_STATUS)
    }

    fn negotiate(&mut self, features: u64) {
        for status in [1, 3] {
            self.set(VIRTIO_MMIO_STATUS, status);
        }
        for (sel, word) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, sel);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, word);
        }
        self.set(VIRTIO_MMIO_STATUS, 0xb);
    }

    fn set_queue(&mut self, index: u32, size: u32, rings: [u64; 3]) {
        self.set(VIRTIO_MMIO_QUEUE_SEL, index);
        self.set(VIRTIO_MMIO_QUEUE_NUM, size);
        let registers = [
            VIRTIO_MMIO_QUEUE_DESC_LOW,
            VIRTIO_MMIO_QUEUE_AVAIL_LOW,
            VIRTIO_MMIO_QUEUE_USED_LOW,
        ];
        for (register, address) in registers.into_iter().zip(rings) {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn set_queues(&mut self) {
        self.set_queue(0, 8, RINGS);
        self.set_queue(1, 4, RINGS.map(|address| address + 0x400));
    }

    fn run(&mut self) {
        self.negotiate(F_VERSION_1);
        self.set_queues();
        self.set(VIRTIO_MMIO_STATUS, 0xf);
        assert_eq!(self.status(), 0xf);
    }

    fn resets(&self) -> usize {
        self.log.lock().expect("the log").resets
    }

    fn activations(&self) -> usize {
        self.log.lock().expect("the log").activations.len()
    }
}

fn page() -> RegisterPage {
    RegisterPage::alone().expect("a page")
}

const RINGS: [u64; 3] = [DESCRIPTORS, AVAILABLE, USED];

#[test]
fn a_spare_window_says_that_it_has_no_device() {
    let mut window = Window::new(GuestRam::new(memory()), page()).expect("a window");
    let get = |window: &Window, register: u32| {
        let mut data = [0xee; 4];
        window.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(get(&window, 0), u32::from_le_bytes(*b"virt"));
    assert_eq!(get(&window, 4), 2);
    assert_eq!(get(&window, 8), 0);
    window.write(STATUS, &1_u32.to_le_bytes());
    for register in (0x10..0x1000).step_by(4) {
        assert_eq!(get(&window, register), 0, "{register:#x}");
    }
    assert!(window.kicks().is_empty());
    assert!(window.unplug().is_none());
}

#[test]
fn a_driver_that_follows_the_order_gets_its_device() {
    let mut guest = Guest::new();
    assert_eq!(guest.get(VIRTIO_MMIO_DEVICE_ID), 42);
    assert_eq!(
        guest.get(VIRTIO_MMIO_VENDOR_ID),
        u32::from_le_bytes(*b"NACR")
    );
    let mut offered = 0_u64;
    for (sel, shift) in [(0, 0), (1, 32)] {
        guest.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, sel);
        offered |= u64::from(guest.get(VIRTIO_MMIO_DEVICE_FEATURES)) << shift;
    }
    assert_eq!(offered, RING_FEATURES | DEVICE_FEATURE | F_VERSION_1);
    guest.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(guest.get(VIRTIO_MMIO_DEVICE_FEATURES), 0);

    guest.negotiate(offered);
    assert_eq!(guest.status(), 0xb);
    for (index, max) in [(0, 8), (1, 4), (2, 0), (u32::MAX, 0)] {
        guest.set(VIRTIO_MMIO_QUEUE_SEL, index);
        assert_eq!(guest.get(VIRTIO_MMIO_QUEUE_NUM_MAX), max);
        assert_eq!(guest.get(VIRTIO_MMIO_QUEUE_READY), 0);
    }
    guest.set_queue(0, 4, RINGS);
    assert_eq!(guest.get(VIRTIO_MMIO_QUEUE_READY), 1);
    guest.set_queue(1, 4, RINGS.map(|address| address + 0x400));
    guest.set(VIRTIO_MMIO_STATUS, 0xf);
    assert_eq!(guest.status(), 0xf);

    let log = guest.log.lock().expect("the log");
    let activation = log.activations.first().expect("activated");
    assert_eq!(activation.features, offered);
    let queues: Vec<_> = activation
        .queues
        .iter()
        .map(|active| {
            let queue = &active.queue;
            (queue.size(), queue.desc_table(), queue.event_idx_enabled())
        })
        .collect();
    assert_eq!(
        queues,
        [(4, DESCRIPTORS, true), (4, DESCRIPTORS + 0x400, true)]
    );
    for (active, kick) in activation.queues.iter().zip(guest.window.kicks()) {
        assert!(Arc::ptr_eq(&active.kick, kick));
    }
}

#[test]
fn features_must_be_offered_and_modern() {
    for (features, accepted) in [
        (F_VERSION_1, true),
        (F_VERSION_1 | DEVICE_FEATURE | F_EVENT_IDX, true),
        (0, false),
        (DEVICE_FEATURE, false),
        (F_VERSION_1 | 1 << 4, false),
        (F_VERSION_1 | 1 << 40, false),
        (u64::MAX, false),
    ] {
        let mut guest = Guest::new();
        guest.negotiate(features);
        let status = if accepted { 0xb } else { 3 };
        assert_eq!(guest.status(), status, "{features:#x}");
    }
}

#[test]
fn features_are_not_renegotiated_once_they_are_settled() {
    let mut guest = Guest::new();
    guest.negotiate(F_VERSION_1);
    guest.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    guest.set(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    guest.set(VIRTIO_MMIO_STATUS, 3);
    guest.set(VIRTIO_MMIO_STATUS, 0xb);
    assert_eq!(guest.status(), 0xb);
    guest.set_queues();
    guest.set(VIRTIO_MMIO_STATUS, 0xf);
    let log = guest.log.lock().expect("the log");
    assert_eq!(
        log.activations.first().expect("active").features,
        F_VERSION_1
    );
}

#[test]
fn skipped_and_cleared_status_bits_change_nothing() {
    let mut guest = Guest::new();
    for value in [2, 3, 4, 8, 0xf, 0x10, 0x100] {
        guest.set(VIRTIO_MMIO_STATUS, value);
        assert_eq!(guest.status(), 0, "{value:#x}");
    }
    guest.run();
    for value in [1, 3, 7, 0xb, 0x1f] {
        guest.set(VIRTIO_MMIO_STATUS, value);
        assert_eq!(guest.status(), 0xf, "{value:#x}");
    }
    assert_eq!((guest.activations(), guest.resets()), (1, 0));
}

#[test]
fn queues_cannot_be_set_up_before_features_or_after_driver_ok() {
    let mut guest = Guest::new();
    guest.set(VIRTIO_MMIO_STATUS, 1);
    guest.set_queues();
    assert_eq!(guest.get(VIRTIO_MMIO_QUEUE_READY), 0);
    guest.run();
    guest.set_queue(0, 2, [END; 3]);
    guest.set(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(guest.get(VIRTIO_MMIO_QUEUE_READY), 1);
    // Nothing of it is left for later either.
    let queue = guest.window.plugged.as_ref().expect("a device").queues[0];
    assert_eq!((queue.size, queue.descriptors), (8, DESCRIPTORS));
}

#[test]
fn a_ready_queue_keeps_its_registers_until_it_is_not() {
    let mut guest = Guest::new();
    guest.negotiate(F_VERSION_1);
    guest.set_queue(0, 8, RINGS);
    guest.set_queue(0, 2, [END; 3]);
    let queue = |guest: &Guest| guest.window.plugged.as_ref().expect("a device").queues[0];
    assert_eq!((queue(&guest).size, queue(&guest).used), (8, USED));
    guest.set(VIRTIO_MMIO_QUEUE_READY, 0);
    guest.set_queue(0, 2, [DESCRIPTORS, AVAILABLE, USED + 64]);
    assert_eq!((queue(&guest).size, queue(&guest).used), (2, USED + 64));
}

#[test]
fn activation_with_unusable_queues_needs_a_reset_and_says_so() {
    let high = 1 << 40;
    let cases: [(&str, u32, [u64; 3]); 16] = [
        ("size 0", 0, RINGS),
        ("no power of two", 6, RINGS),
        ("over the maximum", 16, RINGS),
        ("size over 16 bits", 0x1_0008, RINGS),
        (
            "misaligned descriptors",
            8,
            [DESCRIPTORS + 8, AVAILABLE, USED],
        ),
        (
            "misaligned available",
            8,
            [DESCRIPTORS, AVAILABLE + 1, USED],
        ),
        ("misaligned used", 8, [DESCRIPTORS, AVAILABLE, USED + 2]),
        ("descriptors outside", 8, [GAP, AVAILABLE, USED]),
        ("descriptors into the gap", 8, [GAP - 64, AVAILABLE, USED]),
        ("available outside", 8, [DESCRIPTORS, END, USED]),
        ("available past the end", 8, [DESCRIPTORS, END - 20, USED]),
        ("available never set", 8, [DESCRIPTORS, 0, USED]),
        ("used outside", 8, [DESCRIPTORS, AVAILABLE, GAP]),
        ("used at 2^64", 8, [DESCRIPTORS, AVAILABLE, u64::MAX - 3]),
        ("in a window", 8, [0xd000_0000, AVAILABLE, USED]),
        (
            "far away",
            8,
            [DESCRIPTORS | high, AVAILABLE | high, USED | high],
        ),
    ];
    for (name, size, rings) in cases {
        let mut guest = Guest::new();
        guest.negotiate(F_VERSION_1);
        guest.set_queues();
        guest.set(VIRTIO_MMIO_QUEUE_SEL, 0);
        guest.set(VIRTIO_MMIO_QUEUE_READY, 0);
        guest.set_queue(0, size, rings);
        guest.set(VIRTIO_MMIO_STATUS, 0xf);
        assert_eq!(guest.status(), 0x4f, "{name}");
        assert_eq!(
            guest.window.interrupt().status(),
            INTERRUPT_CONFIG,
            "{name}"
        );
        assert_eq!(guest.window.interrupt().irqfd().read().ok(), Some(1));
        assert_eq!(guest.activations(), 0, "{name}");
        // It comes back after a reset.
        guest.set(VIRTIO_MMIO_STATUS, 0);
        assert_eq!(
            (guest.status(), guest.get(VIRTIO_MMIO_INTERRUPT_STATUS)),
            (0, 0)
        );
        guest.run();
    }
}

#[test]
fn a_queue_that_was_left_out_or_a_device_that_fails_needs_a_reset() {
    let mut guest = Guest::new();
    guest.negotiate(F_VERSION_1);
    guest.set_queue(0, 8, RINGS);
    guest.set(VIRTIO_MMIO_STATUS, 0xf);
    assert_eq!(guest.status(), 0x4f);

    let mut guest = Guest::with(true, SIZES.len());
    guest.negotiate(F_VERSION_1);
    guest.set_queues();
    guest.set(VIRTIO_MMIO_STATUS, 0xf);
    assert_eq!((guest.status(), guest.resets()), (0x4f, 1));
    guest.set(VIRTIO_MMIO_STATUS, 0xf);
    assert_eq!(guest.status(), 0x4f);
}

#[test]
fn a_queue_that_may_be_left_out_is_missing_and_the_others_are_there() {
    for (left_out, expected) in [(1, Some(vec![0])), (0, None), (2, Some(vec![0, 1]))] {
        let mut guest = Guest::with(false, 1);
        guest.negotiate(F_VERSION_1);
        guest.set_queues();
        guest.set(VIRTIO_MMIO_QUEUE_SEL, left_out);
        guest.set(VIRTIO_MMIO_QUEUE_READY, 0);
        guest.set(VIRTIO_MMIO_STATUS, 0xf);
        let log = guest.log.lock().expect("the log");
        let kicks = guest.window.kicks();
        let indices = log.activations.first().map(|activation| {
            let index = |queue: &ActiveQueue| {
                let mut kicks = kicks.iter();
                kicks.position(|kick| Arc::ptr_eq(kick, &queue.kick))
            };
            activation.queues.iter().filter_map(index).collect()
        });
        assert_eq!(indices, expected, "queue {left_out} left out");
    }
}

#[test]
fn a_fault_of_a_running_device_shows_until_the_reset() {
    let mut guest = Guest::new();
    guest.run();
    guest.window.interrupt().fault("dummy", &"a broken ring");
    assert_eq!(guest.status(), 0x4f);
    // A driver that writes back what it read clears nothing and breaks nothing.
    guest.set(VIRTIO_MMIO_STATUS, 0x4f);
    assert_eq!((guest.status(), guest.resets()), (0x4f, 0));
    guest.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!((guest.status(), guest.resets()), (0, 1));
    guest.run();
}

#[test]
fn a_driver_that_gives_up_stops_the_device() {
    let mut guest = Guest::new();
    guest.run();
    guest.set(VIRTIO_MMIO_STATUS, 0x8f);
    assert_eq!((guest.status(), guest.resets()), (0x8f, 1));
    guest.set(VIRTIO_MMIO_STATUS, 0xf);
    assert_eq!(guest.status(), 0x8f);
    guest.set(VIRTIO_MMIO_STATUS, 0);
    guest.run();
}

#[test]
fn a_reset_forgets_all_of_the_driver() {
    let mut guest = Guest::new();
    guest.run();
    guest.window.interrupt().used();
    guest.set(VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    guest.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!((guest.status(), guest.resets()), (0, 1));
    assert_eq!(guest.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    assert_eq!(guest.get(VIRTIO_MMIO_QUEUE_READY), 0);
    assert!(guest.window.kicks()[1].read().is_err(), "no stale kick");
    // Settled features of the last time do not count.
    for status in [1, 3, 0xb] {
        guest.set(VIRTIO_MMIO_STATUS, status);
    }
    assert_eq!(guest.status(), 3);
}

#[test]
fn notify_kicks_the_queue_of_a_running_device() {
    let mut guest = Guest::new();
    guest.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    assert!(guest.window.kicks()[0].read().is_err());
    guest.run();
    for index in [0, 1, 1, 2, u32::MAX] {
        guest.set(VIRTIO_MMIO_QUEUE_NOTIFY, index);
    }
    let kicks: Vec<_> = guest
        .window
        .kicks()
        .iter()
        .map(|kick| kick.read().ok())
        .collect();
    assert_eq!(kicks, [Some(1), Some(2)]);
}

#[test]
fn interrupt_bits_stay_until_they_are_acknowledged() {
    let mut guest = Guest::new();
    guest.run();
    let generation = guest.get(VIRTIO_MMIO_CONFIG_GENERATION);
    guest.window.interrupt().used();
    guest.window.interrupt().config_changed(|| [7; 2]);
    assert_eq!(guest.get(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    assert_ne!(guest.get(VIRTIO_MMIO_CONFIG_GENERATION), generation);
    // What the device has published, and behind it what was there.
    assert_eq!(guest.get(VIRTIO_MMIO_CONFIG), 0x0302_0707);
    guest.set(VIRTIO_MMIO_INTERRUPT_ACK, INTERRUPT_USED_RING);
    assert_eq!(guest.get(VIRTIO_MMIO_INTERRUPT_STATUS), INTERRUPT_CONFIG);
    guest.set(VIRTIO_MMIO_INTERRUPT_ACK, u32::MAX);
    assert_eq!(guest.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn there_is_no_shared_memory() {
    let guest = Guest::new();
    for register in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(guest.get(register), u32::MAX);
    }
}

#[test]
fn registers_are_written_as_four_bytes_and_read_as_they_lie() {
    let mut guest = Guest::new();
    for (offset, expected) in [
        (0, &b"v"[..]),
        (1, b"irt\x02"),
        (0, b"virt\x02\0\0\0"),
        (8, &[42, 0]),
        (0x6e, &[0; 4]),
        (0x1000, &[0; 4]),
    ] {
        let mut data = vec![0xee; expected.len()];
        guest.window.read(offset, &mut data);
        assert_eq!(data, expected, "at {offset:#x}");
        guest.window.write(offset, &vec![1; data.len()]);
    }
    guest.window.write(STATUS - 2, &[1; 4]);
    guest.window.write(STATUS, &[1, 0]);
    guest.window.write(STATUS, &[1, 0, 0, 0, 0, 0, 0, 0]);
    guest.window.write(STATUS, &[1]);
    assert_eq!(guest.status(), 0);
}

#[test]
fn what_is_published_last_is_what_is_read() {
    let mut guest = Guest::new();
    guest.run();
    let interrupt = guest.window.interrupt().clone();
    // A device's thread counts up, and publishes while the driver writes. The dummy knows nothing of it.
    let newest = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let thread = std::thread::spawn({
        let newest = Arc::clone(&newest);
        move || {
            for count in 1..=2000_u32 {
                newest.store(count, std::sync::atomic::Ordering::SeqCst);
                interrupt.publish(|| {
                    newest
                        .load(std::sync::atomic::Ordering::SeqCst)
                        .to_le_bytes()
                });
            }
        }
    });
    let load = || {
        newest
            .load(std::sync::atomic::Ordering::SeqCst)
            .to_le_bytes()
    };
    while !thread.is_finished() {
        guest.window.interrupt().publish(load);
    }
    thread.join().expect("no panic");
    assert_eq!(guest.get(VIRTIO_MMIO_CONFIG), 2000);
    // What the driver writes has the device asked anew.
    guest.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(guest.get(VIRTIO_MMIO_CONFIG), 0x0302_0100);
}

#[test]
fn configuration_is_read_in_any_size_up_to_the_windows_end() {
    let mut guest = Guest::new();
    let read = |guest: &Guest, offset: u64, len: usize| {
        let mut data = vec![0xee; len];
        guest.window.read(offset, &mut data);
        data
    };
    assert_eq!(read(&guest, 0x100, 3), [0, 1, 2]);
    assert_eq!(read(&guest, 0x105, 8), [5, 6, 7, 8, 9, 10, 11, 12]);
    assert_eq!(read(&guest, 0xfff, 4), [0xff, 0, 0, 0]);
    assert_eq!(read(&guest, 0x1000, 4), [0; 4]);
    assert_eq!(read(&guest, u64::MAX, 8), [0; 8]);
    assert_eq!(
        read(&guest, 0xfe, 4),
        [0, 0, 0, 1],
        "across the registers' end"
    );

    guest.window.write(0x100, &[1, 2]);
    guest.run();
    guest.window.write(0x104, &[1, 2, 3]);
    guest.window.write(0xffe, &[1; 8]);
    guest.window.write(0x1000, &[1; 4]);
    guest.window.write(u64::MAX, &[1; 8]);
    let log = guest.log.lock().expect("the log");
    assert_eq!(log.written, [(4, vec![1, 2, 3]), (0xefe, vec![1, 1])]);
}

#[test]
fn plug_and_unplug_give_the_window_to_one_device_at_a_time() {
    let mut guest = Guest::new();
    guest.run();
    let other = Dummy {
        log: Arc::default(),
        fails: false,
        required: SIZES.len(),
    };
    let error = guest.window.plug(Box::new(other)).expect_err("occupied");
    assert!(error.to_string().contains("dummy"), "{error}");
    let device = guest.window.unplug().expect("the device");
    assert_eq!((guest.resets(), guest.get(VIRTIO_MMIO_DEVICE_ID)), (1, 0));
    assert!(guest.window.kicks().is_empty());
    guest.window.plug(device).expect("spare again");
    assert_eq!((guest.get(VIRTIO_MMIO_DEVICE_ID), guest.status()), (42, 0));
    guest.run();
}

/// One access of a guest, often one of those that a driver makes.
fn access() -> impl Strategy<Value = (bool, u64, Vec<u8>)> {
    let offset = prop_oneof![
        3 => Just(STATUS),
        6 => (0..0x40_u64).prop_map(|n| n * 4),
        1 => 0..0x1010_u64,
        1 => any::<u64>(),
    ];
    let value = prop_oneof![
        6 => prop::sample::select(vec![0_u32, 1, 2, 3, 4, 8, 0xb, 0xf, 0x40, 0x80, 0x83]),
        2 => prop::sample::select(vec![0x1000_u32, 0x1_0000, 0x1_4000, 0x2000_0000]),
        1 => any::<u32>(),
    ];
    let size = prop_oneof![12 => Just(4_usize), 1 => 0..9_usize];
    (any::<bool>(), offset, value, size).prop_map(|(write, offset, value, size)| {
        let mut data = value.to_le_bytes().to_vec();
        data.resize(size, 0);
        (write, offset, data)
    })
}

proptest! {
    /// The dummy asserts that it is never activated twice; the status is always one that a
    /// driver can reach, and live means active.
    #[test]
    fn no_sequence_of_accesses_breaks_the_order(
        accesses in prop::collection::vec(access(), 0..200),
        start in 0..3_usize,
    ) {
        let mut guest = Guest::new();
        match start {
            0 => {}
            1 => guest.negotiate(F_VERSION_1),
            _ => guest.run(),
        }
        for (write, offset, mut data) in accesses {
            if write {
                guest.window.write(offset, &data);
            } else {
                guest.window.read(offset, &mut data);
            }
            let status = guest.status();
            let known = [0, 1, 3, 0xb, 0xf, 0x4f, 0x80, 0x81, 0x83, 0x8b, 0x8f, 0xcf];
            prop_assert!(known.contains(&status), "{status:#x}");
            let log = guest.log.lock().expect("the log");
            prop_assert_eq!(log.active, status == 0xf);
        }
    }
}
