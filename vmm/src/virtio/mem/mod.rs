//! virtio-mem (virtio 1.3 section 5.15): memory that the guest plugs and
//! unplugs in blocks of 2 MiB, as the host requests it.
//!
//! `request` is the wire format, `region` the blocks with the KVM slots under
//! them, `host` the host's end, `device` the device. A slot exists while one
//! of its blocks is plugged; what is unplugged within it is discarded.

mod blocks;
mod device;
mod host;
mod region;
mod request;
#[cfg(test)]
mod tests;
mod work;

pub use device::Mem;
pub use host::{MemHost, MemStatus, RequestError};

use thiserror::Error;

/// Bytes of a block, the unit of plugging: a huge page.
pub const BLOCK_BYTES: u64 = 2 << 20;
/// Slots are multiples of this many bytes: the smallest unit in which Linux on x86 adds memory.
pub const SLOT_UNIT: u64 = 128 << 20;
/// Largest region in bytes: 1 TiB.
pub const MAXIMUM_REGION: u64 = 1 << 40;
/// A region ends here at the latest: what four levels of page tables in the guest reach.
const ADDRESS_END: u64 = 1 << 46;

/// Where a memory device's memory is. All in bytes.
///
/// Linux adds memory in whole memory blocks ([`linux_memory_block`]) and leaves unused what of the
/// usable region is less than one; the usable region grows by slots. So a slot should be a multiple
/// of the guest's memory block, and `base` a multiple of it, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemConfig {
    /// Guest-physical start of the region: a multiple of `slot_bytes`, outside all other memory.
    pub base: u64,
    /// Its size: a multiple of `slot_bytes`, at least one and at most [`MAXIMUM_REGION`]. Its end
    /// must be within the guest's physical addresses; here only 2^46 is checked.
    pub region_bytes: u64,
    /// Bytes of a KVM slot: a multiple of [`SLOT_UNIT`].
    pub slot_bytes: u64,
}

/// A memory device cannot be like this.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// The slots have no possible size.
    #[error(
        "memory slots of {bytes} bytes: a multiple of {} MiB is possible",
        SLOT_UNIT >> 20
    )]
    Slot {
        /// The size asked for.
        bytes: u64,
    },
    /// The region has no possible size.
    #[error(
        "a region of {bytes} bytes for the memory device: a multiple of its slots' {} MiB is possible, up to {} GiB",
        slot >> 20,
        MAXIMUM_REGION >> 30
    )]
    Region {
        /// The size asked for.
        bytes: u64,
        /// Bytes of a slot.
        slot: u64,
    },
    /// The region cannot be there.
    #[error(
        "a region for the memory device at {base:#x}: a multiple of its slots' {} MiB is possible, with the end at {ADDRESS_END:#x} at most",
        slot >> 20
    )]
    Base {
        /// The address asked for.
        base: u64,
        /// Bytes of a slot.
        slot: u64,
    },
}

impl MemConfig {
    /// Checks what is said of each field.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] for the first field that cannot be.
    pub fn check(&self) -> Result<(), ConfigError> {
        let Self {
            base,
            region_bytes,
            slot_bytes: slot,
        } = *self;
        if slot == 0 || !slot.is_multiple_of(SLOT_UNIT) {
            return Err(ConfigError::Slot { bytes: slot });
        }
        if region_bytes == 0 || !region_bytes.is_multiple_of(slot) || region_bytes > MAXIMUM_REGION
        {
            return Err(ConfigError::Region {
                bytes: region_bytes,
                slot,
            });
        }
        let end = base.checked_add(region_bytes);
        if !base.is_multiple_of(slot) || end.is_none_or(|end| end > ADDRESS_END) {
            return Err(ConfigError::Base { base, slot });
        }
        Ok(())
    }

    /// The usable part of the region for a requested size: whole slots. More would let the guest
    /// plug, and then touch, more slots than the request needs.
    fn usable(&self, requested: u64) -> u64 {
        requested
            .next_multiple_of(self.slot_bytes)
            .min(self.region_bytes)
    }
}

/// Bytes of the memory blocks in which a Linux guest on x86 adds memory, by where its boot memory
/// ends: 128 MiB below 64 GiB, else the largest power of two up to 2 GiB that the end is a
/// multiple of.
///
/// ```
/// # use nacre_vmm::virtio::mem::linux_memory_block;
/// assert_eq!(linux_memory_block(4 << 30), 128 << 20);
/// assert_eq!(linux_memory_block(65 << 30), 1 << 30);
/// assert_eq!(linux_memory_block(128 << 30), 2 << 30);
/// ```
pub const fn linux_memory_block(boot_memory_end: u64) -> u64 {
    const LARGEST: u32 = 31;
    const SMALLEST: u32 = 27;
    if boot_memory_end < 64 << 30 {
        return 1 << SMALLEST;
    }
    let exponent = boot_memory_end.trailing_zeros();
    if exponent > LARGEST {
        1 << LARGEST
    } else if exponent < SMALLEST {
        1 << SMALLEST
    } else {
        1 << exponent
    }
}
