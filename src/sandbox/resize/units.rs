//! Memory by ACPI: units that are made, announced and brought online by the agent; and back.

use nacre_protocol::agent::{OfflineMemoryRequest, OnlineMemoryRequest};
use nacre_vmm::hotplug::memory::UnitView;
use nacre_vmm::hotplug::{SlotView, State};
use tokio::time::Instant;

use super::{Step, Unsettled, refusal, us, with_report};
use crate::sandbox::Sandbox;

impl Sandbox {
    /// Bytes of the units that are there.
    pub(super) fn unit_bytes(&self) -> u64 {
        let units = self.0.machine.memory_units();
        units.iter().map(|unit| unit.bytes).sum()
    }

    /// Plugs `bytes` more, a multiple of the unit. What went wrong is in words, and is undone.
    pub(super) async fn add_units(&self, bytes: u64) -> Result<Vec<Step>, String> {
        let began = Instant::now();
        let units = self
            .0
            .machine
            .plug_memory(bytes)
            .map_err(|error| error.to_string())?;
        let host_us = us(began) / units.len().max(1) as u64;
        let mut steps = Vec::new();
        for (done, unit) in units.iter().enumerate() {
            match self.online_unit(unit).await {
                Ok(step) => steps.push(Step {
                    host_us,
                    total_us: us(began),
                    ..step
                }),
                Err(cause) => {
                    let undone = self.take_units_back(&units, done).await;
                    return Err(format!("{cause}{undone}"));
                }
            }
        }
        Ok(steps)
    }

    async fn online_unit(&self, unit: &UnitView) -> Result<Step, String> {
        let what = named(unit);
        let within = self.0.timeouts.resize;
        let mut request = OnlineMemoryRequest::new();
        (request.base, request.bytes) = (unit.base, unit.bytes);
        request.wait_ms = u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
        let agent = self.agent().await.map_err(|error| error.to_string())?;
        let answer = agent
            .call(
                format!("bringing {what} online"),
                within + self.0.timeouts.agent,
                |client, context| async move { client.online_memory(context, &request).await },
            )
            .await
            .map_err(|error| {
                let cause = with_report(&error, self.unit_slot(unit.slot.index).as_ref());
                format!("{what} was plugged, but {cause}")
            })?;
        let blocks: Vec<u64> = answer.blocks.iter().map(|block| block.number).collect();
        let fixed = answer.blocks.iter().filter(|block| !block.movable).count();
        tracing::debug!(id = self.0.id, %what, ?blocks, not_removable = fixed, "memory online");
        Ok(Step {
            what,
            noticed_us: answer.noticed_us,
            online_us: answer.online_us,
            ..Step::default()
        })
    }

    /// Takes all of these units away again, of which the first `online` are online.
    async fn take_units_back(&self, units: &[UnitView], online: usize) -> String {
        if self.0.machine.exit_reason().is_some() {
            return String::new();
        }
        let mut left = Vec::new();
        for (place, unit) in units.iter().enumerate() {
            let index = unit.slot.index;
            if self.0.machine.withdraw_memory(index).is_ok() {
                continue;
            }
            let gone = if place < online {
                self.remove_unit(unit).await.map(|_| ())
            } else {
                self.eject_unit(index).await
            };
            if let Err(why) = gone {
                left.push(format!("{}: {why}", named(unit)));
            }
        }
        if left.is_empty() {
            "; it was unplugged again".to_owned()
        } else {
            format!("; it could not all be unplugged again: {}", left.join("; "))
        }
    }

    /// Unplugs `bytes`, a multiple of the unit, from the highest units that go. If too few go, those that went are plugged again.
    pub(super) async fn remove_units(&self, bytes: u64) -> Result<Vec<Step>, String> {
        let mut units = self.0.machine.memory_units();
        let mut steps = Vec::new();
        let mut stays: Vec<String> = Vec::new();
        let mut gone = 0;
        while gone < bytes {
            let Some(unit) = units.pop() else {
                let mut why = format!("{} of {} MiB can be unplugged", gone >> 20, bytes >> 20);
                for cause in &stays {
                    why.push_str("; ");
                    why.push_str(cause);
                }
                if gone > 0 {
                    why.push_str(&match self.add_units(gone).await {
                        Ok(_) => "; what went is plugged again".to_owned(),
                        Err(error) => format!("; what went could not be plugged again: {error}"),
                    });
                }
                return Err(why);
            };
            match self.remove_unit(&unit).await {
                Ok(step) => {
                    gone += unit.bytes;
                    steps.push(step);
                }
                Err(why) => stays.push(format!("{}: {why}", named(&unit))),
            }
        }
        Ok(steps)
    }

    async fn remove_unit(&self, unit: &UnitView) -> Result<Step, String> {
        let what = named(unit);
        let began = Instant::now();
        let within = self.0.timeouts.resize;
        let mut request = OfflineMemoryRequest::new();
        (request.base, request.bytes) = (unit.base, unit.bytes);
        request.deadline_ms = u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
        let agent = self.agent().await.map_err(|error| error.to_string())?;
        let offline = agent
            .call(
                format!("taking {what} offline"),
                within + self.0.timeouts.agent,
                |client, context| async move { client.offline_memory(context, &request).await },
            )
            .await
            .map_err(|error| error.to_string())?;
        let asked = Instant::now();
        if let Err(why) = self.eject_unit(unit.slot.index).await {
            let undone = match self.online_unit(unit).await {
                Ok(_) => "it is online again".to_owned(),
                Err(error) => format!("it stays offline: {error}"),
            };
            return Err(format!("{why}; {undone}"));
        }
        Ok(Step {
            what,
            host_us: us(asked),
            noticed_us: 0,
            online_us: offline.offline_us,
            total_us: us(began),
        })
    }

    fn unit_slot(&self, index: u8) -> Option<SlotView> {
        let units = self.0.machine.memory_units();
        let unit = units.into_iter().find(|unit| unit.slot.index == index)?;
        Some(unit.slot)
    }

    /// Has the guest eject a unit, and waits until it has.
    async fn eject_unit(&self, index: u8) -> Result<(), String> {
        let within = self.0.timeouts.resize;
        self.0
            .machine
            .ask_memory(index)
            .map_err(|error| error.to_string())?;
        let settled = self
            .settled(
                within,
                || self.unit_slot(index),
                |slot| slot.is_none() || refusal(slot).is_some(),
            )
            .await;
        match settled {
            Ok(slot) if slot.state == State::Empty => Ok(()),
            Ok(slot) => Err(format!(
                "the guest does not eject it{}",
                slot.ost.map_or_else(String::new, |ost| format!(": {ost}"))
            )),
            Err(unsettled) => {
                let why = unsettled.why(within);
                if let Unsettled::Late(_) = unsettled {
                    let _ = self.0.machine.withdraw_memory(index);
                }
                Err(format!("the guest does not eject it: {why}"))
            }
        }
    }
}

fn named(unit: &UnitView) -> String {
    format!("{} MiB at {:#x}", unit.bytes >> 20, unit.base)
}
