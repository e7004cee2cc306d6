//! The virtio-fs device (virtio 1.3 section 5.11) as its transport sees it,
//! and the threads that serve its queues while it is active.
//!
//! There are two queues: one for forgets, with a thread of its own, and one for requests, which several threads
//! share. Each takes one chain at a time and serves it outside the queue's lock, so that one slow disk
//! does not stop the others; before it does, it asks for the next kick or wakes another thread.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use nacre_vmm::virtio::device::{
    ActivateError, Activation, ActiveQueue, GuestRam, Interrupt, VirtioDevice, read_space,
};
use nacre_vmm::virtio::queue::{Chain, RING_FEATURES, RingError};
use rustix::event::epoll;
use rustix::io::Errno;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::Error;
use crate::server::Core;
use crate::worker::Worker;

const KIND: &str = "fs";
const DEVICE_ID: u32 = virtio_bindings::virtio_ids::VIRTIO_ID_FS;
/// Forgets, requests. Linux makes its requests as large as the second has room for.
const QUEUE_SIZES: [u16; 2] = [128, 512];
/// Bytes of the tag in the configuration space; then comes the number of request queues.
const TAG_BYTES: usize = 36;

/// The device. While it is active it has threads of its own, joined by `reset`, which waits for the system calls that
/// are under way.
pub(crate) struct Device {
    tag: [u8; TAG_BYTES],
    core: Arc<Core>,
    threads: Option<Threads>,
    /// Whether it is the server's one device, and not one that was refused.
    owning: bool,
}

struct Threads {
    stop: Arc<Stop>,
    joins: Vec<JoinHandle<()>>,
}

/// Tells the threads to end.
pub(crate) struct Stop {
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
}

impl Device {
    pub fn new(tag: &str, core: Arc<Core>) -> Result<Self, Error> {
        let valid = !tag.is_empty() && tag.len() <= TAG_BYTES && !tag.contains('\0');
        if !valid {
            return Err(Error::Tag { tag: tag.into() });
        }
        let mut bytes = [0; TAG_BYTES];
        bytes[..tag.len()].copy_from_slice(tag.as_bytes());
        Ok(Self {
            tag: bytes,
            core,
            threads: None,
            owning: false,
        })
    }

    pub fn owning(mut self) -> Self {
        self.owning = true;
        self
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        let Activation {
            ram,
            interrupt,
            queues,
            ..
        } = activation;
        let queues = <[ActiveQueue; 2]>::try_from(queues)
            .map_err(|queues| io::Error::other(format!("{} queues, not 2", queues.len())))?;
        let stop = Arc::new(Stop::new()?);
        let counts = [("fs-forget", 1), ("fs", self.core.limits.workers)];
        // Dropped by an error, they end those that run.
        let threads = self.threads.insert(Threads {
            stop: Arc::clone(&stop),
            joins: Vec::new(),
        });
        for (ActiveQueue { queue, kick }, (name, count)) in queues.into_iter().zip(counts) {
            let (ram, interrupt) = (ram.clone(), interrupt.clone());
            let ring = Ring::new(queue, kick, ram, interrupt, Arc::clone(&stop), count);
            let ring = Arc::new(ring);
            // Linux may have sent its first request before DRIVER_OK.
            let _ = ring.kick.write(1);
            for index in 0..count {
                let (ring, core) = (Arc::clone(&ring), Arc::clone(&self.core));
                let waiting = ring.waiting()?;
                let thread = thread::Builder::new()
                    .name(format!("{name}-{index}"))
                    .spawn(move || {
                        match catch_unwind(AssertUnwindSafe(|| ring.run(core, &waiting))) {
                            Ok(Ok(())) => {}
                            Ok(Err(error)) => ring.fault(&error),
                            Err(payload) => ring.fault(&panic_text(&*payload)),
                        }
                    })?;
                threads.joins.push(thread);
            }
        }
        Ok(())
    }
}

/// What a panic said.
fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    format!("a thread panicked: {}", text.unwrap_or("without a word"))
}

impl VirtioDevice for Device {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_fs_config: tag, num_request_queues.
        let mut config = [0; TAG_BYTES + 4];
        config[..TAG_BYTES].copy_from_slice(&self.tag);
        config[TAG_BYTES..].copy_from_slice(&1_u32.to_le_bytes());
        read_space(&config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let failed = |why: String| ActivateError { device: KIND, why };
        if self.threads.is_some() {
            return Err(failed("it is active".into()));
        }
        self.start(activation).map_err(|error| {
            self.reset();
            failed(error.to_string())
        })
    }

    fn reset(&mut self) {
        if let Some(Threads { stop, joins }) = self.threads.take() {
            stop.flag.store(true, Ordering::SeqCst);
            // A full counter is readable, too.
            let _ = stop.event.write(1);
            for thread in joins {
                // The threads catch their own panics.
                let _ = thread.join();
            }
            self.core.end_session();
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.reset();
        if self.owning {
            self.core.release_device();
        }
    }
}

/// A queue and what its threads share.
pub(crate) struct Ring {
    queue: Mutex<Queue>,
    kick: Arc<EventFd>,
    ram: GuestRam,
    interrupt: Interrupt,
    stop: Arc<Stop>,
    /// The driver broke it; nothing moves until it resets the device.
    broken: AtomicBool,
    /// Threads that wait, or are about to; counted up under the queue's lock.
    idle: AtomicUsize,
}

impl Ring {
    /// A queue that `threads` threads will serve.
    pub fn new(
        queue: Queue,
        kick: Arc<EventFd>,
        ram: GuestRam,
        interrupt: Interrupt,
        stop: Arc<Stop>,
        threads: usize,
    ) -> Self {
        Self {
            queue: Mutex::new(queue),
            kick,
            ram,
            interrupt,
            stop,
            broken: AtomicBool::new(false),
            idle: AtomicUsize::new(threads),
        }
    }

    /// What a thread waits by. A kick wakes one of those that wait.
    fn waiting(&self) -> io::Result<std::os::fd::OwnedFd> {
        let waiting = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (event, flags) in [
            (
                &*self.kick,
                epoll::EventFlags::IN | epoll::EventFlags::EXCLUSIVE,
            ),
            (&self.stop.event, epoll::EventFlags::IN),
        ] {
            // SAFETY: the eventfd lives as long as the ring, whose threads use the descriptor only for this.
            let event = unsafe {
                std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(event))
            };
            epoll::add(&waiting, event, epoll::EventData::new_u64(0), flags)?;
        }
        Ok(waiting)
    }

    /// Until it is stopped, or the ring cannot be used.
    fn run(&self, core: Arc<Core>, waiting: &std::os::fd::OwnedFd) -> io::Result<()> {
        let mut worker = Worker::new(core)?;
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }; 2];
        loop {
            match epoll::wait(waiting, &mut events[..], None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            self.idle.fetch_sub(1, Ordering::SeqCst);
            // Nonblocking: another thread may have had it, or it was the other one.
            let _ = self.kick.read();
            loop {
                if self.stop.flag.load(Ordering::SeqCst) {
                    return Ok(());
                }
                if self.broken.load(Ordering::SeqCst) {
                    self.idle.fetch_add(1, Ordering::SeqCst);
                    break;
                }
                if !self.turn(&mut worker).map_err(io::Error::other)? {
                    break;
                }
            }
        }
    }

    /// Serves one chain; whether there was one. Without one the thread counts as idle.
    pub fn turn(&self, worker: &mut Worker) -> Result<bool, RingError> {
        let memory = self.ram.memory();
        let Some((size, chain)) = self.next(&memory)? else {
            return Ok(false);
        };
        let head = chain.head_index();
        let len = match Chain::resolve(&memory, chain, size) {
            Ok(chain) => worker.serve(chain),
            Err(error) => {
                tracing::debug!(head, %error, "descriptor chain refused");
                worker.core.tally.malformed.fetch_add(1, Ordering::Relaxed);
                0
            }
        };
        let notify = {
            let mut queue = self.queue();
            queue
                .add_used(&*memory, head, len)
                .map_err(|source| RingError::Used { head, source })?;
            queue.needs_notification(&*memory).unwrap_or(true)
        };
        if notify {
            self.interrupt.used();
        }
        Ok(true)
    }

    /// The next chain, if there is one. Another thread is woken for the one behind it, or the driver asked for a kick.
    fn next<'m>(
        &self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<(u16, DescriptorChain<&'m GuestMemoryMmap>)>, RingError> {
        let mut queue = self.queue();
        let size = queue.size();
        loop {
            let pending = self.pending(&queue, memory)?;
            let mut available = queue.iter(memory).map_err(RingError::Available)?;
            let Some(chain) = available.next() else {
                if pending {
                    // Its entry cannot be read, or the index went back: trying again would spin.
                    return Err(RingError::Available(
                        virtio_queue::Error::InvalidAvailRingIndex,
                    ));
                }
                if queue
                    .enable_notification(memory)
                    .map_err(RingError::Available)?
                {
                    continue;
                }
                self.idle.fetch_add(1, Ordering::SeqCst);
                return Ok(None);
            };
            let more = self.pending(&queue, memory)?
                || queue
                    .enable_notification(memory)
                    .map_err(RingError::Available)?;
            if more && self.idle.load(Ordering::SeqCst) > 0 {
                // A full counter is readable, too.
                let _ = self.kick.write(1);
            }
            return Ok(Some((size, chain)));
        }
    }

    fn pending(&self, queue: &Queue, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        let index = queue
            .avail_idx(memory, Ordering::Acquire)
            .map_err(RingError::Available)?;
        Ok(index.0 != queue.next_avail())
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fault(&self, why: &dyn std::fmt::Display) {
        self.broken.store(true, Ordering::SeqCst);
        self.interrupt.fault(KIND, why);
    }
}
