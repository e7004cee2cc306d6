//! vCPUs: made on demand, announced, brought online by the agent; and back.

use nacre_protocol::agent::{OfflineCpuRequest, OnlineCpuRequest};
use nacre_vmm::hotplug::{SlotView, State};
use tokio::time::Instant;

use super::{Resized, Step, Unsettled, refusal, us, with_report};
use crate::sandbox::Sandbox;
use crate::sandbox::error::Error;

impl Sandbox {
    /// vCPUs that are there; after the VM's end those that it began with.
    pub fn vcpus(&self) -> u8 {
        match self.0.machine.vcpu_slots().len() {
            0 => self.0.vcpus,
            count => u8::try_from(count).unwrap_or(u8::MAX),
        }
    }

    /// vCPUs that the VM began with.
    pub fn boot_vcpus(&self) -> u8 {
        self.0.vcpus
    }

    /// Most vCPUs that there may be.
    pub fn max_vcpus(&self) -> u8 {
        self.0.max_vcpus
    }

    /// Brings the number of vCPUs to `to`, one after another; the highest go first. Waits for the agent.
    ///
    /// # Errors
    /// [`Error::Resize`] with the cause, and the number is as before; where the guest did not let that be, the words say so.
    pub async fn resize_vcpus(&self, to: u8) -> Result<Resized, Error> {
        let doing = format!("bring the VM to {to} vCPUs");
        let _turn = self.turn(&doing).await?;
        let before = self.vcpus();
        let failed = |cause: String| Error::Resize {
            doing: format!("{doing} from {before}"),
            cause,
        };
        if to == 0 {
            return Err(failed("a VM has at least one vCPU".to_owned()));
        }
        let max = self.0.max_vcpus;
        if to > max {
            return Err(failed(format!(
                "it was started for {max} at most, of {} that are possible",
                nacre_vmm::config::MAXIMUM_VCPUS
            )));
        }
        let mut steps = Vec::new();
        loop {
            let now = self.vcpus();
            let step = match now.cmp(&to) {
                std::cmp::Ordering::Less => self.add_vcpu().await,
                std::cmp::Ordering::Greater => self.remove_vcpu().await,
                std::cmp::Ordering::Equal => break,
            };
            match step {
                Ok(step) => steps.push(step),
                Err(cause) => {
                    let undone = self.back_to_vcpus(before, now).await;
                    return Err(failed(format!("{cause}{undone}")));
                }
            }
        }
        tracing::info!(id = self.0.id, before, now = to, "vCPUs resized");
        Ok(Resized {
            before: before.into(),
            now: self.vcpus().into(),
            steps,
        })
    }

    /// Undoes the steps before the one that failed at `at`; what there is to say of it.
    async fn back_to_vcpus(&self, before: u8, at: u8) -> String {
        if at == before || self.0.machine.exit_reason().is_some() {
            return String::new();
        }
        // Bounded: a step that fails ends it.
        while self.vcpus() != before {
            let step = if self.vcpus() < before {
                self.add_vcpu().await
            } else {
                self.remove_vcpu().await
            };
            if let Err(why) = step {
                let now = self.vcpus();
                return format!(
                    "; it could not go back to {before} vCPUs either and has {now}: {why}"
                );
            }
        }
        format!("; it is back at {before} vCPUs")
    }

    fn vcpu_slot(&self, index: u8) -> Option<SlotView> {
        let slots = self.0.machine.vcpu_slots();
        slots.into_iter().find(|slot| slot.index == index)
    }

    /// One more. What went wrong is in words, and is undone.
    async fn add_vcpu(&self) -> Result<Step, String> {
        let agent = self.agent().await.map_err(|error| error.to_string())?;
        let began = Instant::now();
        let index = self
            .0
            .machine
            .plug_vcpu()
            .map_err(|error| error.to_string())?;
        let host_us = us(began);
        let within = self.0.timeouts.resize;
        let mut request = OnlineCpuRequest::new();
        request.uid = u32::from(index);
        request.wait_ms = u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
        // The agent's own deadline comes first, since it has the better words.
        let answer = agent
            .call(
                format!("bringing vCPU {index} online"),
                within + self.0.timeouts.agent,
                |client, context| async move { client.online_cpu(context, &request).await },
            )
            .await;
        match answer {
            Ok(answer) => Ok(Step {
                what: format!("vCPU {index}"),
                host_us,
                noticed_us: answer.noticed_us,
                online_us: answer.online_us,
                total_us: us(began),
            }),
            Err(error) => {
                let cause = with_report(&error, self.vcpu_slot(index).as_ref());
                let undone = self.take_vcpu_back(index).await;
                Err(format!("vCPU {index} was plugged, but {cause}{undone}"))
            }
        }
    }

    /// Takes a vCPU away that did not come online.
    async fn take_vcpu_back(&self, index: u8) -> String {
        if self.0.machine.exit_reason().is_some() {
            return String::new();
        }
        let back = "; it was unplugged again".to_owned();
        if self.0.machine.withdraw_vcpu(index).is_ok() {
            return back;
        }
        match self.eject_vcpu(index).await {
            Ok(()) => back,
            Err(why) => format!("; it could not be unplugged again: {why}"),
        }
    }

    /// One fewer: the highest.
    async fn remove_vcpu(&self) -> Result<Step, String> {
        let slots = self.0.machine.vcpu_slots();
        let index = slots.last().map_or(0, |slot| slot.index);
        if index == 0 {
            return Err("vCPU 0 stays".to_owned());
        }
        let agent = self.agent().await.map_err(|error| error.to_string())?;
        let began = Instant::now();
        let within = self.0.timeouts.resize;
        let mut request = OfflineCpuRequest::new();
        request.uid = u32::from(index);
        let offline = agent
            .call(
                format!("taking vCPU {index} offline"),
                within,
                |client, context| async move { client.offline_cpu(context, &request).await },
            )
            .await
            .map_err(|error| format!("vCPU {index} did not go offline: {error}"))?;
        let asked = Instant::now();
        if let Err(why) = self.eject_vcpu(index).await {
            // The guest may use it again.
            let mut request = OnlineCpuRequest::new();
            request.uid = u32::from(index);
            let online = agent
                .call(
                    format!("bringing vCPU {index} back online"),
                    within,
                    |client, context| async move { client.online_cpu(context, &request).await },
                )
                .await;
            let undone = match online {
                Ok(_) => "; it is online again".to_owned(),
                Err(error) => format!("; it stays offline: {error}"),
            };
            return Err(format!("vCPU {index} is offline, but {why}{undone}"));
        }
        Ok(Step {
            what: format!("vCPU {index}"),
            host_us: us(asked),
            noticed_us: 0,
            online_us: offline.offline_us,
            total_us: us(began),
        })
    }

    /// Has the guest eject a vCPU, and waits until it has.
    async fn eject_vcpu(&self, index: u8) -> Result<(), String> {
        let within = self.0.timeouts.resize;
        self.0
            .machine
            .ask_vcpu(index)
            .map_err(|error| error.to_string())?;
        let settled = self
            .settled(
                within,
                || self.vcpu_slot(index),
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
                    // Else it would leave whenever the guest comes to look.
                    let _ = self.0.machine.withdraw_vcpu(index);
                }
                Err(format!("the guest does not eject it: {why}"))
            }
        }
    }
}
