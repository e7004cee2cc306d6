//! The driver's side of one queue with EVENT_IDX (virtio 1.3, 2.7.7 and 2.7.10).

use std::sync::atomic::fence;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;

/// The driver's side of one queue, whose chains have one descriptor and come back in order.
pub(super) struct Ring {
    pub memory: GuestMemoryMmap,
    /// What the rings and the table are above those of the first queue.
    beside: u64,
    size: u16,
    kick: Arc<EventFd>,
    /// Chains that were offered so far, as an index.
    pub offered: u16,
    /// What of it the device can see.
    shown: u16,
    /// Chains that were taken back so far.
    pub taken: u16,
}

impl Ring {
    pub fn new(driver: &Driver, beside: u64, kick: &Arc<EventFd>) -> Self {
        Self {
            memory: driver.memory.clone(),
            beside,
            size: driver.size,
            kick: Arc::clone(kick),
            offered: 0,
            shown: 0,
            taken: 0,
        }
    }

    fn load(&self, at: u64, order: Ordering) -> u16 {
        let at = GuestAddress(at + self.beside);
        self.memory.load(at, order).unwrap()
    }

    fn store(&self, at: u64, value: u16, order: Ordering) {
        let at = GuestAddress(at + self.beside);
        self.memory.store(value, at, order).unwrap();
    }

    fn used_event(&self) -> u64 {
        AVAILABLE + 4 + u64::from(self.size) * 2
    }

    fn avail_event(&self) -> u64 {
        USED + 4 + u64::from(self.size) * 8
    }

    /// With the device, as far as the driver knows.
    pub fn outstanding(&self) -> u16 {
        self.offered.wrapping_sub(self.taken)
    }

    pub fn room(&self) -> u16 {
        self.size - self.outstanding()
    }

    /// Where the chain goes that is offered next.
    pub fn slot(&self) -> u64 {
        u64::from(self.offered % self.size)
    }

    /// Offers a chain, which the device does not see yet.
    pub fn put(&mut self, address: u64, len: u32, flags: u16) {
        let slot = self.slot();
        let at = GuestAddress(DESCRIPTORS + self.beside / 2 + slot * 16);
        // struct virtq_desc: the address, then length, flags and no next one.
        let rest = u64::from(len) | u64::from(flags) << 32;
        self.memory.write_obj([address, rest], at).unwrap();
        self.store(AVAILABLE + 4 + slot * 2, slot as u16, Ordering::Relaxed);
        self.offered = self.offered.wrapping_add(1);
    }

    /// Shows the device what is offered, and kicks if it listens for that (virtio 1.3, 2.7.10).
    pub fn show(&mut self) {
        let (old, new) = (self.shown, self.offered);
        self.shown = new;
        self.store(AVAILABLE + 2, new, Ordering::Release);
        fence(Ordering::SeqCst);
        let event = self.load(self.avail_event(), Ordering::Relaxed);
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            self.kick.write(1).unwrap();
        }
    }

    pub fn used(&self) -> u16 {
        self.load(USED + 2, Ordering::Acquire)
    }

    /// The next chain that is back: its slot, and the bytes written.
    pub fn take(&mut self) -> Option<(u64, u32)> {
        if self.used() == self.taken {
            return None;
        }
        let slot = u64::from(self.taken % self.size);
        let at = GuestAddress(USED + self.beside + 4 + slot * 8);
        let [head, len]: [u32; 2] = self.memory.read_obj(at).unwrap();
        assert_eq!(u64::from(head), slot, "in another order");
        self.taken = self.taken.wrapping_add(1);
        Some((slot, len))
    }

    /// Asks for an interrupt once more than `more` chains are back; whether it is still to come.
    pub fn want_interrupt(&self, more: u16) -> bool {
        let event = self.taken.wrapping_add(more);
        self.store(self.used_event(), event, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.used().wrapping_sub(self.taken) <= more
    }

    /// Looks for so many microseconds, or until what it looks for is there.
    pub fn watch(&self, micros: u64, found: impl Fn(&Self) -> bool) {
        let until = Instant::now() + Duration::from_micros(micros);
        while !found(self) && Instant::now() < until {
            std::hint::spin_loop();
        }
    }

    pub fn state(&self) -> String {
        let of = |at| self.load(at, Ordering::SeqCst);
        format!(
            "available {}, kick wanted after {}, used {}, interrupt wanted after {}",
            of(AVAILABLE + 2),
            of(self.avail_event()),
            of(USED + 2),
            of(self.used_event())
        )
    }
}
