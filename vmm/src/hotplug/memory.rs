//! The slots of ACPI memory: units of one size, at addresses that are fixed when the VM starts. Each unit is a KVM memory slot
//! and a mapping of its own while it is plugged.

use std::sync::Arc;

use super::table::{Notice, SlotView, Table};
use super::{Changes, Error, State};
use crate::memory::layout::MIB;
use crate::memory::slots::SlotId;
use crate::memory::{self, GuestMemory};

/// Smallest unit, in bytes: a memory block of x86-64 Linux.
pub const SMALLEST_UNIT: u64 = 128 * MIB;

/// Most units of one VM.
pub const MAX_UNITS: u8 = 240;

/// Makes memory and takes it away; [`GuestMemory`], or a stand-in where there is no KVM.
pub trait Regions: Send + Sync {
    /// Makes `size` bytes at guest-physical `base`.
    ///
    /// # Errors
    ///
    /// If it cannot be; nothing has changed then.
    fn add(&self, base: u64, size: u64) -> Result<SlotId, memory::Error>;
    /// Takes them away.
    ///
    /// # Errors
    ///
    /// If it cannot be; they are still there then.
    fn remove(&self, slot: SlotId) -> Result<(), memory::Error>;
}

impl Regions for GuestMemory {
    fn add(&self, base: u64, size: u64) -> Result<SlotId, memory::Error> {
        self.add_region(base, size)
    }

    fn remove(&self, slot: SlotId) -> Result<(), memory::Error> {
        self.remove_region(slot)
    }
}

/// Where ACPI memory may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    /// Guest-physical address of the first unit, a multiple of `unit`.
    pub base: u64,
    /// Bytes of a unit, a multiple of [`SMALLEST_UNIT`].
    pub unit: u64,
    /// How many.
    pub units: u8,
}

impl Area {
    /// Guest-physical address of a unit.
    pub fn address(&self, index: u8) -> u64 {
        self.base + u64::from(index) * self.unit
    }
}

/// A unit that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnitView {
    /// Guest-physical address.
    pub base: u64,
    /// Bytes.
    pub bytes: u64,
    /// Its slot.
    pub slot: SlotView,
}

/// Which units of memory there are, as guest and host share it.
pub struct MemoryUnits {
    area: Area,
    memory: Arc<dyn Regions>,
    table: Table<SlotId>,
}

impl MemoryUnits {
    /// The units of an area, all empty.
    pub fn new(area: Area, memory: Arc<dyn Regions>, changes: Changes) -> Self {
        Self {
            area,
            memory,
            table: Table::new(area.units, changes),
        }
    }

    /// Where the units are.
    pub fn area(&self) -> Area {
        self.area
    }

    /// Makes and announces memory in the lowest empty units; their numbers. All or nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Unit`], [`Error::NoUnit`], or that the host cannot make it.
    pub fn plug(&self, bytes: u64) -> Result<Vec<u8>, Error> {
        let Area { unit, units, .. } = self.area;
        if units == 0 || bytes == 0 || !bytes.is_multiple_of(unit) {
            return Err(Error::Unit { bytes, unit });
        }
        let free = self.table.empty();
        let count = bytes / unit;
        if count > free as u64 {
            return Err(Error::NoUnit {
                bytes,
                free,
                units,
                unit,
            });
        }
        let mut plugged = Vec::new();
        for _ in 0..count {
            match self.plug_one(bytes, free) {
                Ok(index) => plugged.push(index),
                Err(error) => {
                    // The line has not been raised, but a guest that looks by itself may have noticed.
                    for index in plugged {
                        if let Err(error) = self.withdraw(index) {
                            tracing::warn!(%error, "a unit of memory stays");
                        }
                    }
                    return Err(error);
                }
            }
        }
        Ok(plugged)
    }

    fn plug_one(&self, bytes: u64, free: usize) -> Result<u8, Error> {
        let Area { unit, units, .. } = self.area;
        let none = Error::NoUnit {
            bytes,
            free,
            units,
            unit,
        };
        let index = self.table.first_empty().ok_or(none)?;
        let slot = self.memory.add(self.area.address(index), unit)?;
        self.table.plug(index, slot).map_err(|slot| {
            if let Err(error) = self.memory.remove(slot) {
                tracing::error!(%slot, %error, "cannot take memory back");
            }
            self.refused("plug", index, self.state(index))
        })?;
        Ok(index)
    }

    /// Has the guest asked to eject a unit.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if it is not there or its plug was not noticed yet.
    pub fn ask(&self, index: u8) -> Result<(), Error> {
        self.table
            .ask(index)
            .map_err(|state| self.refused("eject", index, state))
    }

    /// Takes back a plug or an eject request that the guest has not noticed; plugged memory goes.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if it has; or that the host cannot take the memory away.
    pub fn withdraw(&self, index: u8) -> Result<(), Error> {
        let slot = self
            .table
            .withdraw(index)
            .map_err(|state| self.refused("withdraw", index, state))?;
        if let Some(slot) = slot {
            self.memory.remove(slot)?;
        }
        Ok(())
    }

    /// All units that are there, the guest knowing of them or not.
    pub fn views(&self) -> Vec<UnitView> {
        let views = self.table.views().into_iter();
        views.map(|slot| self.seen(slot)).collect()
    }

    /// One unit; `None` if there is no such.
    pub fn view(&self, index: u8) -> Option<UnitView> {
        self.table.view(index).map(|slot| self.seen(slot))
    }

    fn seen(&self, slot: SlotView) -> UnitView {
        UnitView {
            base: self.area.address(slot.index),
            bytes: self.area.unit,
            slot,
        }
    }

    fn state(&self, index: u8) -> State {
        self.table
            .view(index)
            .map_or(State::Empty, |view| view.state)
    }

    fn refused(&self, what: &'static str, index: u8, state: State) -> Error {
        Error::State {
            what,
            kind: "memory unit",
            index,
            state,
        }
    }

    pub(super) fn fetch(&self) -> Option<(u8, Notice)> {
        self.table.fetch()
    }

    pub(super) fn table(&self) -> &Table<SlotId> {
        &self.table
    }

    /// The guest ejects one: its KVM slot and its mapping go. Whether it had been asked to.
    pub(super) fn eject(&self, index: usize) -> bool {
        self.table
            .eject(index, |slot| match self.memory.remove(*slot) {
                Ok(()) => true,
                Err(error) => {
                    tracing::error!(unit = index, %error, "cannot take ejected memory away");
                    false
                }
            })
    }
}
