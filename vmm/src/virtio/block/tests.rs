//! Requests and the device as hostile drivers use them.

use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::NamedTempFile;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::backend::Disk;
use super::request::Target;
use super::*;
use crate::config::DiskConfig;
use crate::event_loop::EventLoop;
use crate::memory::stand_in::StandIn;
use crate::virtio::device::{
    Activation, ActiveQueue, GuestRam, INTERRUPT_CONFIG, INTERRUPT_USED_RING, Interrupt,
    VirtioDevice,
};
use crate::virtio::queue::driver::{AVAILABLE, DATA, Driver, END, GAP, ISLAND, Part, SEAM, memory};
use crate::virtio::queue::serve;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What a status byte holds before it is written.
const NONE: u8 = 0xee;

const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x1000;

/// An image whose sector n is full of the byte n + 1.
fn image(sectors: u8) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("an image");
    for sector in 0..sectors {
        file.write_all(&[sector + 1; 512]).expect("written");
    }
    file
}

fn config(image: &NamedTempFile, read_only: bool) -> DiskConfig {
    DiskConfig {
        path: image.path().to_owned(),
        read_only,
        id: "root".to_owned(),
    }
}

fn content(image: &NamedTempFile) -> Vec<u8> {
    let mut file = image.reopen().expect("reopened");
    file.seek(SeekFrom::Start(0)).expect("sought");
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).expect("read");
    bytes
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// Serves one chain; gives the status byte and the used length.
fn answer(disk: &Disk, driver: &mut Driver, parts: &[Part]) -> (u8, u32) {
    driver.fill(STATUS, &[NONE]);
    driver.chain(parts);
    let target = Target {
        disk,
        id: b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        write_through: false,
        cancelled: &AtomicBool::new(false),
    };
    let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
    let mut queue = driver.queue(false);
    queue.try_set_size(driver.size).expect("a size");
    serve(&mut queue, &driver.memory, &interrupt, 8, |chain| {
        target.execute(chain)
    })
    .expect("a sound ring");
    let (_, len) = driver.used().expect("answered");
    (driver.read(STATUS), len)
}

/// One request with its header in one descriptor and `data` between header and status.
fn request(disk: &Disk, kind: u32, sector: u64, data: &[Part]) -> (Driver, u8, u32) {
    let mut driver = Driver::new(memory(), 8);
    driver.fill(HEADER, &header(kind, sector));
    let mut parts = vec![(HEADER, 16, false)];
    parts.extend_from_slice(data);
    parts.push((STATUS, 1, true));
    let (status, len) = answer(disk, &mut driver, &parts);
    (driver, status, len)
}

#[test]
fn reading_gives_the_sectors_and_counts_the_status() {
    let image = image(8);
    let disk = Disk::open(&config(&image, true)).expect("a disk");
    let parts = [(BUFFER, 600, true), (SEAM - 100, 424, true)];
    let (driver, status, len) = request(&disk, 0, 3, &parts);
    assert_eq!((status, len), (OK, 1025));
    let mut bytes = driver.bytes(BUFFER, 600);
    bytes.extend(driver.bytes(SEAM - 100, 424));
    assert_eq!(bytes, [[4; 512], [5; 512]].concat());
}

#[test]
fn writing_changes_these_sectors_only() {
    let image = image(4);
    let disk = Disk::open(&config(&image, false)).expect("a disk");
    let mut driver = Driver::new(memory(), 8);
    driver.fill(HEADER, &header(1, 1));
    driver.fill(ISLAND, &[0xaa; 1024]);
    let parts = [
        (HEADER, 16, false),
        (ISLAND, 1000, false),
        (ISLAND + 1000, 24, false),
        (STATUS, 1, true),
    ];
    assert_eq!(answer(&disk, &mut driver, &parts), (OK, 1));
    let expected = [[1; 512], [0xaa; 512], [0xaa; 512], [4; 512]].concat();
    assert_eq!(content(&image), expected);
}

#[test]
fn a_read_only_disk_is_not_written_and_its_file_is_not_open_for_it() {
    let image = image(4);
    let disk = Disk::open(&config(&image, true)).expect("a disk");
    let (_, status, len) = request(&disk, 1, 0, &[(BUFFER, 512, false)]);
    assert_eq!((status, len), (IOERR, 1));
    let (_, status, _) = request(&disk, 4, 0, &[]);
    assert_eq!(status, OK, "there is nothing to flush");
    assert_eq!(content(&image)[..512], [1; 512]);
}

#[test]
fn sectors_past_the_end_or_wrapping_are_errors() {
    let image = image(4);
    let disk = Disk::open(&config(&image, false)).expect("a disk");
    for kind in [0, 1] {
        for (sector, len) in [
            (4, 512),
            (3, 1024),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (1 << 55, 512),
            (0, 511),
            (0, 513),
            (0, 4096),
        ] {
            let (driver, status, used) = request(&disk, kind, sector, &[(BUFFER, len, kind == 0)]);
            assert_eq!(status, IOERR, "kind {kind}: {len} at {sector}");
            assert_eq!(
                used, kind,
                "kind {kind}: nothing was written before the status"
            );
            assert_eq!(driver.bytes(BUFFER, 512), [0; 512]);
        }
    }
    assert_eq!(content(&image).len(), 4 * 512);
}

#[test]
fn a_request_of_no_length_is_fine_within_the_disk() {
    let image = image(4);
    let disk = Disk::open(&config(&image, false)).expect("a disk");
    for kind in [0, 1] {
        for (sector, expected) in [(0, OK), (4, OK), (5, IOERR)] {
            let (_, status, len) = request(&disk, kind, sector, &[]);
            assert_eq!((status, len), (expected, 1), "kind {kind} at {sector}");
        }
    }
}

#[test]
fn unknown_requests_are_unsupported() {
    let image = image(4);
    let disk = Disk::open(&config(&image, false)).expect("a disk");
    for kind in [2, 3, 5, 11, 13, 14, 0x8000_0000, u32::MAX] {
        let (_, status, len) = request(&disk, kind, 0, &[]);
        assert_eq!((status, len), (UNSUPP, 1), "kind {kind}");
    }
}

#[test]
fn the_id_is_given_in_twenty_bytes_or_as_many_as_fit() {
    let image = image(4);
    let disk = Disk::open(&config(&image, true)).expect("a disk");
    for (room, expected_len) in [(20, 21), (4, 5), (30, 20), (0, 1)] {
        let (driver, status, len) = request(&disk, 8, 0, &[(BUFFER, room, true)]);
        assert_eq!((status, len), (OK, expected_len), "{room} bytes of room");
        let expected = &b"root\0\0\0\0"[..room.min(8) as usize];
        assert_eq!(driver.bytes(BUFFER, expected.len()), expected);
    }
}

#[test]
fn requests_without_header_or_status_are_answered_as_far_as_they_can_be() {
    let image = image(4);
    let disk = Disk::open(&config(&image, false)).expect("a disk");
    for (name, parts, expected) in [
        ("no status", vec![(HEADER, 16, false)], (NONE, 0)),
        ("nothing", vec![(HEADER, 0, false)], (NONE, 0)),
        (
            "empty status",
            vec![(HEADER, 16, false), (STATUS, 0, true)],
            (NONE, 0),
        ),
        ("no header", vec![(STATUS, 1, true)], (IOERR, 1)),
        (
            "short header",
            vec![(HEADER, 15, false), (STATUS, 1, true)],
            (IOERR, 1),
        ),
        (
            "writable header",
            vec![(HEADER, 16, true), (STATUS, 1, true)],
            (IOERR, 0),
        ),
        (
            "read into a readable buffer",
            vec![(HEADER, 16, false), (BUFFER, 512, false), (STATUS, 1, true)],
            (OK, 1),
        ),
        (
            "buffer in the gap",
            vec![(HEADER, 16, false), (GAP, 512, true), (STATUS, 1, true)],
            (NONE, 0),
        ),
        (
            "status outside",
            vec![(HEADER, 16, false), (END, 1, true)],
            (NONE, 0),
        ),
        (
            "status in the gap",
            vec![
                (HEADER, 16, false),
                (BUFFER, 512, true),
                (u64::MAX, 1, true),
            ],
            (NONE, 0),
        ),
    ] {
        let mut driver = Driver::new(memory(), 8);
        driver.fill(HEADER, &header(0, 0));
        assert_eq!(answer(&disk, &mut driver, &parts), expected, "{name}");
    }
    assert_eq!(content(&image)[..512], [1; 512]);
}

#[test]
fn header_and_status_may_be_split_and_joined() {
    let image = image(4);
    let disk = Disk::open(&config(&image, true)).expect("a disk");
    let mut driver = Driver::new(memory(), 32);
    driver.fill(HEADER, &header(0, 2));
    let mut parts: Vec<Part> = (0..16).map(|i| (HEADER + i, 1, false)).collect();
    // Data and status in one descriptor.
    driver.fill(BUFFER + 512, &[NONE]);
    parts.push((BUFFER, 513, true));
    let (_, len) = answer(&disk, &mut driver, &parts);
    assert_eq!(len, 513);
    assert_eq!(driver.bytes(BUFFER, 512), [3; 512]);
    assert_eq!(driver.read::<u8>(BUFFER + 512), OK);
}

#[test]
fn a_file_that_became_shorter_is_an_error_and_not_a_hang() {
    let image = image(4);
    let disk = Disk::open(&config(&image, false)).expect("a disk");
    image.as_file().set_len(512).expect("shortened");
    let (driver, status, len) = request(&disk, 0, 0, &[(BUFFER, 1024, true)]);
    assert_eq!((status, len), (IOERR, 512), "what was read before counts");
    assert_eq!(driver.bytes(BUFFER, 512), [1; 512]);
}

#[test]
fn a_cancelled_request_is_not_answered() {
    let image = image(4);
    let disk = Disk::open(&config(&image, true)).expect("a disk");
    let mut driver = Driver::new(memory(), 8);
    driver.fill(HEADER, &header(0, 0));
    driver.fill(STATUS, &[NONE]);
    driver.chain(&[(HEADER, 16, false), (BUFFER, 512, true), (STATUS, 1, true)]);
    let target = Target {
        disk: &disk,
        id: &[0; ID_BYTES],
        write_through: false,
        cancelled: &AtomicBool::new(true),
    };
    let mut queue = driver.queue(false);
    let chain = virtio_queue::QueueOwnedT::iter(&mut queue, &driver.memory)
        .expect("a sound ring")
        .next()
        .expect("a chain");
    let chain = crate::virtio::queue::Chain::resolve(&driver.memory, chain, 8).expect("sound");
    assert_eq!(target.execute(chain), None);
    assert_eq!(driver.read::<u8>(STATUS), NONE);
}

/// A device as its transport runs it, with its event loop's reports.
struct Running {
    block: Block,
    driver: Driver,
    interrupt: Interrupt,
    kick: Arc<EventFd>,
    _events: EventLoop,
    _reports: Receiver<String>,
}

impl Running {
    fn new(config: &DiskConfig, size: u16) -> Self {
        let (report, reports) = channel();
        let (events, handle) = EventLoop::start("test-loop", move |message| {
            let _ = report.send(message);
        })
        .expect("an event loop");
        Self {
            block: Block::new(config, handle).expect("a device"),
            driver: Driver::new(memory(), size),
            interrupt: Interrupt::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd")),
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd")),
            _events: events,
            _reports: reports,
        }
    }

    fn activate(&mut self) {
        self.block
            .activate(Activation {
                ram: GuestRam::new(self.driver.memory.clone()),
                interrupt: self.interrupt.clone(),
                queues: vec![ActiveQueue {
                    queue: self.driver.queue(false),
                    kick: Arc::clone(&self.kick),
                }],
                features: self.block.features(),
            })
            .expect("activated");
    }

    fn kick(&self) {
        self.kick.write(1).expect("a kick");
    }

    fn wait(&self, what: &str, done: impl Fn() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(20), "no {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn the_device_serves_on_its_own_thread_and_starts_again_after_a_reset() {
    let image = image(4);
    let mut running = Running::new(&config(&image, true), 8);
    for _ in 0..3 {
        running.activate();
        running.driver.fill(HEADER, &header(0, 1));
        running
            .driver
            .chain(&[(HEADER, 16, false), (BUFFER, 512, true), (STATUS, 1, true)]);
        running.kick();
        running.wait("interrupt", || {
            running.interrupt.status() == INTERRUPT_USED_RING
        });
        assert_eq!(running.driver.used(), Some((0, 513)));
        running.block.reset();
        running.interrupt.reset();
        running.driver = Driver::new(memory(), 8);
    }
    running.block.reset();
}

#[test]
fn a_broken_ring_stops_the_device_until_it_is_reset() {
    let image = image(4);
    let mut running = Running::new(&config(&image, true), 8);
    running.activate();
    running.driver.write(AVAILABLE + 2, 1000_u16);
    running.kick();
    running.wait("fault", || running.interrupt.needs_reset());
    assert_eq!(running.interrupt.status(), INTERRUPT_CONFIG);
    running.kick();
    running.block.reset();
}

/// Resets a device that has many gigabytes to read; then nothing moves any more.
#[test]
fn a_reset_with_io_in_flight_ends_it_and_leaves_memory_alone() {
    let image = NamedTempFile::new().expect("an image");
    image.as_file().set_len(1 << 40).expect("a sparse file");
    let mut running = Running::new(&config(&image, true), 256);
    running.driver.fill(HEADER, &header(0, 0));
    running.driver.fill(SEAM, &[0x55]);
    let mut parts = vec![(HEADER, 16, false)];
    parts.extend(std::iter::repeat_n((SEAM, 0x10_0000, true), 254));
    parts.push((STATUS, 1, true));
    let head = running.driver.chain(&parts);
    for _ in 1..255 {
        running.driver.offer(head);
    }
    running.activate();
    running.kick();
    running.wait("first read", || running.driver.read::<u8>(SEAM) == 0);
    let start = Instant::now();
    running.block.reset();
    assert!(start.elapsed() < Duration::from_secs(10));
    running.driver.fill(SEAM, &[0x77; 4096]);
    let used = running
        .driver
        .read::<u16>(crate::virtio::queue::driver::USED + 2);
    assert!(used < 255, "it was not through");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(running.driver.bytes(SEAM, 4096), [0x77; 4096]);
    assert_eq!(
        running
            .driver
            .read::<u16>(crate::virtio::queue::driver::USED + 2),
        used
    );
}

#[test]
fn dropping_an_active_device_ends_its_thread_and_unlocks_the_image() {
    let image = image(4);
    let mut running = Running::new(&config(&image, false), 8);
    running.activate();
    drop(running);
    Disk::open(&config(&image, false)).expect("unlocked");
}

#[test]
fn the_configuration_has_capacity_and_segments() {
    let image = image(4);
    let running = Running::new(&config(&image, true), 8);
    let mut bytes = [0xee; 32];
    running.block.read_config(0, &mut bytes);
    assert_eq!(bytes[..8], 4_u64.to_le_bytes());
    assert_eq!(bytes[12..16], 254_u32.to_le_bytes());
    assert_eq!(bytes[16..], [0; 16]);
    for offset in [14, 16, 17, u64::MAX] {
        let mut bytes = [0xee; 4];
        running.block.read_config(offset, &mut bytes);
        assert_eq!(bytes[2..], [0; 2], "{offset}");
    }
    assert_ne!(running.block.features() & 1 << 5, 0, "RO");
    assert_ne!(running.block.features() & 1 << 9, 0, "FLUSH");
}

#[test]
fn an_id_that_is_too_long_is_refused_by_name() {
    let image = image(4);
    let (_events, handle) = EventLoop::start("test-loop", |_| {}).expect("an event loop");
    let config = DiskConfig {
        id: "a".repeat(21),
        ..config(&image, true)
    };
    let error = Block::new(&config, handle).err().expect("refused");
    assert!(error.to_string().contains("at most 20"), "{error}");
}

fn part() -> impl Strategy<Value = Part> {
    let address = prop_oneof![
        4 => DATA..SEAM,
        2 => Just(HEADER),
        1 => GAP - 600..GAP + 64,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => Just(512_u32), 2 => Just(16), 2 => Just(1), 2 => 0..3000_u32, 1 => any::<u32>()];
    (address, len, any::<bool>())
}

proptest! {
    /// Whatever the chain: an answer, no more bytes than there is room for, and a disk that
    /// keeps its size.
    #[test]
    fn no_request_upsets_the_disk(
        kind in prop_oneof![Just(0_u32), Just(1), Just(4), Just(8), any::<u32>()],
        sector in prop_oneof![0..6_u64, any::<u64>()],
        mut parts in prop::collection::vec(part(), 1..8),
        sorted in any::<bool>(),
        read_only in any::<bool>(),
    ) {
        let image = image(4);
        let disk = Disk::open(&config(&image, read_only)).expect("a disk");
        let before = content(&image);
        if sorted {
            parts.sort_by_key(|part| part.2);
        }
        let mut driver = Driver::new(memory(), 8);
        driver.fill(HEADER, &header(kind, sector));
        let (_, len) = answer(&disk, &mut driver, &parts);
        let room: u64 = parts.iter().filter(|part| part.2).map(|part| u64::from(part.1)).sum();
        prop_assert!(u64::from(len) <= room);
        let after = content(&image);
        prop_assert_eq!(after.len(), before.len());
        if read_only {
            prop_assert_eq!(after, before);
        }
    }
}

/// The view is replaced while the device is active: it sees the new memory with the next batch.
#[test]
fn a_removed_slot_is_not_read_any_more() {
    let image = image(4);
    let mut running = Running::new(&config(&image, true), 8);
    let ram = GuestRam::new(running.driver.memory.clone());
    running
        .block
        .activate(Activation {
            ram: ram.clone(),
            interrupt: running.interrupt.clone(),
            queues: vec![ActiveQueue {
                queue: running.driver.queue(false),
                kick: Arc::clone(&running.kick),
            }],
            features: running.block.features(),
        })
        .expect("activated");
    let (rest, _island): (GuestMemoryMmap, _) = running
        .driver
        .memory
        .remove_region(GuestAddress(ISLAND), END - ISLAND)
        .expect("the island is there");
    ram.lock().expect("the view").replace(rest);
    running.driver.fill(HEADER, &header(0, 1));
    running
        .driver
        .chain(&[(HEADER, 16, false), (ISLAND, 512, true), (STATUS, 1, true)]);
    running.kick();
    running.wait("interrupt", || running.interrupt.status() != 0);
    assert_eq!(running.driver.used(), Some((0, 0)));
    assert_eq!(running.driver.bytes(ISLAND, 512), [0; 512]);
    running.block.reset();
}

/// A slot of memory goes while requests with parts in it are queued: they come back without an answer, those
/// around them are served, and the device goes on.
#[test]
fn requests_into_a_removed_slot_fail_alone() {
    const PLUGGED: u64 = 1 << 32;
    const SIZE: u64 = 2 << 20;
    let (guest, _kvm) = StandIn::memory(&[(0, SEAM), (SEAM, GAP - SEAM), (PLUGGED - SIZE, SIZE)]);
    let image = image(4);
    let mut running = Running::new(&config(&image, true), 64);
    guest.add_region(PLUGGED, SIZE).expect("added");
    running.driver = Driver::new((*guest.ram().memory()).clone(), 64);
    running
        .block
        .activate(Activation {
            ram: guest.ram(),
            interrupt: running.interrupt.clone(),
            queues: vec![ActiveQueue {
                queue: running.driver.queue(false),
                kick: Arc::clone(&running.kick),
            }],
            features: running.block.features(),
        })
        .expect("activated");
    let read = header(0, 1);
    running.driver.fill(HEADER, &read);
    running.driver.fill(PLUGGED, &read);
    let (head, data, status) = ((HEADER, 16, false), (BUFFER, 512, true), (STATUS, 1, true));
    let sound = [head, data, status];
    let gone: [[Part; 3]; 4] = [
        [(PLUGGED, 16, false), data, status],
        [head, (PLUGGED + 0x1000, 512, true), status],
        [head, data, (PLUGGED + SIZE - 1, 1, true)],
        [head, (PLUGGED - 256, 512, true), status],
    ];
    for removed in [false, true] {
        let mut expected = Vec::new();
        for parts in &gone {
            let used = if removed { 0 } else { 513 };
            expected.push((u32::from(running.driver.chain(parts)), used));
            expected.push((u32::from(running.driver.chain(&sound)), 513));
        }
        if removed {
            guest.remove_region_at(PLUGGED).expect("removed");
        }
        running.driver.fill(BUFFER, &[0; 512]);
        running.driver.fill(STATUS, &[NONE]);
        running.interrupt.acknowledge(INTERRUPT_USED_RING);
        running.kick();
        let mut used = Vec::new();
        let start = Instant::now();
        while used.len() < expected.len() {
            assert!(start.elapsed() < Duration::from_secs(20), "{used:?}");
            used.extend(running.driver.used());
        }
        assert_eq!(used, expected, "removed: {removed}");
        assert_eq!(running.driver.bytes(BUFFER, 512), [2; 512]);
        assert_eq!(running.driver.read::<u8>(STATUS), OK);
        assert!(!running.interrupt.needs_reset());
    }
    running.block.reset();
}
