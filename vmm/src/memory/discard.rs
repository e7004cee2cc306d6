//! Gives guest memory back to the host without taking it away from the guest.
//!
//! A discarded page takes no host memory and reads as zeros until something writes it again. This
//! holds for the private anonymous mappings that all of a VM's regions are.

use std::io;

use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use super::layout::PAGE;

/// A range could not be given back; see each case for what of it was.
#[derive(Debug, Error)]
pub enum DiscardError {
    /// It does not begin or end at a page. Nothing was given back.
    #[error("cannot give back {size} bytes of guest memory at {base:#x}: they are not whole pages")]
    Unaligned {
        /// Guest-physical address.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// It is not, or not all, guest memory. Nothing was given back.
    #[error(
        "cannot give back {size} bytes of guest memory at {base:#x}: not all of it is guest memory"
    )]
    Absent {
        /// Guest-physical address.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// The host refused, as it does for memory that is locked. Part may have been given back.
    #[error("cannot give back {size} bytes of guest memory at {base:#x}")]
    Refused {
        /// Guest-physical address.
        base: u64,
        /// Bytes.
        size: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Discards `size` bytes from the guest-physical address `base` on; both are multiples of a page
/// (4096), and the range may span regions that touch.
///
/// # Errors
///
/// [`DiscardError`].
pub fn discard(memory: &GuestMemoryMmap, base: u64, size: u64) -> Result<(), DiscardError> {
    if !base.is_multiple_of(PAGE) || !size.is_multiple_of(PAGE) {
        return Err(DiscardError::Unaligned { base, size });
    }
    let absent = || DiscardError::Absent { base, size };
    let count = usize::try_from(size).map_err(|_| absent())?;
    let slices = memory
        .get_slices(GuestAddress(base), count)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| absent())?;
    for slice in &slices {
        discard_slice(slice).map_err(|source| DiscardError::Refused { base, size, source })?;
    }
    Ok(())
}

/// Discards a slice of guest memory, as a descriptor chain gives them.
///
/// # Errors
///
/// [`io::ErrorKind::InvalidInput`] if it is not whole pages, else what the host says.
pub fn discard_slice(slice: &VolatileSlice<'_>) -> io::Result<()> {
    let guard = slice.ptr_guard_mut();
    let address = guard.as_ptr();
    if !(address as u64).is_multiple_of(PAGE) || !(slice.len() as u64).is_multiple_of(PAGE) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a range that is not whole pages",
        ));
    }
    // SAFETY: the slice is of a mapping that the borrowed view keeps, so that nothing else is at
    // these addresses. Their content changes to zeros, which for memory that the guest may write
    // at any time is nothing new: there are no Rust references into it.
    match unsafe { libc::madvise(address.cast(), slice.len(), libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    const SEAM: u64 = 4 * PAGE;
    const GAP: u64 = 8 * PAGE;
    const ISLAND: u64 = 16 * PAGE;

    /// Two regions that touch, a gap, and a third; full of ones.
    fn memory() -> GuestMemoryMmap {
        let memory = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), SEAM as usize),
            (GuestAddress(SEAM), (GAP - SEAM) as usize),
            (GuestAddress(ISLAND), PAGE as usize),
        ])
        .expect("guest memory");
        for base in [0, SEAM, ISLAND] {
            let len = if base == ISLAND { PAGE } else { SEAM };
            memory
                .write_slice(&vec![0xff; len as usize], GuestAddress(base))
                .expect("written");
        }
        memory
    }

    fn pages(memory: &GuestMemoryMmap) -> Vec<u64> {
        let full = |page: &u64| {
            memory
                .read_obj::<u64>(GuestAddress(page * PAGE))
                .is_ok_and(|value| value == u64::MAX)
        };
        (0..17).filter(|page| !full(page)).collect()
    }

    #[test]
    fn pages_are_gone_across_a_seam_and_only_they() {
        let memory = memory();
        discard(&memory, SEAM - PAGE, 2 * PAGE).expect("discarded");
        let gap = 8..16;
        let expected: Vec<u64> = [3, 4].into_iter().chain(gap).collect();
        assert_eq!(pages(&memory), expected);
    }

    #[test]
    fn what_is_not_whole_pages_of_guest_memory_is_refused_and_left_alone() {
        let memory = memory();
        let before = pages(&memory);
        for (base, size) in [(1, PAGE), (0, 1), (0, PAGE + 8), (PAGE - 1, PAGE + 1)] {
            let result = discard(&memory, base, size);
            assert!(
                matches!(result, Err(DiscardError::Unaligned { .. })),
                "{size} at {base:#x}: {result:?}"
            );
        }
        for (base, size) in [
            (GAP, PAGE),
            (GAP - PAGE, 2 * PAGE),
            (ISLAND, 2 * PAGE),
            (ISLAND - PAGE, 2 * PAGE),
            (0, ISLAND + PAGE),
            (1 << 52, PAGE),
            (u64::MAX - PAGE + 1, PAGE),
            (u64::MAX - PAGE + 1, 2 * PAGE),
            (PAGE, u64::MAX - PAGE + 1),
        ] {
            let result = discard(&memory, base, size);
            assert!(
                matches!(result, Err(DiscardError::Absent { .. })),
                "{size:#x} at {base:#x}: {result:?}"
            );
        }
        assert_eq!(pages(&memory), before);
    }

    #[test]
    fn nothing_can_be_discarded_anywhere_in_memory() {
        discard(&memory(), PAGE, 0).expect("nothing");
    }

    #[test]
    fn a_slice_of_half_a_page_is_refused() {
        let memory = memory();
        for (base, len) in [(8, PAGE as usize), (0, 8)] {
            let slice = memory.get_slice(GuestAddress(base), len).expect("a slice");
            let error = discard_slice(&slice).expect_err("refused");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
