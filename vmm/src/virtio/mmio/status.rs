//! The device status register as a state machine (virtio 1.3 sections 2.1 and 3.1).
//!
//! A driver goes up one step at a time and comes down only by a reset; what
//! else it writes is refused and changes nothing.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;

/// How far the driver has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nothing yet, or after a reset.
    Reset,
    /// ACKNOWLEDGE: the guest has seen the device.
    Acknowledged,
    /// DRIVER: it knows how to drive it, and negotiates features.
    Driver,
    /// FEATURES_OK: features are settled; queues are being set up.
    FeaturesOk,
    /// DRIVER_OK: the device is live.
    Running,
    /// DRIVER_OK was written and the device could not start.
    Broken,
    /// FAILED: the driver has given up. Holds the bits that it had reached.
    Failed(u8),
}

/// What a write to the status register comes to. What needs the device (settling features,
/// starting it) is for the transport to do; only if that works is the step made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Zero was written: reset the device, then [`State::Reset`].
    Reset,
    /// To [`State::Acknowledged`].
    Acknowledge,
    /// To [`State::Driver`].
    Driver,
    /// To [`State::FeaturesOk`], if the features are acceptable.
    SettleFeatures,
    /// To [`State::Running`], or [`State::Broken`].
    Activate,
    /// The driver gives up: stop the device, then [`State::Failed`].
    Fail,
    /// The bits are those that stand already.
    Nothing,
    /// Bits cleared, skipped, unknown, or written by a driver that must reset first.
    Refused,
}

impl State {
    /// The bits that the driver has set.
    pub fn bits(self) -> u32 {
        match self {
            State::Reset => 0,
            State::Acknowledged => ACKNOWLEDGE,
            State::Driver => DRIVER,
            State::FeaturesOk => FEATURES_OK,
            State::Running => DRIVER_OK,
            State::Broken => DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET,
            State::Failed(before) => u32::from(before) | VIRTIO_CONFIG_S_FAILED,
        }
    }

    /// What writing `value` means here. DEVICE_NEEDS_RESET is the device's bit: a driver that
    /// writes back what it read may have it set.
    pub fn step(self, value: u32) -> Step {
        if value == 0 {
            return Step::Reset;
        }
        let wanted = value & !VIRTIO_CONFIG_S_NEEDS_RESET;
        let standing = self.bits() & !VIRTIO_CONFIG_S_NEEDS_RESET;
        if wanted == standing {
            return Step::Nothing;
        }
        if wanted == standing | VIRTIO_CONFIG_S_FAILED {
            return Step::Fail;
        }
        match (self, wanted) {
            (State::Reset, ACKNOWLEDGE) => Step::Acknowledge,
            (State::Acknowledged, DRIVER) => Step::Driver,
            (State::Driver, FEATURES_OK) => Step::SettleFeatures,
            (State::FeaturesOk, DRIVER_OK) => Step::Activate,
            _ => Step::Refused,
        }
    }

    /// The state after the driver has given up.
    pub fn failed(self) -> State {
        State::Failed((self.bits() & !(VIRTIO_CONFIG_S_NEEDS_RESET | VIRTIO_CONFIG_S_FAILED)) as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 7] = [
        State::Reset,
        State::Acknowledged,
        State::Driver,
        State::FeaturesOk,
        State::Running,
        State::Broken,
        State::Failed(0x03),
    ];

    /// Every state against every value: what is not in the table is refused.
    #[test]
    fn every_pair_of_state_and_value_is_as_the_table_says() {
        let allowed = |state: State, value: u32| match (state, value) {
            (_, 0) => Step::Reset,
            (State::Reset, 0x01) => Step::Acknowledge,
            (State::Acknowledged, 0x03) => Step::Driver,
            (State::Driver, 0x0b) => Step::SettleFeatures,
            (State::FeaturesOk, 0x0f) => Step::Activate,
            (State::Reset, 0x80)
            | (State::Acknowledged, 0x81)
            | (State::Driver, 0x83)
            | (State::FeaturesOk, 0x8b)
            | (State::Running | State::Broken, 0x8f) => Step::Fail,
            (State::Acknowledged, 0x01)
            | (State::Driver, 0x03)
            | (State::FeaturesOk, 0x0b)
            | (State::Running | State::Broken, 0x0f)
            | (State::Failed(_), 0x83) => Step::Nothing,
            _ => Step::Refused,
        };
        for state in STATES {
            for value in 0..=0x1ff_u32 {
                // The device's own bit is no part of what the driver asks, unless it is all.
                let expected = match (state, value) {
                    (State::Reset, 0x40) => Step::Nothing,
                    (_, 0x40) => Step::Refused,
                    _ => allowed(state, value & !0x40),
                };
                assert_eq!(state.step(value), expected, "{state:?} <- {value:#x}");
            }
        }
    }

    #[test]
    fn bits_are_those_of_the_specification() {
        let bits: Vec<u32> = STATES.iter().map(|state| state.bits()).collect();
        assert_eq!(bits, [0, 1, 3, 0xb, 0xf, 0x4f, 0x83]);
        assert_eq!(State::Broken.failed().bits(), 0x8f);
        assert_eq!(State::Driver.failed().bits(), 0x83);
    }
}
