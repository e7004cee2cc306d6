//! The region: which blocks are plugged, which slots exist, and the work on
//! them that a request asks for, some slots at a time.

use std::ops::Range;
use std::sync::Arc;

use super::BLOCK_BYTES;
use super::blocks::Blocks;
use super::host::Shared;
use super::request::{BlockState, Request, Response, Span};
use super::work::{Change, Extent, Outcome, Work};
use crate::memory::GuestMemory;

/// Outlives resets of the device: they change no block (5.15.5.2). Only one service at a time works
/// on it.
pub(super) struct Region {
    memory: Arc<GuestMemory>,
    shared: Arc<Shared>,
    plugged: Blocks,
    /// By slot: whether it exists.
    slots: Vec<bool>,
    work: Work,
}

impl Region {
    /// All unplugged. The configuration has been checked.
    pub fn new(memory: Arc<GuestMemory>, shared: Arc<Shared>) -> Self {
        let config = &shared.config;
        let blocks = (config.region_bytes / BLOCK_BYTES) as u32;
        let slots = (config.region_bytes / config.slot_bytes) as usize;
        Self {
            memory,
            shared,
            plugged: Blocks::new(blocks),
            slots: vec![false; slots],
            work: Work::Idle,
        }
    }

    /// Whether a request can be begun.
    pub fn is_idle(&self) -> bool {
        self.work == Work::Idle
    }

    /// Whether work goes on that no driver waits for.
    pub fn is_tidying(&self) -> bool {
        matches!(self.work, Work::Sweep { answer: None, .. })
    }

    /// Judges a request, and turns it into work. Only while idle.
    pub fn begin(&mut self, request: Request) {
        debug_assert!(self.is_idle());
        self.work = match request {
            Request::Malformed => Work::Answer(Response::Error),
            Request::UnplugAll => {
                let extent = Extent {
                    blocks: 0..self.plugged.len(),
                    slots: 0..self.slots.len() as u32,
                };
                Work::drain(extent, true)
            }
            Request::Plug(span) => self.begin_plug(span),
            Request::Unplug(span) => match self.extent(span) {
                Some(extent) if self.all_plugged(&extent.blocks) => Work::drain(extent, false),
                _ => Work::Answer(Response::Error),
            },
            Request::State(span) => Work::Answer(match self.extent(span) {
                Some(extent) => Response::State(self.state(&extent.blocks)),
                None => Response::Error,
            }),
        };
    }

    fn begin_plug(&self, span: Span) -> Work {
        let Some(extent) = self.extent(span) else {
            return Work::Answer(Response::Error);
        };
        if self.plugged.count(extent.blocks.clone()) > 0 {
            return Work::Answer(Response::Error);
        }
        let status = self.shared.status();
        let more = u64::from(span.blocks) * BLOCK_BYTES;
        if status.plugged + more > status.requested {
            return Work::Answer(Response::Nack);
        }
        Work::fill(extent)
    }

    /// The driver is gone, and with it whoever waits for an answer. Slots that were made for
    /// blocks that never were plugged are taken away when a driver comes again.
    pub fn abandon(&mut self) {
        if !self.is_idle() {
            self.work = Work::sweep(0..self.slots.len() as u32, None);
        }
    }

    /// Works on, with at most `budget` slots made, discarded or taken away; it is less by what was
    /// done. The response when there is one: then the region is idle again.
    pub fn advance(&mut self, budget: &mut u32) -> Option<Response> {
        while let Some(slot) = self.work.slot() {
            let outcome = if self.concerns(slot) {
                *budget = budget.checked_sub(1)?;
                self.perform(slot)
            } else {
                Outcome::Done
            };
            let (work, change) = std::mem::replace(&mut self.work, Work::Idle).after(outcome);
            self.work = work;
            if let Some(change) = change {
                self.apply(change);
            }
        }
        match std::mem::replace(&mut self.work, Work::Idle) {
            Work::Answer(response) => Some(response),
            _ => None,
        }
    }

    /// Whether the work has to do anything with the slot.
    fn concerns(&self, slot: u32) -> bool {
        let exists = self.slots[slot as usize];
        match self.work {
            Work::Fill { .. } => !exists,
            Work::Drain { .. } => exists,
            Work::Sweep { .. } => exists && self.plugged.count(self.blocks_of(slot)) == 0,
            Work::Idle | Work::Answer(_) => false,
        }
    }

    fn perform(&mut self, slot: u32) -> Outcome {
        let size = self.shared.config.slot_bytes;
        let base = self.shared.config.base + u64::from(slot) * size;
        let failure = match &self.work {
            Work::Fill { .. } => match self.memory.add_region(base, size) {
                Ok(_) => {
                    self.set_slot(slot, true);
                    return Outcome::Done;
                }
                Err(error) => describe(&error),
            },
            Work::Drain { extent, .. } => {
                let slot = self.blocks_of(slot);
                let first = extent.blocks.start.max(slot.start);
                let end = extent.blocks.end.min(slot.end);
                let base = self.shared.config.base + u64::from(first) * BLOCK_BYTES;
                let size = u64::from(end - first) * BLOCK_BYTES;
                match self.memory.discard(base, size) {
                    Ok(()) => return Outcome::Done,
                    Err(error) => describe(&error),
                }
            }
            Work::Sweep { .. } => match self.memory.remove_region_at(base) {
                Ok(()) => {
                    self.set_slot(slot, false);
                    return Outcome::Done;
                }
                Err(error) => describe(&error),
            },
            Work::Idle | Work::Answer(_) => return Outcome::Done,
        };
        self.shared.failed(failure);
        Outcome::Failed
    }

    fn apply(&mut self, change: Change) {
        let bytes = |blocks: &Range<u32>| u64::from(blocks.end - blocks.start) * BLOCK_BYTES;
        match change {
            Change::Plug(blocks) => {
                self.shared
                    .update(|status| status.plugged += bytes(&blocks));
                self.plugged.set(blocks);
            }
            Change::Unplug(blocks) => {
                self.shared
                    .update(|status| status.plugged -= bytes(&blocks));
                self.plugged.clear(blocks);
            }
            Change::UnplugAll => {
                self.plugged.clear(0..self.plugged.len());
                let config = &self.shared.config;
                self.shared.update(|status| {
                    status.plugged = 0;
                    status.usable = config.usable(status.requested);
                });
            }
        }
    }

    fn set_slot(&mut self, slot: u32, exists: bool) {
        self.slots[slot as usize] = exists;
        self.shared.update(|status| {
            if exists {
                status.slots += 1;
            } else {
                status.slots -= 1;
            }
        });
    }

    /// The span, if it is one: whole blocks within the usable region, one at least.
    fn extent(&self, span: Span) -> Option<Extent> {
        let config = &self.shared.config;
        let offset = span.address.checked_sub(config.base)?;
        let end = offset.checked_add(u64::from(span.blocks) * BLOCK_BYTES)?;
        if span.blocks == 0
            || !offset.is_multiple_of(BLOCK_BYTES)
            || end > self.shared.status().usable
        {
            return None;
        }
        // Both fit: a region has 2^19 blocks at most.
        let number = |bytes: u64, unit: u64| (bytes / unit) as u32;
        Some(Extent {
            blocks: number(offset, BLOCK_BYTES)..number(end, BLOCK_BYTES),
            slots: number(offset, config.slot_bytes)..number(end - 1, config.slot_bytes) + 1,
        })
    }

    fn blocks_of(&self, slot: u32) -> Range<u32> {
        let per_slot = (self.shared.config.slot_bytes / BLOCK_BYTES) as u32;
        slot * per_slot..(slot + 1) * per_slot
    }

    fn all_plugged(&self, blocks: &Range<u32>) -> bool {
        self.plugged.count(blocks.clone()) == blocks.end - blocks.start
    }

    fn state(&self, blocks: &Range<u32>) -> BlockState {
        match self.plugged.count(blocks.clone()) {
            0 => BlockState::Unplugged,
            count if count == blocks.end - blocks.start => BlockState::Plugged,
            _ => BlockState::Mixed,
        }
    }

    /// Panics if what is said in several places does not agree.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn check(&self) {
        use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};

        let status = self.shared.status();
        let config = &self.shared.config;
        let plugged = u64::from(self.plugged.count(0..self.plugged.len())) * BLOCK_BYTES;
        assert_eq!(status.plugged, plugged);
        assert!(status.requested <= status.usable && status.usable <= config.region_bytes);
        let usable = (status.usable / BLOCK_BYTES) as u32;
        assert_eq!(self.plugged.count(usable..self.plugged.len()), 0);
        let existing = self.slots.iter().filter(|exists| **exists).count();
        assert_eq!(status.slots as usize, existing);
        let view = self.memory.ram().memory();
        for (slot, exists) in self.slots.iter().enumerate() {
            let base = config.base + slot as u64 * config.slot_bytes;
            let region = view.find_region(GuestAddress(base));
            assert_eq!(region.is_some(), *exists, "slot {slot} at {base:#x}");
            let count = self.plugged.count(self.blocks_of(slot as u32));
            assert!(*exists || count == 0, "slot {slot} has blocks and is not");
        }
    }
}

/// An error with its causes.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
