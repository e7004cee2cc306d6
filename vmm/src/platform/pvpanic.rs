//! pvpanic: the port through which a guest's kernel tells that it panicked. A panic is followed by
//! a reboot or by nothing, so this is the only way to know it for what it is.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::exit::{Ending, ExitReason};

/// Event bit: the kernel panicked and goes no further.
pub const PANICKED: u8 = 1 << 0;

/// The one-byte port: reads give the events that are understood, writes report them.
pub struct Pvpanic {
    ending: Arc<Ending>,
}

impl Pvpanic {
    /// A port that ends the VM through `ending`.
    pub fn new(ending: Arc<Ending>) -> Self {
        Self { ending }
    }
}

impl BusDevice for Pvpanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|events| events & PANICKED != 0) {
            self.ending.report(ExitReason::Panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_wins_over_the_reboot_that_follows() {
        let ending = Arc::new(Ending::default());
        let port = Pvpanic::new(Arc::clone(&ending));
        let mut events = [0];
        port.read(0, &mut events);
        assert_eq!(events, [PANICKED]);
        port.write(0, &[2]);
        assert_eq!(ending.reason(), None);
        port.write(0, &[PANICKED]);
        ending.report(ExitReason::Reboot);
        assert_eq!(ending.reason(), Some(ExitReason::Panic));
    }
}
