//! vCPUs by load.

use std::cmp::Ordering;
use std::time::Duration;

use super::gate::{Direction, Gate, Streak};
use super::{Decision, Hold, compare_share};
use crate::config::CpuRules;
use crate::hotplug::Bounds;

/// What a guest says of its CPUs. Counters are since its boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuReading {
    /// CPUs online.
    pub online: u8,
    /// Time that all CPUs together were not idle, in µs.
    pub busy_us: u64,
    /// Time that all CPUs together were online, in µs.
    pub total_us: u64,
    /// Time that all containers together were throttled by their CPU limits, in µs.
    pub throttled_us: u64,
}

/// Decides how many vCPUs a VM has. Owned by one controller.
#[derive(Debug, Clone)]
pub struct CpuPolicy {
    rules: CpuRules,
    bounds: Bounds<u8>,
    /// As the last reading or change had it.
    current: u8,
    before: Option<CpuReading>,
    streak: Streak,
    gate: Gate,
}

impl CpuPolicy {
    /// For a VM that has `current` vCPUs.
    pub fn new(rules: CpuRules, bounds: Bounds<u8>, current: u8) -> Self {
        let gate = Gate::new(rules.up_cooldown, rules.down_cooldown);
        Self {
            rules,
            bounds,
            current,
            before: None,
            streak: Streak::default(),
            gate,
        }
    }

    /// vCPUs that the VM is believed to have.
    pub fn current(&self) -> u8 {
        self.current
    }

    /// The bounds in force.
    pub fn bounds(&self) -> Bounds<u8> {
        self.bounds
    }

    /// Between two readings. None: no reading could change anything, since it is switched off or there is no room.
    pub fn interval(&self) -> Option<Duration> {
        let on = !self.rules.interval.is_zero() && !self.bounds.pin(self.current);
        on.then_some(self.rules.interval)
    }

    /// New bounds. Rows of readings begin anew.
    pub fn set_bounds(&mut self, bounds: Bounds<u8>) {
        self.bounds = bounds;
        self.streak = Streak::default();
    }

    /// Somebody else has made the VM have `to` vCPUs: cooldowns start, rows of readings begin anew.
    pub fn set(&mut self, now: Duration, to: u8) {
        self.current = to;
        self.streak = Streak::default();
        self.gate.set(now);
    }

    /// What was decided has been tried, and the VM has `actual` vCPUs now. None gone or come is a failure.
    pub fn settled(&mut self, now: Duration, actual: u8) {
        self.gate.settle(now, actual.cmp(&self.current));
        self.current = actual;
    }

    /// What was decided could not be done. It is not decided again for a while that grows with each failure in a row,
    /// from 10 s to 10 min; the other direction is free.
    pub fn failed(&mut self, now: Duration) {
        self.gate.fail(now);
    }

    /// One reading.
    pub fn step(&mut self, now: Duration, reading: &CpuReading) -> Decision<u8> {
        match self.judge(now, reading) {
            Ok((direction, to)) => {
                self.streak = Streak::default();
                self.gate.decide(now, direction);
                match direction {
                    Direction::Up => Decision::Up(to),
                    Direction::Down => Decision::Down(to),
                }
            }
            Err(hold) => Decision::Hold(hold),
        }
    }

    fn judge(&mut self, now: Duration, reading: &CpuReading) -> Result<(Direction, u8), Hold> {
        if self.rules.interval.is_zero() {
            return Err(Hold::Off);
        }
        if !self.gate.advance(now) {
            return Err(Hold::ClockStopped);
        }
        let before = self.before.replace(*reading);
        if reading.online == 0 {
            self.streak.count(None);
            return Err(Hold::Implausible);
        }
        if reading.online != self.current {
            self.current = reading.online;
            self.streak.count(None);
            return Err(Hold::Adopted);
        }
        if !self.bounds.hold(self.current) {
            let to = self.bounds.clamp(self.current).max(1);
            let direction = if to > self.current {
                Direction::Up
            } else {
                Direction::Down
            };
            return self.pass(now, direction, to);
        }
        let Some(before) = before else {
            return Err(Hold::FirstReading);
        };
        let Some(load) = Load::between(&before, reading) else {
            self.streak.count(None);
            return Err(Hold::Implausible);
        };
        let (said, otherwise) = self.says(&load);
        let have = self.streak.count(said);
        let Some(direction) = said else {
            return Err(otherwise);
        };
        let (need, to) = match direction {
            Direction::Up => (self.rules.up_readings, self.current.saturating_add(1)),
            Direction::Down => (self.rules.down_readings, self.current - 1),
        };
        if self.bounds.clamp(to) != to {
            return Err(Hold::AtCeiling);
        }
        if have < need {
            return Err(Hold::Counting { have, need });
        }
        self.pass(now, direction, to)
    }

    /// What one reading says, and why it says nothing if so.
    fn says(&self, load: &Load) -> (Option<Direction>, Hold) {
        let rules = &self.rules;
        if compare_share(load.busy, load.total, rules.up_load) != Ordering::Less {
            let throttled = rules.up_throttled > 0
                && compare_share(load.throttled, load.total, rules.up_throttled) != Ordering::Less;
            return match throttled {
                true => (None, Hold::Throttled),
                false => (Some(Direction::Up), Hold::Steady),
            };
        }
        let fewer = self.current.saturating_sub(1);
        // The same work in the time that one CPU fewer would have been online.
        let on_fewer = |percent| {
            let busy = u128::from(load.busy) * 100 * u128::from(self.current);
            busy.cmp(&(u128::from(load.total) * u128::from(percent) * u128::from(fewer)))
        };
        let low = fewer >= self.bounds.floor()
            && fewer > 0
            && on_fewer(rules.down_load) != Ordering::Greater
            && on_fewer(rules.up_load) == Ordering::Less;
        (low.then_some(Direction::Down), Hold::Steady)
    }

    fn pass(&self, now: Duration, direction: Direction, to: u8) -> Result<(Direction, u8), Hold> {
        match self.gate.closed(now, direction) {
            Some(hold) => Err(hold),
            None => Ok((direction, to)),
        }
    }
}

/// Between two readings, in µs.
struct Load {
    busy: u64,
    total: u64,
    throttled: u64,
}

impl Load {
    /// None if a counter went back or no time has passed. A guest that was busy for longer than it had CPUs was busy
    /// all the time: its clocks tick apart.
    fn between(before: &CpuReading, after: &CpuReading) -> Option<Self> {
        let total = after.total_us.checked_sub(before.total_us)?;
        let busy = after.busy_us.checked_sub(before.busy_us)?;
        let throttled = after.throttled_us.checked_sub(before.throttled_us)?;
        (total > 0).then_some(Self {
            busy: busy.min(total),
            total,
            throttled,
        })
    }
}

#[cfg(test)]
mod tests;
