//! Pages and ranges as the guest names them, checked and given back.

use vm_memory::GuestMemoryMmap;

use super::PAGE_BYTES;
use crate::memory::discard::{DiscardError, discard, discard_slice};
use crate::virtio::queue::{Buffers, Chain};

/// Page numbers of one inflate request that are looked at; Linux sends 256. Pages beyond are the
/// balloon's all the same, but keep their memory.
pub(super) const PAGES_PER_REQUEST: usize = 1024;

/// What came of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Given {
    /// Bytes given back to the host.
    pub bytes: u64,
    /// Pages (inflate) or ranges (report) that were not.
    pub refused: u64,
}

/// Gives back the pages whose 32-bit numbers are in `numbers`, neighbours at once. A page that is
/// named twice counts once; one that is not guest memory is refused, and only it.
pub(super) fn inflate(memory: &GuestMemoryMmap, mut numbers: Buffers<'_>) -> Given {
    let named = numbers.len() / 4;
    let count = named.min(PAGES_PER_REQUEST as u64);
    let mut bytes = vec![0; count as usize * 4];
    if numbers.read_exact(&mut bytes).is_err() {
        // There are that many; but nothing is given back that was not read.
        return Given::default();
    }
    let (words, _) = bytes.as_chunks::<4>();
    let mut pages: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    pages.sort_unstable();
    pages.dedup();
    let mut given = Given {
        bytes: 0,
        refused: named - count,
    };
    for run in pages.chunk_by(|page, next| page.checked_add(1) == Some(*next)) {
        match discard_pages(memory, run) {
            Ok(bytes) => given.bytes += bytes,
            Err(DiscardError::Absent { .. }) => {
                // Part of the run may be memory.
                for page in run.chunks(1) {
                    match discard_pages(memory, page) {
                        Ok(bytes) => given.bytes += bytes,
                        Err(_) => given.refused += 1,
                    }
                }
            }
            Err(error) => {
                tracing::debug!(%error, "pages in the balloon keep their memory");
                given.refused += run.len() as u64;
            }
        }
    }
    given
}

/// Discards pages with consecutive numbers; how many bytes.
fn discard_pages(memory: &GuestMemoryMmap, run: &[u32]) -> Result<u64, DiscardError> {
    let Some(&first) = run.first() else {
        return Ok(0);
    };
    let bytes = run.len() as u64 * PAGE_BYTES;
    discard(memory, u64::from(first) * PAGE_BYTES, bytes)?;
    Ok(bytes)
}

/// Gives back the buffers of a report: those that the device may write, each whole pages. That they
/// are guest memory is known of each chain; a range over a seam of two regions comes in two.
pub(super) fn report(chain: &Chain<'_>) -> Given {
    let mut given = Given {
        bytes: 0,
        // The device may not write to these, and discarding is no less than that.
        refused: chain.readable.slices().count() as u64,
    };
    for slice in chain.writable.slices() {
        match discard_slice(slice) {
            Ok(()) => given.bytes += slice.len() as u64,
            Err(error) => {
                tracing::debug!(%error, "a reported range keeps its memory");
                given.refused += 1;
            }
        }
    }
    given
}
