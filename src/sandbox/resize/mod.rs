//! vCPUs and memory that come and go: each change returns when the guest has
//! made it, or undoes itself and says why not. One change at a time; which
//! size is wanted is for others to say.
//!
//! `vcpus` and `units` go by ACPI and its `slots`, `requested` by the virtio-mem device; the guest's part of the first two is the
//! agent's. What the guest is not known to use, since a change failed or was given up, is remembered, and is what the next change
//! begins with.

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod memory;
mod requested;
mod slots;
mod units;
mod vcpus;

pub use crate::config::MemoryWay;
pub use memory::Rounding;
pub(super) use slots::Plugged;

use std::time::Duration;

use nacre_protocol::agent::{ResourcesRequest, ResourcesResponse, WatchMemoryRequest};
use nacre_vmm::hotplug::{Ost, SlotView};
use serde::{Deserialize, Serialize};
use tokio::sync::{SemaphorePermit, watch};
use tokio::time::Instant;

use super::Sandbox;
use super::bring_up::BringUp;
use super::error::{Error, chain};
use crate::control::{Changed, Wanted};

/// One vCPU, or one step of memory, that came or went; how long each part of it took, in microseconds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Step {
    /// What it was: `vCPU 3`, `128 MiB at 0x100000000`, `virtio-mem to 512 MiB`.
    pub what: String,
    /// The host's part: what KVM, mappings and threads took.
    pub host_us: u64,
    /// By the guest: until its kernel showed what was plugged; 0 where the guest has no such part.
    pub noticed_us: u64,
    /// By the guest: until it was online, or offline; it includes `noticed_us`.
    pub online_us: u64,
    /// From the first part to the last, the guest's eject and the host's giving back included.
    pub total_us: u64,
}

impl Step {
    /// One whose `(noticed_us, online_us)` are the guest's word, which cannot be more than the whole took.
    fn of_guest(what: String, (noticed_us, online_us): (u64, u64), total_us: u64) -> Self {
        let online_us = online_us.min(total_us);
        Self {
            what,
            host_us: 0,
            noticed_us: noticed_us.min(online_us),
            online_us,
            total_us,
        }
    }
}

/// A change that came about.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Resized {
    /// The size before: vCPUs, or MiB.
    pub before: u64,
    /// The size now.
    pub now: u64,
    /// What was done, in order.
    pub steps: Vec<Step>,
}

/// Microseconds since then.
fn us(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

impl Sandbox {
    /// What the guest has, and how busy it is. Waits for the agent.
    pub async fn resources(&self) -> Result<ResourcesResponse, Error> {
        let agent = self.agent().await?;
        agent
            .call(
                "reading the guest's resources".to_owned(),
                self.0.timeouts.agent,
                |client, context| async move {
                    client.resources(context, &ResourcesRequest::new()).await
                },
            )
            .await
    }

    /// Brings the VM to another size, vCPUs first; what went wrong is in words.
    ///
    /// # Errors
    /// The first change that did not come about, with what there is to say of the other.
    pub async fn resize(&self, wanted: Wanted) -> Result<Changed, String> {
        if !self.0.agent {
            let to = match (wanted.vcpus, wanted.memory_mib) {
                (Some(vcpus), _) => format!("{vcpus} vCPUs"),
                (None, mib) => format!("{} MiB of memory", mib.unwrap_or_default()),
            };
            return Err(format!(
                "Cannot bring the VM to {to}: it was started without nacre's agent, which would bring what is plugged online"
            ));
        }
        let mut changed = Changed::default();
        if let Some(to) = wanted.vcpus {
            let resized = self.resize_vcpus(to).await;
            changed.vcpus = Some(resized.map_err(|error| chain(&error))?);
        }
        if let Some(to) = wanted.memory_mib {
            let resized = self.resize_memory(to).await;
            changed.memory = Some(resized.map_err(|error| {
                let mut why = chain(&error);
                if let Some(vcpus) = &changed.vcpus {
                    why.push_str(&format!("; the VM has {} vCPUs now", vcpus.now));
                }
                why
            })?);
        }
        Ok(changed)
    }

    /// What the guest's kernel says that it uses of its memory, in bytes, if its agent is ready.
    pub async fn memory_used(&self) -> Option<u64> {
        if !matches!(&*self.0.state.borrow(), BringUp::Ready { .. }) {
            return None;
        }
        let seen = self.resources().await.ok()?;
        Some(
            seen.memory_total_bytes
                .saturating_sub(seen.memory_available_bytes),
        )
    }

    /// From which use on the containers together are slowed down and the host is told; 0: never.
    pub async fn watch_memory(&self, high_bytes: u64) -> Result<(), Error> {
        let mut request = WatchMemoryRequest::new();
        request.high_bytes = high_bytes;
        let agent = self.agent().await?;
        agent
            .call(
                format!(
                    "watching the containers' memory at {} MiB",
                    high_bytes >> 20
                ),
                self.0.timeouts.agent,
                |client, context| async move { client.watch_memory(context, &request).await },
            )
            .await?;
        Ok(())
    }

    /// The slots of vCPUs, and those of units of ACPI memory.
    pub(crate) fn slots(&self) -> (Vec<SlotView>, Vec<SlotView>) {
        let units = self.0.machine.memory_units();
        let units = units.into_iter().map(|unit| unit.slot).collect();
        (self.0.machine.vcpu_slots(), units)
    }

    /// Told after each change of a slot.
    pub(crate) fn slot_changes(&self) -> watch::Receiver<u64> {
        self.0.machine.plug_changes()
    }

    /// Waits for its turn: one change at a time.
    async fn turn(&self, doing: &str) -> Result<SemaphorePermit<'_>, Error> {
        let longest = self.longest();
        let taken = tokio::time::timeout(longest, self.0.resizing.acquire()).await;
        match taken {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) | Err(_) => Err(Error::Resize {
                doing: doing.to_owned(),
                cause: format!(
                    "another change of the VM's size is under way for more than {longest:?}"
                ),
            }),
        }
    }

    /// As long as a change of some steps takes.
    fn longest(&self) -> Duration {
        self.0.timeouts.resize * 4
    }

    /// What came of a change; a VM that has ended has come to no size, and its end is the cause of whatever went wrong.
    fn unless_gone<T>(&self, outcome: Result<T, String>) -> Result<T, String> {
        match self.0.machine.exit_reason() {
            Some(reason) => Err(chain(&self.gone(reason))),
            None => outcome,
        }
    }
}

/// Why a step did not come about.
struct Stuck {
    why: String,
    /// The guest did not answer in time, or cannot any more: to ask it for the like would take as long.
    late: bool,
    /// The guest's kernel does not know what it is about.
    unknown: bool,
}

impl Stuck {
    fn by(error: &Error) -> Self {
        Self {
            why: chain(error),
            late: !matches!(error, Error::Refused { .. }),
            unknown: is_unknown(error),
        }
    }

    fn map(self, words: impl FnOnce(String) -> String) -> Self {
        Self {
            why: words(self.why),
            ..self
        }
    }
}

/// The guest's last word, if it is one of failure.
fn refusal(slot: Option<&SlotView>) -> Option<Ost> {
    slot.and_then(|slot| slot.ost)
        .filter(|ost| ost.refuses_eject() || ost.refuses_insertion())
}

/// Whether the agent says that the guest's kernel does not know it: it never noticed it, or has let go of it.
fn is_unknown(error: &Error) -> bool {
    matches!(
        error,
        Error::Refused {
            code: ttrpc::Code::NOT_FOUND,
            ..
        }
    )
}

/// What a failed call to the agent adds to what the guest's kernel said.
fn with_report(error: &Error, slot: Option<&SlotView>) -> String {
    match refusal(slot) {
        Some(ost) => format!("{}; its kernel reports: {ost}", chain(error)),
        None => chain(error),
    }
}

#[cfg(test)]
mod tests;
