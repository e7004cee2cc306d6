//! The virtio-mmio transport, version 2 (virtio 1.3 section 4.2).
//!
//! A [`Window`] is one page of registers that has a device behind it or is
//! spare. It enforces the order of initialization, so that a device is
//! activated only with queues that lie in guest memory. Who maps the page, shows its registers to the guest and
//! registers the eventfds with KVM is not its business.

mod status;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use thiserror::Error;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_DEVICE_FEATURES, VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES, VIRTIO_MMIO_DRIVER_FEATURES_SEL,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
    VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW,
    VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX,
    VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW,
    VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID,
    VIRTIO_MMIO_VERSION,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{ActivateError, Activation, ActiveQueue, GuestRam, Interrupt, VirtioDevice};
use super::queue::F_EVENT_IDX;
use super::registers::RegisterPage;
pub use status::{State, Step};

/// Size of a window in guest-physical address space, in bytes.
pub const WINDOW_SIZE: u64 = 0x1000;
/// Offset of the register that a driver writes a queue's index to; an ioeventfd goes here.
pub const NOTIFY_OFFSET: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;
/// Offset of the register by which a driver acknowledges an interrupt. Whoever maps the window may swallow a write of
/// [`INTERRUPT_USED_RING`](super::device::INTERRUPT_USED_RING) alone, the one that comes with every interrupt of a queue: its bit then
/// stays set in the interrupt status, and all that a driver does by a bit too many is to look at its queues. A bit of the configuration must be
/// cleared, so that every other value must arrive.
pub const ACKNOWLEDGE_OFFSET: u64 = VIRTIO_MMIO_INTERRUPT_ACK as u64;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "NACR", little-endian.
const VENDOR: u32 = 0x5243_414e;
const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;
const F_VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

/// Why a device could not be put into a window.
#[derive(Debug, Error)]
pub enum Error {
    /// There is one already.
    #[error("The virtio-mmio window already has a {0} device")]
    Occupied(&'static str),
    /// A device that no driver could use.
    #[error(
        "The {device} device offers a queue of {size} entries, which is no power of two up to 32768"
    )]
    QueueSize {
        /// The device's kind.
        device: &'static str,
        /// What it offers.
        size: u16,
    },
    /// The host is out of descriptors.
    #[error("Cannot make an eventfd for a virtio-mmio window")]
    EventFd(#[source] io::Error),
}

/// What the driver wrote about a queue, judged when the device is activated.
#[derive(Debug, Clone, Copy, Default)]
struct QueueRegisters {
    max_size: u16,
    size: u32,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            ..Self::default()
        }
    }

    /// The queue, if it can be used.
    fn build(&self, event_idx: bool, memory: &GuestMemoryMmap) -> Result<Queue, String> {
        if !self.ready {
            return Err("is not ready".to_owned());
        }
        let max_size = self.max_size;
        let bad_size = || {
            format!(
                "has {} entries; 2^n up to {max_size} are possible",
                self.size
            )
        };
        let size = u16::try_from(self.size).map_err(|_| bad_size())?;
        let mut queue = Queue::new(max_size).map_err(|error| error.to_string())?;
        queue.try_set_size(size).map_err(|_| bad_size())?;
        let bad_address = |what: &'static str, address: u64| {
            move |_| format!("has a misaligned {what} at {address:#x}")
        };
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .map_err(bad_address("descriptor table", self.descriptors))?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.available))
            .map_err(bad_address("available ring", self.available))?;
        queue
            .try_set_used_ring_address(GuestAddress(self.used))
            .map_err(bad_address("used ring", self.used))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        // virtio-queue takes an available ring at 0 for one that was never set.
        if self.available == 0 || !queue.is_valid(memory) {
            return Err(format!(
                "has a ring outside guest memory (descriptors {:#x}, available {:#x}, used {:#x})",
                self.descriptors, self.available, self.used
            ));
        }
        Ok(queue)
    }
}

/// A device in a window, with what its driver has said so far.
struct Plugged {
    device: Box<dyn VirtioDevice>,
    kicks: Vec<Arc<EventFd>>,
    queues: Vec<QueueRegisters>,
    state: State,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
}

/// One virtio-mmio window. The VM holds it behind a lock and calls [`read`](Self::read) and
/// [`write`](Self::write) from vCPU threads. Dropping it stops the device.
pub struct Window {
    ram: GuestRam,
    interrupt: Interrupt,
    plugged: Option<Plugged>,
}

impl std::fmt::Debug for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Window")
            .field("device", &self.kind())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

impl Window {
    /// A spare window, with an irqfd of its own, its registers in a page that is all zeros.
    ///
    /// # Errors
    ///
    /// [`Error::EventFd`].
    pub fn new(ram: GuestRam, page: RegisterPage) -> Result<Self, Error> {
        let irqfd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::EventFd)?;
        page.set(VIRTIO_MMIO_MAGIC_VALUE, MAGIC);
        page.set(VIRTIO_MMIO_VERSION, VERSION);
        page.set(VIRTIO_MMIO_VENDOR_ID, VENDOR);
        Ok(Self {
            ram,
            interrupt: Interrupt::over(irqfd, page),
            plugged: None,
        })
    }

    /// Puts a device into a spare window. Its queues' eventfds are then in [`kicks`](Self::kicks);
    /// a driver that looks from now on finds it.
    ///
    /// # Errors
    ///
    /// [`Error`]; the device is dropped.
    pub fn plug(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), Error> {
        if let Some(there) = &self.plugged {
            return Err(Error::Occupied(there.device.kind()));
        }
        let sizes = device.queue_sizes().to_vec();
        for &size in &sizes {
            Queue::new(size).map_err(|_| Error::QueueSize {
                device: device.kind(),
                size,
            })?;
        }
        let kicks = sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new))
            .collect::<Result<_, _>>()
            .map_err(Error::EventFd)?;
        self.interrupt.reset();
        self.plugged = Some(Plugged {
            device,
            kicks,
            queues: sizes.into_iter().map(QueueRegisters::new).collect(),
            state: State::Reset,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
        });
        self.show_configuration();
        self.show();
        Ok(())
    }

    /// Stops the device and takes it out; the window is spare again. The kicks' ioeventfds are
    /// unregistered before.
    pub fn unplug(&mut self) -> Option<Box<dyn VirtioDevice>> {
        let mut plugged = self.plugged.take()?;
        plugged.device.reset();
        self.interrupt.reset();
        self.show();
        self.show_configuration();
        Some(plugged.device)
    }

    /// Eventfds by queue index, each for an ioeventfd at [`NOTIFY_OFFSET`] that matches its index
    /// (4 bytes). The same from plug to unplug; empty for a spare window.
    pub fn kicks(&self) -> &[Arc<EventFd>] {
        self.plugged.as_ref().map_or(&[], |plugged| &plugged.kicks)
    }

    /// The line, with the eventfd for KVM's irqfd. The same for the window's whole life.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// The kind of the device, if there is one.
    pub fn kind(&self) -> Option<&'static str> {
        self.plugged.as_ref().map(|plugged| plugged.device.kind())
    }

    /// How far its driver has come, if there is a device.
    pub fn state(&self) -> Option<State> {
        self.plugged.as_ref().map(|plugged| plugged.state)
    }

    /// The guest reads `data.len()` bytes at `offset` in the window, as it would read them of the page by itself; what lies outside
    /// gives zeros.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.interrupt.page().read(offset, data);
    }

    /// Brings the page up to date with all that depends on the driver's writes.
    fn show(&self) {
        let page = self.interrupt.page();
        let plugged = self.plugged.as_ref();
        let queue = plugged.and_then(Plugged::queue);
        let features = plugged.map_or(0, |plugged| match plugged.device_features_sel {
            0 => plugged.offered() as u32,
            1 => (plugged.offered() >> 32) as u32,
            _ => 0,
        });
        page.set(VIRTIO_MMIO_DEVICE_FEATURES, features);
        let max_size = queue.map_or(0, |queue| queue.max_size.into());
        page.set(VIRTIO_MMIO_QUEUE_NUM_MAX, max_size);
        let ready = queue.is_some_and(|queue| queue.ready);
        page.set(VIRTIO_MMIO_QUEUE_READY, ready.into());
        let bits = plugged.map_or(0, |plugged| plugged.state.bits());
        self.interrupt.show_device_status(bits);
        // No shared memory region has this id: length and base are -1 (4.2.2).
        let shared_memory = if plugged.is_some() { u32::MAX } else { 0 };
        for register in [
            VIRTIO_MMIO_SHM_LEN_LOW,
            VIRTIO_MMIO_SHM_LEN_HIGH,
            VIRTIO_MMIO_SHM_BASE_LOW,
            VIRTIO_MMIO_SHM_BASE_HIGH,
        ] {
            page.set(register, shared_memory);
        }
        // Last of all, as it is what a driver looks for. The device ID of a spare window, too, is 0.
        let id = plugged.map_or(0, |plugged| plugged.device.device_id());
        page.set(VIRTIO_MMIO_DEVICE_ID, id);
    }

    fn show_configuration(&self) {
        self.interrupt.publish(|| {
            let mut space = [0; (WINDOW_SIZE - CONFIG) as usize];
            if let Some(plugged) = &self.plugged {
                plugged.device.read_config(0, &mut space);
            }
            space
        });
    }

    /// The guest writes `data` at `offset` in the window. What it may not write, in this state or
    /// with this size, changes nothing.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let Some(plugged) = &mut self.plugged else {
            return;
        };
        if offset >= CONFIG {
            let within = WINDOW_SIZE.saturating_sub(offset).min(data.len() as u64) as usize;
            if within > 0
                && matches!(
                    plugged.state,
                    State::Driver | State::FeaturesOk | State::Running
                )
            {
                plugged
                    .device
                    .write_config(offset - CONFIG, &data[..within]);
                self.show_configuration();
            }
            return;
        }
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else {
            return;
        };
        if !offset.is_multiple_of(4) {
            return;
        }
        match offset as u32 {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => plugged.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => plugged.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => plugged.write_features(value),
            VIRTIO_MMIO_QUEUE_SEL => plugged.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                if let (State::Running, Some(kick)) =
                    (plugged.state, plugged.kicks.get(value as usize))
                {
                    // A counter that is full says that it was kicked, too.
                    let _ = kick.write(1);
                }
                return;
            }
            VIRTIO_MMIO_INTERRUPT_ACK => return self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => {
                self.write_status(value);
                self.show_configuration();
            }
            register => plugged.write_queue(register, value),
        }
        self.show();
    }

    fn write_status(&mut self, value: u32) {
        let Some(plugged) = &mut self.plugged else {
            return;
        };
        let kind = plugged.device.kind();
        match plugged.state.step(value) {
            Step::Reset => {
                if plugged.state != State::Reset {
                    plugged.device.reset();
                }
                plugged.forget_driver();
                self.interrupt.reset();
            }
            Step::Acknowledge => plugged.state = State::Acknowledged,
            Step::Driver => plugged.state = State::Driver,
            Step::SettleFeatures => {
                if plugged.features_acceptable() {
                    plugged.state = State::FeaturesOk;
                } else {
                    tracing::debug!(
                        device = kind,
                        offered = plugged.offered(),
                        wanted = plugged.driver_features,
                        "features refused"
                    );
                }
            }
            Step::Activate => match plugged.activate(&self.ram, &self.interrupt) {
                Ok(()) => {
                    plugged.state = State::Running;
                    tracing::debug!(
                        device = kind,
                        features = plugged.driver_features,
                        "driver ok"
                    );
                }
                Err(error) => {
                    plugged.device.reset();
                    plugged.state = State::Broken;
                    self.interrupt.fault(kind, &error);
                }
            },
            Step::Fail => {
                tracing::debug!(device = kind, "the driver gave up");
                plugged.device.reset();
                plugged.state = plugged.state.failed();
            }
            Step::Nothing => {}
            Step::Refused => {
                tracing::debug!(
                    device = kind,
                    state = ?plugged.state,
                    value,
                    "status write refused"
                );
            }
        }
    }
}

impl Plugged {
    fn offered(&self) -> u64 {
        self.device.features() | F_VERSION_1
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & F_VERSION_1 != 0 && self.driver_features & !self.offered() == 0
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(self.queue_sel as usize)
    }

    /// Features are the driver's to write until they are settled.
    fn write_features(&mut self, value: u32) {
        if self.state != State::Driver {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_sel {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            // There are no such features, so whoever wants one is mistaken: keep nothing.
            _ => {}
        }
    }

    /// Queues are set up between FEATURES_OK and DRIVER_OK, each before it is made ready.
    fn write_queue(&mut self, register: u32, value: u32) {
        if self.state != State::FeaturesOk {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else {
            return;
        };
        if register == VIRTIO_MMIO_QUEUE_READY {
            queue.ready = value & 1 == 1;
            return;
        }
        if queue.ready {
            return;
        }
        let low = |address: u64| address & !0xffff_ffff | u64::from(value);
        let high = |address: u64| address & 0xffff_ffff | u64::from(value) << 32;
        match register {
            VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.descriptors = low(queue.descriptors),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.descriptors = high(queue.descriptors),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.available = low(queue.available),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.available = high(queue.available),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.used = low(queue.used),
            VIRTIO_MMIO_QUEUE_USED_HIGH => queue.used = high(queue.used),
            _ => {}
        }
    }

    fn activate(&mut self, ram: &GuestRam, interrupt: &Interrupt) -> Result<(), ActivateError> {
        let event_idx = self.driver_features & F_EVENT_IDX != 0;
        let memory = ram.memory();
        let mut queues = Vec::with_capacity(self.queues.len());
        let required = self.device.required_queues();
        for (index, (registers, kick)) in self.queues.iter().zip(&self.kicks).enumerate() {
            if index >= required && !registers.ready {
                continue;
            }
            let queue = registers
                .build(event_idx, &memory)
                .map_err(|why| ActivateError {
                    device: self.device.kind(),
                    why: format!("queue {index} {why}"),
                })?;
            queues.push(ActiveQueue {
                queue,
                kick: Arc::clone(kick),
            });
        }
        self.device.activate(Activation {
            ram: ram.clone(),
            interrupt: interrupt.clone(),
            queues,
            features: self.driver_features,
        })
    }

    fn forget_driver(&mut self) {
        self.state = State::Reset;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max_size);
        }
        for kick in &self.kicks {
            // Kicks of the former driver are not the next one's. Nonblocking: EAGAIN is none.
            let _ = kick.read();
        }
    }
}
