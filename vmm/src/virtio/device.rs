//! What a virtio device is to its transport. Devices do not know which
//! transport they are behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Guest memory as devices see it: an atomically replaceable view.
pub type GuestRam = GuestMemoryAtomic<GuestMemoryMmap>;

/// Interrupt status bit: a queue was used.
pub const INTERRUPT_USED_RING: u32 = 1;
/// Interrupt status bit: the configuration changed (or DEVICE_NEEDS_RESET was set).
pub const INTERRUPT_CONFIG: u32 = 2;

/// The device's one interrupt line: status bits for the guest to read and the irqfd that raises it.
#[derive(Debug, Clone)]
pub struct Interrupt {
    status: Arc<AtomicU32>,
    irqfd: Arc<EventFd>,
}

impl Interrupt {
    /// Makes the line over an eventfd that is (or will be) registered as irqfd.
    pub fn new(irqfd: EventFd) -> Self {
        Self { status: Arc::new(AtomicU32::new(0)), irqfd: Arc::new(irqfd) }
    }

    /// Tells the guest that a queue has used buffers. The device has asked `needs_notification` first.
    pub fn used(&self) {
        self.raise(INTERRUPT_USED_RING);
    }

    /// Tells the guest that the configuration space changed.
    pub fn config_changed(&self) {
        self.raise(INTERRUPT_CONFIG);
    }

    /// Status bits not yet acknowledged (transport).
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// Clears acknowledged bits (transport).
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// The eventfd behind the line.
    pub fn irqfd(&self) -> &EventFd {
        &self.irqfd
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        if let Err(error) = self.irqfd.write(1) {
            tracing::warn!(%error, "cannot raise a device interrupt");
        }
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
    /// Queues, by index.
    pub queues: Vec<ActiveQueue>,
    /// Features that driver and device agreed on.
    pub features: u64,
}

/// A device failed to start; the transport sets DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
#[error("Cannot activate the {device} device: {why}")]
pub struct ActivateError {
    /// The device's kind.
    pub device: &'static str,
    /// What went wrong.
    pub why: String,
}

/// A virtio device, called by its transport under the transport's lock.
///
/// Order of calls: `read_config`/`write_config` at any time; `activate` once, at DRIVER_OK; then
/// `reset` when the guest writes status 0 or the device is unplugged, after which `activate` may
/// come again. When `reset` returns the device no longer touches guest memory or its queues.
pub trait VirtioDevice: Send {
    /// Kind, for logs: "block", "vsock".
    fn kind(&self) -> &'static str;
    /// Device ID (virtio 1.3 section 5).
    fn device_id(&self) -> u32;
    /// Features offered, without those of the transport (VERSION_1 is added by it).
    fn features(&self) -> u64;
    /// Largest size of each queue, each a power of two.
    fn queue_sizes(&self) -> &[u16];
    /// Reads configuration space; bytes beyond it read 0.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes configuration space; what is not writable is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// Starts the device, typically by adding a subscriber to the event loop.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// Stops it and forgets all of the driver's state.
    fn reset(&mut self);
}
