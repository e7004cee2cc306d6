//! What devices share to serve the rings of a hostile driver.
//!
//! [`Chain`] reads each descriptor of a chain once, judges the copy, and gives
//! its buffers as slices of guest memory; [`serve`] works through what is
//! available, a bounded number at a time, and notifies when the driver wants
//! it. Nothing here trusts an index, an address or a length.

use std::cmp::min;
use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use super::device::Interrupt;

/// VIRTIO_F_EVENT_IDX: notifications in both directions say how far they are wanted.
pub const F_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// Features of the ring that every device offers: EVENT_IDX and INDIRECT_DESC.
pub const RING_FEATURES: u64 = F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What is wrong with a chain. The device can go on: the chain is returned with nothing written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ChainError {
    /// It loops, leads out of its table, is longer than 2^32 bytes or than the table, or
    /// has an indirect table that cannot be.
    #[error("the descriptor chain does not come to an end")]
    Broken,
    /// More descriptors than the queue has entries (virtio 1.3, 2.7.5.2).
    #[error("the descriptor chain has more descriptors than the queue's {0}")]
    TooLong(u16),
    /// A readable descriptor after a writable one (virtio 1.3, 2.7.4.2).
    #[error("the descriptor chain has a readable descriptor after a writable one")]
    Order,
    /// A buffer is not, or not all, in guest memory.
    #[error("the buffer of {len} bytes at {address:#x} is not in guest memory")]
    Address {
        /// Guest-physical address of the buffer.
        address: u64,
        /// Its length in bytes.
        len: u32,
    },
}

/// What is wrong with the ring itself. The device cannot go on until it is reset.
#[derive(Debug, Error)]
pub enum RingError {
    /// The available index jumped, or the ring is no longer in guest memory.
    #[error("the available ring cannot be used: {0}")]
    Available(virtio_queue::Error),
    /// An available entry names a descriptor outside the table, or the used ring is no longer in
    /// guest memory.
    #[error("chain {head} cannot be put into the used ring: {source}")]
    Used {
        /// Head index of the chain.
        head: u16,
        /// What virtio-queue says.
        source: virtio_queue::Error,
    },
}

/// Part of a chain's buffers, as slices of guest memory in order. Reading and writing take bytes
/// off the front.
#[derive(Debug, Clone, Default)]
pub struct Buffers<'m> {
    slices: std::collections::VecDeque<VolatileSlice<'m>>,
    len: u64,
}

/// Fewer bytes in the chain than were to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the descriptor chain is too short")]
pub struct Short;

impl<'m> Buffers<'m> {
    /// Bytes left.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The slices left.
    pub fn slices(&self) -> impl Iterator<Item = &VolatileSlice<'m>> {
        self.slices.iter()
    }

    /// Copies exactly `data.len()` bytes out of the guest, however many descriptors they are in.
    ///
    /// # Errors
    ///
    /// [`Short`]; nothing is taken then.
    pub fn read_exact(&mut self, data: &mut [u8]) -> Result<(), Short> {
        if self.len < data.len() as u64 {
            return Err(Short);
        }
        let mut done = 0;
        while done < data.len() {
            let taken = self.take_front(data.len() - done);
            done += taken.copy_to(&mut data[done..]);
        }
        Ok(())
    }

    /// Copies into the guest as much of `data` as there is room for; returns how much.
    pub fn write(&mut self, data: &[u8]) -> usize {
        let total = min(data.len() as u64, self.len) as usize;
        let mut done = 0;
        while done < total {
            let taken = self.take_front(total - done);
            taken.copy_from(&data[done..done + taken.len()]);
            done += taken.len();
        }
        total
    }

    /// Takes `count` bytes off the front, or all that are left.
    pub fn take(&mut self, count: u64) -> Buffers<'m> {
        let mut taken = Buffers::default();
        let total = min(count, self.len);
        while taken.len < total {
            let most = usize::try_from(total - taken.len).unwrap_or(usize::MAX);
            let slice = self.take_front(most);
            taken.push(slice);
        }
        taken
    }

    /// One slice of at most `most` bytes off the front. Called only with bytes left and `most > 0`.
    fn take_front(&mut self, most: usize) -> VolatileSlice<'m> {
        let front = self.slices.pop_front().expect("bytes are left");
        let taken = if front.len() <= most {
            front
        } else {
            let (taken, rest) = front.split_at(most).expect("within the slice");
            self.slices.push_front(rest);
            taken
        };
        self.len -= taken.len() as u64;
        taken
    }

    fn push(&mut self, slice: VolatileSlice<'m>) {
        // Empty ones would make `take_front` yield nothing.
        if !slice.is_empty() {
            self.len += slice.len() as u64;
            self.slices.push_back(slice);
        }
    }
}

/// A chain's buffers: first what the device reads, then what it writes.
#[derive(Debug)]
pub struct Chain<'m> {
    /// For the device to read.
    pub readable: Buffers<'m>,
    /// For the device to write.
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    /// Walks a chain, reading each descriptor once, and finds its buffers in guest memory. A
    /// chain has at most `queue_size` descriptors.
    ///
    /// # Errors
    ///
    /// [`ChainError`]; nothing of the guest's memory has been touched then.
    pub fn resolve(
        memory: &'m GuestMemoryMmap,
        chain: DescriptorChain<&'m GuestMemoryMmap>,
        queue_size: u16,
    ) -> Result<Self, ChainError> {
        let mut readable = Buffers::default();
        let mut writable = Buffers::default();
        let mut count = 0;
        let mut last: Option<Descriptor> = None;
        for descriptor in chain {
            count += 1;
            if count > u32::from(queue_size) {
                return Err(ChainError::TooLong(queue_size));
            }
            let part = if descriptor.is_write_only() {
                &mut writable
            } else if last.is_some_and(|last| last.is_write_only()) {
                return Err(ChainError::Order);
            } else {
                &mut readable
            };
            let outside = || ChainError::Address {
                address: descriptor.addr().0,
                len: descriptor.len(),
            };
            // The iterator gives a slice for each region; a gap ends it with an error.
            for slice in
                GuestMemoryBackend::get_slices(memory, descriptor.addr(), descriptor.len() as usize)
            {
                part.push(slice.map_err(|_| outside())?);
            }
            last = Some(descriptor);
        }
        // virtio-queue just ends at what it does not like: a chain is whole only if its last
        // descriptor says so.
        match last {
            Some(last) if !last.has_next() => Ok(Self { readable, writable }),
            _ => Err(ChainError::Broken),
        }
    }
}

/// Whether [`serve`] left something to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// All chains are served; the driver will kick for the next.
    All,
    /// There may be more, without a kick to come: the budget is used up, or the device stopped.
    More,
}

/// Serves up to `budget` chains: `each` does the work of one and returns how many bytes it has
/// written from the start of the writable part, or `None` to put the chain back and stop. A chain
/// that cannot be is returned to the driver with nothing written.
///
/// At the end the driver is interrupted if it wants that; when all is served it is asked to kick
/// for the next chain.
///
/// # Errors
///
/// [`RingError`]; the caller reports it by [`Interrupt::fault`] and leaves the queue alone.
pub fn serve(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    interrupt: &Interrupt,
    budget: usize,
    mut each: impl FnMut(Chain<'_>) -> Option<u32>,
) -> Result<Served, RingError> {
    let mut used = false;
    let result = serve_quietly(queue, memory, budget, &mut used, &mut each);
    // Also after an error: what was served before it is the driver's.
    if used && queue.needs_notification(memory).unwrap_or(true) {
        interrupt.used();
    }
    result
}

/// As [`serve`], but sets `used` when a chain was returned instead of interrupting the driver: for
/// a device that serves several queues in a turn and interrupts once.
///
/// # Errors
///
/// As [`serve`]; `used` counts then too.
pub fn serve_quietly(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    budget: usize,
    used: &mut bool,
    mut each: impl FnMut(Chain<'_>) -> Option<u32>,
) -> Result<Served, RingError> {
    for _ in 0..budget {
        let (head, len) = match pop(queue, memory)? {
            Popped::Empty => return Ok(Served::All),
            Popped::Refused { head } => (head, 0),
            Popped::Chain { head, chain } => match each(chain) {
                Some(len) => (head, len),
                None => {
                    queue.go_to_previous_position();
                    return Ok(Served::More);
                }
            },
        };
        give_back(queue, memory, head, len)?;
        *used = true;
    }
    Ok(Served::More)
}

/// What [`pop`] finds.
#[derive(Debug)]
pub enum Popped<'m> {
    /// A chain, to be returned by [`give_back`] when the device is done with it.
    Chain {
        /// Its head index.
        head: u16,
        /// Its buffers.
        chain: Chain<'m>,
    },
    /// A chain that cannot be, to be returned with nothing written.
    Refused {
        /// Its head index.
        head: u16,
    },
    /// None is available; the driver will kick for the next.
    Empty,
}

/// Takes the next available chain, for a device that answers later or in another order than it is
/// asked; others use [`serve`].
///
/// # Errors
///
/// [`RingError`]; the caller reports it by [`Interrupt::fault`] and leaves the queue alone.
pub fn pop<'m>(queue: &mut Queue, memory: &'m GuestMemoryMmap) -> Result<Popped<'m>, RingError> {
    let size = queue.size();
    // One that comes while notifications are asked for is there the second time.
    for _ in 0..2 {
        let index = queue
            .avail_idx(memory, Ordering::Acquire)
            .map_err(RingError::Available)?;
        let pending = index.0 != queue.next_avail();
        let mut available = queue.iter(memory).map_err(RingError::Available)?;
        let Some(chain) = available.next() else {
            if pending {
                // Its entry cannot be read, or the index went back: trying again would spin.
                break;
            }
            if queue
                .enable_notification(memory)
                .map_err(RingError::Available)?
            {
                continue;
            }
            return Ok(Popped::Empty);
        };
        let head = chain.head_index();
        return Ok(match Chain::resolve(memory, chain, size) {
            Ok(chain) => Popped::Chain { head, chain },
            Err(error) => {
                tracing::debug!(head, %error, "descriptor chain refused");
                Popped::Refused { head }
            }
        });
    }
    Err(RingError::Available(
        virtio_queue::Error::InvalidAvailRingIndex,
    ))
}

/// Returns a chain to the driver, with how many bytes were written from the start of its writable
/// part.
///
/// # Errors
///
/// [`RingError::Used`].
pub fn give_back(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    head: u16,
    len: u32,
) -> Result<(), RingError> {
    queue
        .add_used(memory, head, len)
        .map_err(|source| RingError::Used { head, source })
}

/// Chains to be returned together, so that the driver sees all of them or none: a frame in several buffers.
/// A queue's chains are all returned by one of these, or none is.
#[derive(Debug, Default)]
pub struct UsedBatch {
    chains: Vec<(u16, u32)>,
}

impl UsedBatch {
    /// Adds a chain that [`pop`] gave, with how many bytes were written from the start of its writable part.
    pub fn push(&mut self, head: u16, len: u32) {
        self.chains.push((head, len));
    }

    /// Returns them to the driver; whether it wants to be interrupted for them.
    ///
    /// # Errors
    ///
    /// [`RingError::Used`]; none of them is returned then.
    pub fn publish(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, RingError> {
        let Some(&(first, _)) = self.chains.first() else {
            return Ok(false);
        };
        let failed = |source| RingError::Used {
            head: first,
            source,
        };
        let at = |ring: u64, offset: u64| {
            let address = ring.checked_add(offset);
            address
                .map(GuestAddress)
                .ok_or_else(|| failed(virtio_queue::Error::AddressOverflow))
        };
        let memory_error = |error| failed(virtio_queue::Error::GuestMemory(error));
        let (old, size) = (Wrapping(queue.next_used()), queue.size());
        let mut next = old;
        for (head, len) in self.chains.drain(..) {
            if head >= size {
                return Err(failed(virtio_queue::Error::InvalidDescriptorIndex));
            }
            let slot = u64::from(next.0 % size);
            // struct virtq_used_elem: id, then len.
            let element = (u64::from(head) | u64::from(len) << 32).to_le();
            let place = at(queue.used_ring(), 4 + slot * 8)?;
            memory.write_obj(element, place).map_err(memory_error)?;
            next += Wrapping(1);
        }
        queue.set_next_used(next.0);
        let index = at(queue.used_ring(), 2)?;
        memory
            .store(next.0.to_le(), index, Ordering::Release)
            .map_err(memory_error)?;
        if !queue.event_idx_enabled() {
            return Ok(true);
        }
        // The index is there before the driver's wish is read, and the driver looks again after it has said it.
        fence(Ordering::SeqCst);
        let place = at(queue.avail_ring(), 4 + u64::from(size) * 2)?;
        let event: u16 = memory
            .load(place, Ordering::Relaxed)
            .map_err(memory_error)?;
        let event = Wrapping(u16::from_le(event));
        Ok(next - event - Wrapping(1) < next - old)
    }
}

#[cfg(test)]
pub(crate) mod driver;
#[cfg(test)]
mod tests;
