//! The virtio device (virtio 1.3 section 5.10): three queues, a configuration
//! space that holds the guest's CID, and the subscriber that moves packets
//! between queues and muxer on the event loop.
//!
//! One turn takes what the guest has sent, gives it what the host has, wakes the
//! host's tasks and raises at most one interrupt. A turn is bounded by [`BUDGET`]
//! packets each way, so a busy guest cannot keep the loop from other devices; what is
//! left is done in the next turn. The event queue is left alone: there is no event to tell.

use std::sync::{Arc, Mutex};

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::Error;
use super::muxer::{DeviceState, Muxer};
use super::packet::{RxBuffer, TxPacket};
use super::stream::{Shared, VsockHost};
use crate::event_loop::{EventLoopHandle, SubscriberId};
use crate::virtio::device::{
    ActivateError, Activation, ActiveQueue, GuestRam, Interrupt, VirtioDevice, read_space,
};
use crate::virtio::queue::{RING_FEATURES, RingError, Served, serve_quietly};

/// VIRTIO_VSOCK_F_STREAM, as a bit number.
const FEATURE_STREAM: u32 = 0;
/// Sizes of the queues: receive, transmit, event.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// Packets of one turn in each direction: 4 MiB at most, about a millisecond.
pub const BUDGET: usize = 64;

/// What an event is about; the data of its registration.
const RX_KICK: u32 = 0;
const TX_KICK: u32 = 1;
const EVENT_KICK: u32 = 2;
const DOORBELL: u32 = 3;

/// The socket device. Dropping it ends all streams of its [`VsockHost`].
pub struct Vsock {
    guest_cid: u64,
    shared: Arc<Shared>,
    event_loop: EventLoopHandle,
    subscriber: Option<SubscriberId>,
}

impl Vsock {
    /// A device for the guest `guest_cid` (3 to 2^32-2), which will run on `event_loop`, and the
    /// host's end of it.
    ///
    /// # Errors
    /// [`Error::Doorbell`] when there are no file descriptors left.
    pub fn new(guest_cid: u64, event_loop: EventLoopHandle) -> Result<(Self, VsockHost), Error> {
        let shared = Shared::new(guest_cid)?;
        let host = VsockHost::new(Arc::clone(&shared));
        Ok((
            Self {
                guest_cid,
                shared,
                event_loop,
                subscriber: None,
            },
            host,
        ))
    }

    /// Takes the subscriber out of the loop, if it is in.
    fn stop(&mut self) {
        let Some(id) = self.subscriber.take() else {
            return;
        };
        if let Err(error) = self.event_loop.remove(id) {
            tracing::debug!(%error, "the vsock device had left its event loop");
        }
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> &'static str {
        "vsock"
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        RING_FEATURES | 1 << FEATURE_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.guest_cid.to_le_bytes();
        read_space(&config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let failed = |why: String| ActivateError {
            device: "vsock",
            why,
        };
        if self.subscriber.is_some() {
            return Err(failed("it is active".into()));
        }
        let worker = Worker::new(Arc::clone(&self.shared), activation).map_err(failed)?;
        let id = self
            .event_loop
            .add(Arc::new(Mutex::new(worker)))
            .map_err(|error| failed(error.to_string()))?;
        self.subscriber = Some(id);
        // What the host has asked for so far.
        self.shared.lock().device = DeviceState::Running;
        self.shared.ring();
        Ok(())
    }

    fn reset(&mut self) {
        self.stop();
        self.shared.with(|muxer| {
            muxer.device = DeviceState::Inactive;
            muxer.cut_all();
        });
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.stop();
        self.shared.with(Muxer::end);
    }
}

/// The active device: its queues, on the event loop's thread.
pub struct Worker {
    shared: Arc<Shared>,
    ram: GuestRam,
    interrupt: Interrupt,
    pub(super) rx: ActiveQueue,
    pub(super) tx: ActiveQueue,
    event: ActiveQueue,
    /// The driver broke a queue; nothing moves until it resets the device.
    broken: bool,
}

impl Worker {
    /// Takes what the transport gives.
    ///
    /// # Errors
    /// A text when there are not three queues.
    pub fn new(shared: Arc<Shared>, activation: Activation) -> Result<Self, String> {
        let Activation {
            ram,
            interrupt,
            queues,
            ..
        } = activation;
        let count = queues.len();
        let [rx, tx, event] =
            <[ActiveQueue; 3]>::try_from(queues).map_err(|_| format!("{count} queues, not 3"))?;
        Ok(Self {
            shared,
            ram,
            interrupt,
            rx,
            tx,
            event,
            broken: false,
        })
    }

    /// One turn; see the module.
    pub fn turn(&mut self) {
        if self.broken {
            return;
        }
        let ram = self.ram.memory();
        let mut raise = false;
        let done = self.take(&ram, &mut raise).and_then(|more_to_take| {
            self.shared.flush();
            Ok(more_to_take | self.give(&ram, &mut raise)?)
        });
        if raise {
            self.interrupt.used();
        }
        match done {
            Ok(true) => self.shared.ring(),
            Ok(false) => {}
            Err(error) => {
                self.broken = true;
                self.interrupt.fault("vsock", &error);
                self.shared.lock().cut_all();
            }
        }
        self.shared.flush();
    }

    /// Takes packets from the guest; tells whether there are more.
    fn take(&mut self, ram: &GuestMemoryMmap, raise: &mut bool) -> Result<bool, RingError> {
        let shared = &self.shared;
        let mut used = false;
        let served = serve_quietly(&mut self.tx.queue, ram, BUDGET, &mut used, |chain| {
            match TxPacket::new(chain.readable) {
                Ok(mut packet) => {
                    let header = packet.header;
                    shared.lock().receive(&header, &mut packet);
                }
                Err(error) => {
                    tracing::debug!(%error, "a chain of the guest's holds no vsock packet");
                    shared.lock().counters.bad_chains += 1;
                }
            }
            Some(0)
        });
        *raise |= used && self.tx.queue.needs_notification(ram).unwrap_or(true);
        Ok(served? == Served::More)
    }

    /// Gives packets to the guest; tells whether there are more, and perhaps room for them.
    fn give(&mut self, ram: &GuestMemoryMmap, raise: &mut bool) -> Result<bool, RingError> {
        let shared = &self.shared;
        if !shared.lock().has_packet() {
            return Ok(false);
        }
        let mut used = false;
        let served = serve_quietly(&mut self.rx.queue, ram, BUDGET, &mut used, |chain| {
            match RxBuffer::new(chain.writable) {
                Ok(buffer) => shared
                    .lock()
                    .next_packet(buffer.room(), |header, data| buffer.write(header, data)),
                Err(error) => {
                    tracing::debug!(%error, "a chain of the guest's cannot take a vsock packet");
                    shared.lock().counters.bad_chains += 1;
                    Some(0)
                }
            }
        });
        *raise |= used && self.rx.queue.needs_notification(ram).unwrap_or(true);
        // Without buffers left the guest's kick brings the next turn, without packets the doorbell.
        Ok(served? == Served::More && shared.lock().has_packet())
    }
}

/// Empties an eventfd that was readable.
fn drain(eventfd: &EventFd) {
    if let Err(error) = eventfd.read() {
        tracing::debug!(%error, "an eventfd of the vsock device was empty");
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let watched = [
            (&*self.rx.kick, RX_KICK),
            (&*self.tx.kick, TX_KICK),
            (&*self.event.kick, EVENT_KICK),
            (&self.shared.doorbell, DOORBELL),
        ];
        for (eventfd, data) in watched {
            if let Err(error) = ops.add(Events::with_data(eventfd, data, EventSet::IN)) {
                tracing::error!(?error, data, "cannot watch an eventfd of the vsock device");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        match events.data() {
            RX_KICK => drain(&self.rx.kick),
            TX_KICK => drain(&self.tx.kick),
            EVENT_KICK => return drain(&self.event.kick),
            _ => drain(&self.shared.doorbell),
        }
        self.turn();
    }
}
