//! The slots of vCPUs. A vCPU's slot, ACPI `_UID` and APIC id are its index.

use std::sync::Arc;

use super::table::{Notice, SlotView, Table};
use super::{Changes, Error, State};
use crate::vcpu::set::VcpuControl;

/// Which vCPUs there are, as guest and host share it.
pub struct Cpus {
    max: u8,
    table: Table<Arc<VcpuControl>>,
}

impl Cpus {
    /// Slots for `max` vCPUs, all empty.
    pub fn new(max: u8, changes: Changes) -> Self {
        Self {
            max,
            table: Table::new(max, changes),
        }
    }

    /// Most vCPUs that may be there.
    pub fn max(&self) -> u8 {
        self.max
    }

    /// One that the guest begins with.
    pub fn occupy(&self, index: u8, vcpu: Arc<VcpuControl>) {
        self.table.occupy(index, vcpu);
    }

    /// The slot that the next plug fills.
    ///
    /// # Errors
    ///
    /// [`Error::NoCpu`] if all are taken.
    pub fn vacancy(&self) -> Result<u8, Error> {
        self.table
            .first_empty()
            .ok_or(Error::NoCpu { max: self.max })
    }

    /// Announces a vCPU whose thread runs. If its slot is not empty any more it is parked again.
    ///
    /// # Errors
    ///
    /// [`Error::State`].
    pub fn plug(&self, index: u8, vcpu: Arc<VcpuControl>) -> Result<(), Error> {
        self.table.plug(index, vcpu).map_err(|vcpu| {
            vcpu.park();
            self.refused("plug", index, self.state(index))
        })
    }

    /// Has the guest asked to eject a vCPU.
    ///
    /// # Errors
    ///
    /// [`Error::BootCpu`] for vCPU 0; [`Error::State`] if it is not there or its plug was not noticed yet.
    pub fn ask(&self, index: u8) -> Result<(), Error> {
        if index == 0 {
            return Err(Error::BootCpu);
        }
        self.table
            .ask(index)
            .map_err(|state| self.refused("eject", index, state))
    }

    /// Takes back a plug or an eject request that the guest has not noticed; a plugged vCPU is parked.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if it has.
    pub fn withdraw(&self, index: u8) -> Result<(), Error> {
        let vcpu = self
            .table
            .withdraw(index)
            .map_err(|state| self.refused("withdraw", index, state))?;
        if let Some(vcpu) = vcpu {
            vcpu.park();
        }
        Ok(())
    }

    /// All that are there, the guest knowing of them or not.
    pub fn views(&self) -> Vec<SlotView> {
        self.table.views()
    }

    /// One slot; `None` if there is no such.
    pub fn view(&self, index: u8) -> Option<SlotView> {
        self.table.view(index)
    }

    fn state(&self, index: u8) -> State {
        self.view(index).map_or(State::Empty, |view| view.state)
    }

    fn refused(&self, what: &'static str, index: u8, state: State) -> Error {
        Error::State {
            what,
            kind: "vCPU",
            index,
            state,
        }
    }

    pub(super) fn fetch(&self) -> Option<(u8, Notice)> {
        self.table.fetch()
    }

    pub(super) fn table(&self) -> &Table<Arc<VcpuControl>> {
        &self.table
    }

    /// The guest ejects one: it is parked, and its slot is empty; vCPU 0 stays. Whether it had been asked to.
    pub(super) fn eject(&self, index: usize) -> bool {
        if index == 0 {
            return false;
        }
        self.table.eject(index, |vcpu| {
            vcpu.park();
            true
        })
    }
}
