//! What a request comes to, slot by slot, as a state machine without effects.
//!
//! ```text
//! PLUG            Fill ── all slots exist: blocks plugged ──► Answer(ACK)
//!                  └─ one cannot be made ──► Sweep ──► Answer(BUSY)
//! UNPLUG (ALL)    Drain ── all discarded: blocks unplugged ──► Sweep ──► Answer(ACK)
//!                  └─ one cannot be discarded ──► Answer(BUSY)
//! reset           Sweep ──► Idle
//! ```
//!
//! So a request is carried out whole or not at all, and what can fail comes
//! before the blocks change. Sweep takes away slots without plugged blocks; one
//! that stays costs an empty slot until the next sweep.

use std::ops::Range;

use super::request::Response;

/// Consecutive blocks, and the slots that they lie in. Neither is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Extent {
    pub blocks: Range<u32>,
    pub slots: Range<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Work {
    /// Nothing to do.
    Idle,
    /// Makes the slots that are not there yet, from `next` on.
    Fill { extent: Extent, next: u32 },
    /// Discards the blocks, from slot `next` on.
    Drain {
        extent: Extent,
        next: u32,
        all: bool,
    },
    /// Takes away slots that have no plugged block, from `next` on.
    Sweep {
        slots: Range<u32>,
        next: u32,
        answer: Option<Response>,
    },
    /// It is done, and the driver does not know yet.
    Answer(Response),
}

/// How it went with one slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    Failed,
}

/// A change of the blocks that comes with a transition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    Plug(Range<u32>),
    Unplug(Range<u32>),
    UnplugAll,
}

impl Work {
    pub fn fill(extent: Extent) -> Self {
        let next = extent.slots.start;
        Self::Fill { extent, next }
    }

    pub fn drain(extent: Extent, all: bool) -> Self {
        let next = extent.slots.start;
        Self::Drain { extent, next, all }
    }

    pub fn sweep(slots: Range<u32>, answer: Option<Response>) -> Self {
        let next = slots.start;
        Self::Sweep {
            slots,
            next,
            answer,
        }
    }

    /// The slot to work on.
    pub fn slot(&self) -> Option<u32> {
        match self {
            Self::Fill { next, .. } | Self::Drain { next, .. } | Self::Sweep { next, .. } => {
                Some(*next)
            }
            Self::Idle | Self::Answer(_) => None,
        }
    }

    /// What comes after the work on [`slot`](Self::slot).
    pub fn after(self, outcome: Outcome) -> (Self, Option<Change>) {
        match (self, outcome) {
            (Self::Fill { extent, next }, Outcome::Done) => {
                let next = next + 1;
                if next < extent.slots.end {
                    (Self::Fill { extent, next }, None)
                } else {
                    let change = Change::Plug(extent.blocks);
                    (Self::Answer(Response::Ack), Some(change))
                }
            }
            (Self::Fill { extent, .. }, Outcome::Failed) => {
                (Self::sweep(extent.slots, Some(Response::Busy)), None)
            }
            (Self::Drain { extent, next, all }, Outcome::Done) => {
                let next = next + 1;
                if next < extent.slots.end {
                    (Self::Drain { extent, next, all }, None)
                } else {
                    let change = if all {
                        Change::UnplugAll
                    } else {
                        Change::Unplug(extent.blocks)
                    };
                    let sweep = Self::sweep(extent.slots, Some(Response::Ack));
                    (sweep, Some(change))
                }
            }
            (Self::Drain { .. }, Outcome::Failed) => (Self::Answer(Response::Busy), None),
            (
                Self::Sweep {
                    slots,
                    next,
                    answer,
                },
                _,
            ) => {
                let next = next + 1;
                let after = match answer {
                    answer if next < slots.end => Self::Sweep {
                        slots,
                        next,
                        answer,
                    },
                    Some(response) => Self::Answer(response),
                    None => Self::Idle,
                };
                (after, None)
            }
            (resting @ (Self::Idle | Self::Answer(_)), _) => (resting, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_and_outcome_has_its_successor() {
        use Outcome::{Done, Failed};
        let extent = Extent {
            blocks: 5..200,
            slots: 0..2,
        };
        let fill = |next| Work::Fill {
            extent: extent.clone(),
            next,
        };
        let drain = |next, all| Work::Drain {
            extent: extent.clone(),
            next,
            all,
        };
        let sweep = |next, answer| Work::Sweep {
            slots: 0..2,
            next,
            answer,
        };
        let ack = || Work::Answer(Response::Ack);
        let busy = || Work::Answer(Response::Busy);
        let (acked, busied) = (Some(Response::Ack), Some(Response::Busy));
        for (state, outcome, expected, change) in [
            (Work::Idle, Done, Work::Idle, None),
            (Work::Idle, Failed, Work::Idle, None),
            (fill(0), Done, fill(1), None),
            (fill(0), Failed, sweep(0, busied), None),
            (fill(1), Done, ack(), Some(Change::Plug(5..200))),
            (fill(1), Failed, sweep(0, busied), None),
            (drain(0, false), Done, drain(1, false), None),
            (drain(0, false), Failed, busy(), None),
            (
                drain(1, false),
                Done,
                sweep(0, acked),
                Some(Change::Unplug(5..200)),
            ),
            (drain(1, false), Failed, busy(), None),
            (
                drain(1, true),
                Done,
                sweep(0, acked),
                Some(Change::UnplugAll),
            ),
            (drain(1, true), Failed, busy(), None),
            (sweep(0, acked), Done, sweep(1, acked), None),
            (sweep(0, acked), Failed, sweep(1, acked), None),
            (sweep(1, acked), Done, ack(), None),
            (sweep(1, acked), Failed, ack(), None),
            (sweep(1, busied), Done, busy(), None),
            (sweep(1, None), Done, Work::Idle, None),
            (sweep(1, None), Failed, Work::Idle, None),
            (ack(), Done, ack(), None),
            (busy(), Failed, busy(), None),
        ] {
            let what = format!("{state:?} {outcome:?}");
            assert_eq!(state.after(outcome), (expected, change), "{what}");
        }
    }
}
