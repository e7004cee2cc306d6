//! Guest memory as KVM slots behind one atomically replaceable view.
//!
//! A region is an anonymous mapping that this module owns and KVM shows to the guest. Regions come
//! and go while the VM runs: devices look addresses up through [`GuestRam`], take a fresh view for
//! each batch, and so see a new region at once and never a removed one. A removed region's mapping
//! goes away with the last view that was taken before.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use thiserror::Error;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};

use super::slots::{Exhausted, SlotAllocator, SlotId};
use crate::virtio::device::GuestRam;

/// Guest memory could not be made or changed.
#[derive(Debug, Error)]
pub enum Error {
    /// The host gives no mapping of this size.
    #[error("the host cannot map {} MiB for guest memory at {base:#x}: {why}", size >> 20)]
    Map {
        /// Guest-physical address.
        base: u64,
        /// Bytes.
        size: u64,
        /// What the system says.
        why: String,
    },
    /// KVM refused the slot.
    #[error("KVM refused memory slot {slot} of {} MiB at {base:#x}", size >> 20)]
    Slot {
        /// The slot.
        slot: SlotId,
        /// Guest-physical address.
        base: u64,
        /// Bytes.
        size: u64,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// No slot number is left.
    #[error("cannot add memory at {base:#x}")]
    Exhausted {
        /// Guest-physical address.
        base: u64,
        /// The cause.
        #[source]
        source: Exhausted,
    },
    /// The region overlaps another, or is not the kind of range that memory may have.
    #[error("cannot put {size} bytes of memory at {base:#x}: {why}")]
    Layout {
        /// Guest-physical address.
        base: u64,
        /// Bytes.
        size: u64,
        /// What is wrong with it.
        why: String,
    },
    /// There is no region in that slot.
    #[error("memory slot {0} is empty")]
    Empty(SlotId),
}

/// All memory of one VM.
pub struct GuestMemory {
    vm: Arc<VmFd>,
    ram: GuestRam,
    table: Mutex<Table>,
}

struct Table {
    slots: SlotAllocator,
    /// What KVM knows: the mappings live at least as long as their slots.
    regions: BTreeMap<SlotId, Arc<GuestRegionMmap>>,
}

impl GuestMemory {
    /// Makes the boot memory from pieces given as (base, bytes), lowest first, not overlapping.
    ///
    /// # Errors
    ///
    /// If the host cannot map it or KVM refuses it.
    pub fn new(vm: Arc<VmFd>, slot_limit: u32, pieces: &[(u64, u64)]) -> Result<Self, Error> {
        let mut table = Table {
            slots: SlotAllocator::new(slot_limit),
            regions: BTreeMap::new(),
        };
        let mut regions = Vec::with_capacity(pieces.len());
        for &(base, size) in pieces {
            let region = map(base, size)?;
            table.insert(&vm, Arc::clone(&region))?;
            regions.push(region);
        }
        let view = GuestMemoryMmap::from_arc_regions(regions).map_err(|error| {
            let (base, size) = pieces.first().copied().unwrap_or_default();
            Error::Layout {
                base,
                size,
                why: error.to_string(),
            }
        })?;
        Ok(Self {
            vm,
            ram: GuestMemoryAtomic::new(view),
            table: Mutex::new(table),
        })
    }

    /// The view that devices hold.
    pub fn ram(&self) -> GuestRam {
        self.ram.clone()
    }

    /// Bytes of all regions.
    pub fn size(&self) -> u64 {
        self.table()
            .regions
            .values()
            .map(|region| region.len())
            .sum()
    }

    /// Adds `size` bytes at `base` while the VM runs; both are multiples of the page size.
    ///
    /// # Errors
    ///
    /// If it overlaps, the host cannot map it, slots are exhausted or KVM refuses; then nothing
    /// has changed.
    pub fn add_region(&self, base: u64, size: u64) -> Result<SlotId, Error> {
        let mut table = self.table();
        let region = map(base, size)?;
        let view = self
            .ram
            .memory()
            .insert_region(Arc::clone(&region))
            .map_err(|error| Error::Layout {
                base,
                size,
                why: error.to_string(),
            })?;
        let slot = table.insert(&self.vm, region)?;
        self.replace(view);
        Ok(slot)
    }

    /// Takes a region away from devices and guest.
    ///
    /// # Errors
    ///
    /// If the slot is empty or KVM refuses; then nothing has changed.
    pub fn remove_region(&self, slot: SlotId) -> Result<(), Error> {
        let mut table = self.table();
        let region = table.regions.get(&slot).ok_or(Error::Empty(slot))?;
        let (base, size) = (region.start_addr(), region.len());
        let before = GuestMemoryMmap::clone(&self.ram.memory());
        let (view, region) = before
            .remove_region(base, size)
            .map_err(|error| Error::Layout {
                base: base.0,
                size,
                why: error.to_string(),
            })?;
        self.replace(view);
        if let Err(source) = set_slot(&self.vm, slot, base.0, 0, region.as_ptr() as u64) {
            self.replace(before);
            return Err(Error::Slot {
                slot,
                base: base.0,
                size,
                source,
            });
        }
        table.regions.remove(&slot);
        table.slots.free(slot);
        Ok(())
    }

    fn replace(&self, view: GuestMemoryMmap) {
        match self.ram.lock() {
            Ok(guard) => guard.replace(view),
            Err(poisoned) => poisoned.into_inner().replace(view),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn insert(&mut self, vm: &VmFd, region: Arc<GuestRegionMmap>) -> Result<SlotId, Error> {
        let (base, size) = (region.start_addr().0, region.len());
        let slot = self
            .slots
            .allocate()
            .map_err(|source| Error::Exhausted { base, source })?;
        if let Err(source) = set_slot(vm, slot, base, size, region.as_ptr() as u64) {
            self.slots.free(slot);
            return Err(Error::Slot {
                slot,
                base,
                size,
                source,
            });
        }
        self.regions.insert(slot, region);
        Ok(slot)
    }
}

/// An anonymous mapping, without reservation of swap: the guest's memory is taken as it is touched.
fn map(base: u64, size: u64) -> Result<Arc<GuestRegionMmap>, Error> {
    let failed = |why: String| Error::Map { base, size, why };
    let length = usize::try_from(size).map_err(|error| failed(error.to_string()))?;
    let mapping = map_aligned(length).map_err(|error| failed(error.to_string()))?;
    // A core dump of the VMM is no place for the guest's memory, nor is a child of it: a fork would write-protect all
    // of it to share it with a program that has no use for it. These are wishes: nothing depends on them.
    for advice in [libc::MADV_DONTDUMP, libc::MADV_DONTFORK] {
        // SAFETY: the range is the mapping just made; neither changes its contents in this process.
        unsafe { libc::madvise(mapping.as_ptr().cast(), length, advice) };
    }
    GuestRegionMmap::new(mapping, GuestAddress(base))
        .map(Arc::new)
        .ok_or_else(|| Error::Layout {
            base,
            size,
            why: "it wraps around the end of the address space".to_owned(),
        })
}

/// A huge page. KVM maps one into the guest where host and guest addresses agree below it.
const HUGE_PAGE: usize = 2 << 20;

/// A mapping at a multiple of [`HUGE_PAGE`] if the kernel can be brought to give one; kernels
/// before 6.7 do not by themselves.
fn map_aligned(length: usize) -> Result<MmapRegion, MmapRegionError> {
    let first = map_anywhere(length, libc::PROT_READ | libc::PROT_WRITE)?;
    let excess = first.as_ptr() as usize % HUGE_PAGE;
    if length < HUGE_PAGE || excess == 0 {
        return Ok(first);
    }
    drop(first);
    // Mappings go downwards from the last, so one of the excess's size puts the next in its place.
    // If another thread maps something in between, the guest runs with small pages.
    let _spacer = map_anywhere(excess, libc::PROT_NONE)?;
    map_anywhere(length, libc::PROT_READ | libc::PROT_WRITE)
}

fn map_anywhere(length: usize, protection: libc::c_int) -> Result<MmapRegion, MmapRegionError> {
    MmapRegionBuilder::new(length)
        .with_mmap_prot(protection)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .build()
}

/// Tells KVM of a slot; size 0 takes it away.
fn set_slot(
    vm: &VmFd,
    slot: SlotId,
    guest_phys_addr: u64,
    memory_size: u64,
    userspace_addr: u64,
) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: slot.number(),
        flags: 0,
        guest_phys_addr,
        memory_size,
        userspace_addr,
    };
    // SAFETY: the address is of a mapping of at least that size which the table (or, when the slot
    // is taken away, the caller) keeps until the slot is gone or the VM's last vCPU has ended.
    unsafe { vm.set_user_memory_region(region) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_where_huge_pages_fit() {
        // Other threads of the test program map things too, so not every attempt must succeed.
        let aligned = (0..16).any(|_| {
            let mapping = map_aligned(2 * HUGE_PAGE).expect("maps");
            assert_eq!(mapping.size(), 2 * HUGE_PAGE);
            (mapping.as_ptr() as usize).is_multiple_of(HUGE_PAGE)
        });
        assert!(aligned);
        assert_eq!(map_aligned(4096).expect("maps").size(), 4096);
    }
}
