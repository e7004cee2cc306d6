//! Slots of what ACPI plugs, as a change of size sees them: whether the guest
//! has acknowledged the last change of each, and how one is emptied again.

use std::collections::BTreeSet;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use nacre_vmm::hotplug::{SlotView, State};
use tokio::time::Instant;

use super::Stuck;
use crate::sandbox::Sandbox;
use crate::sandbox::error::{Error, chain};

/// A guest that has not reported on what it ejected for so long does not, or has come to grief over it.
const DONE_EJECTING: Duration = Duration::from_secs(5);

/// What is plugged by ACPI, by its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::sandbox) enum Plugged {
    /// A vCPU.
    Vcpu(u8),
    /// A unit of memory.
    Unit(u8),
}

impl Sandbox {
    fn unacknowledged(&self) -> MutexGuard<'_, BTreeSet<Plugged>> {
        let set = self.0.unacknowledged.lock();
        set.unwrap_or_else(PoisonError::into_inner)
    }

    /// A change of it begins: until the guest acknowledges, nobody knows whether the guest uses it. Whether that was known.
    pub(super) fn begin(&self, of: Plugged) -> bool {
        self.unacknowledged().insert(of)
    }

    /// The guest has it online, or it is gone.
    pub(super) fn acknowledge(&self, of: Plugged) {
        self.unacknowledged().remove(&of);
    }

    /// Whether an earlier change has left it so that the guest may not use it.
    pub(super) fn is_left_over(&self, of: Plugged) -> bool {
        self.unacknowledged().contains(&of)
    }

    /// The slot, if something is in it.
    pub(super) fn slot(&self, of: Plugged) -> Option<SlotView> {
        match of {
            Plugged::Vcpu(index) => {
                let slots = self.0.machine.vcpu_slots();
                slots.into_iter().find(|slot| slot.index == index)
            }
            Plugged::Unit(index) => {
                let units = self.0.machine.memory_units();
                let slots = units.into_iter().map(|unit| unit.slot);
                slots.into_iter().find(|slot| slot.index == index)
            }
        }
    }

    fn ask(&self, of: Plugged) -> Result<(), Error> {
        match of {
            Plugged::Vcpu(index) => self.0.machine.ask_vcpu(index),
            Plugged::Unit(index) => self.0.machine.ask_memory(index),
        }
    }

    fn withdraw(&self, of: Plugged) -> Result<(), Error> {
        match of {
            Plugged::Vcpu(index) => self.0.machine.withdraw_vcpu(index),
            Plugged::Unit(index) => self.0.machine.withdraw_memory(index),
        }
    }

    /// Takes a plug back that the guest has not noticed; whether it was so.
    pub(super) fn take_unnoticed_back(&self, of: Plugged) -> bool {
        let unnoticed = self
            .slot(of)
            .is_some_and(|slot| slot.state == State::Announced);
        let taken = unnoticed && self.withdraw(of).is_ok();
        if taken {
            self.acknowledge(of);
        }
        taken
    }

    /// Empties a slot: takes back what the guest has not noticed, has it eject the rest, and waits until it has. A request that
    /// it does not notice in time is taken back; one that it has noticed cannot be.
    pub(super) async fn eject(&self, of: Plugged) -> Result<(), Stuck> {
        if self.take_unnoticed_back(of) {
            return Ok(());
        }
        // A change that was given up may have left a request.
        let asked = match self.slot(of) {
            None
            | Some(SlotView {
                state: State::Asked,
                ..
            }) => Ok(()),
            Some(_) => self.ask(of),
        };
        let ejected = match asked {
            Ok(()) => self.ejected(of).await,
            Err(error) => Err(Stuck {
                why: chain(&error),
                late: false,
                unknown: false,
            }),
        };
        // The guest may have been faster than the one or slower than the other.
        if self.slot(of).is_none() {
            self.acknowledge(of);
            return Ok(());
        }
        ejected
    }

    /// Waits until the guest is done with what it has ejected: before that it could miss what is plugged in its place.
    pub(super) async fn done_ejecting(&self) {
        let mut changes = self.0.machine.plug_changes();
        // One that goes on ejecting is waited for no longer.
        let limit = Instant::now() + DONE_EJECTING;
        while let Some(since) = self.0.machine.ejecting_since() {
            tokio::select! {
                () = tokio::time::sleep_until(limit.min(since + DONE_EJECTING)) => return,
                _ = changes.changed() => {}
                _ = self.0.machine.ended() => return,
            }
        }
    }

    /// Waits for the guest's answer to a request to eject.
    async fn ejected(&self, of: Plugged) -> Result<(), Stuck> {
        let mut changes = self.0.machine.plug_changes();
        let within = self.0.timeouts.resize;
        let deadline = Instant::now() + within;
        loop {
            let seen = self.slot(of);
            // The slots go with the VM.
            if let Some(reason) = self.0.machine.exit_reason() {
                return Err(Stuck::by(&self.gone(reason)));
            }
            let Some(slot) = seen else {
                return Ok(());
            };
            let word = slot.ost.map_or_else(String::new, |ost| format!(": {ost}"));
            if !matches!(slot.state, State::Asked | State::Leaving) {
                return Err(Stuck {
                    why: format!("the guest does not eject it{word}"),
                    late: false,
                    unknown: false,
                });
            }
            // A guest that makes changes without end has a deadline all the same.
            if Instant::now() >= deadline {
                let outcome = match self.withdraw(of) {
                    Ok(()) => "the request is taken back",
                    Err(_) => "it goes when the guest gets to it",
                };
                return Err(Stuck {
                    why: format!(
                        "the guest does not eject it: after {within:?} it is {}{word}; {outcome}",
                        slot.state
                    ),
                    late: true,
                    unknown: false,
                });
            }
            tokio::select! {
                // Neither outcome says more than the slot does.
                _ = tokio::time::timeout_at(deadline, changes.changed()) => {}
                _ = self.0.machine.ended() => {}
            }
        }
    }
}
