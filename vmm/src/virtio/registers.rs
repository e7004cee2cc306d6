//! The page of registers that a driver reads.
//!
//! What a register holds changes when the driver writes one, and when the device says something: never by being read. So
//! each window's registers are kept in a page of memory as they would be read, and whoever maps the window may show the
//! guest that page, for reading only: reads then stay in the guest, those of the interrupt status above all, which come with every
//! interrupt. Writes leave it as before.
//!
//! The bits of the interrupt status, DEVICE_NEEDS_RESET in the status and the generation of the configuration have no other
//! place than the page.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::mmap::MmapRegionError;
use vm_memory::{MmapRegion, VolatileMemory};

use super::mmio::WINDOW_SIZE;

/// Pages one after another, each of which is a window's.
#[derive(Debug, Clone)]
pub struct RegisterPages {
    mapping: Arc<MmapRegion<()>>,
}

impl RegisterPages {
    /// So many, all zeros.
    ///
    /// # Errors
    ///
    /// If the host maps no more memory.
    pub fn new(windows: u8) -> Result<Self, MmapRegionError> {
        let mapping = MmapRegion::new(usize::from(windows) * WINDOW_SIZE as usize)?;
        Ok(Self {
            mapping: Arc::new(mapping),
        })
    }

    /// Where they are in this process, for as long as this value or a page of it lives; and their bytes.
    pub fn place(&self) -> (u64, u64) {
        (self.mapping.as_ptr() as u64, self.mapping.size() as u64)
    }

    /// The page of a window; `None` if there are not so many.
    pub fn page(&self, window: u8) -> Option<RegisterPage> {
        let start = usize::from(window) * WINDOW_SIZE as usize;
        (start < self.mapping.size()).then(|| RegisterPage {
            mapping: Arc::clone(&self.mapping),
            start,
        })
    }
}

/// The page of one window. Clones share it.
#[derive(Debug, Clone)]
pub struct RegisterPage {
    mapping: Arc<MmapRegion<()>>,
    start: usize,
}

impl RegisterPage {
    /// One that no guest is shown.
    ///
    /// # Errors
    ///
    /// If the host maps no more memory.
    pub fn alone() -> Result<Self, MmapRegionError> {
        let RegisterPages { mapping } = RegisterPages::new(1)?;
        Ok(Self { mapping, start: 0 })
    }

    /// The register at an offset that is one.
    pub(super) fn register(&self, offset: u32) -> &AtomicU32 {
        debug_assert!(offset.is_multiple_of(4) && u64::from(offset) < WINDOW_SIZE);
        // Pages are aligned, and there is one from `start` on.
        self.mapping
            .get_atomic_ref(self.start + offset as usize)
            .expect("a register lies within its page")
    }

    pub(super) fn set(&self, offset: u32, value: u32) {
        self.register(offset).store(value, Ordering::SeqCst);
    }

    /// Writes what lies within the page.
    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        if let Some((offset, len)) = self.within(offset, data.len())
            && let Ok(place) = self.mapping.get_slice(offset, len)
        {
            place.copy_from(&data[..len]);
        }
    }

    /// Reads; what lies outside of the page reads zero.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some((offset, len)) = self.within(offset, data.len())
            && let Ok(place) = self.mapping.get_slice(offset, len)
        {
            place.copy_to(&mut data[..len]);
        }
    }

    fn within(&self, offset: u64, len: usize) -> Option<(usize, usize)> {
        let left = WINDOW_SIZE.checked_sub(offset)?;
        Some((self.start + offset as usize, len.min(left as usize)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_do_not_reach_into_each_other() {
        let pages = RegisterPages::new(2).expect("mapped");
        let [first, second] = [0, 1].map(|window| pages.page(window).expect("there"));
        assert!(pages.page(2).is_none());
        assert_eq!(pages.place().1, 2 * WINDOW_SIZE);
        first.write(WINDOW_SIZE - 2, &[1, 2, 3, 4]);
        let mut data = [9; 4];
        second.read(0, &mut data);
        assert_eq!(data, [0; 4]);
        first.read(WINDOW_SIZE - 2, &mut data);
        assert_eq!(data, [1, 2, 0, 0]);
        for outside in [WINDOW_SIZE, WINDOW_SIZE + 1, u64::MAX] {
            first.write(outside, &[5; 8]);
            first.read(outside, &mut data);
            assert_eq!(data, [0; 4]);
        }
        second.read(0, &mut data);
        assert_eq!(data, [0; 4]);
        second.set(0x74, 0x0102_0304);
        second.read(0x74, &mut data);
        assert_eq!(data, [4, 3, 2, 1]);
    }
}
