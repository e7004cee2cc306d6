//! The driver's side of one queue, for tests: writes rings and descriptors as
//! it is told, nonsense included.

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub(crate) const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub(crate) const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub(crate) const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// Two regions that touch at [`SEAM`], a gap from [`GAP`], a third region, and its end.
pub(crate) const SEAM: u64 = 0x10_0000;
pub(crate) const GAP: u64 = 0x20_0000;
pub(crate) const ISLAND: u64 = 0x40_0000;
pub(crate) const END: u64 = 0x50_0000;
/// Free for buffers: the rings are below.
pub(crate) const DATA: u64 = 0x2_0000;

pub(crate) const DESCRIPTORS: u64 = 0x1000;
pub(crate) const AVAILABLE: u64 = 0x1_0000;
pub(crate) const USED: u64 = 0x1_4000;

pub(crate) fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0), SEAM as usize),
        (GuestAddress(SEAM), (GAP - SEAM) as usize),
        (GuestAddress(ISLAND), (END - ISLAND) as usize),
    ])
    .expect("guest memory")
}

/// One buffer of a chain: address, length, whether the device writes it.
pub(crate) type Part = (u64, u32, bool);

pub(crate) struct Driver {
    pub memory: GuestMemoryMmap,
    pub size: u16,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
}

impl Driver {
    pub fn new(memory: GuestMemoryMmap, size: u16) -> Self {
        Self {
            memory,
            size,
            next_descriptor: 0,
            next_available: 0,
            next_used: 0,
        }
    }

    pub fn queue(&self, event_idx: bool) -> Queue {
        let mut queue = Queue::new(self.size).expect("a queue");
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        queue
    }

    pub fn write<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory
            .write_obj(value, GuestAddress(address))
            .expect("in guest memory");
    }

    pub fn read<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        self.memory
            .read_obj(GuestAddress(address))
            .expect("in guest memory")
    }

    pub fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .expect("in guest memory");
        bytes
    }

    pub fn fill(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .expect("in guest memory");
    }

    /// Writes one descriptor into a table that may also be an indirect one.
    pub fn descriptor(
        &self,
        table: u64,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let at = table + u64::from(index) * 16;
        self.write(at, address);
        self.write(at + 8, len);
        self.write(at + 12, flags);
        self.write(at + 14, next);
    }

    /// Links `parts` in the main table from where the last chain ended, and offers the chain.
    pub fn chain(&mut self, parts: &[Part]) -> u16 {
        let head = self.next_descriptor;
        for (i, &(address, len, writable)) in parts.iter().enumerate() {
            let index = self.next_descriptor;
            let mut flags = if writable { WRITE } else { 0 };
            if i + 1 < parts.len() {
                flags |= NEXT;
            }
            self.descriptor(
                DESCRIPTORS,
                index,
                address,
                len,
                flags,
                (index + 1) % self.size,
            );
            self.next_descriptor = (index + 1) % self.size;
        }
        self.offer(head);
        head
    }

    /// Puts a head into the available ring.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        self.write(AVAILABLE + 4 + slot * 2, head);
        self.next_available = self.next_available.wrapping_add(1);
        self.write(AVAILABLE + 2, self.next_available);
    }

    /// Says after which used index it wants an interrupt (EVENT_IDX).
    pub fn want_interrupt_after(&self, used: u16) {
        self.write(AVAILABLE + 4 + u64::from(self.size) * 2, used);
    }

    /// The next chain that the device has returned: head and bytes written.
    pub fn used(&mut self) -> Option<(u32, u32)> {
        if self.read::<u16>(USED + 2) == self.next_used {
            return None;
        }
        let at = USED + 4 + u64::from(self.next_used % self.size) * 8;
        self.next_used = self.next_used.wrapping_add(1);
        Some((self.read(at), self.read(at + 4)))
    }
}
