//! What comes and goes in a running VM by ACPI: vCPUs and units of memory, each in a slot, and the registers through which
//! AML in the guest learns of them.
//!
//! The host's calls return when the host has done its part. What the guest makes of it is seen in the slots, whose changes can
//! be awaited ([`Changes`]); who waits, how long, and what is undone then is the caller's.

pub mod aml;
pub mod cpus;
pub mod ged;
pub mod memory;
pub mod registers;
pub mod slot;
mod table;

use std::sync::Arc;

use thiserror::Error;
use tokio::sync::watch;
use tokio::time::Instant;

pub use slot::{Ost, State};
pub use table::SlotView;

use crate::memory::layout::MIB;
use crate::vcpu::set::VcpuControl;
use cpus::Cpus;
use ged::EventLine;
use memory::{Area, MemoryUnits, Regions, UnitView};
use registers::Registers;

/// Something could not be plugged or asked back.
#[derive(Debug, Error)]
pub enum Error {
    /// Every vCPU that the VM may have is there.
    #[error(
        "no vCPU can be plugged: all {max} that this VM may have are there (the number is fixed when the VM starts)"
    )]
    NoCpu {
        /// Most vCPUs of this VM.
        max: u8,
    },
    /// There is no such slot, or it is in a state that the call cannot be made in.
    #[error("cannot {what} {kind} {index}: it is {state}")]
    State {
        /// "plug", "eject", "withdraw".
        what: &'static str,
        /// "vCPU", "memory unit".
        kind: &'static str,
        /// Its number.
        index: u8,
        /// Where it is.
        state: State,
    },
    /// The boot vCPU stays.
    #[error("vCPU 0 cannot be unplugged: the guest's kernel needs the processor that it began on")]
    BootCpu,
    /// Not a whole number of units.
    #[error(
        "{} MiB of memory: it is plugged as ACPI memory in units of {} MiB", bytes / MIB, unit / MIB
    )]
    Unit {
        /// Bytes asked for.
        bytes: u64,
        /// Bytes of a unit.
        unit: u64,
    },
    /// Too few units are empty.
    #[error(
        "cannot plug {} MiB: {free} of {units} ACPI memory units of {} MiB are free (their number is fixed when the VM starts)", bytes / MIB, unit / MIB
    )]
    NoUnit {
        /// Bytes asked for.
        bytes: u64,
        /// Empty units.
        free: usize,
        /// All units.
        units: u8,
        /// Bytes of a unit.
        unit: u64,
    },
    /// The vCPU could not be made or started.
    #[error(transparent)]
    Vcpu(#[from] crate::vcpu::Error),
    /// The memory could not be made.
    #[error(transparent)]
    Memory(#[from] crate::memory::Error),
}

/// Tells whoever waits that a slot has changed. Clones share it.
#[derive(Debug, Clone)]
pub struct Changes(watch::Sender<u64>);

impl Default for Changes {
    fn default() -> Self {
        Self(watch::Sender::new(0))
    }
}

impl Changes {
    /// Completes `changed()` after each change; changes that come together may be told as one. Subscribe before looking at a
    /// slot.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }

    fn tell(&self) {
        self.0.send_modify(|count| *count = count.wrapping_add(1));
    }
}

/// All that comes and goes by ACPI in one VM.
pub struct Plugs {
    cpus: Arc<Cpus>,
    memory: Arc<MemoryUnits>,
    line: Arc<EventLine>,
    registers: Arc<Registers>,
}

impl Plugs {
    /// Empty slots for `max_vcpus` vCPUs and the units of `area`.
    pub fn new(
        max_vcpus: u8,
        area: Area,
        memory: Arc<dyn Regions>,
        line: EventLine,
        changes: &Changes,
    ) -> Self {
        let cpus = Arc::new(Cpus::new(max_vcpus, changes.clone()));
        let memory = Arc::new(MemoryUnits::new(area, memory, changes.clone()));
        Self {
            registers: Arc::new(Registers::new(Arc::clone(&cpus), Arc::clone(&memory))),
            line: Arc::new(line),
            cpus,
            memory,
        }
    }

    /// The device to be put at [`HOTPLUG_BASE`](crate::memory::layout::HOTPLUG_BASE).
    pub fn registers(&self) -> Arc<Registers> {
        Arc::clone(&self.registers)
    }

    /// The slots of vCPUs.
    pub fn cpus(&self) -> &Cpus {
        &self.cpus
    }

    /// The units of memory.
    pub fn memory(&self) -> &MemoryUnits {
        &self.memory
    }

    /// Announces a vCPU whose thread runs.
    ///
    /// # Errors
    ///
    /// As [`Cpus::plug`].
    pub fn plug_vcpu(&self, index: u8, vcpu: Arc<VcpuControl>) -> Result<(), Error> {
        self.cpus.plug(index, vcpu)?;
        self.line.raise();
        Ok(())
    }

    /// Has the guest asked to eject a vCPU.
    ///
    /// # Errors
    ///
    /// As [`Cpus::ask`].
    pub fn ask_vcpu(&self, index: u8) -> Result<(), Error> {
        self.cpus.ask(index)?;
        self.line.raise();
        Ok(())
    }

    /// Makes memory and announces it.
    ///
    /// # Errors
    ///
    /// As [`MemoryUnits::plug`].
    pub fn plug_memory(&self, bytes: u64) -> Result<Vec<UnitView>, Error> {
        let units = self.memory.plug(bytes)?;
        self.line.raise();
        let views = units.into_iter().filter_map(|unit| self.memory.view(unit));
        Ok(views.collect())
    }

    /// When the guest last ejected something of which it has not reported yet that it is done (`_OST`). Until then it may look
    /// whether the slot is empty (`_STA`), and forget what is plugged there meanwhile: Linux does from 6.11 on.
    pub fn ejecting_since(&self) -> Option<Instant> {
        let since = [
            self.cpus.table().ejecting_since(),
            self.memory.table().ejecting_since(),
        ];
        since.into_iter().flatten().max()
    }

    /// Has the guest asked to eject a unit of memory.
    ///
    /// # Errors
    ///
    /// As [`MemoryUnits::ask`].
    pub fn ask_memory(&self, unit: u8) -> Result<(), Error> {
        self.memory.ask(unit)?;
        self.line.raise();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
