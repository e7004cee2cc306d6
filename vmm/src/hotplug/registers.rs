//! The registers that AML in the guest reads and writes, all of 32 bits and aligned; other accesses read all ones and write
//! nothing.
//!
//! ```text
//! 0x0000              read: the next notification, and it is fetched by that; 0: none
//!                           kind << 24 | slot << 8 | code, kind 1 a vCPU and 2 memory
//! 0x1000 + 16 × slot  vCPU    +0 read: _STA            write 1: eject
//!                             +4 write: _OST's event   +8 write: _OST's status
//! 0x2000 + 16 × slot  memory  the same
//! ```
//!
//! A `_STA` is one read, since the guest asks for it several times for each slot while it boots.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::cpus::Cpus;
use super::memory::MemoryUnits;
use super::slot::Ost;
use crate::bus::BusDevice;

/// The next notification.
pub const FETCH: u64 = 0;
/// Slots of vCPUs.
pub const CPUS: u64 = 0x1000;
/// Slots of memory.
pub const MEMORY: u64 = 0x2000;
/// Registers of one slot, in bytes.
pub const SLOT_BYTES: u64 = 16;
/// Where `_STA` and eject are in a slot's registers.
pub const STATUS: u64 = 0;
/// Where `_OST`'s event is.
pub const OST_EVENT: u64 = 4;
/// Where `_OST`'s status is.
pub const OST_STATUS: u64 = 8;
/// Length of the whole, in bytes.
pub const LENGTH: u64 = 0x3000;

/// In [`FETCH`]: the notification is for a vCPU.
pub const KIND_CPU: u32 = 1;
/// In [`FETCH`]: the notification is for a unit of memory.
pub const KIND_MEMORY: u32 = 2;

/// `_STA` of what is there: present, enabled, shown, functioning (ACPI 6.5 section 6.3.7).
const THERE: u32 = 0xf;
const EJECT: u32 = 1;

/// Ejects and reports that are logged one by one; the guest can make any number.
const LOGGED: u64 = 64;

/// The device on the MMIO bus.
pub struct Registers {
    cpus: Arc<Cpus>,
    memory: Arc<MemoryUnits>,
    unasked: AtomicU64,
    reports: AtomicU64,
}

impl Registers {
    /// Over the slots.
    pub fn new(cpus: Arc<Cpus>, memory: Arc<MemoryUnits>) -> Self {
        Self {
            cpus,
            memory,
            unasked: AtomicU64::new(0),
            reports: AtomicU64::new(0),
        }
    }

    /// Ejects that the guest had not been asked for. What it knew of is gone by that, vCPU 0 apart; others have no effect.
    pub fn unasked(&self) -> u64 {
        self.unasked.load(Ordering::Relaxed)
    }

    fn fetch(&self) -> u32 {
        let word = |kind: u32, index: u8, code: u32| kind << 24 | u32::from(index) << 8 | code;
        if let Some((index, notice)) = self.cpus.fetch() {
            return word(KIND_CPU, index, notice as u32);
        }
        match self.memory.fetch() {
            Some((index, notice)) => word(KIND_MEMORY, index, notice as u32),
            None => 0,
        }
    }

    fn ejected(&self, kind: &'static str, index: usize, asked: bool) {
        if asked {
            tracing::debug!(kind, index, "ejected");
        } else if self.unasked.fetch_add(1, Ordering::Relaxed) < LOGGED {
            tracing::warn!(kind, index, "the guest ejects what it was not asked to");
        }
    }

    fn reported(&self, kind: &'static str, index: usize, ost: Option<Ost>) {
        if let Some(report) = ost
            && self.reports.fetch_add(1, Ordering::Relaxed) < LOGGED
        {
            tracing::debug!(kind, index, %report, "the guest reports");
        }
    }
}

/// Which kind of slot, which slot, and which of its registers.
fn place(offset: u64) -> Option<(u32, usize, u64)> {
    let (kind, inside) = match offset {
        CPUS..MEMORY => (KIND_CPU, offset - CPUS),
        MEMORY..LENGTH => (KIND_MEMORY, offset - MEMORY),
        _ => return None,
    };
    let index = usize::try_from(inside / SLOT_BYTES).ok()?;
    Some((kind, index, inside % SLOT_BYTES))
}

impl BusDevice for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(word) = <&mut [u8; 4]>::try_from(&mut *data) else {
            data.fill(0xff);
            return;
        };
        let occupied = |kind, index| match kind {
            KIND_CPU => self.cpus.table().occupied(index),
            _ => self.memory.table().occupied(index),
        };
        let value = match place(offset) {
            None if offset == FETCH => self.fetch(),
            Some((kind, index, STATUS)) if occupied(kind, index) => THERE,
            Some((_, _, STATUS)) => 0,
            _ => u32::MAX,
        };
        *word = value.to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (Ok(word), Some((kind, index, register))) = (<[u8; 4]>::try_from(data), place(offset))
        else {
            return;
        };
        let value = u32::from_le_bytes(word);
        match (kind, register) {
            (KIND_CPU, STATUS) if value == EJECT => {
                self.ejected("vCPU", index, self.cpus.eject(index));
            }
            (KIND_MEMORY, STATUS) if value == EJECT => {
                self.ejected("memory", index, self.memory.eject(index));
            }
            (KIND_CPU, OST_EVENT) => self.cpus.table().ost_event(index, value),
            (KIND_MEMORY, OST_EVENT) => self.memory.table().ost_event(index, value),
            (KIND_CPU, OST_STATUS) => {
                self.reported("vCPU", index, self.cpus.table().ost_status(index, value));
            }
            (KIND_MEMORY, OST_STATUS) => {
                self.reported(
                    "memory",
                    index,
                    self.memory.table().ost_status(index, value),
                );
            }
            _ => {}
        }
    }
}
