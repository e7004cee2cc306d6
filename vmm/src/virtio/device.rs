//! What a virtio device is to its transport. Devices do not know which
//! transport they are behind.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_STATUS,
};
use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::registers::RegisterPage;

/// Guest memory as devices see it: an atomically replaceable view.
pub type GuestRam = GuestMemoryAtomic<GuestMemoryMmap>;

/// Interrupt status bit: a queue was used.
pub const INTERRUPT_USED_RING: u32 = 1;
/// Interrupt status bit: the configuration changed (or DEVICE_NEEDS_RESET was set).
pub const INTERRUPT_CONFIG: u32 = 2;

/// The device's one interrupt line: the irqfd that raises it, and the registers that say why. Clones share it.
#[derive(Debug, Clone)]
pub struct Interrupt {
    line: Arc<Line>,
}

#[derive(Debug)]
struct Line {
    page: RegisterPage,
    /// Held while the configuration space is written into the page.
    publishing: Mutex<()>,
    faults: AtomicU32,
    irqfd: EventFd,
}

/// Faults of one device that are logged as warnings: a guest that resets and breaks its device in
/// a loop does not fill the host's log.
const LOUD_FAULTS: u32 = 4;

impl Interrupt {
    /// Makes the line over an eventfd, for a device without a transport: nobody reads its registers.
    ///
    /// # Panics
    ///
    /// If the host maps no more memory.
    pub fn new(irqfd: EventFd) -> Self {
        let page = RegisterPage::alone().expect("a page of memory");
        Self::over(irqfd, page)
    }

    /// Makes the line over an eventfd that is (or will be) registered as irqfd, with registers in a page.
    pub fn over(irqfd: EventFd, page: RegisterPage) -> Self {
        Self {
            line: Arc::new(Line {
                page,
                publishing: Mutex::new(()),
                faults: AtomicU32::new(0),
                irqfd,
            }),
        }
    }

    /// Tells the guest that a queue has used buffers. The device has asked `needs_notification` first.
    pub fn used(&self) {
        self.raise(INTERRUPT_USED_RING);
    }

    /// Shows the guest what its configuration space holds now, from the first byte on, and moves its generation on if that is new. A
    /// device calls it when something has changed that its driver need not be told of; after a write of the driver and after a
    /// reset the transport does. `space` is called when nobody else publishes, so that what stays is the newest: the caller holds no lock
    /// that it, or [`read_config`](VirtioDevice::read_config), takes, and it does not publish.
    pub fn publish<Space: AsRef<[u8]>>(&self, space: impl FnOnce() -> Space) {
        let _alone = self
            .line
            .publishing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let space = space();
        let space = space.as_ref();
        let page = &self.line.page;
        let mut shown = vec![0; space.len()];
        page.read(VIRTIO_MMIO_CONFIG.into(), &mut shown);
        if shown == space {
            return;
        }
        // A driver that has read a part of it before finds another generation when it has read the rest. One that reads all of it
        // between the two steps may find a mixture, and reads again when it is told.
        let generation = page.register(VIRTIO_MMIO_CONFIG_GENERATION);
        generation.fetch_add(1, Ordering::SeqCst);
        page.write(VIRTIO_MMIO_CONFIG.into(), space);
        generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Publishes what `space` returns, and tells the driver that its configuration has changed.
    pub fn config_changed<Space: AsRef<[u8]>>(&self, space: impl FnOnce() -> Space) {
        self.publish(space);
        self.raise(INTERRUPT_CONFIG);
    }

    /// The device cannot go on with what the driver gave it: DEVICE_NEEDS_RESET (virtio 1.3,
    /// 2.1.2). It then leaves its queues alone until it is reset.
    pub fn fault(&self, device: &'static str, why: &dyn fmt::Display) {
        let status = self.line.page.register(VIRTIO_MMIO_STATUS);
        let before = status.fetch_or(VIRTIO_CONFIG_S_NEEDS_RESET, Ordering::SeqCst);
        if before & VIRTIO_CONFIG_S_NEEDS_RESET == 0 {
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
        let status = self.line.page.register(VIRTIO_MMIO_STATUS);
        status.load(Ordering::SeqCst) & VIRTIO_CONFIG_S_NEEDS_RESET != 0
    }

    /// Moves on each time that the configuration changes (transport).
    pub fn generation(&self) -> u32 {
        let generation = self.line.page.register(VIRTIO_MMIO_CONFIG_GENERATION);
        generation.load(Ordering::SeqCst)
    }

    /// Status bits not yet acknowledged (transport).
    pub fn status(&self) -> u32 {
        let status = self.line.page.register(VIRTIO_MMIO_INTERRUPT_STATUS);
        status.load(Ordering::SeqCst)
    }

    /// Clears acknowledged bits (transport).
    pub fn acknowledge(&self, bits: u32) {
        let status = self.line.page.register(VIRTIO_MMIO_INTERRUPT_STATUS);
        status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Forgets all but the generation, with the device stopped (transport).
    pub fn reset(&self) {
        self.acknowledge(u32::MAX);
        let status = self.line.page.register(VIRTIO_MMIO_STATUS);
        status.fetch_and(!VIRTIO_CONFIG_S_NEEDS_RESET, Ordering::SeqCst);
    }

    /// Shows the driver's bits of the device status; DEVICE_NEEDS_RESET stays as it is (transport).
    pub(super) fn show_device_status(&self, bits: u32) {
        let status = self.line.page.register(VIRTIO_MMIO_STATUS);
        let keep = |before| Some(before & VIRTIO_CONFIG_S_NEEDS_RESET | bits);
        // The function never declines.
        let _ = status.fetch_update(Ordering::SeqCst, Ordering::SeqCst, keep);
    }

    /// The registers (transport).
    pub(super) fn page(&self) -> &RegisterPage {
        &self.line.page
    }

    /// The eventfd behind the line.
    pub fn irqfd(&self) -> &EventFd {
        &self.line.irqfd
    }

    fn raise(&self, bit: u32) {
        let status = self.line.page.register(VIRTIO_MMIO_INTERRUPT_STATUS);
        status.fetch_or(bit, Ordering::SeqCst);
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
    /// Reads configuration space; bytes beyond it read 0. The transport calls it when the driver has written something, for the guest to
    /// find in the [`registers`](super::registers): what changes of itself, the device publishes.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes configuration space; what is not writable is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// Starts the device, typically by adding a subscriber to the event loop.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// Stops it and forgets all of the driver's state.
    fn reset(&mut self);
}
