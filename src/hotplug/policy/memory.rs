//! Memory by use, and at once when containers stall for want of it.

use std::cmp::Ordering;
use std::time::Duration;

use super::gate::{Direction, Gate, Streak};
use super::{Decision, Hold, compare_share};
use crate::config::MemoryRules;
use crate::hotplug::Bounds;

/// A stall brings at least what is used in this time at the present rate.
const AHEAD: Duration = Duration::from_secs(4);
/// Rates are taken over no less, or a moment's noise would be a rate.
const SHORTEST: Duration = Duration::from_secs(1);
/// A stall this soon after another brings twice as much as that.
const AGAIN: Duration = Duration::from_secs(30);
/// Of [`MemoryRules::burst`] comes at the first stall.
const FIRST_PART: u64 = 4;
/// Of the guest's memory is always reserved: the kernel slows a container by how far it is beyond `memory.high` in
/// proportion to that, hardly at one percent, to a crawl at six.
const RESERVED_PART: u64 = 16;

/// What a guest says of its memory, and what it has by the VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryReading {
    /// Boot memory and all that is plugged, in MiB, by the VMM.
    pub size_mib: u64,
    /// MemTotal in bytes, by the guest.
    pub total_bytes: u64,
    /// MemAvailable in bytes, by the guest.
    pub available_bytes: u64,
}

/// Of the guest's memory, in bytes.
#[derive(Debug, Clone, Copy)]
struct Use {
    total: u64,
    available: u64,
}

impl Use {
    /// None if it cannot be.
    fn of(size_mib: u64, total: u64, available: u64) -> Option<Self> {
        let possible =
            total > 0 && available <= total && u128::from(total) <= u128::from(size_mib) << 20;
        possible.then_some(Self { total, available })
    }

    fn used(self) -> u64 {
        self.total - self.available
    }

    /// With so many bytes less. None if they are not there.
    fn without(self, bytes: u64) -> Option<Self> {
        Some(Self {
            total: self.total.checked_sub(bytes).filter(|total| *total > 0)?,
            available: self.available.checked_sub(bytes)?,
        })
    }
}

/// Decides how much memory a VM has. Owned by one controller.
#[derive(Debug, Clone)]
pub struct MemoryPolicy {
    rules: MemoryRules,
    bounds: Bounds<u64>,
    /// As the last reading or change had it, in MiB.
    current: u64,
    streak: Streak,
    gate: Gate,
    /// Bytes used, and when.
    used: Option<(Duration, u64)>,
    /// MiB that the last stall brought, and when.
    burst: Option<(Duration, u64)>,
}

impl MemoryPolicy {
    /// For a VM that has `current` MiB.
    pub fn new(rules: MemoryRules, bounds: Bounds<u64>, current: u64) -> Self {
        let gate = Gate::new(rules.up_cooldown, rules.down_cooldown);
        Self {
            rules,
            bounds,
            current,
            streak: Streak::default(),
            gate,
            used: None,
            burst: None,
        }
    }

    /// MiB that the VM is believed to have.
    pub fn current(&self) -> u64 {
        self.current
    }

    /// The bounds in force.
    pub fn bounds(&self) -> Bounds<u64> {
        self.bounds
    }

    /// Between two readings. None: no reading could change anything, since it is switched off or there is no room.
    pub fn interval(&self) -> Option<Duration> {
        let on = !self.off() && !self.bounds.pin(self.current);
        on.then_some(self.rules.interval)
    }

    /// New bounds. Rows of readings begin anew.
    pub fn set_bounds(&mut self, bounds: Bounds<u64>) {
        self.bounds = bounds;
        self.streak = Streak::default();
    }

    /// Somebody else has made the VM have `to` MiB: cooldowns start, rows of readings begin anew.
    pub fn set(&mut self, now: Duration, to: u64) {
        self.current = to;
        self.streak = Streak::default();
        self.gate.set(now);
    }

    /// What was decided has been tried, and the VM has `actual` MiB now. None gone or come is a failure.
    pub fn settled(&mut self, now: Duration, actual: u64) {
        self.gate.settle(now, actual.cmp(&self.current));
        self.current = actual;
    }

    /// What was decided could not be done. It is not decided again for a while that grows with each failure in a row,
    /// from 10 s to 10 min; the other direction is free.
    pub fn failed(&mut self, now: Duration) {
        self.gate.fail(now);
    }

    /// Bytes that all containers together may use before they are slowed down and the host is told; 0: never. They are
    /// slowed only while more memory could come: not when it is switched off, at the ceiling, or while plugging fails.
    pub fn high_bytes(&self, now: Duration, total_bytes: u64) -> u64 {
        let room = total_bytes > 0
            && !self.off()
            && self.rules.burst.0 > 0
            && self.current < self.bounds.ceiling()
            && self.gate.backing_off(now, Direction::Up).is_none();
        if room {
            high_bytes(total_bytes, self.rules.reserve.0)
        } else {
            0
        }
    }

    /// One reading.
    pub fn step(&mut self, now: Duration, reading: &MemoryReading) -> Decision<u64> {
        match self.judge(now, reading) {
            Ok((direction, to)) => self.decide(now, direction, to),
            Err(hold) => Decision::Hold(hold),
        }
    }

    /// Containers stall: what comes, comes at once, after whatever cooldown and readings. Bytes are MemTotal and
    /// MemAvailable of the guest when it was noticed. The answer is never to shrink.
    ///
    /// It is a quarter of `burst`, or what is used in four seconds at the rate since the last reading if that is more,
    /// or twice what the last stall brought if that was less than 30 s ago; at least a step, at most `burst`.
    pub fn pressure(
        &mut self,
        now: Duration,
        total_bytes: u64,
        available_bytes: u64,
    ) -> Decision<u64> {
        match self.relieve(now, total_bytes, available_bytes) {
            Ok(to) => self.decide(now, Direction::Up, to),
            Err(hold) => Decision::Hold(hold),
        }
    }

    fn off(&self) -> bool {
        self.rules.interval.is_zero() || self.rules.step.mib() == 0
    }

    fn decide(&mut self, now: Duration, direction: Direction, to: u64) -> Decision<u64> {
        self.streak = Streak::default();
        self.gate.decide(now, direction);
        match direction {
            Direction::Up => Decision::Up(to),
            Direction::Down => Decision::Down(to),
        }
    }

    fn judge(&mut self, now: Duration, reading: &MemoryReading) -> Result<(Direction, u64), Hold> {
        if self.off() {
            return Err(Hold::Off);
        }
        if !self.gate.advance(now) {
            return Err(Hold::ClockStopped);
        }
        let usage = Use::of(
            reading.size_mib,
            reading.total_bytes,
            reading.available_bytes,
        );
        let Some(usage) = usage else {
            self.streak.count(None);
            return Err(Hold::Implausible);
        };
        self.used = Some((now, usage.used()));
        if reading.size_mib != self.current {
            self.current = reading.size_mib;
            self.streak.count(None);
            return Err(Hold::Adopted);
        }
        if self.current < self.bounds.floor() {
            return self.pass(now, Direction::Up, self.bounds.floor());
        }
        if self.current > self.bounds.ceiling() {
            let to = self.bounds.ceiling();
            self.without(usage, to).ok_or(Hold::KeepsAvailable)?;
            return self.pass(now, Direction::Down, to);
        }
        let (said, otherwise) = self.says(usage);
        let have = self.streak.count(said);
        let Some(direction) = said else {
            return Err(otherwise);
        };
        let (need, to) = match direction {
            Direction::Up => (self.rules.up_readings, self.above(self.rules.step.mib())),
            Direction::Down => (self.rules.down_readings, self.below()),
        };
        if to == self.current {
            return Err(Hold::AtCeiling);
        }
        if have < need {
            return Err(Hold::Counting { have, need });
        }
        self.pass(now, direction, to)
    }

    /// What one reading says, and why it says nothing if so.
    fn says(&self, usage: Use) -> (Option<Direction>, Hold) {
        if self.wants_more(usage) {
            return (Some(Direction::Up), Hold::Steady);
        }
        let low = compare_share(usage.used(), usage.total, self.rules.down_used) == Ordering::Less
            && self.current > self.bounds.floor();
        if !low {
            return (None, Hold::Steady);
        }
        match self.without(usage, self.below()) {
            Some(after) if !self.wants_more(after) => (Some(Direction::Down), Hold::Steady),
            _ => (None, Hold::KeepsAvailable),
        }
    }

    fn wants_more(&self, usage: Use) -> bool {
        compare_share(usage.used(), usage.total, self.rules.up_used) != Ordering::Less
            && usage.available < self.rules.up_available.0
    }

    /// After shrinking to `to` MiB. None if less than is to be kept would be available.
    fn without(&self, usage: Use, to: u64) -> Option<Use> {
        let bytes = self.current.saturating_sub(to).checked_mul(1 << 20)?;
        let after = usage.without(bytes)?;
        let keep = reserved(after.total, self.rules.reserve.0).max(self.rules.down_available.0);
        (after.available >= keep).then_some(after)
    }

    /// At least `mib` more, in whole steps from the boot size, within the bounds.
    fn above(&self, mib: u64) -> u64 {
        let (boot, step) = (self.bounds.boot(), self.rules.step.mib());
        let beyond = self.current.saturating_add(mib).saturating_sub(boot);
        let to = boot.saturating_add(beyond.div_ceil(step).saturating_mul(step));
        self.bounds.clamp(to)
    }

    /// At most a step less, so that whole steps from the boot size are left, down to the floor.
    fn below(&self) -> u64 {
        let (boot, step) = (self.bounds.boot(), self.rules.step.mib());
        let beyond = self.current.saturating_sub(boot).saturating_sub(step);
        let to = boot.saturating_add(beyond.div_ceil(step).saturating_mul(step));
        to.max(self.bounds.floor()).min(self.current)
    }

    fn pass(&self, now: Duration, direction: Direction, to: u64) -> Result<(Direction, u64), Hold> {
        match self.gate.closed(now, direction) {
            Some(hold) => Err(hold),
            None => Ok((direction, to)),
        }
    }

    fn relieve(&mut self, now: Duration, total: u64, available: u64) -> Result<u64, Hold> {
        if self.off() || self.rules.burst.0 == 0 {
            return Err(Hold::Off);
        }
        let usage = Use::of(self.current, total, available).ok_or(Hold::Implausible)?;
        let mib = self.burst_mib(now, usage.used());
        if self.current >= self.bounds.ceiling() {
            return Err(Hold::AtCeiling);
        }
        if let Some(hold) = self.gate.backing_off(now, Direction::Up) {
            return Err(hold);
        }
        let enough =
            reserved(total, self.rules.reserve.0).saturating_add(self.rules.up_available.0);
        if available >= enough {
            return Err(Hold::Available);
        }
        self.burst = Some((now, mib));
        Ok(self.above(mib))
    }

    /// What a stall brings.
    fn burst_mib(&mut self, now: Duration, used: u64) -> u64 {
        let (then, before) = self.used.unwrap_or((now, used));
        let passed = now.saturating_sub(then);
        if self.used.is_none() || passed >= SHORTEST {
            self.used = Some((now, used));
        }
        let grown = u128::from(used.saturating_sub(before));
        let ahead = grown.saturating_mul(AHEAD.as_millis()) / passed.max(SHORTEST).as_millis();
        let ahead = u64::try_from(ahead.div_ceil(1 << 20)).unwrap_or(u64::MAX);
        let again = self.burst.map_or(0, |(then, mib)| {
            let soon = now.saturating_sub(then) < AGAIN;
            if soon { mib.saturating_mul(2) } else { 0 }
        });
        let (step, burst) = (self.rules.step.mib(), self.rules.burst.mib());
        let mib = (burst / FIRST_PART).max(ahead).max(again);
        mib.clamp(step, burst.max(step))
    }
}

/// Bytes that all containers of a guest with `total_bytes` of memory may use together before they are slowed down and
/// the host is told: all but the reserve, which is at least a sixteenth of the whole and at most half, in whole MiB.
/// At least 1 MiB, since 0 would mean never.
pub fn high_bytes(total_bytes: u64, reserve_bytes: u64) -> u64 {
    let high = total_bytes - reserved(total_bytes, reserve_bytes);
    (high >> 20).max(1) << 20
}

fn reserved(total: u64, reserve: u64) -> u64 {
    reserve.clamp(total / RESERVED_PART, total / 2)
}

#[cfg(test)]
mod tests;
