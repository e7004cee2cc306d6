//! virtio-rng (virtio 1.3 section 5.4): the host's entropy, from getrandom.
//!
//! What a guest may ask for is bounded twice: a request gets at most
//! [`REQUEST_BYTES`], and a turn in the event loop serves [`BATCH`] of them.

#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::device::{ActivateError, Activation, ActiveQueue, GuestRam, Interrupt, VirtioDevice};
use super::queue::{Buffers, Chain, RING_FEATURES, Served, serve};
use crate::event_loop::{EventLoopHandle, SubscriberId};

/// Most bytes that one request gets; what it has room for beyond is left as it is.
pub const REQUEST_BYTES: u64 = 16 << 10;
/// Requests served in one turn of the event loop.
pub const BATCH: usize = 4;

const KIND: &str = "rng";
const QUEUE_SIZES: [u16; 1] = [64];

/// A virtio-rng device, served by the event loop.
#[derive(Debug)]
pub struct Rng {
    events: EventLoopHandle,
    active: Option<SubscriberId>,
}

impl Rng {
    /// A device that will be served by `events`.
    pub fn new(events: EventLoopHandle) -> Self {
        Self {
            events,
            active: None,
        }
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        // There is no configuration space.
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let failed = |why: String| ActivateError { device: KIND, why };
        let [ActiveQueue { queue, kick }] = <[ActiveQueue; 1]>::try_from(activation.queues)
            .map_err(|queues| failed(format!("{} queues, not 1", queues.len())))?;
        let service = Service {
            ram: activation.ram,
            interrupt: activation.interrupt,
            queue,
            kick,
            broken: false,
        };
        let id = self
            .events
            .add(Arc::new(Mutex::new(service)))
            .map_err(|error| failed(error.to_string()))?;
        self.active = Some(id);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(id) = self.active.take() {
            // It can only be unknown if it is gone already.
            let _ = self.events.remove(id);
        }
    }
}

impl Drop for Rng {
    fn drop(&mut self) {
        self.reset();
    }
}

struct Service {
    ram: GuestRam,
    interrupt: Interrupt,
    queue: Queue,
    kick: Arc<EventFd>,
    /// The ring cannot be used until a reset.
    broken: bool,
}

impl Service {
    fn turn(&mut self) {
        if self.broken {
            return;
        }
        let memory = self.ram.memory();
        match serve(&mut self.queue, &memory, &self.interrupt, BATCH, answer) {
            Ok(Served::All) => {}
            Ok(Served::More) => {
                // Others in the loop come first. A full counter is readable, too.
                let _ = self.kick.write(1);
            }
            Err(error) => {
                self.broken = true;
                self.interrupt.fault(KIND, &error);
            }
        }
    }
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

/// Fills a chain's writable part, up to the cap; returns how many bytes.
fn answer(mut chain: Chain<'_>) -> Option<u32> {
    let mut wanted: Buffers<'_> = chain.writable.take(REQUEST_BYTES);
    let mut bytes = [0; 1024];
    let mut done = 0;
    while !wanted.is_empty() {
        let len = bytes.len().min(wanted.len() as usize);
        if let Err(error) = fill(&mut bytes[..len]) {
            tracing::warn!(%error, "the host gives no entropy");
            break;
        }
        done += wanted.write(&bytes[..len]) as u32;
    }
    Some(done)
}

/// Random bytes of the host's kernel.
fn fill(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        // SAFETY: the pointer and the length are those of a slice that is ours alone to write.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => bytes = &mut bytes[got..],
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
