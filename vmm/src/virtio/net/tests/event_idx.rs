//! The device behind its event loop, with a driver that uses EVENT_IDX as Linux does: it kicks, and waits, only where the rings' two
//! event indices say that the device listens, or will tell. A notification too few, and a direction stands still for ever.

mod ring;

use std::sync::Condvar;
use std::thread;

use fastrand::Rng;
use vm_memory::{Bytes, GuestAddress};

use self::ring::Ring;
use super::*;
use crate::virtio::device::INTERRUPT_USED_RING;
use crate::virtio::queue::F_EVENT_IDX;

/// Without a frame for so long, a direction stands still. A loaded machine has other things to do, too.
const LIMIT: Duration = Duration::from_secs(20);
/// Bytes of a buffer for receiving, and how many of them the largest frame needs.
const RECEIVE_BYTES: u32 = 256;
const MOST_BUFFERS: u16 = 6;
/// Bytes of the largest frames of the guest, with their headers.
const SEND_BYTES: u32 = 400;
/// Bytes between buffers for sending.
const SEND_STEP: u64 = 0x200;
/// Buffers for receiving are this far above those for sending.
const RECEIVE_DATA: u64 = DATA + 0x4_0000;

/// Says that something may have come; it is heard once, also by whoever waits later.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let rung = self.rung.lock().unwrap();
        let mut rung = self.changed.wait_while(rung, |rung| !*rung).unwrap();
        *rung = false;
    }
}

/// Writes the frame of this number, with its header: `most` bytes at most, of a length and with bytes that follow from the number.
fn numbered(frame: &mut Vec<u8>, number: u64, most: u32) {
    static BYTES: [u8; 2048] = {
        let mut bytes = [0; 2048];
        let mut i = 0;
        while i < bytes.len() {
            bytes[i] = (i * 7 / 3) as u8;
            i += 1;
        }
        bytes
    };
    let fixed = HEADER_BYTES + 8;
    let spread = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let len = spread as usize % (most as usize - fixed + 1);
    let from = number as usize % 251;
    frame.clear();
    frame.resize(HEADER_BYTES, 0);
    frame.extend(number.to_le_bytes());
    frame.extend_from_slice(&BYTES[from..from + len]);
}

/// Lets others go on, mostly for next to nothing and now and then for long.
fn pause(rng: &mut Rng) {
    match rng.u8(..) {
        0..4 => thread::sleep(Duration::from_micros(rng.u64(..1000))),
        4..24 => thread::yield_now(),
        // About as long as the device takes from one look at a ring to the next.
        24..152 => (0..rng.u8(..)).for_each(|_| std::hint::spin_loop()),
        _ => {}
    }
}

/// What all threads of a run know.
struct Run {
    /// Frames of each direction.
    frames: u64,
    seed: u64,
    interrupt: Interrupt,
    /// Of the driver's two threads.
    bells: [Bell; 2],
    /// Frames that have arrived, for the guest and from it.
    arrived: [AtomicU64; 2],
    over: AtomicBool,
}

impl Run {
    fn goes_on(&self) -> bool {
        !self.over.load(Ordering::SeqCst)
    }

    /// Works on a thread whose panic ends the others.
    fn guarded(&self, work: impl FnOnce()) {
        struct Guard<'r>(&'r Run);
        impl Drop for Guard<'_> {
            fn drop(&mut self) {
                if thread::panicking() {
                    self.0.end();
                }
            }
        }
        let _guard = Guard(self);
        work();
    }

    /// Ends all threads.
    fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.interrupt.irqfd().write(1).unwrap();
        self.bells.iter().for_each(Bell::ring);
    }

    /// The driver's interrupt handler.
    fn interrupts(&self) {
        while self.goes_on() {
            self.interrupt.irqfd().read().unwrap();
            self.interrupt.acknowledge(INTERRUPT_USED_RING);
            self.bells.iter().for_each(Bell::ring);
        }
    }

    /// The guest sends.
    fn send(&self, mut ring: Ring) {
        let mut rng = Rng::with_seed(self.seed);
        let (mut bytes, mut number, mut back) = (Vec::new(), 0, 0);
        while back < self.frames && self.goes_on() {
            while ring.take().is_some() {
                back += 1;
            }
            let lot = u64::from(ring.room().min(rng.u16(1..=4))).min(self.frames - number);
            for _ in 0..lot {
                numbered(&mut bytes, number, SEND_BYTES);
                let address = DATA + ring.slot() * SEND_STEP;
                ring.memory
                    .write_slice(&bytes, GuestAddress(address))
                    .unwrap();
                ring.put(address, bytes.len() as u32, 0);
                number += 1;
            }
            if lot > 0 {
                ring.show();
                // The next lot comes when the device has just found nothing more, and is about to say that it listens.
                if rng.bool() {
                    ring.watch(rng.u64(..200), |ring| ring.used() == ring.offered);
                }
                pause(&mut rng);
                continue;
            }
            // Full, or at the end. Some drivers look again and again.
            if rng.u8(..) < 8 {
                ring.watch(rng.u64(..2000), |ring| ring.used() != ring.taken);
                continue;
            }
            let more = match rng.bool() {
                true => 0,
                false => ring.outstanding() * 3 / 4,
            };
            if ring.outstanding() > 0 && ring.want_interrupt(more) {
                self.bells[1].wait();
            }
        }
    }

    /// The guest receives.
    fn receive(&self, mut ring: Ring) {
        let mut rng = Rng::with_seed(self.seed + 1);
        let (mut got, mut wanted, mut number) = (Vec::new(), Vec::new(), 0);
        while self.goes_on() {
            while let Some(first) = ring.take() {
                got.clear();
                let mut buffer = Some(first);
                let mut left = 1;
                while left > 0 {
                    let (slot, len) = buffer.expect("all of a frame shows at once");
                    let at = GuestAddress(RECEIVE_DATA + slot * u64::from(RECEIVE_BYTES));
                    let from = got.len();
                    got.resize(from + len as usize, 0);
                    ring.memory.read_slice(&mut got[from..], at).unwrap();
                    if from == 0 {
                        left = u16::from_le_bytes([got[10], got[11]]);
                    }
                    left -= 1;
                    buffer = if left > 0 { ring.take() } else { None };
                }
                numbered(&mut wanted, number, RECEIVE_BYTES * u32::from(MOST_BUFFERS));
                wanted[10..12].copy_from_slice(&got[10..12]);
                assert!(got == wanted, "frame {number} for the guest");
                number += 1;
                self.arrived[0].store(number, Ordering::SeqCst);
                if rng.u8(..) < 32 {
                    break;
                }
            }
            if number == self.frames {
                return;
            }
            // It starves for a while, or not.
            pause(&mut rng);
            // The largest frame has room at last, or its driver waits for nothing.
            while ring.room() > 0 && (ring.outstanding() < MOST_BUFFERS || rng.bool()) {
                let most = if rng.bool() { ring.room() } else { 1 };
                for _ in 0..rng.u16(1..=most) {
                    let address = RECEIVE_DATA + ring.slot() * u64::from(RECEIVE_BYTES);
                    ring.put(address, RECEIVE_BYTES, WRITE);
                }
                ring.show();
                pause(&mut rng);
            }
            if ring.want_interrupt(0) {
                self.bells[0].wait();
            }
        }
    }

    /// The other end of the wire, which now and then only sends, or only takes, or does nothing.
    fn host(&self, wire: &UnixDatagram, host: &NetHost) {
        let mut rng = Rng::with_seed(self.seed + 2);
        let (mut bytes, mut wanted, mut got) = (Vec::new(), Vec::new(), vec![0; 2048]);
        let (mut given, mut taken) = (0, 0);
        while (given < self.frames || taken < self.frames) && self.goes_on() {
            let (gives, takes) = (rng.u8(..4) != 0, rng.u8(..4) != 0);
            for _ in 0..rng.u16(1..60) {
                let mut moved = false;
                if gives && given < self.frames {
                    let most = RECEIVE_BYTES * u32::from(MOST_BUFFERS);
                    numbered(&mut bytes, given, most);
                    match wire.send(&bytes) {
                        Ok(_) => (given, moved) = (given + 1, true),
                        Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                    }
                }
                if takes && let Ok(len) = wire.recv(&mut got) {
                    numbered(&mut wanted, taken, SEND_BYTES);
                    assert!(got[..len] == wanted, "frame {taken} of the guest");
                    (taken, moved) = (taken + 1, true);
                    self.arrived[1].store(taken, Ordering::SeqCst);
                }
                if !moved {
                    thread::yield_now();
                    break;
                }
            }
            // Now and then it takes nothing until the wire is full, and the guest sends no more.
            let mut sent = rng.bool().then_some(taken);
            while sent.is_some() {
                thread::sleep(Duration::from_micros(200));
                let now = host.counters().sent;
                sent = (sent != Some(now)).then_some(now);
            }
        }
    }
}

/// Numbered frames both ways over queues of this size.
fn run(size: u16, frames: u64, seed: u64) {
    let (_events, handle) =
        EventLoop::start("test", |message| panic!("unexpected: {message}")).unwrap();
    let (wire, tap) = wires();
    let (mut net, host) = Net::new(config(), tap, handle).unwrap();
    let driver = Driver::new(memory(), size);
    // Whoever takes interrupts waits for them.
    let interrupt = Interrupt::new(EventFd::new(0).unwrap());
    let queues = queues(&driver, true);
    let rings = || {
        let [receive, send] = &queues;
        [(0, &receive.kick), (BESIDE, &send.kick)]
            .map(|(beside, kick)| Ring::new(&driver, beside, kick))
    };
    let ([receive, send], shown) = (rings(), rings());
    net.activate(Activation {
        ram: GuestRam::new(driver.memory.clone()),
        interrupt: interrupt.clone(),
        queues: queues.into(),
        features: F_EVENT_IDX | 1 << VIRTIO_NET_F_MRG_RXBUF,
    })
    .unwrap();
    let run = Run {
        frames,
        seed,
        interrupt,
        bells: [Bell::default(), Bell::default()],
        arrived: [AtomicU64::new(0), AtomicU64::new(0)],
        over: AtomicBool::new(false),
    };
    let mut stuck = None;
    thread::scope(|scope| {
        let handler = scope.spawn(|| run.interrupts());
        let working = [
            scope.spawn(|| run.guarded(|| run.receive(receive))),
            scope.spawn(|| run.guarded(|| run.send(send))),
            scope.spawn(|| run.guarded(|| run.host(&wire, &host))),
        ];
        let mut before = [(0, Instant::now()); 2];
        while stuck.is_none() && run.goes_on() && !working.iter().all(|thread| thread.is_finished())
        {
            thread::sleep(Duration::from_millis(5));
            for (direction, (count, since)) in before.iter_mut().enumerate() {
                let now = run.arrived[direction].load(Ordering::SeqCst);
                if now > *count {
                    (*count, *since) = (now, Instant::now());
                } else if since.elapsed() > LIMIT && !working[direction].is_finished() {
                    let [receive, send] = shown.each_ref().map(Ring::state);
                    stuck = Some(format!(
                        "{} stands still after {now} of {frames} frames, seed {seed}. Receive: {receive}. Send: {send}. {:?}",
                        ["receiving", "sending"][direction],
                        host.counters()
                    ));
                }
            }
        }
        run.end();
        for thread in working.into_iter().chain([handler]) {
            if let Err(panic) = thread.join()
                && stuck.is_none()
            {
                std::panic::resume_unwind(panic);
            }
        }
    });
    if let Some(stuck) = stuck {
        panic!("{stuck}");
    }
    let counters = host.counters();
    assert_eq!((counters.received, counters.sent), (frames, frames));
    assert_eq!((counters.receive_dropped, counters.send_dropped), (0, 0));
    assert!(!run.interrupt.needs_reset());
}

/// Small queues are full or empty all the time, and their indices wrap.
#[test]
fn with_event_idx_nothing_waits_for_ever() {
    run(SIZE, 70_000, 1);
}

/// More chains wait than a turn of the loop serves.
#[test]
fn with_event_idx_nothing_waits_for_ever_in_large_queues() {
    run(4 * BATCH as u16, 70_000, 2);
}
