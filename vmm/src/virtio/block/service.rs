//! The loop between a disk's queue and its engine, on a thread of its own while the device is
//! active: takes chains, has their operations done, and returns them in the order in which they
//! are ready.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::ID_BYTES;
use super::disk::Disk;
use super::engine::{Completion, Engine};
use super::flight::{Flight, Next};
use super::request::{Agreed, Target};
use crate::virtio::device::{ActiveQueue, GuestRam, Interrupt};
use crate::virtio::queue::{Popped, give_back, pop};

/// Chains taken between two interrupts, at most.
const BATCH: usize = 16;

/// Tells the thread to end.
pub(super) struct Stop {
    flag: AtomicBool,
    event: EventFd,
}

impl Stop {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            flag: AtomicBool::new(false),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    pub fn set(&self) {
        self.flag.store(true, Ordering::SeqCst);
        // A full counter is readable, too.
        let _ = self.event.write(1);
    }

    fn is_set(&self) -> bool {
        self.flag.load(Ordering::SeqCst)
    }
}

/// What the device is made of, for its thread.
pub(super) struct Parts {
    pub disk: Arc<Disk>,
    pub id: [u8; ID_BYTES],
    pub agreed: Agreed,
    pub ram: GuestRam,
    pub interrupt: Interrupt,
    pub queue: ActiveQueue,
    pub stop: Arc<Stop>,
}

/// What the thread owns.
pub(super) struct Service {
    disk: Arc<Disk>,
    id: [u8; ID_BYTES],
    agreed: Agreed,
    ram: GuestRam,
    interrupt: Interrupt,
    queue: Queue,
    kick: Arc<EventFd>,
    stop: Arc<Stop>,
    epoll: Epoll,
    // Dropped before the flights, whose memory its operations use.
    engine: Box<dyn Engine>,
    /// By token. No more than the queue has entries, so memory is bounded.
    flights: Vec<Option<Flight>>,
    /// Tokens without a flight.
    free: Vec<usize>,
    completions: Vec<Completion>,
}

impl Service {
    /// A service by way of `engine`, whose depth is at least the queue's size.
    pub fn new(parts: Parts, engine: Box<dyn Engine>) -> io::Result<Self> {
        let Parts {
            disk,
            id,
            agreed,
            ram,
            interrupt,
            queue: ActiveQueue { queue, kick },
            stop,
        } = parts;
        let epoll = Epoll::new()?;
        let own = [kick.as_raw_fd(), stop.event.as_raw_fd()];
        for descriptor in own.into_iter().chain(engine.descriptors()) {
            let event = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, descriptor, event)?;
        }
        let depth = usize::from(queue.size());
        Ok(Self {
            disk,
            id,
            agreed,
            ram,
            interrupt,
            queue,
            kick,
            stop,
            epoll,
            engine,
            flights: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            completions: Vec::with_capacity(depth),
        })
    }

    /// Until it is stopped, or ring or engine cannot be used.
    pub fn run(&mut self) -> io::Result<()> {
        let mut ready = [EpollEvent::default(); 4];
        loop {
            match self.epoll.wait(-1, &mut ready) {
                Ok(_) => {}
                // Also when io_uring had something to do in this thread.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            // Nonblocking: it may have been another one.
            let _ = self.kick.read();
            while !self.stop.is_set() {
                if !self.turn()? {
                    break;
                }
            }
            if self.stop.is_set() {
                return Ok(());
            }
        }
    }

    /// A bounded amount of work, and at most one interrupt. Returns whether there may be more to do
    /// without anything to wake the thread.
    pub fn turn(&mut self) -> io::Result<bool> {
        let view = self.ram.memory().into_inner();
        let mut used = false;
        let result = self.work(&view, &mut used);
        // Also after an error: what was served before it is the driver's. And before the engine is
        // set to work, which may take its time.
        if used && self.queue.needs_notification(&*view).unwrap_or(true) {
            self.interrupt.used();
        }
        let busy = result?;
        self.engine.submit()?;
        Ok(busy)
    }

    /// Returns whether anything was done: operations that ended or were begun may have others for
    /// a consequence.
    fn work(&mut self, view: &Arc<GuestMemoryMmap>, used: &mut bool) -> io::Result<bool> {
        let mut completions = std::mem::take(&mut self.completions);
        self.engine.completions(&mut completions);
        let mut busy = !completions.is_empty();
        for Completion { token, result } in completions.drain(..) {
            if self.stop.is_set() {
                return Ok(false);
            }
            if let Some(flight) = &mut self.flights[token] {
                flight.completed(&self.disk, result);
            }
            self.go_on(token, view, used)?;
        }
        self.completions = completions;
        for _ in 0..BATCH {
            if self.stop.is_set() {
                return Ok(false);
            }
            // With every flight under way the next completion makes room.
            let Some(&token) = self.free.last() else {
                break;
            };
            match pop(&mut self.queue, view).map_err(io::Error::other)? {
                Popped::Empty => break,
                Popped::Refused { head } => {
                    give_back(&mut self.queue, view, head, 0).map_err(io::Error::other)?;
                    *used = true;
                }
                Popped::Chain { head, chain } => {
                    let target = Target {
                        disk: &self.disk,
                        id: &self.id,
                        agreed: self.agreed,
                    };
                    // SAFETY: the chain was taken with this view.
                    let flight = unsafe { Flight::begin(&target, view, head, chain) };
                    self.flights[token] = Some(flight);
                    self.free.pop();
                    self.go_on(token, view, used)?;
                }
            }
            busy = true;
        }
        Ok(busy)
    }

    /// Has the flight's next operation done, or returns its chain.
    fn go_on(&mut self, token: usize, view: &GuestMemoryMmap, used: &mut bool) -> io::Result<()> {
        let Some(flight) = &mut self.flights[token] else {
            return Ok(());
        };
        match flight.next(&self.disk) {
            // SAFETY: the flight keeps vectors and memory, and stays in its place until it is
            // answered, which is after the completion, or until after the engine is dropped.
            Next::Start(operation) => unsafe { self.engine.start(token, operation) },
            Next::Answered { head, len } => {
                self.flights[token] = None;
                self.free.push(token);
                give_back(&mut self.queue, view, head, len).map_err(io::Error::other)?;
                *used = true;
                Ok(())
            }
        }
    }
}
