//! What a virtio device is to its transport. Devices do not know which
//! transport they are behind.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Guest memory as devices see it: an atomically replaceable view.
pub type GuestRam = GuestMemoryAtomic<GuestMemoryMmap>;

/// Interrupt status bit: a queue was used.
pub const INTERRUPT_USED_RING: u32 = 1;
/// Interrupt status bit: the configuration changed (or DEVICE_NEEDS_RESET was set).
pub const INTERRUPT_CONFIG: u32 = 2;

/// The device's one interrupt line: status bits for the guest to read and the irqfd that raises
/// it. Clones share it.
#[derive(Debug, Clone)]
pub struct Interrupt {
    line: Arc<Line>,
}

#[derive(Debug)]
struct Line {
    status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    faults: AtomicU32,
    irqfd: EventFd,
}

/// Faults of one device that are logged as warnings: a guest that resets and breaks its device in
/// a loop does not fill the host's log.
const LOUD_FAULTS: u32 = 4;

impl Interrupt {
    /// Makes the line over an eventfd that is (or will be) registered as irqfd.
    pub fn new(irqfd: EventFd) -> Self {
        Self {
            line: Arc::new(Line {
                status: AtomicU32::new(0),
                generation: AtomicU32::new(0),
                needs_reset: AtomicBool::new(false),
                faults: AtomicU32::new(0),
                irqfd,
            }),
        }
    }

    /// Tells the guest that a queue has used buffers. The device has asked `needs_notification` first.
    pub fn used(&self) {
        self.raise(INTERRUPT_USED_RING);
    }

    /// Tells the guest that the configuration space changed, and moves its generation on.
    pub fn config_changed(&self) {
        self.line.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(INTERRUPT_CONFIG);
    }

    /// The device cannot go on with what the driver gave it: DEVICE_NEEDS_RESET (virtio 1.3,
    /// 2.1.2). It then leaves its queues alone until it is reset.
    pub fn fault(&self, device: &'static str, why: &dyn fmt::Display) {
        if !self.line.needs_reset.swap(true, Ordering::SeqCst) {
            let before = self.line.faults.fetch_add(1, Ordering::Relaxed);
            if before < LOUD_FAULTS {
                tracing::warn!(device, %why, "the device needs a reset");
            } else {
                tracing::debug!(device, %why, "the device needs a reset again");
            }
            self.raise(INTERRUPT_CONFIG);
        }
    }

    /// Whether [`fault`](Self::fault) was called since the last reset.
    pub fn needs_reset(&self) -> bool {
        self.line.needs_reset.load(Ordering::SeqCst)
    }

    /// How often the configuration has changed (transport).
    pub fn generation(&self) -> u32 {
        self.line.generation.load(Ordering::SeqCst)
    }

    /// Status bits not yet acknowledged (transport).
    pub fn status(&self) -> u32 {
        self.line.status.load(Ordering::SeqCst)
    }

    /// Clears acknowledged bits (transport).
    pub fn acknowledge(&self, bits: u32) {
        self.line.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Forgets all but the generation, with the device stopped (transport).
    pub fn reset(&self) {
        self.line.status.store(0, Ordering::SeqCst);
        self.line.needs_reset.store(false, Ordering::SeqCst);
    }

    /// The eventfd behind the line.
    pub fn irqfd(&self) -> &EventFd {
        &self.line.irqfd
    }

    fn raise(&self, bit: u32) {
        self.line.status.fetch_or(bit, Ordering::SeqCst);
        // A counter that is full (EAGAIN) is an interrupt that no one has taken yet.
        let _ = self.line.irqfd.write(1);
    }
}

/// One queue, ready to use, with the eventfd that the guest's notify writes (ioeventfd).
#[derive(Debug)]
pub struct ActiveQueue {
    /// Validated by the transport before activation.
    pub queue: Queue,
    /// Readable when the guest has notified.
    pub kick: Arc<EventFd>,
}

/// What a device gets at DRIVER_OK.
pub struct Activation {
    /// Guest memory; take a fresh view (`memory()`) for each batch.
    pub ram: GuestRam,
    /// The interrupt line.
    pub interrupt: Interrupt,
    /// Queues, in the order of their indices; one that the driver may leave out and has left out is missing.
    pub queues: Vec<ActiveQueue>,
    /// Features that driver and device agreed on.
    pub features: u64,
}

/// A device could not start; the transport sets DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
#[error("Cannot activate the {device} device: {why}")]
pub struct ActivateError {
    /// The device's kind.
    pub device: &'static str,
    /// What went wrong.
    pub why: String,
}

/// Reads a configuration space whose bytes are `space`; those beyond it read 0.
pub fn read_space(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let from = usize::try_from(offset).ok();
    if let Some(space) = from.and_then(|from| space.get(from..)) {
        let len = space.len().min(data.len());
        data[..len].copy_from_slice(&space[..len]);
    }
}

/// A virtio device, called by its transport under the transport's lock.
///
/// Order of calls: `read_config`/`write_config` at any time; `activate` at DRIVER_OK; then
/// `reset` when the guest writes status 0 or FAILED, when `activate` failed, or when the device is unplugged,
/// after which `activate` may come again; a `reset` may also come without one. When `reset` returns the device no longer touches guest
/// memory or its queues. A device that is dropped while active resets itself.
///
/// The transport's lock is held, so no call waits for a thread that takes it.
pub trait VirtioDevice: Send {
    /// Kind, for logs: "block", "vsock".
    fn kind(&self) -> &'static str;
    /// Device ID (virtio 1.3 section 5).
    fn device_id(&self) -> u32;
    /// Features offered, without those of the transport (VERSION_1 is added by it); those of the
    /// ring ([`RING_FEATURES`](super::queue::RING_FEATURES)) are the device's to offer.
    fn features(&self) -> u64;
    /// Largest size of each queue, each a power of two.
    fn queue_sizes(&self) -> &[u16];
    /// How many of the queues, from the first on, the driver must have made ready at DRIVER_OK. It
    /// may leave out the others: which of them it needs is for the device to say, by the features.
    fn required_queues(&self) -> usize {
        self.queue_sizes().len()
    }
    /// Reads configuration space; bytes beyond it read 0.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes configuration space; what is not writable is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// Starts the device, typically by adding a subscriber to the event loop.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// Stops it and forgets all of the driver's state.
    fn reset(&mut self);
}
