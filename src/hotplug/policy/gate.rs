//! What lets a change through: enough readings in a row, then no change too
//! recently, then no failure too recently.
//!
//! Either cooldown runs from the last change, in whichever direction that was
//! and whoever asked for it: growing waits for `up` since then, shrinking for
//! `down`. So load that comes back soon after a VM shrank is not kept waiting
//! by the longer cooldown, and a VM that has just grown does not shrink at once.

use std::cmp::Ordering;
use std::time::Duration;

use super::Hold;

/// From the first failure to the next attempt; it doubles with each failure in a row.
const FIRST_RETRY: Duration = Duration::from_secs(10);
/// Longest time without an attempt.
const LONGEST_RETRY: Duration = Duration::from_secs(600);

/// Which way a size changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Up,
    Down,
}

/// Readings in a row that say one thing.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Streak {
    direction: Option<Direction>,
    count: u8,
}

impl Streak {
    /// One more reading, and what it says; None ends the row.
    pub(super) fn count(&mut self, direction: Option<Direction>) -> u8 {
        if self.direction != direction {
            self.count = 0;
        }
        self.direction = direction;
        self.count = self.count.saturating_add(1);
        self.count
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Retry {
    failures: u32,
    at: Option<Duration>,
}

impl Retry {
    fn fail(&mut self, now: Duration) {
        let wait = FIRST_RETRY.saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        self.at = Some(now.saturating_add(wait.min(LONGEST_RETRY)));
    }

    fn left(&self, now: Duration) -> Option<Duration> {
        let left = self.at?.saturating_sub(now);
        (!left.is_zero()).then_some(left)
    }
}

/// The waits between changes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gate {
    up_cooldown: Duration,
    down_cooldown: Duration,
    changed: Option<Duration>,
    up: Retry,
    down: Retry,
    /// What was decided and has not been settled.
    pending: Option<Direction>,
    /// Of the last reading.
    read: Option<Duration>,
}

impl Gate {
    pub(super) fn new(up_cooldown: Duration, down_cooldown: Duration) -> Self {
        Self {
            up_cooldown,
            down_cooldown,
            changed: None,
            up: Retry::default(),
            down: Retry::default(),
            pending: None,
            read: None,
        }
    }

    /// The time of a reading. False if none has passed since the last one; then the reading does not count. Should the
    /// clock go back, waits begin anew, rather than to last until it has caught up.
    pub(super) fn advance(&mut self, now: Duration) -> bool {
        let before = self.read.replace(now);
        let Some(before) = before.filter(|before| *before >= now) else {
            return true;
        };
        if before > now {
            let back = before - now;
            self.changed = self.changed.map(|changed| changed.min(now));
            for retry in [&mut self.up, &mut self.down] {
                retry.at = retry.at.map(|at| at.saturating_sub(back));
            }
        }
        false
    }

    /// Why a change in this direction has to wait, if it has.
    pub(super) fn closed(&self, now: Duration, direction: Direction) -> Option<Hold> {
        let cooldown = match direction {
            Direction::Up => self.up_cooldown,
            Direction::Down => self.down_cooldown,
        };
        let left = self.changed.map_or(Duration::ZERO, |changed| {
            cooldown.saturating_sub(now.saturating_sub(changed))
        });
        if !left.is_zero() {
            return Some(Hold::Cooldown { left });
        }
        self.backing_off(now, direction)
    }

    /// The same without the cooldowns.
    pub(super) fn backing_off(&self, now: Duration, direction: Direction) -> Option<Hold> {
        let retry = match direction {
            Direction::Up => self.up,
            Direction::Down => self.down,
        };
        retry.left(now).map(|left| Hold::BackingOff { left })
    }

    /// A change is decided: cooldowns start.
    pub(super) fn decide(&mut self, now: Duration, direction: Direction) {
        self.changed = Some(now);
        self.pending = Some(direction);
    }

    /// What was decided has been tried: how the size is now, compared with before. If it has not moved that way, that
    /// is a failure.
    pub(super) fn settle(&mut self, now: Duration, moved: Ordering) {
        let failed = match self.pending {
            Some(Direction::Up) => moved != Ordering::Greater,
            Some(Direction::Down) => moved != Ordering::Less,
            None => false,
        };
        if failed {
            self.fail(now);
        } else {
            self.forget();
        }
    }

    fn forget(&mut self) {
        self.pending = None;
        self.up = Retry::default();
        self.down = Retry::default();
    }

    /// The decided change was not made. Only its own direction is left alone: memory that the guest does not give back
    /// must not keep it from getting more.
    pub(super) fn fail(&mut self, now: Duration) {
        match self.pending.take() {
            Some(Direction::Up) => self.up.fail(now),
            Some(Direction::Down) => self.down.fail(now),
            None => {}
        }
    }

    /// Somebody else made a change: cooldowns start, failures are forgotten.
    pub(super) fn set(&mut self, now: Duration) {
        self.changed = Some(now);
        self.forget();
    }
}
