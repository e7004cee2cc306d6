//! The host's end: what it requests of the driver, and how far the driver is.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::Serialize;
use thiserror::Error;
use tokio::sync::watch;

use super::{BLOCK_BYTES, MemConfig};
use crate::virtio::device::Interrupt;

/// The size that was asked for cannot be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RequestError {
    /// It is not whole blocks.
    #[error(
        "cannot request {bytes} bytes of the memory device: it plugs blocks of {} MiB, so a multiple of that is possible",
        BLOCK_BYTES >> 20
    )]
    Unaligned {
        /// Bytes that were asked for.
        bytes: u64,
    },
    /// It is more than the region holds.
    #[error(
        "cannot request {} MiB of the memory device: its region has {} MiB",
        bytes >> 20,
        region >> 20
    )]
    TooMuch {
        /// Bytes that were asked for.
        bytes: u64,
        /// Bytes of the region.
        region: u64,
    },
}

/// Where the device is. All sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct MemStatus {
    /// What the driver is to plug.
    pub requested: u64,
    /// What it has plugged. It may stay above `requested`: only the guest knows what it can spare.
    pub plugged: u64,
    /// The part of the region, from its start, that the driver may plug in.
    pub usable: u64,
    /// The whole region.
    pub region: u64,
    /// KVM slots that exist. A slot whose last block was just unplugged may still count.
    pub slots: u32,
    /// Whether a driver runs the device: without one nothing will ever be plugged.
    pub driver: bool,
    /// Requests of the driver that the host could not carry out, for which it was told to try
    /// again; see [`MemHost::last_failure`].
    pub failures: u64,
}

/// The host's end of a memory device. Clones share it; it outlives the device, and then stays as it was,
/// without a driver.
#[derive(Debug, Clone)]
pub struct MemHost {
    shared: Arc<Shared>,
}

impl MemHost {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// How the device was made.
    pub fn config(&self) -> &MemConfig {
        &self.shared.config
    }

    /// Requests that `bytes` be plugged, counted from nothing: a multiple of [`BLOCK_BYTES`], up to
    /// the region's size. It returns at once; the driver does it, as far as it can, in its own
    /// time.
    ///
    /// # Errors
    ///
    /// [`RequestError`]; the former request stays.
    pub fn set_requested(&self, bytes: u64) -> Result<(), RequestError> {
        let region = self.shared.config.region_bytes;
        if !bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(RequestError::Unaligned { bytes });
        }
        if bytes > region {
            return Err(RequestError::TooMuch { bytes, region });
        }
        let usable = self.shared.config.usable(bytes);
        self.shared.update(|status| {
            status.requested = bytes;
            // It shrinks only when all is unplugged (5.15.4.2).
            status.usable = status.usable.max(usable);
        });
        self.shared.notify_driver();
        Ok(())
    }

    /// Where the device is.
    pub fn status(&self) -> MemStatus {
        self.shared.status()
    }

    /// Why the host last could not carry out what the driver asked for, if that happened.
    pub fn last_failure(&self) -> Option<String> {
        self.shared.lock().failure.clone()
    }

    /// Waits until the status is another than `seen`, at most until `deadline`; the status then.
    /// Blocks the thread: async code uses [`watch`](Self::watch).
    pub fn wait_change(&self, seen: &MemStatus, deadline: Instant) -> MemStatus {
        let mut state = self.shared.lock();
        while state.status == *seen {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                break;
            };
            let (next, _) = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
            state = next;
        }
        state.status
    }

    /// A receiver that sees each change. It does not end with the device.
    pub fn watch(&self) -> watch::Receiver<MemStatus> {
        self.shared.watch.subscribe()
    }
}

/// What device, event loop and host share. Its lock is held for moments only: vCPU threads take it
/// to read the configuration.
#[derive(Debug)]
pub(super) struct Shared {
    pub config: MemConfig,
    /// The line to the driver, while there is one. Held while it is used, so that no driver is told after the device was
    /// reset; taken before `state`, never after.
    interrupt: Mutex<Option<Interrupt>>,
    state: Mutex<State>,
    changed: Condvar,
    watch: watch::Sender<MemStatus>,
}

#[derive(Debug)]
struct State {
    status: MemStatus,
    failure: Option<String>,
}

/// Failures that are logged as warnings: a guest that asks again and again does not fill the host's log.
const LOUD_FAILURES: u64 = 4;

impl Shared {
    pub fn new(config: MemConfig) -> Self {
        let status = MemStatus {
            region: config.region_bytes,
            ..MemStatus::default()
        };
        Self {
            config,
            interrupt: Mutex::new(None),
            state: Mutex::new(State {
                status,
                failure: None,
            }),
            changed: Condvar::new(),
            watch: watch::Sender::new(status),
        }
    }

    pub fn status(&self) -> MemStatus {
        self.lock().status
    }

    /// struct virtio_mem_config (5.15.4); node_id and the padding are 0.
    pub fn config_space(&self) -> [u8; 56] {
        let status = self.status();
        let mut bytes = [0; 56];
        for (offset, value) in [
            (0, BLOCK_BYTES),
            (16, self.config.base),
            (24, status.region),
            (32, status.usable),
            (40, status.plugged),
            (48, status.requested),
        ] {
            bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// Changes the status, and tells all who wait if that made a difference.
    pub fn update(&self, change: impl FnOnce(&mut MemStatus)) {
        let mut state = self.lock();
        let before = state.status;
        change(&mut state.status);
        if state.status != before {
            // Under the lock, so that receivers see changes in their order.
            self.watch.send_replace(state.status);
            self.changed.notify_all();
        }
        drop(state);
        // A driver that comes later is shown it anyway.
        if let Some(interrupt) = &*self.interrupt() {
            interrupt.publish(|| self.config_space());
        }
    }

    /// The host could not do what the driver asked for.
    pub fn failed(&self, why: String) {
        let mut state = self.lock();
        if state.status.failures < LOUD_FAILURES {
            tracing::warn!(%why, "a request of the memory device's driver fails");
        } else {
            tracing::debug!(%why, "a request of the memory device's driver fails again");
        }
        state.failure = Some(why);
        drop(state);
        self.update(|status| status.failures += 1);
    }

    /// A driver runs the device from now on, or none does.
    pub fn set_driver(&self, interrupt: Option<Interrupt>) {
        let driver = interrupt.is_some();
        *self.interrupt() = interrupt;
        self.update(|status| status.driver = driver);
    }

    fn notify_driver(&self) {
        if let Some(interrupt) = &*self.interrupt() {
            interrupt.config_changed(|| self.config_space());
        }
    }

    fn interrupt(&self) -> MutexGuard<'_, Option<Interrupt>> {
        self.interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
