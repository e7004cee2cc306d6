//! The guest's statistics of its memory (virtio 1.3 section 5.5.6.3).

use serde::Serialize;

use crate::virtio::queue::Buffers;

/// `struct virtio_balloon_stat`: a tag of 16 bits and a value of 64.
const ENTRY_BYTES: usize = 10;
/// Entries that are looked at: more than there are tags.
const MOST_ENTRIES: usize = 64;

/// What a guest tells of its memory, by the specification's names. Any of it may be missing, and all of it is
/// the guest's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct GuestStats {
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Major page faults.
    pub major_faults: Option<u64>,
    /// Minor page faults.
    pub minor_faults: Option<u64>,
    /// Bytes that are not used for anything.
    pub free: Option<u64>,
    /// Bytes in all.
    pub total: Option<u64>,
    /// Bytes that new programs could have without swapping: an estimate.
    pub available: Option<u64>,
    /// Bytes that could be had at once, such as those of cached files.
    pub caches: Option<u64>,
    /// Huge pages allocated.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be.
    pub hugetlb_failures: Option<u64>,
}

impl GuestStats {
    /// Reads what the driver put into its buffer: any order, tags that are not known left out,
    /// the last of several with one tag.
    pub(super) fn read(mut buffer: Buffers<'_>) -> Self {
        let mut stats = Self::default();
        let mut entry = [0; ENTRY_BYTES];
        for _ in 0..MOST_ENTRIES {
            if buffer.read_exact(&mut entry).is_err() {
                break;
            }
            let [t0, t1, value @ ..] = entry;
            let value = Some(u64::from_le_bytes(value));
            match u16::from_le_bytes([t0, t1]) {
                0 => stats.swap_in = value,
                1 => stats.swap_out = value,
                2 => stats.major_faults = value,
                3 => stats.minor_faults = value,
                4 => stats.free = value,
                5 => stats.total = value,
                6 => stats.available = value,
                7 => stats.caches = value,
                8 => stats.hugetlb_allocations = value,
                9 => stats.hugetlb_failures = value,
                _ => {}
            }
        }
        stats
    }
}
