//! The device with its threads.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nacre_vmm::virtio::device::{Activation, ActiveQueue, Interrupt, VirtioDevice};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::{FromBytes, IntoBytes};

use super::descriptors;
use crate::abi::{ForgetIn, InHeader, InitIn, OutHeader, init, opcode};
use crate::testing::{ANSWER, Lane, REQUEST, memory, opath, server};
use crate::{Access, Error, FileServer};

/// A guest behind a device that runs.
struct Machine {
    memory: GuestMemoryMmap,
    lanes: [Lane; 2],
    kicks: [Arc<EventFd>; 2],
    interrupt: Interrupt,
}

fn activate(device: &mut dyn VirtioDevice) -> Machine {
    let memory = memory();
    let lanes = [Lane::new(0, 128), Lane::new(1, 512)];
    let eventfd = || Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    let kicks = [eventfd(), eventfd()];
    let interrupt = Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    let queues = lanes
        .iter()
        .zip(&kicks)
        .map(|(lane, kick)| ActiveQueue {
            queue: lane.queue(&memory),
            kick: Arc::clone(kick),
        })
        .collect();
    device
        .activate(Activation {
            ram: GuestMemoryAtomic::new(memory.clone()),
            interrupt: interrupt.clone(),
            queues,
            features: device.features(),
        })
        .expect("activated");
    Machine {
        memory,
        lanes,
        kicks,
        interrupt,
    }
}

impl Machine {
    /// Offers a request on a queue, in a place of its own.
    fn offer(&mut self, queue: usize, place: u16, request: &[u8], room: u32) {
        let offset = u64::from(place) * 0x1000;
        self.memory
            .write_slice(request, GuestAddress(REQUEST + offset))
            .unwrap();
        let parts = [
            (REQUEST + offset, request.len() as u32, false),
            (ANSWER + offset, room, true),
        ];
        self.lanes[queue].offer(&self.memory, place * 2, &parts);
    }

    /// The next place whose answer has come, and its error.
    fn wait(&mut self, queue: usize) -> (u16, i32) {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some((head, _)) = self.lanes[queue].take_used(&self.memory) {
                let place = head as u16 / 2;
                let mut answer = [0; 16];
                let at = GuestAddress(ANSWER + u64::from(place) * 0x1000);
                self.memory.read_slice(&mut answer, at).unwrap();
                return (place, OutHeader::read_from_bytes(&answer).unwrap().error);
            }
            assert!(Instant::now() < until, "no answer");
            std::thread::yield_now();
        }
    }

    fn kick(&self, queue: usize) {
        self.kicks[queue].write(1).unwrap();
    }

    fn ask(&mut self, opcode: u32, nodeid: u64, body: &[u8]) -> i32 {
        self.offer(1, 0, &request(opcode, nodeid, body), 4096);
        self.kick(1);
        self.wait(1).1
    }

    fn init(&mut self) {
        let request = InitIn {
            major: 7,
            minor: 38,
            flags: (init::DONT_MASK | init::ATOMIC_O_TRUNC | init::BIG_WRITES) as u32,
            ..Default::default()
        };
        assert_eq!(self.ask(opcode::INIT, 0, request.as_bytes()), 0);
    }
}

fn request(opcode: u32, nodeid: u64, body: &[u8]) -> Vec<u8> {
    let header = InHeader {
        len: 40 + body.len() as u32,
        opcode,
        unique: 2,
        nodeid,
        ..Default::default()
    };
    [header.as_bytes(), body].concat()
}

fn exporting(folder: &std::path::Path) -> FileServer {
    let server = server();
    server
        .export("x", opath(folder), Access::ReadWrite)
        .unwrap();
    server
}

#[test]
fn there_is_one_device_and_its_tag_is_in_the_configuration() {
    let server = server();
    for tag in ["", "a\0b", &"t".repeat(37)] {
        assert!(
            matches!(server.device(tag), Err(Error::Tag { .. })),
            "{tag:?}"
        );
    }
    let device = server.device("nacre").expect("the first");
    assert!(matches!(server.device("nacre"), Err(Error::Device)));
    assert_eq!((device.kind(), device.device_id()), ("fs", 26));
    let mut config = [0xff; 44];
    device.read_config(0, &mut config);
    assert_eq!(&config[..6], b"nacre\0");
    assert_eq!(&config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    for offset in [40, u64::MAX] {
        device.read_config(offset, &mut config[..4]);
        assert_eq!(config[..4], [0; 4]);
    }
    drop(device);
    server.device("again").expect("the first is gone");
}

#[test]
fn all_requests_of_a_burst_are_answered_by_several_threads() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "text").unwrap();
    let server = exporting(folder.path());
    let mut device = server.device("nacre").unwrap();
    let mut machine = activate(&mut *device);
    machine.init();
    assert_eq!(machine.ask(opcode::LOOKUP, 1, b"x\0"), 0);
    for _ in 0..20 {
        for place in 0..200 {
            machine.offer(1, place, &request(opcode::LOOKUP, 2, b"f\0"), 4096);
        }
        machine.kick(1);
        let mut places: Vec<_> = (0..200)
            .map(|_| {
                let (place, error) = machine.wait(1);
                assert_eq!(error, 0);
                place
            })
            .collect();
        places.sort_unstable();
        assert!(places.into_iter().eq(0..200));
    }
    assert_eq!(server.counters().inodes, 2);
    assert!(!machine.interrupt.needs_reset());
    // Forgets have a queue of their own.
    let body = ForgetIn { nlookup: 4000 };
    machine
        .memory
        .write_slice(
            &request(opcode::FORGET, 3, body.as_bytes()),
            GuestAddress(REQUEST),
        )
        .unwrap();
    // Linux leaves no room for an answer that never comes.
    machine.lanes[0].offer(&machine.memory, 0, &[(REQUEST, 48, false)]);
    machine.kick(0);
    machine.wait(0);
    assert_eq!(server.counters().inodes, 1);
}

#[test]
fn a_driver_that_kicks_only_when_asked_is_always_served() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "text").unwrap();
    let server = exporting(folder.path());
    let mut device = server.device("nacre").unwrap();
    let mut machine = activate(&mut *device);
    machine.init();
    assert_eq!(machine.ask(opcode::LOOKUP, 1, b"x\0"), 0);
    let (mut free, mut asked, mut kicks) = ((0..8).collect::<Vec<_>>(), 0_u32, 0_u32);
    while asked < 20_000 || free.len() < 8 {
        // One, two, or many at once, with some always under way, or none.
        let burst = [1, 2, 1, 8, 3, 1][asked as usize % 6];
        for _ in 0..burst {
            if asked == 20_000 {
                break;
            }
            let Some(place) = free.pop() else {
                break;
            };
            let old = machine.lanes[1].offered();
            machine.offer(1, place, &request(opcode::LOOKUP, 2, b"f\0"), 4096);
            if machine.lanes[1].wants_kick(&machine.memory, old) {
                machine.kick(1);
                kicks += 1;
            }
            asked += 1;
        }
        if asked.is_multiple_of(7) || free.is_empty() || asked == 20_000 {
            let (place, error) = machine.wait(1);
            assert_eq!(error, 0);
            free.push(place);
        }
    }
    assert!(kicks > 0 && kicks <= asked, "{kicks} of {asked}");
}

#[test]
fn a_reset_closes_everything_and_the_device_starts_again() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "text").unwrap();
    let server = exporting(folder.path());
    let before = descriptors(folder.path());
    let mut device = server.device("nacre").unwrap();
    for _ in 0..3 {
        let mut machine = activate(&mut *device);
        machine.init();
        assert_eq!(machine.ask(opcode::LOOKUP, 1, b"x\0"), 0);
        let node = server.counters().inodes;
        assert_eq!(node, 1);
        // A reset with requests under way.
        for place in 0..100 {
            machine.offer(1, place, &request(opcode::LOOKUP, 1, b"x\0"), 4096);
        }
        machine.kick(1);
        let start = Instant::now();
        device.reset();
        assert!(start.elapsed() < Duration::from_secs(5));
        let used: u16 = machine
            .memory
            .read_obj(GuestAddress(machine.lanes[1].used + 2))
            .unwrap();
        machine.kick(1);
        std::thread::sleep(Duration::from_millis(20));
        let later: u16 = machine
            .memory
            .read_obj(GuestAddress(machine.lanes[1].used + 2))
            .unwrap();
        assert_eq!(used, later, "nothing is touched after a reset");
        drop(machine);
        assert_eq!(server.counters().inodes, 0);
        assert_eq!(descriptors(folder.path()), before);
    }
    device.reset();
}

#[test]
fn a_ring_that_cannot_be_used_faults_the_device_once() {
    let server = server();
    let mut device = server.device("nacre").unwrap();
    let machine = activate(&mut *device);
    // The available index jumps beyond the queue's size.
    let at = GuestAddress(machine.lanes[1].available + 2);
    machine.memory.write_obj(1000_u16, at).unwrap();
    machine.kick(1);
    let until = Instant::now() + Duration::from_secs(10);
    while !machine.interrupt.needs_reset() {
        assert!(Instant::now() < until, "not noticed");
        std::thread::yield_now();
    }
    let start = Instant::now();
    device.reset();
    assert!(start.elapsed() < Duration::from_secs(5));
    let mut machine = activate(&mut *device);
    machine.init();
}

#[test]
fn withdrawing_while_the_guest_works_harms_no_one() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("f"), "text").unwrap();
    let server = exporting(folder.path());
    let mut device = server.device("nacre").unwrap();
    let mut machine = activate(&mut *device);
    machine.init();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let thread = std::thread::spawn({
        let (server, stop, path) = (server.clone(), Arc::clone(&stop), folder.path().to_owned());
        move || {
            let mut rounds = 0;
            while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                assert!(server.withdraw("x"));
                server.export("x", opath(&path), Access::ReadWrite).unwrap();
                rounds += 1;
            }
            rounds
        }
    });
    let mut answers = std::collections::BTreeMap::<i32, usize>::new();
    for _ in 0..100 {
        for place in 0..50 {
            machine.offer(1, place, &request(opcode::LOOKUP, 1, b"x\0"), 4096);
        }
        machine.kick(1);
        for _ in 0..50 {
            *answers.entry(machine.wait(1).1).or_default() += 1;
        }
    }
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    assert!(thread.join().unwrap() > 0);
    let known = [0, -libc::ENOENT, -libc::ESTALE];
    assert!(
        answers.keys().all(|error| known.contains(error)),
        "{answers:?}"
    );
    assert!(server.withdraw("x"));
    let counters = server.counters();
    assert_eq!((counters.inodes, counters.node_descriptors), (0, 0));
}
