//! Numbers of KVM memory slots, given out and taken back.

use std::collections::BTreeSet;

use thiserror::Error;

/// One KVM memory slot's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(u32);

impl SlotId {
    /// The number as KVM wants it.
    pub fn number(self) -> u32 {
        self.0
    }
}

impl std::fmt::Display for SlotId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// KVM has no more slots.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("all {0} memory slots of this VM are taken")]
pub struct Exhausted(pub u32);

/// Gives out slot numbers, the lowest free one first.
#[derive(Debug)]
pub struct SlotAllocator {
    limit: u32,
    next: u32,
    returned: BTreeSet<u32>,
}

impl SlotAllocator {
    /// Numbers from 0 to below `limit` (KVM_CAP_NR_MEMSLOTS).
    pub fn new(limit: u32) -> Self {
        Self {
            limit,
            next: 0,
            returned: BTreeSet::new(),
        }
    }

    /// Takes a number.
    ///
    /// # Errors
    ///
    /// [`Exhausted`] when all are taken.
    pub fn allocate(&mut self) -> Result<SlotId, Exhausted> {
        if let Some(number) = self.returned.pop_first() {
            return Ok(SlotId(number));
        }
        if self.next == self.limit {
            return Err(Exhausted(self.limit));
        }
        self.next += 1;
        Ok(SlotId(self.next - 1))
    }

    /// Gives a number back.
    pub fn free(&mut self, slot: SlotId) {
        debug_assert!(slot.0 < self.next);
        self.returned.insert(slot.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_and_end() {
        let mut slots = SlotAllocator::new(2);
        let first = slots.allocate().expect("one");
        let second = slots.allocate().expect("two");
        assert_ne!(first, second);
        assert_eq!(slots.allocate(), Err(Exhausted(2)));
        slots.free(first);
        assert_eq!(slots.allocate(), Ok(first));
        assert_eq!(slots.allocate(), Err(Exhausted(2)));
    }
}
