//! The block device as its transport sees it, and the thread that serves its
//! one queue while it is active.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::backend::Disk;
use super::request::Target;
use super::{Error, ID_BYTES};
use crate::config::DiskConfig;
use crate::event_loop::{EventLoopHandle, panic_message};
use crate::virtio::device::{
    ActivateError, Activation, ActiveQueue, GuestRam, Interrupt, VirtioDevice,
};
use crate::virtio::queue::{RING_FEATURES, Served, serve};

const KIND: &str = "block";
const QUEUE_SIZES: [u16; 1] = [256];
/// A request's header and status take a descriptor each.
const SEG_MAX: u32 = QUEUE_SIZES[0] as u32 - 2;
/// Requests served between two interrupts, at most.
const BATCH: usize = 16;

/// A virtio-blk device. While active it has a thread of its own, joined by `reset`; a reset waits
/// for the system call that is under way, which moves at most 4 MiB.
pub struct Block {
    disk: Arc<Disk>,
    id: [u8; ID_BYTES],
    name: String,
    events: EventLoopHandle,
    worker: Option<Worker>,
}

struct Worker {
    stop: Arc<Stop>,
    thread: JoinHandle<()>,
}

/// Tells the thread to end.
struct Stop {
    flag: AtomicBool,
    event: EventFd,
}

impl Block {
    /// Opens and locks the image. `events` is told if the device's thread fails.
    ///
    /// # Errors
    ///
    /// [`Error`], with the image's path.
    pub fn new(config: &DiskConfig, events: EventLoopHandle) -> Result<Self, Error> {
        let mut id = [0; ID_BYTES];
        id.get_mut(..config.id.len())
            .ok_or_else(|| Error::Id {
                path: config.path.clone(),
                id: config.id.clone(),
            })?
            .copy_from_slice(config.id.as_bytes());
        Ok(Self {
            disk: Arc::new(Disk::open(config)?),
            id,
            // A thread's name holds no zero.
            name: format!("disk-{}", config.id.replace('\0', "")),
            events,
            worker: None,
        })
    }

    /// The image.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        let Activation {
            ram,
            interrupt,
            queues,
            features,
        } = activation;
        let [ActiveQueue { queue, kick }] = <[ActiveQueue; 1]>::try_from(queues)
            .map_err(|queues| io::Error::other(format!("{} queues, not 1", queues.len())))?;
        let stop = Arc::new(Stop {
            flag: AtomicBool::new(false),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let epoll = Epoll::new()?;
        for event in [&*kick, &stop.event] {
            epoll.ctl(
                ControlOperation::Add,
                std::os::fd::AsRawFd::as_raw_fd(event),
                EpollEvent::new(EventSet::IN, 0),
            )?;
        }
        let mut service = Service {
            disk: Arc::clone(&self.disk),
            id: self.id,
            write_through: features & (1 << VIRTIO_BLK_F_FLUSH) == 0,
            ram,
            interrupt,
            queue,
            kick,
            stop: Arc::clone(&stop),
            epoll,
        };
        let events = self.events.clone();
        let name = self.name.clone();
        let thread = thread::Builder::new()
            .name(self.name.clone())
            .spawn(
                move || match catch_unwind(AssertUnwindSafe(|| service.run())) {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => service.interrupt.fault(KIND, &error),
                    Err(payload) => {
                        events.report(format!("{name}: {}", panic_message(&*payload)));
                    }
                },
            )?;
        self.worker = Some(Worker { stop, thread });
        Ok(())
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let read_only = u64::from(self.disk.read_only()) << VIRTIO_BLK_F_RO;
        RING_FEATURES | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_FLUSH | read_only
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_blk_config: capacity, size_max (not offered), seg_max.
        let mut config = [0; 16];
        config[..8].copy_from_slice(&self.disk.sectors().to_le_bytes());
        config[12..].copy_from_slice(&SEG_MAX.to_le_bytes());
        data.fill(0);
        if let Some(config) = usize::try_from(offset)
            .ok()
            .and_then(|offset| config.get(offset..))
        {
            let len = config.len().min(data.len());
            data[..len].copy_from_slice(&config[..len]);
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.start(activation).map_err(|error| ActivateError {
            device: KIND,
            why: error.to_string(),
        })
    }

    fn reset(&mut self) {
        if let Some(Worker { stop, thread }) = self.worker.take() {
            stop.flag.store(true, Ordering::SeqCst);
            // A full counter is readable, too.
            let _ = stop.event.write(1);
            // The thread catches its own panics.
            let _ = thread.join();
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.reset();
    }
}

/// What the thread owns.
struct Service {
    disk: Arc<Disk>,
    id: [u8; ID_BYTES],
    write_through: bool,
    ram: GuestRam,
    interrupt: Interrupt,
    queue: Queue,
    kick: Arc<EventFd>,
    stop: Arc<Stop>,
    epoll: Epoll,
}

impl Service {
    /// Until it is stopped, or the ring cannot be used.
    fn run(&mut self) -> io::Result<()> {
        let mut ready = [EpollEvent::default(); 2];
        loop {
            match self.epoll.wait(-1, &mut ready) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            // Nonblocking: it may have been the other one.
            let _ = self.kick.read();
            loop {
                if self.stop.flag.load(Ordering::SeqCst) {
                    return Ok(());
                }
                if self.batch().map_err(io::Error::other)? == Served::All {
                    break;
                }
            }
        }
    }

    fn batch(&mut self) -> Result<Served, crate::virtio::queue::RingError> {
        let target = Target {
            disk: &self.disk,
            id: &self.id,
            write_through: self.write_through,
            cancelled: &self.stop.flag,
        };
        let memory = self.ram.memory();
        serve(&mut self.queue, &memory, &self.interrupt, BATCH, |chain| {
            target.execute(chain)
        })
    }
}
