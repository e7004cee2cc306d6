//! Slots of one kind, with what is in them, shared by the host and the guest's accesses.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use super::Changes;
use super::slot::{self, Event, Ost, State};

/// What a slot looks like from the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotView {
    /// Its number.
    pub index: u8,
    /// Where it is in its life.
    pub state: State,
    /// The guest's last report since it was last plugged or asked for.
    pub ost: Option<Ost>,
}

/// What waits for the guest, by the codes that AML notifies a device with (ACPI 6.5 section 5.6.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notice {
    DeviceCheck = 1,
    EjectRequest = 3,
}

struct Slot<T> {
    state: State,
    content: Option<T>,
    ost: Option<Ost>,
    /// Of a report whose status has not been written.
    ost_event: u32,
    /// When the guest ejected what was in it, until it reports that it is done.
    ejected: Option<Instant>,
}

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self {
            state: State::Empty,
            content: None,
            ost: None,
            ost_event: 0,
            ejected: None,
        }
    }
}

impl<T> Slot<T> {
    fn go(&mut self, event: Event) -> Result<(), slot::Refused> {
        self.state = slot::next(self.state, event)?;
        Ok(())
    }
}

/// The slots. Its lock is held for moments only, and never while the guest is waited for.
pub(super) struct Table<T> {
    slots: Mutex<Vec<Slot<T>>>,
    changes: Changes,
}

impl<T> Table<T> {
    pub fn new(count: u8, changes: Changes) -> Self {
        let mut slots = Vec::new();
        slots.resize_with(usize::from(count), Slot::default);
        Self {
            slots: Mutex::new(slots),
            changes,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Slot<T>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was there when the guest began.
    pub fn occupy(&self, index: u8, content: T) {
        if let Some(slot) = self.lock().get_mut(usize::from(index)) {
            slot.state = State::Present;
            slot.content = Some(content);
        }
    }

    /// The first empty slot.
    pub fn first_empty(&self) -> Option<u8> {
        let slots = self.lock();
        let empty = slots.iter().position(|slot| slot.state == State::Empty)?;
        u8::try_from(empty).ok()
    }

    /// How many slots are empty.
    pub fn empty(&self) -> usize {
        let slots = self.lock();
        slots
            .iter()
            .filter(|slot| slot.state == State::Empty)
            .count()
    }

    /// Puts something into an empty slot; the guest is to be told. The content comes back if the slot has one.
    pub fn plug(&self, index: u8, content: T) -> Result<(), T> {
        let mut slots = self.lock();
        let Some(slot) = slots.get_mut(usize::from(index)) else {
            return Err(content);
        };
        if slot.go(Event::Plug).is_err() {
            return Err(content);
        }
        slot.content = Some(content);
        slot.ost = None;
        slot.ejected = None;
        drop(slots);
        self.changes.tell();
        Ok(())
    }

    /// Has the guest asked to eject what is in a slot; its state if that cannot be.
    pub fn ask(&self, index: u8) -> Result<(), State> {
        self.host(index, |slot| {
            slot.go(Event::Ask)?;
            slot.ost = None;
            Ok(())
        })
    }

    /// Takes back what the guest has not fetched; the content, if it was a plug. The state if the guest was faster.
    pub fn withdraw(&self, index: u8) -> Result<Option<T>, State> {
        self.host(index, |slot| {
            slot.go(Event::Withdraw)?;
            Ok(match slot.state {
                State::Empty => slot.content.take(),
                _ => None,
            })
        })
    }

    fn host<R>(
        &self,
        index: u8,
        act: impl FnOnce(&mut Slot<T>) -> Result<R, slot::Refused>,
    ) -> Result<R, State> {
        let mut slots = self.lock();
        let slot = slots.get_mut(usize::from(index)).ok_or(State::Empty)?;
        let result = act(slot).map_err(|slot::Refused| slot.state);
        drop(slots);
        self.changes.tell();
        result
    }

    /// Every slot that is not empty.
    pub fn views(&self) -> Vec<SlotView> {
        let slots = self.lock();
        (0..=u8::MAX)
            .zip(slots.iter())
            .filter(|(_, slot)| slot.state.is_occupied())
            .map(|(index, slot)| view(index, slot))
            .collect()
    }

    /// One slot; `None` if there is no such.
    pub fn view(&self, index: u8) -> Option<SlotView> {
        let slots = self.lock();
        slots.get(usize::from(index)).map(|slot| view(index, slot))
    }

    /// The guest looks whether something is in a slot.
    pub fn occupied(&self, index: usize) -> bool {
        let slots = self.lock();
        slots
            .get(index)
            .is_some_and(|slot| slot.state.is_occupied())
    }

    /// The guest fetches the next thing that it is to be told of.
    pub fn fetch(&self) -> Option<(u8, Notice)> {
        let mut slots = self.lock();
        let (index, slot) = (0..=u8::MAX)
            .zip(slots.iter_mut())
            .find(|(_, slot)| matches!(slot.state, State::Announced | State::Asked))?;
        let notice = match slot.state {
            State::Announced => Notice::DeviceCheck,
            _ => Notice::EjectRequest,
        };
        slot.go(Event::Fetch).ok()?;
        drop(slots);
        self.changes.tell();
        Some((index, notice))
    }

    /// The guest ejects. `give_back` gets the content, with the slots locked, and says whether it is gone; otherwise the slot
    /// stays as it is. Whether the guest had been asked to; what it does not know of yet it cannot eject.
    pub fn eject(&self, index: usize, give_back: impl FnOnce(&T) -> bool) -> bool {
        let mut slots = self.lock();
        let Some(slot) = slots.get_mut(index) else {
            return false;
        };
        if slot::next(slot.state, Event::Eject).is_err() {
            return false;
        }
        let asked = slot.state != State::Present;
        if slot
            .content
            .as_ref()
            .is_some_and(|content| !give_back(content))
        {
            return asked;
        }
        slot.state = State::Empty;
        slot.content = None;
        slot.ejected = Some(Instant::now());
        drop(slots);
        self.changes.tell();
        asked
    }

    /// When the guest last ejected something without having reported on it since.
    pub fn ejecting_since(&self) -> Option<Instant> {
        self.lock().iter().filter_map(|slot| slot.ejected).max()
    }

    /// The first half of a report.
    pub fn ost_event(&self, index: usize, event: u32) {
        if let Some(slot) = self.lock().get_mut(index) {
            slot.ost_event = event;
        }
    }

    /// The second half, which makes it count.
    pub fn ost_status(&self, index: usize, status: u32) -> Option<Ost> {
        let mut slots = self.lock();
        let slot = slots.get_mut(index)?;
        let ost = Ost {
            event: slot.ost_event,
            status,
        };
        slot.ost = Some(ost);
        if ost.ends_eject() {
            slot.ejected = None;
        }
        if ost.refuses_eject() {
            // Only from Leaving; elsewhere it is words.
            let _ = slot.go(Event::Refuse);
        }
        drop(slots);
        self.changes.tell();
        Some(ost)
    }
}

fn view<T>(index: u8, slot: &Slot<T>) -> SlotView {
    SlotView {
        index,
        state: slot.state,
        ost: slot.ost,
    }
}
