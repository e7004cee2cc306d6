//! The block device as its transport sees it: features, configuration, and the thread that serves
//! its one queue while it is active.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::disk::Disk;
use super::engine::{self, Ring};
use super::request::{Agreed, MAX_SEGMENT_SECTORS, MAX_SEGMENTS};
use super::service::{Parts, Service, Stop};
use super::{Error, ID_BYTES, SECTOR};
use crate::config::{DiskConfig, DiskIo};
use crate::event_loop::{EventLoopHandle, panic_message};
use crate::virtio::device::{ActivateError, Activation, ActiveQueue, VirtioDevice, read_space};
use crate::virtio::queue::RING_FEATURES;

const KIND: &str = "block";
const QUEUE_SIZES: [u16; 1] = [256];
/// A request's header and status take a descriptor each.
const SEG_MAX: u32 = QUEUE_SIZES[0] as u32 - 2;
/// Bytes of struct virtio_blk_config up to the write-zeroes fields.
const CONFIG_BYTES: usize = 60;
/// What files are best read, written and discarded in: 2^3 sectors, a page.
const BLOCK_EXPONENT: u8 = 3;

/// A virtio-blk device. While active it has a thread of its own, joined by `reset`; a reset waits
/// for the system calls that are under way, each of which moves at most 4 MiB.
pub struct Block {
    disk: Arc<Disk>,
    id: [u8; ID_BYTES],
    io: DiskIo,
    name: String,
    events: EventLoopHandle,
    worker: Option<Worker>,
    announced: bool,
}

struct Worker {
    stop: Arc<Stop>,
    thread: JoinHandle<()>,
}

impl Block {
    /// Opens and locks the disk's files. `events` is told if the device's thread fails.
    ///
    /// # Errors
    ///
    /// [`Error`], with the file's path.
    pub fn new(config: &DiskConfig, events: EventLoopHandle) -> Result<Self, Error> {
        let mut id = [0; ID_BYTES];
        id.get_mut(..config.id.len())
            .ok_or_else(|| Error::Id {
                disk: config.source.to_string(),
                id: config.id.clone(),
            })?
            .copy_from_slice(config.id.as_bytes());
        let disk = Arc::new(Disk::open(config)?);
        if config.io == DiskIo::IoUring {
            // Better now than when the guest's driver starts.
            Ring::new(&disk, 1).map_err(|source| Error::Ring {
                disk: config.source.to_string(),
                source,
            })?;
        }
        Ok(Self {
            disk,
            id,
            io: config.io,
            // A thread's name holds no zero.
            name: format!("disk-{}", config.id.replace('\0', "")),
            events,
            worker: None,
            announced: false,
        })
    }

    /// The disk.
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
        let [queue] = <[ActiveQueue; 1]>::try_from(queues)
            .map_err(|queues| io::Error::other(format!("{} queues, not 1", queues.len())))?;
        let engine = engine::choose(self.io, &self.disk, QUEUE_SIZES[0])?;
        if !self.announced {
            tracing::debug!(disk = self.disk.name(), io = engine.name(), "disk in use");
            self.announced = true;
        }
        let stop = Arc::new(Stop::new()?);
        let has = |bit: u32| features & (1 << bit) != 0;
        let parts = Parts {
            disk: Arc::clone(&self.disk),
            id: self.id,
            agreed: Agreed {
                flush: has(VIRTIO_BLK_F_FLUSH),
                discard: has(VIRTIO_BLK_F_DISCARD),
                write_zeroes: has(VIRTIO_BLK_F_WRITE_ZEROES),
            },
            ram,
            interrupt: interrupt.clone(),
            queue,
            stop: Arc::clone(&stop),
        };
        let mut service = Service::new(parts, engine)?;
        let events = self.events.clone();
        let name = self.name.clone();
        let thread = thread::Builder::new()
            .name(self.name.clone())
            .spawn(move || {
                // With the service goes all that is under way, also when it panics.
                match catch_unwind(AssertUnwindSafe(move || service.run())) {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => interrupt.fault(KIND, &error),
                    Err(payload) => {
                        events.report(format!("{name}: {}", panic_message(&*payload)));
                    }
                }
            })?;
        self.worker = Some(Worker { stop, thread });
        Ok(())
    }

    /// struct virtio_blk_config (5.2.4); fields without a feature are zero.
    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let mut put = |offset: usize, bytes: &[u8]| {
            config[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &self.disk.sectors().to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Topology: physical block, no offset of it, and the least good transfer.
        put(24, &[BLOCK_EXPONENT, 0]);
        put(26, &(1_u16 << BLOCK_EXPONENT).to_le_bytes());
        if !self.disk.read_only() {
            // Discards: sectors and segments at most, and their alignment.
            put(36, &MAX_SEGMENT_SECTORS.to_le_bytes());
            put(40, &MAX_SEGMENTS.to_le_bytes());
            put(44, &(1_u32 << BLOCK_EXPONENT).to_le_bytes());
            // Write-zeroes: sectors and segments at most, and that they may unmap.
            put(48, &MAX_SEGMENT_SECTORS.to_le_bytes());
            put(52, &MAX_SEGMENTS.to_le_bytes());
            put(56, &[1]);
        }
        config
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
        let access = if self.disk.read_only() {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        RING_FEATURES
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH
            | access
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        read_space(&config, offset, data);
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
            stop.set();
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
