//! The network device as its transport sees it: features, configuration, and the thread that serves its two queues.

use std::io;
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};

use super::service::Service;
use super::tap::{Offload, Tap};
use super::{Error, NetConfig, NetHost, Shared};
use crate::event_loop::{EventLoop, EventLoopHandle};
use crate::virtio::device::{ActivateError, Activation, ActiveQueue, VirtioDevice, read_space};
use crate::virtio::queue::RING_FEATURES;

const KIND: &str = "net";
/// Receive, transmit.
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// A virtio-net device. While active it has a thread of its own, joined by `reset`.
pub struct Net {
    config: NetConfig,
    tap: Arc<Tap>,
    shared: Arc<Shared>,
    events: EventLoopHandle,
    thread: Option<EventLoop>,
}

impl Net {
    /// Over a TAP interface. `events` is told if the device's thread fails.
    ///
    /// # Errors
    ///
    /// [`Error`] for a configuration that cannot be.
    pub fn new(
        config: NetConfig,
        tap: Tap,
        events: EventLoopHandle,
    ) -> Result<(Self, NetHost), Error> {
        config.check()?;
        let shared = Arc::new(Shared::new(&config));
        let host = NetHost {
            shared: Arc::clone(&shared),
        };
        let device = Self {
            config,
            tap: Arc::new(tap),
            shared,
            events,
            thread: None,
        };
        Ok((device, host))
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        let Activation {
            ram,
            interrupt,
            queues,
            features,
        } = activation;
        let queues = <[ActiveQueue; 2]>::try_from(queues)
            .map_err(|queues| io::Error::other(format!("{} queues, not 2", queues.len())))?;
        let has = |bit: u32| features & (1 << bit) != 0;
        // Of segments the guest can only make something if it makes checksums (5.1.3.1).
        let checksum = has(VIRTIO_NET_F_GUEST_CSUM);
        let (tso4, tso6) = (
            checksum && has(VIRTIO_NET_F_GUEST_TSO4),
            checksum && has(VIRTIO_NET_F_GUEST_TSO6),
        );
        self.tap.set_offload(Offload {
            checksum,
            tso4,
            tso6,
            ecn: (tso4 || tso6) && has(VIRTIO_NET_F_GUEST_ECN),
        })?;
        let service = Service::new(
            (Arc::clone(&self.tap), Arc::clone(&self.shared)),
            (ram, interrupt.clone()),
            queues,
            (has(VIRTIO_NET_F_MRG_RXBUF), self.config.mtu),
        )?;
        let events = self.events.clone();
        let name = format!("net-{}", self.config.name);
        let report = name.clone();
        let started = EventLoop::start(&name, move |message| {
            events.report(format!("{report}: {message}"));
        });
        let (thread, handle) = started.map_err(io::Error::other)?;
        self.shared.set_interrupt(Some(interrupt));
        self.thread = Some(thread);
        handle
            .add(Arc::new(Mutex::new(service)))
            .map_err(io::Error::other)?;
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let mut features = RING_FEATURES;
        for bit in [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
        ] {
            features |= 1 << bit;
        }
        if self.config.mtu.is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.shared.config_space(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.start(activation).map_err(|error| ActivateError {
            device: KIND,
            why: error.to_string(),
        })
    }

    fn reset(&mut self) {
        self.shared.set_interrupt(None);
        if let Some(mut thread) = self.thread.take() {
            thread.stop();
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
    }
}
