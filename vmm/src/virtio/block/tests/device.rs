//! The device on its own thread: activation, reset, interrupts, and memory that goes away.

use std::sync::mpsc::{Receiver, channel};

use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use super::*;
use crate::config::DiskCache;
use crate::event_loop::EventLoop;
use crate::memory::stand_in::StandIn;
use crate::virtio::device::{Activation, INTERRUPT_CONFIG, INTERRUPT_USED_RING, VirtioDevice};
use crate::virtio::queue::driver::{AVAILABLE, END, GAP, ISLAND, SEAM};

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
    fn new(config: DiskConfig, io: DiskIo, size: u16) -> Self {
        let config = DiskConfig { io, ..config };
        let (report, reports) = channel();
        let (events, handle) = EventLoop::start("test-loop", move |message| {
            let _ = report.send(message);
        })
        .expect("an event loop");
        Self {
            block: Block::new(&config, handle).expect("a device"),
            driver: Driver::new(memory(), size),
            interrupt: Interrupt::new(eventfd()),
            kick: Arc::new(eventfd()),
            _events: events,
            _reports: reports,
        }
    }

    fn activate(&mut self) {
        self.activate_with(false);
    }

    fn activate_with(&mut self, event_idx: bool) {
        self.block
            .activate(Activation {
                ram: GuestRam::new(self.driver.memory.clone()),
                interrupt: self.interrupt.clone(),
                queues: vec![ActiveQueue {
                    queue: self.driver.queue(event_idx),
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
    both(|io| {
        let image = image(4);
        let mut running = Running::new(config(&image, true), io, 8);
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
    });
}

#[test]
fn a_broken_ring_stops_the_device_until_it_is_reset() {
    both(|io| {
        let image = image(4);
        let mut running = Running::new(config(&image, true), io, 8);
        running.activate();
        running.driver.write(AVAILABLE + 2, 1000_u16);
        running.kick();
        running.wait("fault", || running.interrupt.needs_reset());
        assert_eq!(running.interrupt.status(), INTERRUPT_CONFIG);
        running.kick();
        running.block.reset();
    });
}

/// Resets a device that has many gigabytes to read; then nothing moves any more.
#[test]
fn a_reset_with_io_in_flight_ends_it_and_leaves_memory_alone() {
    both(|io| {
        for cache in [DiskCache::Host, DiskCache::Direct] {
            reset_in_flight(io, cache);
        }
    });
}

fn reset_in_flight(io: DiskIo, cache: DiskCache) {
    // Not /tmp, which may be a tmpfs without O_DIRECT.
    let image = NamedTempFile::new_in("/var/tmp").expect("an image");
    image.as_file().set_len(1 << 40).expect("a sparse file");
    let config = DiskConfig {
        cache,
        ..config(&image, true)
    };
    let mut running = Running::new(config, io, 256);
    running.driver.fill(HEADER, &header(IN, 0));
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
    let used = running.driver.read::<u16>(USED + 2);
    assert!(used < 255, "it was not through");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(running.driver.bytes(SEAM, 4096), [0x77; 4096]);
    assert_eq!(running.driver.read::<u16>(USED + 2), used);
}

/// As many requests at a time as the descriptors allow: each has its own bytes, whatever the order.
#[test]
fn many_requests_at_a_time_keep_their_bytes_apart() {
    const COUNT: u64 = 64;
    const STRIDE: u64 = 0x4000;
    both(|io| {
        let image = NamedTempFile::new().expect("an image");
        image.as_file().set_len(COUNT * STRIDE).expect("a length");
        let mut running = Running::new(config(&image, false), io, 256);
        running.activate();
        let len = |index: u64| 512 * (1 + index as u32 * 7 % 32);
        let bytes = |index: u64| -> Vec<u8> {
            let byte = |at| (u64::from(at) * 31 + index * 97 + u64::from(at) / 512) as u8;
            (0..len(index)).map(byte).collect()
        };
        for (kind, base) in [(OUT, SEAM), (IN, ISLAND)] {
            let mut order: Vec<u64> = (0..COUNT).collect();
            if kind == IN {
                order.reverse();
            }
            for index in order {
                let at = base + index * STRIDE;
                let (head, status) = (DATA + index * 32, DATA + 0x2000 + index);
                running
                    .driver
                    .fill(head, &header(kind, index * STRIDE / 512));
                running.driver.fill(status, &[NONE]);
                if kind == OUT {
                    running.driver.fill(at, &bytes(index));
                }
                let parts = [
                    (head, 16, false),
                    (at, len(index), kind == IN),
                    (status, 1, true),
                ];
                running.driver.chain(&parts);
                if index % 5 == 0 {
                    running.kick();
                }
            }
            running.kick();
            let mut done = 0;
            let start = Instant::now();
            while done < COUNT {
                assert!(start.elapsed() < Duration::from_secs(20), "{done} are done");
                done += u64::from(running.driver.used().is_some());
            }
            let statuses = running.driver.bytes(DATA + 0x2000, COUNT as usize);
            assert_eq!(statuses, [OK; COUNT as usize]);
        }
        for index in 0..COUNT {
            let read = running
                .driver
                .bytes(ISLAND + index * STRIDE, len(index) as usize);
            assert!(read == bytes(index), "request {index}");
        }
        let content = content(&image);
        for index in 0..COUNT {
            let at = (index * STRIDE) as usize;
            let end = at + len(index) as usize;
            assert!(content[at..end] == bytes(index), "write {index}");
        }
    });
}

#[test]
fn a_driver_that_wants_one_interrupt_for_many_requests_gets_one() {
    both(|io| {
        let image = image(4);
        let mut running = Running::new(config(&image, true), io, 256);
        running.driver.fill(HEADER, &header(IN, 1));
        running.driver.want_interrupt_after(63);
        let parts = [(HEADER, 16, false), (BUFFER, 512, true), (STATUS, 1, true)];
        for _ in 0..64 {
            running.driver.chain(&parts);
        }
        running.activate_with(true);
        running.kick();
        running.wait("interrupt", || running.interrupt.status() != 0);
        assert_eq!(running.driver.read::<u16>(USED + 2), 64);
        running.block.reset();
        let count = running.interrupt.irqfd().read();
        assert_eq!(count.expect("it was raised"), 1);
    });
}

#[test]
fn dropping_an_active_device_ends_its_thread_and_unlocks_the_image() {
    both(|io| {
        let image = image(4);
        let mut running = Running::new(config(&image, false), io, 8);
        running.activate();
        drop(running);
        disk(&config(&image, false));
    });
}

#[test]
fn the_configuration_has_capacity_segments_and_limits() {
    let image = image(4);
    let bytes = |running: &Running, offset, len| {
        let mut bytes = vec![0xee; len];
        running.block.read_config(offset, &mut bytes);
        bytes
    };
    for read_only in [true, false] {
        let running = Running::new(config(&image, read_only), DiskIo::Auto, 8);
        let config = bytes(&running, 0, 64);
        assert_eq!(config[..8], 4_u64.to_le_bytes());
        assert_eq!(config[8..12], [0; 4], "no SIZE_MAX");
        assert_eq!(config[12..16], 254_u32.to_le_bytes());
        assert_eq!(config[20..24], 512_u32.to_le_bytes());
        assert_eq!(config[24..28], [3, 0, 8, 0]);
        let field = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().expect("four"));
        let limits = [36, 40, 44, 48, 52].map(field);
        let (expected, unmap) = match read_only {
            true => ([0; 5], 0),
            false => ([1 << 21, 16, 8, 1 << 21, 16], 1),
        };
        assert_eq!((limits, config[56]), (expected, unmap));
        assert_eq!(config[57..], [0; 7]);
        for offset in [58, 60, 61, u64::MAX] {
            assert_eq!(bytes(&running, offset, 4)[2..], [0; 2], "{offset}");
        }
        let features = running.block.features();
        let has = |bit: u32| features & 1 << bit != 0;
        // SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, INDIRECT_DESC, EVENT_IDX; RO, DISCARD, WRITE_ZEROES.
        assert!([2, 6, 9, 10, 28, 29].into_iter().all(has), "{features:#x}");
        assert_eq!([5, 13, 14].map(has), [read_only, !read_only, !read_only]);
    }
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

/// The view is replaced while the device is active: it sees the new memory with the next batch.
#[test]
fn a_removed_slot_is_not_read_any_more() {
    both(|io| {
        let image = image(4);
        let mut running = Running::new(config(&image, true), io, 8);
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
    });
}

/// A slot of memory goes while requests with parts in it are queued: they come back without an answer, those
/// around them are served, and the device goes on.
#[test]
fn requests_into_a_removed_slot_fail_alone() {
    both(|io| {
        const PLUGGED: u64 = 1 << 32;
        const SIZE: u64 = 2 << 20;
        let (guest, _kvm) =
            StandIn::memory(&[(0, SEAM), (SEAM, GAP - SEAM), (PLUGGED - SIZE, SIZE)]);
        let image = image(4);
        let mut running = Running::new(config(&image, true), io, 64);
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
            // In the order in which they are ready.
            used.sort_unstable();
            expected.sort_unstable();
            assert_eq!(used, expected, "removed: {removed}");
            assert_eq!(running.driver.bytes(BUFFER, 512), [2; 512]);
            assert_eq!(running.driver.read::<u8>(STATUS), OK);
            assert!(!running.interrupt.needs_reset());
        }
        running.block.reset();
    });
}
