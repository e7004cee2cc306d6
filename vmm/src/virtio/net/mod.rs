//! virtio-net (virtio 1.3 section 5.1) over a TAP interface of the host.
//!
//! `tap` is the host's side, a descriptor that carries one frame a call, each with the header that tells of
//! checksums and segments still to be made. `service` moves frames between it and the queues, on a thread of its
//! own; `device` is what the transport sees. A frame is never split or changed here: what offloads
//! driver and host agreed on is for the two kernels to do. Several queue pairs, the control queue and filters are not here.

mod device;
mod service;
mod tap;
#[cfg(test)]
mod tests;

pub use device::Net;
pub use tap::Tap;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;
use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;

use super::device::Interrupt;

/// Bytes of struct virtio_net_hdr_v1, which is before each frame (5.1.6).
pub const HEADER_BYTES: usize = 12;
/// Bytes of the largest frame, with its header: 64 KiB of an IP packet and what is before it.
pub const FRAME_BYTES: usize = HEADER_BYTES + 18 + (64 << 10);
/// Bytes of struct virtio_net_config up to the MTU.
const CONFIG_BYTES: usize = 12;

/// Why a network device could not be made.
#[derive(Debug, Error)]
pub enum Error {
    /// /dev/net/tun, or the interface.
    #[error("Cannot {doing} the TAP interface {name:?}")]
    Tap {
        /// What was being done.
        doing: &'static str,
        /// The interface.
        name: String,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// No such name of an interface.
    #[error("{name:?} is no name of an interface: 1 to 15 bytes, none of them / or white space")]
    Name {
        /// What was given.
        name: String,
    },
    /// An MTU that cannot be.
    #[error("An MTU of {0} bytes is not possible; 68 to 65535 are (virtio 1.3, 5.1.4.1)")]
    Mtu(u16),
    /// An address that no interface may have.
    #[error("{} is no address of one interface", mac(*.0))]
    Mac([u8; 6]),
}

/// A MAC address as people write it.
pub fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

/// What the device tells the guest of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// Names the device in logs and thread names: the interface in the guest, such as `eth0`.
    pub name: String,
    /// The guest interface's MAC address.
    pub mac: [u8; 6],
    /// Its MTU in bytes, 68 to 65535; without one the driver's own.
    pub mtu: Option<u16>,
    /// Whether the link is up at first.
    pub link: bool,
}

impl NetConfig {
    /// Whether it can be.
    ///
    /// # Errors
    ///
    /// [`Error::Mtu`] and [`Error::Mac`].
    pub fn check(&self) -> Result<(), Error> {
        if let Some(mtu) = self.mtu
            && mtu < 68
        {
            return Err(Error::Mtu(mtu));
        }
        // A group's address, or none.
        if self.mac[0] & 1 != 0 || self.mac == [0; 6] {
            return Err(Error::Mac(self.mac));
        }
        Ok(())
    }
}

/// What has gone through a device since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetCounters {
    /// Frames that the guest got.
    pub received: u64,
    /// Their bytes, without headers.
    pub received_bytes: u64,
    /// Frames that the guest sent and the host took.
    pub sent: u64,
    /// Their bytes, without headers.
    pub sent_bytes: u64,
    /// Frames for the guest that its buffers had no room for, that the host's interface could not give, or that came before its driver.
    pub receive_dropped: u64,
    /// Frames from the guest that the host refused: a header that cannot be, or an interface that is down.
    pub send_dropped: u64,
}

/// The host's hand on a device; clones share it, and it may outlive the device.
#[derive(Debug, Clone)]
pub struct NetHost {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    mac: [u8; 6],
    mtu: Option<u16>,
    link: AtomicBool,
    /// The interface is gone, and the link is down for good. Written with `interrupt` locked, as `link` is.
    ended: AtomicBool,
    /// While the device is active.
    interrupt: Mutex<Option<Interrupt>>,
    received: AtomicU64,
    received_bytes: AtomicU64,
    sent: AtomicU64,
    sent_bytes: AtomicU64,
    receive_dropped: AtomicU64,
    send_dropped: AtomicU64,
}

impl Shared {
    fn new(config: &NetConfig) -> Self {
        Self {
            mac: config.mac,
            mtu: config.mtu,
            link: config.link.into(),
            ..Self::default()
        }
    }

    /// struct virtio_net_config (5.1.4); fields without a feature are zero.
    fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        config[..6].copy_from_slice(&self.mac);
        if self.link.load(Ordering::SeqCst) {
            config[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        }
        config[10..12].copy_from_slice(&self.mtu.unwrap_or_default().to_le_bytes());
        config
    }

    fn set_interrupt(&self, interrupt: Option<Interrupt>) {
        *self
            .interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = interrupt;
    }

    fn set_link(&self, up: bool) {
        let interrupt = self
            .interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let up = up && !self.has_ended();
        self.tell_link(up, interrupt.as_ref());
    }

    /// The link goes down and stays so.
    fn end(&self) {
        let interrupt = self
            .interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.ended.store(true, Ordering::SeqCst);
        self.tell_link(false, interrupt.as_ref());
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    fn tell_link(&self, up: bool, interrupt: Option<&Interrupt>) {
        // The guest reads it when it is told.
        if self.link.swap(up, Ordering::SeqCst) != up
            && let Some(interrupt) = interrupt
        {
            interrupt.config_changed(|| self.config_space());
        }
    }
}

impl NetHost {
    /// Tells the guest that the link is up, or down. Frames go through either way: the guest's kernel holds its own back. Once the host's
    /// interface has ended, the link is down and stays so.
    pub fn set_link(&self, up: bool) {
        self.shared.set_link(up);
    }

    /// Whether the guest is told that the link is up.
    pub fn link(&self) -> bool {
        self.shared.link.load(Ordering::SeqCst)
    }

    /// What has gone through.
    pub fn counters(&self) -> NetCounters {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetCounters {
            received: of(&self.shared.received),
            received_bytes: of(&self.shared.received_bytes),
            sent: of(&self.shared.sent),
            sent_bytes: of(&self.shared.sent_bytes),
            receive_dropped: of(&self.shared.receive_dropped),
            send_dropped: of(&self.shared.send_dropped),
        }
    }
}
