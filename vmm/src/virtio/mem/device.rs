//! The memory device as its transport sees it, and its service on the event
//! loop.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::host::Shared;
use super::region::Region;
use super::request::{REQUEST_BYTES, RESPONSE_BYTES, Request};
use super::{ConfigError, MemConfig, MemHost};
use crate::event_loop::{EventLoopHandle, SubscriberId};
use crate::memory::GuestMemory;
use crate::virtio::device::{
    ActivateError, Activation, ActiveQueue, GuestRam, Interrupt, VirtioDevice, read_space,
};
use crate::virtio::queue::{Chain, RING_FEATURES, Served, serve};

const KIND: &str = "mem";
const QUEUE_SIZES: [u16; 1] = [16];
/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: the driver does not even read unplugged blocks. Linux accepts it since
/// 5.17; an older one reads, for a dump, zeros or (where there is no slot) ones.
const FEATURE_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Requests served in one turn of the event loop.
pub(super) const BATCH: usize = 4;
/// Slots made, discarded or taken away in one turn; a request for more goes on in the next.
pub(super) const SLOTS_PER_TURN: u32 = 8;

/// A virtio-mem device, served by the event loop.
///
/// Its blocks stay as they are when the guest resets it, and when it is dropped: they go with
/// UNPLUG ALL, or with the VM's memory. There is no reboot within a VM's life.
pub struct Mem {
    shared: Arc<Shared>,
    region: Arc<Mutex<Region>>,
    events: EventLoopHandle,
    active: Option<SubscriberId>,
}

impl Mem {
    /// A device with nothing plugged and nothing requested, that adds its slots to `memory` and
    /// will be served by `events`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`]. That the region overlaps other memory shows only when a block is plugged
    /// there.
    pub fn new(
        config: MemConfig,
        memory: Arc<GuestMemory>,
        events: EventLoopHandle,
    ) -> Result<(Self, MemHost), ConfigError> {
        config.check()?;
        let shared = Arc::new(Shared::new(config));
        let host = MemHost::new(Arc::clone(&shared));
        let region = Region::new(memory, Arc::clone(&shared));
        let device = Self {
            shared,
            region: Arc::new(Mutex::new(region)),
            events,
            active: None,
        };
        Ok((device, host))
    }

    /// Panics if the device's state does not agree with itself. Not while a turn is under way.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn checker(&self) -> impl Fn() + use<> {
        let region = Arc::clone(&self.region);
        move || lock(&region).check()
    }

    /// The service of an activation, that nothing runs yet.
    pub(super) fn service(&self, activation: Activation) -> Result<Service, ActivateError> {
        let [ActiveQueue { queue, kick }] = <[ActiveQueue; 1]>::try_from(activation.queues)
            .map_err(|queues| ActivateError {
                device: KIND,
                why: format!("{} queues, not 1", queues.len()),
            })?;
        if lock(&self.region).is_tidying() {
            // What the driver before left undone. A full counter is readable, too.
            let _ = kick.write(1);
        }
        Ok(Service {
            ram: activation.ram,
            interrupt: activation.interrupt,
            queue,
            kick,
            region: Arc::clone(&self.region),
            broken: false,
        })
    }

    /// Ends what the service left undone. There is none any more.
    pub(super) fn abandon(&self) {
        lock(&self.region).abandon();
    }
}

impl VirtioDevice for Mem {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn features(&self) -> u64 {
        RING_FEATURES | FEATURE_UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.shared.config_space(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = activation.interrupt.clone();
        let service = self.service(activation)?;
        let id = self
            .events
            .add(Arc::new(Mutex::new(service)))
            .map_err(|error| ActivateError {
                device: KIND,
                why: error.to_string(),
            })?;
        self.active = Some(id);
        self.shared.set_driver(Some(interrupt));
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(id) = self.active.take() {
            // It can only be unknown if it is gone already.
            let _ = self.events.remove(id);
            self.shared.set_driver(None);
            self.abandon();
        }
    }
}

impl Drop for Mem {
    fn drop(&mut self) {
        self.reset();
    }
}

/// Held by the service for a turn, by the device only while there is no service.
fn lock(region: &Mutex<Region>) -> MutexGuard<'_, Region> {
    region.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) struct Service {
    ram: GuestRam,
    interrupt: Interrupt,
    queue: Queue,
    kick: Arc<EventFd>,
    region: Arc<Mutex<Region>>,
    /// The ring cannot be used until a reset.
    broken: bool,
}

impl Service {
    pub fn turn(&mut self) {
        let mut budget = SLOTS_PER_TURN;
        let region = Arc::clone(&self.region);
        let mut region = lock(&region);
        if self.broken {
            return;
        }
        if region.is_tidying() {
            region.advance(&mut budget);
            if region.is_tidying() {
                let _ = self.kick.write(1);
                return;
            }
        }
        let memory = self.ram.memory();
        let served = serve(&mut self.queue, &memory, &self.interrupt, BATCH, |chain| {
            answer(&mut region, chain, &mut budget)
        });
        match served {
            Ok(Served::All) => {}
            Ok(Served::More) => {
                // Others in the loop come first.
                let _ = self.kick.write(1);
            }
            Err(error) => {
                self.broken = true;
                self.interrupt.fault(KIND, &error);
            }
        }
    }
}

/// Begins a chain's request, or goes on with it if it was put back in the turn before: then its
/// request is not read again. A driver that changes a chain meanwhile gets an answer that means
/// nothing to it.
fn answer(region: &mut Region, mut chain: Chain<'_>, budget: &mut u32) -> Option<u32> {
    // Without room for a response nothing is done.
    let room = chain.writable.len() >= RESPONSE_BYTES as u64;
    if region.is_idle() {
        if !room {
            return Some(0);
        }
        let mut bytes = [0; REQUEST_BYTES];
        region.begin(match chain.readable.read_exact(&mut bytes) {
            Ok(()) => Request::parse(&bytes),
            Err(_) => Request::Malformed,
        });
    }
    let response = region.advance(budget)?;
    if !room {
        return Some(0);
    }
    Some(chain.writable.write(&response.bytes()) as u32)
}

impl MutEventSubscriber for Service {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&*self.kick, EventSet::IN)) {
            self.broken = true;
            self.interrupt.fault(KIND, &error);
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let _ = self.kick.read();
        self.turn();
    }
}
