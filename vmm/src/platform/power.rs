//! How a guest powers off and resets: the sleep and reset registers of hardware-reduced ACPI
//! (ACPI 6.5 section 4.8.3), and the keyboard controller's reset line that kernels fall back to.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::exit::{Ending, ExitReason};
use crate::memory::layout::{RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT};

/// SLP_TYP of S5, as the DSDT's `_S5` names it.
pub const S5_SLEEP_TYPE: u8 = 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
const SLEEP_ENABLE: u8 = 1 << 5;
const PULSE_RESET_LINE: u8 = 0xfe;

/// Real-mode code for the reset vector: it asks for a reset by the register. Linux with
/// hardware-reduced ACPI and without EFI ends there when it restarts, unless it was told another
/// way (`reboot=`).
pub const RESET_VECTOR_CODE: [u8; 9] = {
    let [low, high] = RESET_PORT.to_le_bytes();
    // mov dx, RESET_PORT; mov al, RESET_VALUE; out dx, al; again: hlt; jmp again
    [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
};

/// Sleep control, sleep status and reset, one byte each, from [`SLEEP_CONTROL_PORT`].
pub struct PowerRegisters {
    ending: Arc<Ending>,
}

impl PowerRegisters {
    /// Bytes on the port bus.
    pub const LENGTH: u64 = (RESET_PORT - SLEEP_CONTROL_PORT + 1) as u64;

    /// Registers that end the VM through `ending`.
    pub fn new(ending: Arc<Ending>) -> Self {
        Self { ending }
    }
}

impl BusDevice for PowerRegisters {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // No wake status, no sleep type: nothing is pending ever.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [value] = data else { return };
        match SLEEP_CONTROL_PORT + offset as u16 {
            SLEEP_CONTROL_PORT
                if value & SLEEP_ENABLE != 0
                    && (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK == S5_SLEEP_TYPE =>
            {
                self.ending.report(ExitReason::PowerOff);
            }
            RESET_PORT if *value == RESET_VALUE => {
                self.ending.report(ExitReason::Reboot);
            }
            _ => {}
        }
    }
}

/// Port 0x64 of the keyboard controller that is not there: idle when read, and resets on 0xFE.
pub struct ResetLine {
    ending: Arc<Ending>,
}

impl ResetLine {
    /// A line that ends the VM through `ending`.
    pub fn new(ending: Arc<Ending>) -> Self {
        Self { ending }
    }
}

impl BusDevice for ResetLine {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data == [PULSE_RESET_LINE] {
            self.ending.report(ExitReason::Reboot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(offset: u64, data: &[u8]) -> Option<ExitReason> {
        let ending = Arc::new(Ending::default());
        PowerRegisters::new(Arc::clone(&ending)).write(offset, data);
        ending.reason()
    }

    #[test]
    fn only_s5_with_enable_powers_off() {
        assert_eq!(outcome(0, &[0x34]), Some(ExitReason::PowerOff));
        for value in [0x14, 0x20, 0x24, 0x30, 0] {
            assert_eq!(outcome(0, &[value]), None, "{value:#x}");
        }
        assert_eq!(outcome(0, &[0x34, 0]), None);
    }

    #[test]
    fn only_the_reset_value_resets() {
        assert_eq!(outcome(2, &[RESET_VALUE]), Some(ExitReason::Reboot));
        assert_eq!(outcome(2, &[0]), None);
        assert_eq!(outcome(1, &[0x80]), None);
    }

    #[test]
    fn the_keyboard_controller_resets() {
        let ending = Arc::new(Ending::default());
        let line = ResetLine::new(Arc::clone(&ending));
        line.write(0, &[0xd1]);
        assert_eq!(ending.reason(), None);
        line.write(0, &[0xfe]);
        assert_eq!(ending.reason(), Some(ExitReason::Reboot));
    }
}
