//! The life of one slot that a vCPU or a unit of memory is plugged into, as guest and host share it.
//!
//! ```text
//! Empty ─plug→ Announced ─fetch→ Present ─ask→ Asked ─fetch→ Leaving ─eject→ Empty
//!                  └withdraw→ Empty  ↑└──withdraw──┘            └refuse→ Present
//!                                    └────────eject→ Empty
//! ```
//!
//! The guest fetches what it is to be notified of, ejects (`_EJ0`) and reports (`_OST`); all else is the host's. A slot
//! whose eject the guest never answers stays in `Leaving`, and leaves whenever the guest gets to it.
//!
//! An eject from `Present` is one that nobody waits for: the guest's root began it, or the guest refused a request and does
//! another that it was told of before. Its kernel has let go of what it ejects, so it is gone here too.

use std::fmt;

/// Where a slot is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum State {
    /// Nothing is in it.
    #[default]
    Empty,
    /// Plugged; the guest has not fetched the notification.
    Announced,
    /// The guest has been told of it.
    Present,
    /// The guest is asked to eject it, and has not fetched the request.
    Asked,
    /// The guest has fetched the request to eject it.
    Leaving,
}

impl State {
    /// Whether something is in the slot, the guest knowing of it or not.
    pub fn is_occupied(self) -> bool {
        self != Self::Empty
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "empty",
            Self::Announced => "plugged, not yet noticed by the guest",
            Self::Present => "present",
            Self::Asked => "to be ejected, not yet noticed by the guest",
            Self::Leaving => "being ejected by the guest",
        })
    }
}

/// What happens to a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The host puts something in.
    Plug,
    /// The guest fetches the notification or request that waits.
    Fetch,
    /// The host asks for it back.
    Ask,
    /// The host takes back what the guest has not fetched.
    Withdraw,
    /// The guest ejects it.
    Eject,
    /// The guest reports that it does not eject it.
    Refuse,
}

/// An event that has no meaning in a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused;

/// The one place where a slot's state changes.
///
/// # Errors
///
/// [`Refused`], and the state stays.
pub fn next(state: State, event: Event) -> Result<State, Refused> {
    match (state, event) {
        (State::Empty, Event::Plug) => Ok(State::Announced),
        (State::Announced, Event::Fetch) => Ok(State::Present),
        (State::Announced, Event::Withdraw) => Ok(State::Empty),
        (State::Present, Event::Ask) => Ok(State::Asked),
        (State::Asked, Event::Fetch) => Ok(State::Leaving),
        (State::Asked, Event::Withdraw) => Ok(State::Present),
        (State::Present | State::Asked | State::Leaving, Event::Eject) => Ok(State::Empty),
        (State::Leaving, Event::Ask) => Ok(State::Asked),
        (State::Leaving, Event::Refuse) => Ok(State::Present),
        _ => Err(Refused),
    }
}

/// The guest's last word on a slot (ACPI 6.5 section 6.3.5, `_OST`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ost {
    /// Source event: a notification's code, or 0x100 and up for what the guest began by itself.
    pub event: u32,
    /// Status: 0 is success.
    pub status: u32,
}

const EVENT_EJECT_REQUEST: u32 = 3;
const EVENT_EJECTION: u32 = 0x103;
const STATUS_EJECTING: u32 = 0x84;

impl Ost {
    fn is_of_eject(self) -> bool {
        matches!(self.event & 0xffff, EVENT_EJECT_REQUEST | EVENT_EJECTION)
    }

    /// Whether it is the last word on an eject, be it done or refused.
    pub fn ends_eject(self) -> bool {
        self.is_of_eject() && self.status & 0xffff != STATUS_EJECTING
    }

    /// Whether it says that an eject will not be. That one goes on is no refusal.
    pub fn refuses_eject(self) -> bool {
        self.ends_eject() && self.status & 0xffff != 0
    }

    /// Whether it says that what was plugged cannot be used.
    pub fn refuses_insertion(self) -> bool {
        matches!(self.event & 0xffff, 0 | 1 | 0x200) && !matches!(self.status & 0xffff, 0 | 0x80)
    }
}

impl fmt::Display for Ost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let meaning = match (self.is_of_eject(), self.status & 0xffff) {
            (_, 0) => "success",
            (_, 1) => "a failure that it does not name",
            (_, 2) => "a notification that it does not know",
            (true, 0x80) => "ejecting is not supported",
            (true, 0x81) => "the device is in use",
            (true, 0x82) => "the device is busy",
            (true, 0x83) => "what depends on the device is busy",
            (true, STATUS_EJECTING) => "ejecting goes on",
            (false, 0x80) => "inserting goes on",
            (false, 0x81) => "its driver could not be loaded or failed",
            (false, 0x82) => "inserting is not supported",
            _ => "a status that is not known",
        };
        write!(
            f,
            "_OST event {:#x}, status {:#x}: {meaning}",
            self.event, self.status
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_in_every_state_is_as_drawn() {
        use State::{Announced, Asked, Empty, Leaving, Present};
        let states = [Empty, Announced, Present, Asked, Leaving];
        // By state: what Plug, Fetch, Ask, Withdraw, Eject, Refuse lead to.
        let table = [
            (Empty, [Some(Announced), None, None, None, None, None]),
            (
                Announced,
                [None, Some(Present), None, Some(Empty), None, None],
            ),
            (Present, [None, None, Some(Asked), None, Some(Empty), None]),
            (
                Asked,
                [None, Some(Leaving), None, Some(Present), Some(Empty), None],
            ),
            (
                Leaving,
                [None, None, Some(Asked), None, Some(Empty), Some(Present)],
            ),
        ];
        let events = [
            Event::Plug,
            Event::Fetch,
            Event::Ask,
            Event::Withdraw,
            Event::Eject,
            Event::Refuse,
        ];
        assert_eq!(table.map(|(state, _)| state), states);
        for (state, row) in table {
            for (event, expected) in events.into_iter().zip(row) {
                assert_eq!(next(state, event).ok(), expected, "{state:?} {event:?}");
            }
        }
    }

    #[test]
    fn reports_are_told_apart() {
        let ost = |event, status| Ost { event, status };
        for (report, end, eject, insertion) in [
            (ost(3, 0), true, false, false),
            (ost(3, 0x84), false, false, false),
            (ost(0x103, 0), true, false, false),
            (ost(0x103, 0x84), false, false, false),
            (ost(3, 1), true, true, false),
            (ost(0x103, 0x82), true, true, false),
            (ost(1, 0), false, false, false),
            (ost(1, 0x80), false, false, false),
            (ost(1, 0x81), false, false, true),
            (ost(0x200, 1), false, false, true),
            (ost(u32::MAX, u32::MAX), false, false, false),
        ] {
            assert_eq!(report.ends_eject(), end, "{report}");
            assert_eq!(report.refuses_eject(), eject, "{report}");
            assert_eq!(report.refuses_insertion(), insertion, "{report}");
        }
        assert!(ost(3, 0x82).to_string().contains("busy"));
        assert!(ost(1, 0x81).to_string().contains("driver"));
    }
}
