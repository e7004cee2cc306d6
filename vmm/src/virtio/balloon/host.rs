//! The host's end: how big the balloon is to be, and what the guest says.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use thiserror::Error;
use tokio::sync::watch;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::ACTUAL;
use super::{GuestStats, PAGE_BYTES};
use crate::memory::GuestMemory;
use crate::virtio::device::Interrupt;

/// The balloon cannot be of that size.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TargetError {
    /// It is not whole pages.
    #[error(
        "cannot set the balloon's target to {bytes} bytes: a multiple of {PAGE_BYTES} is possible"
    )]
    Unaligned {
        /// Bytes that were asked for.
        bytes: u64,
    },
    /// It is more than the guest has.
    #[error(
        "cannot set the balloon's target to {} MiB: the guest has {} MiB of memory",
        bytes >> 20,
        memory >> 20
    )]
    TooMuch {
        /// Bytes that were asked for.
        bytes: u64,
        /// Bytes of guest memory.
        memory: u64,
    },
}

/// The balloon and the guest around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct BalloonStats {
    /// What the balloon is to hold, in bytes.
    pub target_bytes: u64,
    /// What the guest says that it holds, in bytes; at most the guest's memory. More than the target is
    /// allowed.
    pub actual_bytes: u64,
    /// Bytes given back by pages put into the balloon, in all; what the guest took out of it again
    /// is not deducted.
    pub inflated_bytes: u64,
    /// Bytes given back by reports of free pages, in all; what the guest has used again is not
    /// deducted.
    pub reported_bytes: u64,
    /// Reports of free pages.
    pub reports: u64,
    /// Pages and ranges that the guest named and that were not given back: they are not its memory, or not
    /// whole pages, or the host would not; and requests with such a buffer.
    pub refused: u64,
    /// Statistics that came from the guest, in all: when this grows, `guest` is new.
    pub samples: u64,
    /// The last of them. A reset of the device forgets them.
    pub guest: Option<GuestStats>,
    /// Whether a driver runs the device.
    pub driver: bool,
}

/// The host's end of a balloon. Clones share it; it outlives the device, and then stays as it was, without a
/// driver.
#[derive(Clone)]
pub struct BalloonHost {
    shared: Arc<Shared>,
    memory: Arc<GuestMemory>,
}

impl BalloonHost {
    pub(super) fn new(shared: Arc<Shared>, memory: Arc<GuestMemory>) -> Self {
        Self { shared, memory }
    }

    /// Asks the guest for a balloon of `bytes`, a multiple of [`PAGE_BYTES`] up to all of its memory. It
    /// returns at once; the driver fills or empties the balloon, as far as it can, in its own
    /// time.
    ///
    /// # Errors
    ///
    /// [`TargetError`]; the former target stays.
    pub fn set_target(&self, bytes: u64) -> Result<(), TargetError> {
        if !bytes.is_multiple_of(PAGE_BYTES) {
            return Err(TargetError::Unaligned { bytes });
        }
        let memory = self.memory.size();
        // The driver is told by a number of pages in 32 bits, which is 16 TiB.
        if bytes > memory || u32::try_from(bytes / PAGE_BYTES).is_err() {
            return Err(TargetError::TooMuch { bytes, memory });
        }
        self.shared.update(|stats| stats.target_bytes = bytes);
        // A driver that comes later is shown it anyway.
        if let Some(interrupt) = &*self.shared.interrupt() {
            interrupt.config_changed(|| self.shared.config_space());
        }
        Ok(())
    }

    /// What is known now.
    pub fn stats(&self) -> BalloonStats {
        self.shared.stats()
    }

    /// Asks the guest for new statistics. They come in its own time: [`BalloonStats::samples`]
    /// tells.
    pub fn refresh(&self) {
        // A full counter is readable, too.
        let _ = self.shared.ask.write(1);
    }

    /// A receiver that sees each change. It does not end with the device.
    pub fn watch(&self) -> watch::Receiver<BalloonStats> {
        self.shared.watch.subscribe()
    }
}

impl std::fmt::Debug for BalloonHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BalloonHost")
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

/// What device, event loop and host share. Its lock is held for moments only: vCPU threads take it
/// to read the configuration.
#[derive(Debug)]
pub(super) struct Shared {
    /// The line to the driver, while there is one. Held while it is used, so that no driver is told after the device was
    /// reset; taken before `state`, never after.
    interrupt: Mutex<Option<Interrupt>>,
    state: Mutex<State>,
    watch: watch::Sender<BalloonStats>,
    /// Readable when the host wants new statistics.
    pub ask: EventFd,
}

#[derive(Debug, Default)]
struct State {
    stats: BalloonStats,
}

impl Shared {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: Mutex::default(),
            state: Mutex::default(),
            watch: watch::Sender::default(),
            ask: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    pub fn stats(&self) -> BalloonStats {
        self.lock().stats
    }

    /// struct virtio_balloon_config (5.5.4): num_pages, actual; what follows is not offered.
    pub fn config_space(&self) -> [u8; ACTUAL.end] {
        let stats = self.stats();
        let mut config = [0; ACTUAL.end];
        // Both fit: the target by its check, the other as it came from these bits.
        let pages = |bytes: u64| ((bytes / PAGE_BYTES) as u32).to_le_bytes();
        config[..ACTUAL.start].copy_from_slice(&pages(stats.target_bytes));
        config[ACTUAL].copy_from_slice(&pages(stats.actual_bytes));
        config
    }

    /// Changes the figures, and tells all who wait if that made a difference.
    pub fn update(&self, change: impl FnOnce(&mut BalloonStats)) {
        let mut state = self.lock();
        let before = state.stats;
        change(&mut state.stats);
        if state.stats != before {
            // Under the lock, so that receivers see changes in their order.
            self.watch.send_replace(state.stats);
        }
    }

    /// A driver runs the device from now on, or none does: then what it said is forgotten.
    pub fn set_driver(&self, interrupt: Option<Interrupt>) {
        let driver = interrupt.is_some();
        *self.interrupt() = interrupt;
        self.update(|stats| {
            stats.driver = driver;
            if !driver {
                stats.actual_bytes = 0;
                stats.guest = None;
            }
        });
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
