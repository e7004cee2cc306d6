//! The two buses of the machine: I/O ports and memory-mapped registers.
//!
//! A bus is built before the first vCPU runs and does not change afterwards, so an access takes no
//! lock to find its device. What sits at an address that may be empty (a virtio-mmio window) is a
//! device of its own that knows whether something is in it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

/// A device on a bus. Called from vCPU threads, several at once.
///
/// `data` is 1 to 8 bytes on the MMIO bus and 1, 2 or 4 on the port bus, at any alignment: the
/// guest decides. No access may panic; what has no meaning reads all ones and writes nothing.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` from the start of the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset` from the start of the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Two devices want the same addresses, or a range is empty or wraps.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "cannot put {length:#x} bytes at {base:#x} on the {bus} bus: the range is empty, wraps or overlaps another"
)]
pub struct Overlap {
    bus: &'static str,
    base: u64,
    length: u64,
}

struct Range {
    length: u64,
    device: Arc<dyn BusDevice>,
}

/// An address space with devices in it.
pub struct Bus {
    name: &'static str,
    ranges: BTreeMap<u64, Range>,
    unknown_reads: AtomicU64,
    unknown_writes: AtomicU64,
}

impl Bus {
    /// An empty bus; `name` is for logs ("port", "MMIO").
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            ranges: BTreeMap::new(),
            unknown_reads: AtomicU64::new(0),
            unknown_writes: AtomicU64::new(0),
        }
    }

    /// Puts a device at `base..base + length`.
    ///
    /// # Errors
    ///
    /// If the range is empty, wraps, or overlaps one that is there.
    pub fn insert(
        &mut self,
        base: u64,
        length: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), Overlap> {
        let overlap = Overlap {
            bus: self.name,
            base,
            length,
        };
        if length == 0 {
            return Err(overlap);
        }
        let Some(last) = base.checked_add(length - 1) else {
            return Err(overlap);
        };
        // Ranges do not overlap each other, so the last that begins before our end is the only one
        // that can reach into us.
        if let Some((&start, range)) = self.ranges.range(..=last).next_back()
            && start + (range.length - 1) >= base
        {
            return Err(overlap);
        }
        self.ranges.insert(base, Range { length, device });
        Ok(())
    }

    /// Reads; where there is no device all bits are one, and the access is counted.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => device.read(offset, data),
            None => {
                data.fill(0xff);
                let count = self.unknown_reads.fetch_add(1, Ordering::Relaxed);
                if count < LOGGED {
                    tracing::debug!(
                        bus = self.name,
                        address = format_args!("{address:#x}"),
                        size = data.len(),
                        "read of nothing"
                    );
                }
            }
        }
    }

    /// Writes; where there is no device nothing happens, and the access is counted.
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => device.write(offset, data),
            None => {
                let count = self.unknown_writes.fetch_add(1, Ordering::Relaxed);
                if count < LOGGED {
                    tracing::debug!(
                        bus = self.name,
                        address = format_args!("{address:#x}"),
                        size = data.len(),
                        "write to nothing"
                    );
                }
            }
        }
    }

    /// Reads that found no device.
    pub fn unknown_reads(&self) -> u64 {
        self.unknown_reads.load(Ordering::Relaxed)
    }

    /// Writes that found no device.
    pub fn unknown_writes(&self) -> u64 {
        self.unknown_writes.load(Ordering::Relaxed)
    }

    /// The device that the whole access falls into, and the offset in it.
    fn find(&self, address: u64, size: usize) -> Option<(u64, &dyn BusDevice)> {
        let (&start, range) = self.ranges.range(..=address).next_back()?;
        let offset = address - start;
        let end = offset.checked_add(size as u64)?;
        (end <= range.length).then(|| (offset, range.device.as_ref()))
    }
}

/// Accesses to nothing that are logged one by one; the guest can make any number.
const LOGGED: u64 = 16;

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0
                .lock()
                .expect("not poisoned")
                .push((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_reaches_the_device_it_falls_into_whole() {
        let device = Arc::new(Recorder::default());
        let mut bus = Bus::new("test");
        bus.insert(0x10, 4, device.clone()).expect("free");
        bus.write(0x12, &[7, 8]);
        assert_eq!(*device.0.lock().expect("lock"), vec![(2, vec![7, 8])]);
        let mut data = [0; 4];
        bus.read(0x10, &mut data);
        assert_eq!(data, [0; 4]);
        // Over the end, before the start, behind the end.
        for (address, size) in [(0x12, 3), (0xf, 1), (0x14, 1), (u64::MAX, 8)] {
            let mut data = vec![0; size];
            bus.read(address, &mut data);
            assert_eq!(data, vec![0xff; size], "{address:#x}");
            bus.write(address, &data);
        }
        assert_eq!((bus.unknown_reads(), bus.unknown_writes()), (4, 4));
        assert_eq!(device.0.lock().expect("lock").len(), 1);
    }

    #[test]
    fn overlaps_are_refused() {
        let device = Arc::new(Recorder::default());
        let mut bus = Bus::new("test");
        bus.insert(0x10, 0x10, device.clone()).expect("free");
        for (base, length) in [
            (0x10, 1),
            (0x1f, 1),
            (0, 0x11),
            (0, 0x100),
            (0x18, 0x100),
            (0x40, 0),
            (u64::MAX, 2),
        ] {
            assert!(
                bus.insert(base, length, device.clone()).is_err(),
                "{base:#x}+{length:#x}"
            );
        }
        bus.insert(0x20, 1, device.clone()).expect("behind");
        bus.insert(0xf, 1, device.clone()).expect("before");
        bus.insert(u64::MAX, 1, device).expect("the last address");
    }
}
