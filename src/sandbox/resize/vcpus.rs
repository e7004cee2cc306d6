//! vCPUs: made on demand, announced, brought online by the agent; and back.

use std::cmp::Ordering;

use nacre_protocol::agent::{OfflineCpuRequest, OnlineCpuRequest, OnlineCpuResponse};
use tokio::time::Instant;

use super::{Plugged, Resized, Step, is_unknown, us, with_report};
use crate::sandbox::Sandbox;
use crate::sandbox::error::{Error, chain};

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

    /// Brings the number of vCPUs to `to`, one after another; the highest go first. What a change that failed or was given up has
    /// left is brought online, or goes, before others. Waits for the agent.
    ///
    /// # Errors
    /// [`Error::Resize`] with the cause, and the number is as before; where the guest did not let that be, the words say so. For
    /// no vCPUs, more than the VM was started for, and a VM that has ended, at once.
    pub async fn resize_vcpus(&self, to: u8) -> Result<Resized, Error> {
        let doing = format!("bring the VM to {to} vCPUs");
        let failed = |before: u8, cause: String| Error::Resize {
            doing: format!("{doing} from {before}"),
            cause,
        };
        let max = self.0.max_vcpus;
        if to == 0 {
            let cause = "a VM has at least one vCPU".to_owned();
            return Err(failed(self.vcpus(), cause));
        }
        if to > max {
            let cause = format!(
                "it was started for {max} at most, of {} that are possible",
                nacre_vmm::config::MAXIMUM_VCPUS
            );
            return Err(failed(self.vcpus(), cause));
        }
        let _turn = self.turn(&doing).await?;
        let before = self.vcpus();
        let outcome = self.to_vcpus(to, before).await;
        let steps = self
            .unless_gone(outcome)
            .map_err(|cause| failed(before, cause))?;
        tracing::info!(id = self.0.id, before, now = to, "vCPUs resized");
        Ok(Resized {
            before: before.into(),
            now: self.vcpus().into(),
            steps,
        })
    }

    async fn to_vcpus(&self, to: u8, before: u8) -> Result<Vec<Step>, String> {
        // Each round takes a vCPU that is not acknowledged, adds one, or removes one. More of them than this there are only where
        // the guest ejects what it was given.
        let most = 2 * usize::from(self.0.max_vcpus);
        let mut steps = Vec::new();
        let mut rounds = 0;
        if to >= before {
            self.look_for_offline(before).await?;
        }
        loop {
            rounds += 1;
            if rounds > most {
                return Err(format!(
                    "after {most} changes the VM has {} vCPUs, since the guest ejects what it is given",
                    self.vcpus()
                ));
            }
            let now = self.vcpus();
            let step = match (now.cmp(&to), self.left_over_vcpu()) {
                (Ordering::Greater, _) => self.remove_vcpu().await.map(Some),
                (_, Some(index)) => self.use_vcpu(index).await,
                (Ordering::Less, None) => self.add_vcpu().await.map(Some),
                (Ordering::Equal, None) => return Ok(steps),
            };
            match step {
                Ok(step) => steps.extend(step),
                Err(cause) => {
                    let undone = self.back_to_vcpus(before, now).await;
                    return Err(format!("{cause}{undone}"));
                }
            }
            if self.0.machine.exit_reason().is_some() {
                return Ok(steps);
            }
        }
    }

    /// Undoes the steps before the one that failed at `at`; what there is to say of it.
    async fn back_to_vcpus(&self, before: u8, at: u8) -> String {
        if at == before {
            return String::new();
        }
        // A guest that ejects what it is given would have it go on.
        for _ in 0..=self.0.max_vcpus {
            if self.vcpus() == before || self.0.machine.exit_reason().is_some() {
                return format!("; it is back at {before} vCPUs");
            }
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
        format!(
            "; it should go back to {before} vCPUs and has {}",
            self.vcpus()
        )
    }

    /// What the guest has taken offline by itself is not acknowledged any more.
    async fn look_for_offline(&self, vcpus: u8) -> Result<(), String> {
        if vcpus == 1 {
            return Ok(());
        }
        let seen = self.resources().await.map_err(|error| chain(&error))?;
        for slot in self.0.machine.vcpu_slots() {
            if slot.index != 0 && !seen.online_uids.contains(&u32::from(slot.index)) {
                self.begin(Plugged::Vcpu(slot.index));
            }
        }
        Ok(())
    }

    /// The highest that is there and that the guest may not have online.
    fn left_over_vcpu(&self) -> Option<u8> {
        let slots = self.0.machine.vcpu_slots();
        let mut indices = slots.iter().map(|slot| slot.index);
        indices.rfind(|index| self.is_left_over(Plugged::Vcpu(*index)))
    }

    /// Has the agent bring one online, and acknowledges it.
    async fn online_vcpu(&self, index: u8) -> Result<OnlineCpuResponse, Error> {
        let agent = self.agent().await?;
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
            .await?;
        self.acknowledge(Plugged::Vcpu(index));
        Ok(answer)
    }

    /// One that is there comes online, which an earlier change left. One that the guest's kernel does not know goes: it missed
    /// what it was told, and is to be told anew.
    async fn use_vcpu(&self, index: u8) -> Result<Option<Step>, String> {
        let began = Instant::now();
        let of = Plugged::Vcpu(index);
        match self.online_vcpu(index).await {
            Ok(answer) => Ok(Some(Step::of_guest(
                format!("vCPU {index}"),
                (answer.noticed_us, answer.online_us),
                us(began),
            ))),
            Err(error) => {
                let cause = with_report(&error, self.slot(of).as_ref());
                if is_unknown(&error) && self.eject(of).await.is_ok() {
                    return Ok(None);
                }
                Err(format!("vCPU {index} was plugged earlier, but {cause}"))
            }
        }
    }

    /// One more. What went wrong is in words, and is undone.
    async fn add_vcpu(&self) -> Result<Step, String> {
        // A guest that is not ready yet is not to notice it.
        self.agent().await.map_err(|error| chain(&error))?;
        self.done_ejecting().await;
        let began = Instant::now();
        let plugged = self.0.machine.plug_vcpu();
        let index = plugged.map_err(|error| chain(&error))?;
        let of = Plugged::Vcpu(index);
        self.begin(of);
        let host_us = us(began);
        match self.online_vcpu(index).await {
            Ok(answer) => Ok(Step {
                host_us,
                ..Step::of_guest(
                    format!("vCPU {index}"),
                    (answer.noticed_us, answer.online_us),
                    us(began),
                )
            }),
            Err(error) => {
                let cause = with_report(&error, self.slot(of).as_ref());
                let undone = match self.eject(of).await {
                    Ok(()) => "it was unplugged again".to_owned(),
                    Err(stuck) => format!("it could not be unplugged again: {}", stuck.why),
                };
                Err(format!("vCPU {index} was plugged, but {cause}; {undone}"))
            }
        }
    }

    /// One fewer: one that the guest may not have online, or else the highest.
    async fn remove_vcpu(&self) -> Result<Step, String> {
        let slots = self.0.machine.vcpu_slots();
        let highest = || slots.last().map_or(0, |slot| slot.index);
        let index = self.left_over_vcpu().unwrap_or_else(highest);
        if index == 0 {
            return Err("vCPU 0 stays".to_owned());
        }
        let agent = self.agent().await.map_err(|error| chain(&error))?;
        let of = Plugged::Vcpu(index);
        let was_known = self.begin(of);
        let began = Instant::now();
        let mut request = OfflineCpuRequest::new();
        request.uid = u32::from(index);
        let answer = agent
            .call(
                format!("taking vCPU {index} offline"),
                self.0.timeouts.resize,
                |client, context| async move { client.offline_cpu(context, &request).await },
            )
            .await;
        let offline_us = match answer {
            Ok(answer) => answer.offline_us,
            // The guest's kernel never took it, or has let go of it already.
            Err(error) if is_unknown(&error) => 0,
            Err(error) => {
                let why = format!("vCPU {index} did not go offline: {}", chain(&error));
                return match error {
                    Error::Refused { .. } => {
                        if was_known {
                            self.acknowledge(of);
                        }
                        Err(why)
                    }
                    // It may still go.
                    _ => Err(format!("{why}; {}", self.back_online(index).await)),
                };
            }
        };
        let asked = Instant::now();
        if let Err(stuck) = self.eject(of).await {
            let undone = self.back_online(index).await;
            return Err(format!(
                "vCPU {index} is offline, but {}; {undone}",
                stuck.why
            ));
        }
        Ok(Step {
            host_us: us(asked),
            ..Step::of_guest(format!("vCPU {index}"), (0, offline_us), us(began))
        })
    }

    /// The guest may use it again; what came of it.
    async fn back_online(&self, index: u8) -> String {
        match self.online_vcpu(index).await {
            Ok(_) => "it is online again".to_owned(),
            Err(error) => format!("it could not be brought online again: {}", chain(&error)),
        }
    }
}
