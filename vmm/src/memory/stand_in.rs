//! Stands in for KVM where guest memory is tested without it: keeps the slots that it is told of,
//! and refuses them when a test says so.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::guest::{GuestMemory, SlotTable};
use super::slots::SlotId;

/// Slots as KVM would know them.
#[derive(Debug, Default)]
pub(crate) struct StandIn {
    slots: Mutex<BTreeMap<SlotId, (u64, u64)>>,
    refuse_additions: AtomicBool,
    refuse_removals: AtomicBool,
}

impl StandIn {
    /// Guest memory of `pieces`, with as many slots as KVM has on x86.
    pub(crate) fn memory(pieces: &[(u64, u64)]) -> (Arc<GuestMemory>, Arc<Self>) {
        Self::limited(pieces, 32_764)
    }

    /// The same with so many slots.
    pub(crate) fn limited(pieces: &[(u64, u64)], slots: u32) -> (Arc<GuestMemory>, Arc<Self>) {
        let stand_in = Arc::new(Self::default());
        let table = Arc::clone(&stand_in) as Arc<dyn SlotTable>;
        let memory = GuestMemory::with_table(table, slots, pieces).expect("guest memory");
        (Arc::new(memory), stand_in)
    }

    /// Base and size of each slot, lowest base first.
    #[cfg(test)]
    pub(crate) fn slots(&self) -> Vec<(u64, u64)> {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let mut slots: Vec<_> = slots.values().copied().collect();
        slots.sort_unstable();
        slots
    }

    /// From now on new slots are refused, or not.
    #[cfg(test)]
    pub(crate) fn refuse_additions(&self, refuse: bool) {
        self.refuse_additions.store(refuse, Ordering::SeqCst);
    }

    /// From now on slots are not taken away, or are.
    #[cfg(test)]
    pub(crate) fn refuse_removals(&self, refuse: bool) {
        self.refuse_removals.store(refuse, Ordering::SeqCst);
    }
}

// SAFETY: no guest runs, so no address is used.
unsafe impl SlotTable for StandIn {
    unsafe fn set(
        &self,
        slot: SlotId,
        base: u64,
        size: u64,
        _host: u64,
    ) -> Result<(), kvm_ioctls::Error> {
        let refuse = if size == 0 {
            &self.refuse_removals
        } else {
            &self.refuse_additions
        };
        if refuse.load(Ordering::SeqCst) {
            return Err(kvm_ioctls::Error::new(libc::ENOMEM));
        }
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if size == 0 {
            slots.remove(&slot);
        } else {
            slots.insert(slot, (base, size));
        }
        Ok(())
    }
}
