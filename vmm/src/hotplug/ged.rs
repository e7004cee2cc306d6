//! The Generic Event Device's line (ACPI 6.5 section 5.6.9): one interrupt that tells the guest to fetch what waits.

use std::io;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Raises the Generic Event Device's interrupt.
#[derive(Debug)]
pub struct EventLine(EventFd);

impl EventLine {
    /// Over the eventfd of an interrupt line.
    pub fn new(trigger: EventFd) -> Self {
        Self(trigger)
    }

    /// A line that leads nowhere: for slots whose guest looks by itself.
    ///
    /// # Errors
    ///
    /// If the process has no descriptor left.
    pub fn unheard() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Self)
    }

    /// Tells the guest that something waits to be fetched.
    pub fn raise(&self) {
        // A counter that is full (EAGAIN) is an interrupt that no one has taken yet.
        let _ = self.0.write(1);
    }
}
