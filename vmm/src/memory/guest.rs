//! Guest memory as KVM slots behind one atomically replaceable view.
//!
//! A region is an anonymous mapping that this module owns and KVM shows to the guest. Regions come
//! and go while the VM runs: devices look addresses up through [`GuestRam`], take a fresh view for
//! each batch, and so see a new region at once and never a removed one. A removed region's mapping
//! goes away with the last view that was taken before. What the guest itself does to a removed
//! region is an access to device memory that no device has: the MMIO bus answers and counts it.

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

use super::discard::{DiscardError, discard};
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
    /// KVM refused the slot of the virtio-mmio windows' registers.
    #[error("KVM refused memory slot {slot} for the registers of virtio-mmio windows")]
    Registers {
        /// The slot.
        slot: u32,
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
    /// No region begins there.
    #[error("no region of guest memory begins at {base:#x}")]
    Absent {
        /// Guest-physical address.
        base: u64,
    },
}

/// Who shows memory slots to the guest: KVM.
///
/// # Safety
///
/// Once a slot is taken away nothing uses its memory through the table any more.
pub(crate) unsafe trait SlotTable: Send + Sync {
    /// Shows `size` bytes of this process's memory at `host` to the guest at `base`; size 0 takes
    /// the slot away.
    ///
    /// # Safety
    ///
    /// The memory at `host` is a mapping of at least that size, which stays until the slot is
    /// taken away or the VM's last vCPU has ended.
    unsafe fn set(
        &self,
        slot: SlotId,
        base: u64,
        size: u64,
        host: u64,
    ) -> Result<(), kvm_ioctls::Error>;
}

// SAFETY: KVM has dropped all of its mappings of a slot's memory when the call that takes the slot
// away returns.
unsafe impl SlotTable for VmFd {
    unsafe fn set(
        &self,
        slot: SlotId,
        base: u64,
        size: u64,
        host: u64,
    ) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot: slot.number(),
            flags: 0,
            guest_phys_addr: base,
            memory_size: size,
            userspace_addr: host,
        };
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { self.set_user_memory_region(region) }
    }
}

/// All memory of one VM. Shared by everything that adds or removes memory, from any thread, while
/// vCPUs run.
pub struct GuestMemory {
    vm: Arc<dyn SlotTable>,
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
        Self::with_table(vm, slot_limit, pieces)
    }

    pub(crate) fn with_table(
        vm: Arc<dyn SlotTable>,
        slot_limit: u32,
        pieces: &[(u64, u64)],
    ) -> Result<Self, Error> {
        let mut table = Table {
            slots: SlotAllocator::new(slot_limit),
            regions: BTreeMap::new(),
        };
        let mut regions = Vec::with_capacity(pieces.len());
        for &(base, size) in pieces {
            let region = map(base, size)?;
            table.insert(&*vm, Arc::clone(&region))?;
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
        let slot = table.insert(&*self.vm, region)?;
        self.replace(view);
        Ok(slot)
    }

    /// Takes a region away from devices and guest.
    ///
    /// # Errors
    ///
    /// If the slot is empty or KVM refuses; then nothing has changed.
    pub fn remove_region(&self, slot: SlotId) -> Result<(), Error> {
        self.remove(&mut self.table(), slot)
    }

    /// Takes the region that begins at `base` away from devices and guest.
    ///
    /// # Errors
    ///
    /// If none begins there or KVM refuses; then nothing has changed.
    pub fn remove_region_at(&self, base: u64) -> Result<(), Error> {
        let mut table = self.table();
        let slot = table.slot_at(base).ok_or(Error::Absent { base })?;
        self.remove(&mut table, slot)
    }

    /// Gives `size` bytes from `base` on back to the host: the guest keeps the range, which reads
    /// as zeros and takes no host memory until it is touched again. Both are multiples of the page
    /// size; the range may span regions that touch.
    ///
    /// # Errors
    ///
    /// [`DiscardError`].
    pub fn discard(&self, base: u64, size: u64) -> Result<(), DiscardError> {
        // The view keeps the mappings, also of a region that is removed meanwhile.
        discard(&self.ram.memory(), base, size)
    }

    fn remove(&self, table: &mut Table, slot: SlotId) -> Result<(), Error> {
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
        if let Err(source) = set_slot(&*self.vm, slot, base.0, 0, region.as_ptr() as u64) {
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
    fn slot_at(&self, base: u64) -> Option<SlotId> {
        let mut regions = self.regions.iter();
        let found = regions.find(|(_, region)| region.start_addr().0 == base);
        found.map(|(slot, _)| *slot)
    }

    fn insert(
        &mut self,
        vm: &dyn SlotTable,
        region: Arc<GuestRegionMmap>,
    ) -> Result<SlotId, Error> {
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
    // of it to share it with a program that has no use for it. Huge pages, also where the host gives them to who asks only: a boot
    // is a quarter shorter with them. These are wishes: nothing depends on them.
    for advice in [
        libc::MADV_DONTDUMP,
        libc::MADV_DONTFORK,
        libc::MADV_HUGEPAGE,
    ] {
        // SAFETY: the range is the mapping just made; none changes its contents in this process.
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
    vm: &dyn SlotTable,
    slot: SlotId,
    base: u64,
    size: u64,
    host: u64,
) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the address is of a mapping of at least that size which the table (or, when the slot
    // is taken away, the caller) keeps until the slot is gone or the VM's last vCPU has ended.
    unsafe { vm.set(slot, base, size, host) }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::super::layout::{MIB, PAGE};
    use super::super::stand_in::StandIn;
    use super::*;

    #[test]
    fn a_region_comes_and_goes_by_slot_and_by_base() {
        let (memory, kvm) = StandIn::memory(&[(0, MIB)]);
        let ram = memory.ram();
        for by_base in [false, true] {
            let slot = memory.add_region(4 * MIB, 2 * MIB).expect("added");
            assert_eq!(kvm.slots(), [(0, MIB), (4 * MIB, 2 * MIB)]);
            assert_eq!(memory.size(), 3 * MIB);
            let view = ram.memory();
            view.write_obj(7_u8, GuestAddress(5 * MIB)).expect("there");
            if by_base {
                memory.remove_region_at(4 * MIB).expect("removed");
            } else {
                memory.remove_region(slot).expect("removed");
            }
            assert_eq!(kvm.slots(), [(0, MIB)]);
            assert!(!ram.memory().address_in_range(GuestAddress(5 * MIB)));
            assert_eq!(
                view.read_obj::<u8>(GuestAddress(5 * MIB)).ok(),
                Some(7),
                "a view that was taken before keeps the mapping"
            );
        }
    }

    #[test]
    fn what_is_not_a_region_is_not_removed() {
        let (memory, kvm) = StandIn::memory(&[(0, MIB)]);
        let slot = memory.add_region(4 * MIB, MIB).expect("added");
        for base in [MIB, 4 * MIB + PAGE, 5 * MIB, u64::MAX] {
            let result = memory.remove_region_at(base);
            assert!(matches!(result, Err(Error::Absent { .. })), "{result:?}");
        }
        memory.remove_region(slot).expect("removed");
        let result = memory.remove_region(slot);
        assert!(matches!(result, Err(Error::Empty(_))), "{result:?}");
        assert_eq!(kvm.slots(), [(0, MIB)]);
    }

    #[test]
    fn what_kvm_or_the_layout_refuses_changes_nothing() {
        let (memory, kvm) = StandIn::limited(&[(0, MIB)], 2);
        let overlap = memory.add_region(MIB - PAGE, MIB);
        assert!(matches!(overlap, Err(Error::Layout { .. })), "{overlap:?}");
        let wrapping = memory.add_region(u64::MAX - PAGE + 1, 2 * PAGE);
        assert!(
            matches!(wrapping, Err(Error::Layout { .. })),
            "{wrapping:?}"
        );
        kvm.refuse_additions(true);
        let refused = memory.add_region(MIB, MIB);
        assert!(matches!(refused, Err(Error::Slot { .. })), "{refused:?}");
        assert_eq!((memory.size(), kvm.slots()), (MIB, vec![(0, MIB)]));
        kvm.refuse_additions(false);
        memory.add_region(MIB, MIB).expect("the number came back");
        let exhausted = memory.add_region(2 * MIB, MIB);
        assert!(
            matches!(exhausted, Err(Error::Exhausted { .. })),
            "{exhausted:?}"
        );
        kvm.refuse_removals(true);
        let kept = memory.remove_region_at(MIB);
        assert!(matches!(kept, Err(Error::Slot { .. })), "{kept:?}");
        assert_eq!(memory.size(), 2 * MIB);
        assert!(memory.ram().memory().address_in_range(GuestAddress(MIB)));
        kvm.refuse_removals(false);
        memory.remove_region_at(MIB).expect("removed");
    }

    #[test]
    fn discarded_memory_reads_as_zeros_and_stays_the_guests() {
        let (memory, kvm) = StandIn::memory(&[(0, MIB), (MIB, MIB)]);
        let view = memory.ram().memory();
        let bytes = vec![0xaa; 2 * MIB as usize];
        view.write_slice(&bytes, GuestAddress(0)).expect("written");
        memory.discard(MIB - PAGE, 2 * PAGE).expect("discarded");
        let value = |address| view.read_obj::<u8>(GuestAddress(address)).ok();
        assert_eq!(value(MIB - PAGE - 1), Some(0xaa));
        assert_eq!(value(MIB - PAGE), Some(0));
        assert_eq!(value(MIB + PAGE - 1), Some(0));
        assert_eq!(value(MIB + PAGE), Some(0xaa));
        assert_eq!(kvm.slots(), [(0, MIB), (MIB, MIB)]);
        assert!(memory.discard(MIB, MIB + PAGE).is_err());
    }

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

    #[test]
    fn mappings_ask_for_huge_pages() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            return;
        }
        let region = map(0, 4 * MIB).expect("mapped");
        let address = region.as_ptr() as usize;
        // Neighbours that are alike are shown as one.
        let holds = |line: &&str| {
            let ends = line.split_whitespace().next()?.split_once('-')?;
            let [begin, end] = [ends.0, ends.1].map(|end| usize::from_str_radix(end, 16));
            (begin.ok()? <= address && address < end.ok()?).then_some(())
        };
        let smaps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
        let mapping = smaps
            .lines()
            .skip_while(|line| holds(line).is_none())
            .find_map(|line| line.strip_prefix("VmFlags:"));
        let flags = mapping.expect("the mapping");
        assert!(flags.split_whitespace().any(|flag| flag == "hg"), "{flags}");
    }
}
