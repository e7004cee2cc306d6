//! Memory by ACPI: units that are made, announced and brought online by the agent; and back.

use nacre_protocol::agent::{
    OfflineMemoryRequest, OfflineMemoryResponse, OnlineMemoryRequest, OnlineMemoryResponse,
};
use nacre_vmm::hotplug::memory::UnitView;
use tokio::time::Instant;

use super::{Plugged, Step, Stuck, is_unknown, us, with_report};
use crate::sandbox::Sandbox;
use crate::sandbox::error::{Error, chain};

/// How much more the guest may have available than its kernel estimates.
const UNCERTAIN: u64 = 32 << 20;

/// Most units that go offline by one call, whose time is that of one.
const TOGETHER: usize = 16;

/// Whether a guest has clearly less memory available than is to go. What its kernel says is an estimate, and leaves out what it keeps
/// in reserve for that memory, and its page structures: together up to 6 % of it, which go with it.
pub(super) fn is_short(available: u64, goes: u64) -> bool {
    available
        .saturating_add(UNCERTAIN)
        .saturating_add(goes / 16)
        < goes
}

impl Sandbox {
    /// Bytes of the units that are there.
    pub(super) fn unit_bytes(&self) -> u64 {
        let units = self.0.machine.memory_units();
        units.iter().map(|unit| unit.bytes).sum()
    }

    /// Plugs `bytes` more, a multiple of the unit. What went wrong is in words, and is undone.
    pub(super) async fn add_units(&self, bytes: u64) -> Result<Vec<Step>, String> {
        self.done_ejecting().await;
        let began = Instant::now();
        let plugged = self.0.machine.plug_memory(bytes);
        let units = plugged.map_err(|error| chain(&error))?;
        for unit in &units {
            self.begin(slot_of(unit));
        }
        let host_us = us(began) / units.len().max(1) as u64;
        let mut steps = Vec::new();
        for (done, unit) in units.iter().enumerate() {
            match self.online_unit(unit).await {
                Ok(answer) => steps.push(Step {
                    host_us,
                    ..Step::of_guest(
                        named(unit),
                        (answer.noticed_us, answer.online_us),
                        us(began),
                    )
                }),
                Err(stuck) => {
                    let undone = self.take_units_back(&units, done).await;
                    let why = stuck.why;
                    return Err(format!("{} was plugged, but {why}; {undone}", named(unit)));
                }
            }
        }
        let gone = |unit: &&UnitView| self.slot(slot_of(unit)).is_none();
        if let Some(unit) = units.iter().find(gone)
            && self.0.machine.exit_reason().is_none()
        {
            let undone = self.take_units_back(&units, units.len()).await;
            return Err(format!(
                "{} was online, but the guest has ejected it, unasked; {undone}",
                named(unit)
            ));
        }
        Ok(steps)
    }

    /// Units that are there and that the guest may not have online, since an earlier change left them.
    pub(super) fn left_over_units(&self) -> Vec<UnitView> {
        let mut units = self.0.machine.memory_units();
        units.retain(|unit| self.is_left_over(slot_of(unit)));
        units
    }

    /// One that is there comes online, which an earlier change left. One that the guest's kernel does not know goes: it missed
    /// what it was told, and is to be told anew.
    pub(super) async fn use_unit(&self, unit: &UnitView) -> Result<Option<Step>, String> {
        let began = Instant::now();
        match self.online_unit(unit).await {
            Ok(answer) => {
                let times = (answer.noticed_us, answer.online_us);
                Ok(Some(Step::of_guest(named(unit), times, us(began))))
            }
            Err(stuck) => {
                if stuck.unknown && self.eject(slot_of(unit)).await.is_ok() {
                    return Ok(None);
                }
                let why = stuck.why;
                Err(format!("{} was plugged earlier, but {why}", named(unit)))
            }
        }
    }

    /// Has the agent bring a unit online, and acknowledges it.
    async fn online_unit(&self, unit: &UnitView) -> Result<OnlineMemoryResponse, Stuck> {
        let what = named(unit);
        let within = self.0.timeouts.resize;
        let mut request = OnlineMemoryRequest::new();
        (request.base, request.bytes) = (unit.base, unit.bytes);
        request.wait_ms = u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
        let agent = self.agent().await.map_err(|error| Stuck::by(&error))?;
        let answer = agent
            .call(
                format!("bringing {what} online"),
                within + self.0.timeouts.agent,
                |client, context| async move { client.online_memory(context, &request).await },
            )
            .await
            .map_err(|error| {
                let slot = self.slot(slot_of(unit));
                Stuck::by(&error).map(|_| with_report(&error, slot.as_ref()))
            })?;
        self.acknowledge(slot_of(unit));
        let (blocks, first) = (answer.blocks.len(), answer.blocks.first());
        let first = first.map(|block| block.number);
        let fixed = answer.blocks.iter().filter(|block| !block.movable).count();
        tracing::debug!(id = self.0.id, %what, first, blocks, not_removable = fixed, "memory online");
        Ok(answer)
    }

    /// Takes all of these units away again, of which the first `online` are online; what came of it. The guest's kernel refuses
    /// to eject one that came online after all.
    async fn take_units_back(&self, units: &[UnitView], online: usize) -> String {
        let mut left = Causes::default();
        let mut late = false;
        for (place, unit) in units.iter().enumerate() {
            if self.take_unnoticed_back(slot_of(unit)) {
                continue;
            }
            let gone = if late {
                Err("it stays, since the guest does not answer".to_owned())
            } else {
                let gone = if place < online {
                    self.remove_unit(unit).await.map(|_| ())
                } else {
                    self.eject(slot_of(unit)).await
                };
                gone.map_err(|stuck| {
                    late = stuck.late;
                    stuck.why
                })
            };
            if let Err(why) = gone {
                left.add(unit, &why);
            }
        }
        match left.words() {
            None => "it was unplugged again".to_owned(),
            Some(words) => format!("it could not all be unplugged again{words}"),
        }
    }

    /// Unplugs units until those that stay have `to` bytes, a multiple of the unit: what the guest may not have online first,
    /// then the highest that go. If too few go, those that went are plugged again.
    pub(super) async fn remove_units(&self, to: u64) -> Result<Vec<Step>, String> {
        let began = Instant::now();
        let mut units = self.0.machine.memory_units();
        units.sort_by_key(|unit| (self.is_left_over(slot_of(unit)), unit.slot.index));
        let together = self.highest(&units, self.unit_bytes().saturating_sub(to));
        let outcome = self.remove_each(units, &together, to, began).await;
        // What went offline with others, and is to stay after all.
        let mut back = Causes::default();
        for unit in together {
            if !self.is_left_over(slot_of(&unit)) || self.slot(slot_of(&unit)).is_none() {
                continue;
            }
            if let Err(stuck) = self.online_unit(&unit).await {
                back.add(
                    &unit,
                    &format!("it could not be brought online again: {}", stuck.why),
                );
                if stuck.late {
                    break;
                }
            }
        }
        let words = back.words().unwrap_or_default();
        if outcome.is_ok() && !words.is_empty() {
            tracing::warn!(id = self.0.id, "memory that was not to go after all{words}");
        }
        outcome.map_err(|why| why + &words)
    }

    /// The highest units, of so many bytes together, if there are several, the guest has them online, and they follow one another.
    fn highest(&self, units: &[UnitView], bytes: u64) -> Vec<UnitView> {
        let mut found: Vec<UnitView> = Vec::new();
        let mut sum = 0;
        for unit in units.iter().rev() {
            let next = found
                .last()
                .is_none_or(|above| unit.base + unit.bytes == above.base);
            let enough = sum >= bytes || found.len() == TOGETHER;
            if enough || !next || self.is_left_over(slot_of(unit)) {
                break;
            }
            sum += unit.bytes;
            found.push(*unit);
        }
        if found.len() < 2 {
            found.clear();
        }
        found
    }

    /// Has the guest take units offline that follow one another, all or none, by one call: one process of its own, not one for each.
    /// What each of them took, by the guest and in all, in microseconds; 0 where they stay. An error if it did not answer, and some
    /// may go yet.
    async fn offline_together(&self, units: &[UnitView]) -> Result<(u64, u64), Stuck> {
        let Some(lowest) = units.last() else {
            return Ok((0, 0));
        };
        let began = Instant::now();
        for unit in units {
            self.begin(slot_of(unit));
        }
        let bytes = units.iter().map(|unit| unit.bytes).sum();
        match self.offline(lowest.base, bytes).await {
            Ok(answer) => {
                let (count, total) = (units.len() as u64, us(began));
                Ok((answer.offline_us.min(total) / count, total / count))
            }
            Err(error) => {
                let stuck = Stuck::by(&error);
                if stuck.late {
                    return Err(stuck);
                }
                tracing::debug!(id = self.0.id, why = stuck.why, "one by one");
                // The agent has undone it; what it could not it tries again here.
                for unit in units {
                    if let Err(stuck) = self.online_unit(unit).await
                        && stuck.late
                    {
                        return Err(stuck);
                    }
                }
                Ok((0, 0))
            }
        }
    }

    async fn offline(&self, base: u64, bytes: u64) -> Result<OfflineMemoryResponse, Error> {
        let within = self.0.timeouts.resize;
        let mut request = OfflineMemoryRequest::new();
        (request.base, request.bytes) = (base, bytes);
        request.deadline_ms = u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
        self.agent()
            .await?
            .call(
                format!("taking {} MiB at {base:#x} offline", bytes >> 20),
                within + self.0.timeouts.agent,
                |client, context| async move { client.offline_memory(context, &request).await },
            )
            .await
    }

    async fn remove_each(
        &self,
        mut units: Vec<UnitView>,
        together: &[UnitView],
        to: u64,
        began: Instant,
    ) -> Result<Vec<Step>, String> {
        let before = self.unit_bytes();
        let mut steps = Vec::new();
        let mut stays = Causes::default();
        let online = units
            .iter()
            .filter(|unit| !self.is_left_over(slot_of(unit)));
        let online: u64 = online.map(|unit| unit.bytes).sum();
        // What the guest has available, if that is too little: for all that is to go, since it would hardly have room to take back
        // what went before it failed; or, once a unit has not gone, for another.
        let needed = before.saturating_sub(to).min(online);
        let mut short = self.available().await;
        short = short.filter(|bytes| is_short(*bytes, needed));
        let mut each = (0, 0);
        if short.is_none() {
            match self.offline_together(together).await {
                Ok(took) => each = took,
                Err(stuck) => {
                    stays.add(&together[0], &stuck.why);
                    stays.untried = units.len() - 1;
                    units.clear();
                }
            }
        }
        // What the guest was asked for by an earlier change may go by itself.
        while self.unit_bytes() > to {
            let Some(unit) = units.pop() else {
                let gone = before.saturating_sub(self.unit_bytes());
                let mut why = format!(
                    "{} of {} MiB can be unplugged{}",
                    gone >> 20,
                    (before - to) >> 20,
                    stays.words().unwrap_or_default()
                );
                if gone > 0 {
                    why.push_str(&match self.add_units(gone).await {
                        Ok(_) => "; what went is plugged again".to_owned(),
                        Err(error) => format!("; what went could not be plugged again: {error}"),
                    });
                }
                return Err(why);
            };
            if let Some(bytes) = short
                && !self.is_left_over(slot_of(&unit))
            {
                let mib = bytes >> 20;
                let why = format!("not tried, since the guest has only {mib} MiB available");
                stays.add(&unit, &why);
                continue;
            }
            match self.remove_unit(&unit).await {
                Ok(mut step) => {
                    if together.contains(&unit) {
                        step.online_us += each.0;
                        step.total_us += each.1;
                    }
                    steps.push(step);
                }
                Err(stuck) => {
                    stays.add(&unit, &stuck.why);
                    // A guest that takes its time to refuse each would take hours for all.
                    if stuck.late || began.elapsed() >= self.longest() {
                        stays.untried = units.len();
                        units.clear();
                    } else {
                        short = self.available().await.filter(|bytes| *bytes < unit.bytes);
                    }
                }
            }
        }
        Ok(steps)
    }

    /// Bytes that the guest's kernel could make free, if it says so.
    pub(super) async fn available(&self) -> Option<u64> {
        let seen = self.resources().await.ok()?;
        Some(seen.memory_available_bytes)
    }

    async fn remove_unit(&self, unit: &UnitView) -> Result<Step, Stuck> {
        let what = named(unit);
        let of = slot_of(unit);
        let was_known = self.begin(of);
        let began = Instant::now();
        let offline_us = match self.offline(unit.base, unit.bytes).await {
            Ok(answer) => answer.offline_us,
            // The guest's kernel never took it, or has let go of it already.
            Err(error) if is_unknown(&error) => 0,
            Err(error) => {
                let stuck = Stuck::by(&error);
                if !stuck.late {
                    if was_known {
                        self.acknowledge(of);
                    }
                    return Err(stuck);
                }
                // It may still go.
                let undone = self.unit_back_online(unit).await;
                return Err(stuck.map(|why| format!("{why}; {undone}")));
            }
        };
        let asked = Instant::now();
        if let Err(stuck) = self.eject(of).await {
            let undone = self.unit_back_online(unit).await;
            return Err(stuck.map(|why| format!("{why}; {undone}")));
        }
        Ok(Step {
            host_us: us(asked),
            ..Step::of_guest(what, (0, offline_us), us(began))
        })
    }

    /// The guest may use it again; what came of it.
    async fn unit_back_online(&self, unit: &UnitView) -> String {
        match self.online_unit(unit).await {
            Ok(_) => "it is online again".to_owned(),
            Err(stuck) => format!("it could not be brought online again: {}", stuck.why),
        }
    }
}

/// Why units stay. A guest has a cause for each of hundreds; a few are told.
#[derive(Default)]
struct Causes {
    told: Vec<String>,
    more: usize,
    untried: usize,
}

impl Causes {
    const TOLD: usize = 4;

    fn add(&mut self, unit: &UnitView, why: &str) {
        if self.told.len() < Self::TOLD {
            self.told.push(format!("{}: {why}", named(unit)));
        } else {
            self.more += 1;
        }
    }

    /// All of it, if there is any, beginning with a semicolon.
    fn words(&self) -> Option<String> {
        let mut words = String::new();
        for cause in &self.told {
            words.push_str("; ");
            words.push_str(cause);
        }
        if self.more > 0 {
            words.push_str(&format!("; and {} more stay", self.more));
        }
        if self.untried > 0 {
            words.push_str(&format!("; {} more were not tried", self.untried));
        }
        (!words.is_empty()).then_some(words)
    }
}

fn slot_of(unit: &UnitView) -> Plugged {
    Plugged::Unit(unit.slot.index)
}

fn named(unit: &UnitView) -> String {
    format!("{} MiB at {:#x}", unit.bytes >> 20, unit.base)
}
