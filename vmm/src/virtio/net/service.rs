//! Frames on their way between the TAP interface and the queues.
//!
//! Either side may be full for as long as it likes. A frame that the guest has no buffers for is held, and no other
//! is read until it has; a frame that the host cannot take yet stays in the queue. What then wakes the loop is the guest's
//! kick, or the interface being writable, and nothing else, so that nothing spins and nothing is forgotten. An interface
//! that gives errors only is asked again after a while.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_net::{VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::tap::Tap;
use super::{FRAME_BYTES, HEADER_BYTES, Shared};
use crate::virtio::device::{ActiveQueue, GuestRam, Interrupt};
use crate::virtio::queue::{Chain, Popped, RingError, Served, UsedBatch, pop, serve_quietly};

const KIND: &str = "net";
/// Frames of each direction in one turn of the loop.
pub(super) const BATCH: usize = 64;
/// Frames of an earlier driver that are read away when a new one comes; an interface holds 1000 by default.
const STALE: usize = 4096;
/// So many reads in a row that fail, and the interface is left alone for [`PAUSE`].
pub(super) const FAILURES: u64 = 64;
/// How long nothing is read then.
pub(super) const PAUSE: Duration = Duration::from_millis(100);
/// Where the header says in how many buffers the frame is (num_buffers).
const BUFFERS_AT: usize = 10;

/// What an event is about.
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const TAP: u32 = 2;
const AGAIN: u32 = 3;

pub(super) struct Service {
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    ram: GuestRam,
    interrupt: Interrupt,
    receive: ActiveQueue,
    transmit: ActiveQueue,
    mergeable: bool,
    /// What the link takes: longer frames of the guest are dropped.
    mtu: Option<u16>,
    /// Holds a frame of `held` bytes, if that is not 0.
    frame: Box<[u8]>,
    held: usize,
    used: UsedBatch,
    /// The host takes no frame now.
    full: bool,
    /// What of the interface is waited for.
    watched: EventSet,
    /// Reads in a row that failed, each for a frame of its own.
    failures: u64,
    /// Tells when the interface may be read again.
    again: TimerFd,
    /// Till then.
    paused: bool,
    /// The interface gives nothing any more.
    ended: bool,
    /// The rings cannot be used until a reset.
    broken: bool,
}

/// What became of a frame for the guest.
enum Placed {
    Given,
    Dropped,
    /// There are too few buffers now.
    NoRoom,
}

/// Bytes of an Ethernet header with two VLAN tags.
const LINK_BYTES: u64 = 22;
/// Bytes of the shortest headers of IP and TCP, which each segment of a frame gets.
const SEGMENT_HEADERS: u64 = 40;

/// Whether a frame of so many bytes, or a segment that is to be made of it, is longer than the link takes. What a redirect gives to an
/// interface nobody looks at again.
fn is_too_long(header: &[u8; HEADER_BYTES], len: u64, mtu: u16) -> bool {
    let mtu = u64::from(mtu);
    // struct virtio_net_hdr_v1 (5.1.6): flags, gso_type, hdr_len, gso_size.
    let gso_size = u64::from(u16::from_le_bytes([header[4], header[5]]));
    match u32::from(header[1]) & !VIRTIO_NET_HDR_GSO_ECN {
        VIRTIO_NET_HDR_GSO_NONE => len > mtu + LINK_BYTES,
        _ => gso_size + SEGMENT_HEADERS > mtu,
    }
}

/// Whether an error of a read is about the frame that it would have given: the kernel has dropped that one, for offloads that the header has
/// no word for or for want of memory, and the next may do.
fn costs_a_frame(error: &io::Error) -> bool {
    let codes = [libc::EINVAL, libc::EFAULT, libc::ENOMEM, libc::ENOBUFS];
    error
        .raw_os_error()
        .is_some_and(|code| codes.contains(&code))
}

impl Service {
    /// # Errors
    ///
    /// The host has no descriptor left for a timer.
    pub fn new(
        (tap, shared): (Arc<Tap>, Arc<Shared>),
        (ram, interrupt): (GuestRam, Interrupt),
        [receive, transmit]: [ActiveQueue; 2],
        (mergeable, mtu): (bool, Option<u16>),
    ) -> io::Result<Self> {
        let again = TimerFd::new()?;
        // What has ended for one driver has for the next.
        let ended = shared.has_ended();
        let mut service = Self {
            tap,
            shared,
            ram,
            interrupt,
            receive,
            transmit,
            mergeable,
            mtu,
            frame: vec![0; FRAME_BYTES].into(),
            held: 0,
            used: UsedBatch::default(),
            full: false,
            watched: EventSet::empty(),
            failures: 0,
            again,
            paused: false,
            ended,
            broken: false,
        };
        service.forget_stale();
        Ok(service)
    }

    /// Frames that were made for a driver that agreed on other offloads are not for this one.
    fn forget_stale(&mut self) {
        for _ in 0..STALE {
            match self.tap.read(&mut self.frame) {
                Ok(1..) => count(&self.shared.receive_dropped, 1),
                Err(error) if costs_a_frame(&error) => count(&self.shared.receive_dropped, 1),
                Ok(0) | Err(_) => return,
            }
        }
    }

    /// Gives the guest frames until there are none, it has no buffers, or others are due.
    pub(super) fn receive(&mut self) -> Result<(), RingError> {
        let memory = self.ram.memory();
        let mut result = Ok(());
        for _ in 0..BATCH {
            if self.held == 0 && !self.read() {
                break;
            }
            match self.place(&memory) {
                Ok(Placed::Given) => {
                    count(&self.shared.received, 1);
                    let bytes = self.held.saturating_sub(HEADER_BYTES);
                    count(&self.shared.received_bytes, bytes as u64);
                    self.held = 0;
                }
                Ok(Placed::Dropped) => {
                    count(&self.shared.receive_dropped, 1);
                    self.held = 0;
                }
                Ok(Placed::NoRoom) => break,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        // Also after an error: what was given before it is the driver's.
        if self.used.publish(&mut self.receive.queue, &memory)? {
            self.interrupt.used();
        }
        result
    }

    /// Takes the next frame from the interface; whether there was one.
    fn read(&mut self) -> bool {
        match self.tap.read(&mut self.frame) {
            Ok(0) => self.end(&"its other end is gone"),
            // The next one comes with the next event, which is there already if it is.
            Ok(bytes) if bytes < HEADER_BYTES => {
                tracing::debug!(bytes, "a frame without its header");
                count(&self.shared.receive_dropped, 1);
                self.failures = 0;
            }
            Ok(bytes) => {
                self.held = bytes;
                self.failures = 0;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.failures = 0,
            Err(error) if costs_a_frame(&error) => self.missed(&error),
            Err(error) => self.end(&error),
        }
        self.held > 0
    }

    /// A frame could not be read. The next event is for the next frame; where all fail, it is there at once each time.
    fn missed(&mut self, error: &io::Error) {
        count(&self.shared.receive_dropped, 1);
        self.failures += 1;
        tracing::debug!(%error, "a frame for the guest could not be read");
        if !self.failures.is_multiple_of(FAILURES) {
            return;
        }
        if self.failures == FAILURES {
            tracing::warn!(%error, failures = FAILURES, "a network interface gives errors only; it is read now and then until it gives a frame");
        }
        match self.again.reset(PAUSE, None) {
            Ok(()) => self.paused = true,
            // Nothing would wake it.
            Err(error) => {
                tracing::warn!(%error, "a network interface that gives errors only is read on without a pause");
            }
        }
    }

    fn end(&mut self, why: &dyn std::fmt::Display) {
        tracing::warn!(%why, "a network interface ended; its link is down");
        self.ended = true;
        self.shared.end();
    }

    /// Whether a frame is to be read from the interface.
    fn reads(&self) -> bool {
        self.held == 0 && !self.paused && !self.ended
    }

    /// Puts the held frame into the guest's buffers: into one, or with mergeable ones into as many as it needs. Nothing of it
    /// shows before all of it does.
    fn place(&mut self, memory: &GuestMemoryMmap) -> Result<Placed, RingError> {
        let queue = &mut self.receive.queue;
        let begin = queue.next_avail();
        let mut chains: Vec<(u16, Option<Chain<'_>>)> = Vec::new();
        let mut room = 0;
        while room < self.held as u64 {
            // All that there can be.
            if chains.len() >= usize::from(queue.size()) {
                queue.set_next_avail(begin);
                return Ok(Placed::Dropped);
            }
            match pop(queue, memory)? {
                Popped::Empty => {
                    queue.set_next_avail(begin);
                    return Ok(Placed::NoRoom);
                }
                Popped::Refused { head } => chains.push((head, None)),
                Popped::Chain { head, chain } => {
                    let len = chain.writable.len();
                    if !self.mergeable && len < self.held as u64 {
                        // Its driver is to have room for any frame; the buffer is good for a smaller one.
                        queue.set_next_avail(begin);
                        return Ok(Placed::Dropped);
                    }
                    room += len;
                    chains.push((head, Some(chain)));
                }
            }
        }
        let filled = chains.iter().filter(|(_, chain)| chain.is_some()).count();
        let filled = u16::try_from(filled).unwrap_or(u16::MAX);
        self.frame[BUFFERS_AT..HEADER_BYTES].copy_from_slice(&filled.to_le_bytes());
        // The buffers of one frame follow each other; those that cannot be come before them.
        chains.sort_by_key(|(_, chain)| chain.is_some());
        let mut rest = &self.frame[..self.held];
        for (head, chain) in chains {
            let written = chain.map_or(0, |mut chain| chain.writable.write(rest));
            rest = &rest[written..];
            self.used.push(head, written as u32);
        }
        Ok(Placed::Given)
    }

    /// Has the host take the guest's frames.
    pub(super) fn transmit(&mut self) -> Result<(), RingError> {
        let memory = self.ram.memory();
        let (tap, shared, full) = (&self.tap, &self.shared, &mut self.full);
        let mtu = self.mtu;
        *full = false;
        let mut used = false;
        let queue = &mut self.transmit.queue;
        let result = serve_quietly(queue, &memory, BATCH, &mut used, |mut chain| {
            let len = chain.readable.len();
            // Read once: what is judged is what the host's kernel gets.
            let mut header = [0; HEADER_BYTES];
            let whole = len > HEADER_BYTES as u64 && len <= FRAME_BYTES as u64;
            if !whole
                || chain.readable.read_exact(&mut header).is_err()
                || mtu.is_some_and(|mtu| is_too_long(&header, len - HEADER_BYTES as u64, mtu))
            {
                count(&shared.send_dropped, 1);
                return Some(0);
            }
            match tap.write(&header, chain.readable.slices()) {
                Ok(_) => {
                    count(&shared.sent, 1);
                    count(&shared.sent_bytes, len - HEADER_BYTES as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    *full = true;
                    return None;
                }
                Err(error) => {
                    tracing::trace!(%error, "the host refuses a frame");
                    count(&shared.send_dropped, 1);
                }
            }
            Some(0)
        });
        if used && queue.needs_notification(&*memory).unwrap_or(true) {
            self.interrupt.used();
        }
        if result? == Served::More && !self.full {
            // The other direction is due. A full counter is readable, too.
            let _ = self.transmit.kick.write(1);
        }
        Ok(())
    }

    fn broke(&mut self, why: &dyn std::fmt::Display) {
        self.broken = true;
        self.interrupt.fault(KIND, why);
    }

    /// Waits for what of the interface is needed now.
    fn watch(&mut self, ops: &mut EventOps<'_>) {
        let mut wanted = EventSet::empty();
        if !self.broken {
            if self.reads() {
                wanted |= EventSet::IN;
            }
            if self.full {
                wanted |= EventSet::OUT;
            }
        }
        if wanted == self.watched {
            return;
        }
        // An interface that nothing is wanted of is not in the set, since its errors would be told.
        let events = Events::with_data_raw(self.tap.as_raw_fd(), TAP, wanted);
        let result = match (self.watched.is_empty(), wanted.is_empty()) {
            (true, _) => ops.add(events),
            (false, true) => ops.remove(events),
            (false, false) => ops.modify(events),
        };
        self.watched = wanted;
        if let Err(error) = result {
            self.broke(&error);
        }
    }
}

impl MutEventSubscriber for Service {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let added = [
            Events::with_data(&*self.receive.kick, RECEIVE, EventSet::IN),
            Events::with_data(&*self.transmit.kick, TRANSMIT, EventSet::IN),
            Events::with_data(&self.again, AGAIN, EventSet::IN),
        ]
        .into_iter()
        .try_for_each(|events| ops.add(events));
        match added {
            Ok(()) => self.watch(ops),
            Err(error) => self.broke(&error),
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let (mut receive, mut transmit) = (false, false);
        match events.data() {
            RECEIVE => {
                let _ = self.receive.kick.read();
                receive = self.held > 0;
            }
            TRANSMIT => {
                let _ = self.transmit.kick.read();
                transmit = !self.full;
            }
            AGAIN => {
                // It is readable, so this waits for nothing.
                let _ = self.again.wait();
                self.paused = false;
            }
            _ => {
                let told = events.event_set();
                let failed = told.intersects(EventSet::ERROR | EventSet::HANG_UP);
                receive = self.reads() && (failed || told.contains(EventSet::IN));
                transmit = self.full && (failed || told.contains(EventSet::OUT));
            }
        }
        if self.broken {
            return;
        }
        let mut result = Ok(());
        if receive {
            result = self.receive();
        }
        if transmit {
            result = result.and(self.transmit());
        }
        if let Err(error) = result {
            self.broke(&error);
        }
        self.watch(ops);
    }
}

fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}
