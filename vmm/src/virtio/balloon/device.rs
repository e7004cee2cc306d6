//! The balloon as its transport sees it, and its service on the event loop.

use std::io;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::epoll::EventSet;

use super::host::Shared;
use super::pages::{Given, inflate, report};
use super::{BalloonHost, GuestStats, PAGE_BYTES};
use crate::event_loop::{EventLoopHandle, SubscriberId};
use crate::memory::GuestMemory;
use crate::virtio::device::{
    ActivateError, Activation, ActiveQueue, GuestRam, Interrupt, VirtioDevice, read_space,
};
use crate::virtio::queue::{Chain, RING_FEATURES, RingError, Served, serve};

const KIND: &str = "balloon";

/// inflateq, deflateq, then of statsq and reporting_vq those that were negotiated. The specification gives
/// reporting_vq the index 4 in any case, Linux counts on without what is not offered; a queue more than
/// needed makes both right. Linux wants 32 entries for reports.
const QUEUE_SIZES: [u16; 5] = [128; 5];
const REQUIRED_QUEUES: usize = 2;

const FEATURE_MUST_TELL_HOST: u64 = 1;
pub(super) const FEATURE_STATS: u64 = 1 << 1;
const FEATURE_DEFLATE_ON_OOM: u64 = 1 << 2;
pub(super) const FEATURE_REPORTING: u64 = 1 << 5;

/// Offset and size of `actual` in the configuration space.
pub(super) const ACTUAL: std::ops::Range<usize> = 4..8;

/// Requests of one queue served in one turn of the event loop.
pub(super) const BATCH: usize = 4;

/// What the service watches.
const INFLATE: u32 = 0;
const DEFLATE: u32 = 1;
const STATS: u32 = 2;
const REPORTING: u32 = 3;
const ASK: u32 = 4;

/// A virtio-balloon device, served by the event loop.
pub struct Balloon {
    shared: Arc<Shared>,
    memory: Arc<GuestMemory>,
    events: EventLoopHandle,
    active: Option<SubscriberId>,
}

impl Balloon {
    /// An empty balloon for the guest whose memory this is, that will be served by `events`.
    ///
    /// # Errors
    ///
    /// When the host is out of descriptors.
    pub fn new(
        memory: Arc<GuestMemory>,
        events: EventLoopHandle,
    ) -> io::Result<(Self, BalloonHost)> {
        let shared = Arc::new(Shared::new()?);
        let host = BalloonHost::new(Arc::clone(&shared), Arc::clone(&memory));
        let device = Self {
            shared,
            memory,
            events,
            active: None,
        };
        Ok((device, host))
    }

    /// The service of an activation, that nothing runs yet.
    pub(super) fn service(&self, activation: Activation) -> Result<Service, ActivateError> {
        let Activation {
            ram,
            interrupt,
            queues,
            features,
        } = activation;
        let mut queues = queues.into_iter();
        let mut next = |name: &'static str| {
            queues.next().ok_or_else(|| ActivateError {
                device: KIND,
                why: format!("the driver has not set up the {name} queue"),
            })
        };
        Ok(Service {
            shared: Arc::clone(&self.shared),
            ram,
            interrupt,
            inflate: next("inflate")?,
            deflate: next("deflate")?,
            stats: (features & FEATURE_STATS != 0)
                .then(|| next("statistics"))
                .transpose()?,
            reporting: (features & FEATURE_REPORTING != 0)
                .then(|| next("reporting"))
                .transpose()?,
            holds_stats: false,
            broken: false,
        })
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        RING_FEATURES
            | FEATURE_MUST_TELL_HOST
            | FEATURE_STATS
            | FEATURE_DEFLATE_ON_OOM
            | FEATURE_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn required_queues(&self) -> usize {
        REQUIRED_QUEUES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.shared.config_space(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // The driver writes it whole, so that no half of it is believed.
        let (true, Ok(actual)) = (offset == ACTUAL.start as u64, data.try_into()) else {
            return;
        };
        let said = u64::from(u32::from_le_bytes(actual)) * PAGE_BYTES;
        let there = self.memory.ram().memory().iter().map(|r| r.len()).sum();
        self.shared
            .update(|stats| stats.actual_bytes = said.min(there));
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = activation.interrupt.clone();
        // Linux offers its buffer for statistics, and kicks, before DRIVER_OK.
        for queue in &activation.queues {
            let _ = queue.kick.write(1);
        }
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
        }
    }
}

impl Drop for Balloon {
    fn drop(&mut self) {
        self.reset();
    }
}

pub(super) struct Service {
    shared: Arc<Shared>,
    ram: GuestRam,
    interrupt: Interrupt,
    inflate: ActiveQueue,
    deflate: ActiveQueue,
    stats: Option<ActiveQueue>,
    reporting: Option<ActiveQueue>,
    /// The first chain of the statistics queue has been read and is kept there: returning it asks
    /// the driver for new ones.
    holds_stats: bool,
    /// A ring cannot be used until a reset.
    broken: bool,
}

impl Service {
    /// Serves what `event` is about, up to [`BATCH`] chains.
    pub fn turn(&mut self, event: u32) {
        if self.broken {
            return;
        }
        let memory = self.ram.memory();
        let served = match event {
            INFLATE => self.turn_inflate(&memory),
            // The guest has the pages back by touching them: to be told is all that there is.
            DEFLATE => drain(&mut self.deflate, &memory, &self.interrupt, |_| Some(0)).map(|_| ()),
            STATS => self.turn_stats(&memory, false),
            REPORTING => self.turn_reporting(&memory),
            ASK => self.turn_stats(&memory, true),
            _ => Ok(()),
        };
        if let Err(error) = served {
            self.broken = true;
            self.interrupt.fault(KIND, &error);
        }
    }

    fn turn_inflate(&mut self, memory: &GuestMemoryMmap) -> Result<(), RingError> {
        let mut all = Given::default();
        let served = drain(&mut self.inflate, memory, &self.interrupt, |chain| {
            let given = inflate(memory, chain.readable);
            all.bytes += given.bytes;
            all.refused += given.refused;
            Some(0)
        });
        let bad = served.as_ref().copied().unwrap_or_default();
        self.shared.update(|stats| {
            stats.inflated_bytes += all.bytes;
            stats.refused += all.refused + bad;
        });
        served.map(|_| ())
    }

    fn turn_reporting(&mut self, memory: &GuestMemoryMmap) -> Result<(), RingError> {
        let Some(queue) = &mut self.reporting else {
            return Ok(());
        };
        let mut all = Given::default();
        let mut reports = 0;
        let served = drain(queue, memory, &self.interrupt, |chain| {
            let given = report(&chain);
            all.bytes += given.bytes;
            all.refused += given.refused;
            reports += 1;
            // The pages are zeros now, but not by writing.
            Some(0)
        });
        let bad = served.as_ref().copied().unwrap_or_default();
        self.shared.update(|stats| {
            stats.reported_bytes += all.bytes;
            stats.reports += reports;
            stats.refused += all.refused + bad;
        });
        served.map(|_| ())
    }

    /// Reads the statistics that the driver offers, unless some are held already; with `release`
    /// those that are held are returned first. So the driver gets one buffer back for each time that
    /// the host asks, however many it offers.
    fn turn_stats(&mut self, memory: &GuestMemoryMmap, mut release: bool) -> Result<(), RingError> {
        let Some(queue) = &mut self.stats else {
            return Ok(());
        };
        release &= self.holds_stats;
        if self.holds_stats && !release {
            return Ok(());
        }
        let mut read = None;
        let served = serve(
            &mut queue.queue,
            memory,
            &self.interrupt,
            BATCH,
            |chain: Chain<'_>| {
                if std::mem::take(&mut release) {
                    return Some(0);
                }
                read = Some(GuestStats::read(chain.readable));
                None
            },
        );
        self.holds_stats = read.is_some();
        if read.is_some() {
            self.shared.update(|stats| {
                stats.samples += 1;
                stats.guest = read;
            });
        } else if matches!(served, Ok(Served::More)) {
            let _ = queue.kick.write(1);
        }
        served.map(|_| ())
    }
}

/// Serves up to [`BATCH`] chains, and kicks itself if there may be more. How many chains were returned
/// because they could not be.
fn drain(
    queue: &mut ActiveQueue,
    memory: &GuestMemoryMmap,
    interrupt: &Interrupt,
    mut each: impl FnMut(Chain<'_>) -> Option<u32>,
) -> Result<u64, RingError> {
    let before = queue.queue.next_used();
    let mut sound: u16 = 0;
    let served = serve(&mut queue.queue, memory, interrupt, BATCH, |chain| {
        sound += 1;
        each(chain)
    })?;
    if served == Served::More {
        // Others in the loop come first. A full counter is readable, too.
        let _ = queue.kick.write(1);
    }
    let returned = queue.queue.next_used().wrapping_sub(before);
    Ok(returned.saturating_sub(sound).into())
}

impl MutEventSubscriber for Service {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let optional = [(&self.stats, STATS), (&self.reporting, REPORTING)];
        let watched = [(&self.inflate, INFLATE), (&self.deflate, DEFLATE)]
            .into_iter()
            .chain(
                optional
                    .into_iter()
                    .filter_map(|(queue, data)| queue.as_ref().map(|queue| (queue, data))),
            )
            .map(|(queue, data)| (&*queue.kick, data))
            .chain([(&self.shared.ask, ASK)]);
        for (eventfd, data) in watched {
            if let Err(error) = ops.add(Events::with_data(eventfd, data, EventSet::IN)) {
                self.broken = true;
                self.interrupt.fault(KIND, &error);
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        let event = events.data();
        let eventfd = match event {
            INFLATE => Some(&*self.inflate.kick),
            DEFLATE => Some(&*self.deflate.kick),
            STATS => self.stats.as_ref().map(|queue| &*queue.kick),
            REPORTING => self.reporting.as_ref().map(|queue| &*queue.kick),
            _ => Some(&self.shared.ask),
        };
        if let Some(eventfd) = eventfd {
            let _ = eventfd.read();
        }
        self.turn(event);
    }
}
