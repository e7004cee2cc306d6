//! Exits of vCPUs, counted by reason.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a vCPU came back from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum ExitKind {
    /// Read of an I/O port.
    PortRead,
    /// Write of an I/O port.
    PortWrite,
    /// Read of device memory.
    MmioRead,
    /// Write of device memory.
    MmioWrite,
    /// HLT that KVM did not handle itself.
    Halt,
    /// A signal, ours or another.
    Interrupted,
    /// The guest woke from waiting for its start.
    Again,
    /// Everything else: the VM ends by it.
    Other,
}

const KINDS: [(ExitKind, &str); 8] = [
    (ExitKind::PortRead, "port-read"),
    (ExitKind::PortWrite, "port-write"),
    (ExitKind::MmioRead, "mmio-read"),
    (ExitKind::MmioWrite, "mmio-write"),
    (ExitKind::Halt, "halt"),
    (ExitKind::Interrupted, "interrupted"),
    (ExitKind::Again, "again"),
    (ExitKind::Other, "other"),
];

/// One vCPU's counts.
#[derive(Debug, Default)]
pub struct ExitCounts([AtomicU64; KINDS.len()]);

impl ExitCounts {
    /// Counts one.
    pub fn count(&self, kind: ExitKind) {
        self.0[kind as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Adds the counts to a table by name.
    pub fn add_to(&self, table: &mut BTreeMap<&'static str, u64>) {
        for (kind, name) in KINDS {
            *table.entry(name).or_default() += self.0[kind as usize].load(Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_place_and_name() {
        for (place, (kind, _)) in KINDS.iter().enumerate() {
            assert_eq!(*kind as usize, place);
        }
        let counts = ExitCounts::default();
        counts.count(ExitKind::Other);
        counts.count(ExitKind::Other);
        let mut table = BTreeMap::new();
        counts.add_to(&mut table);
        counts.add_to(&mut table);
        assert_eq!(table["other"], 4);
        assert_eq!(table.len(), KINDS.len());
    }
}
