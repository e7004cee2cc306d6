//! A byte queue of bounded size: what a connection holds in one direction.
//!
//! It takes memory as it fills, by doubling, and lends its free and its filled
//! part as slices, so that bytes are copied once on each way.

/// Smallest allocation.
const SMALLEST: usize = 4096;

/// Bytes, first in first out, at most `limit` of them.
#[derive(Debug)]
pub struct ByteRing {
    buffer: Vec<u8>,
    head: usize,
    len: usize,
    limit: usize,
}

impl ByteRing {
    /// An empty ring that owns no memory yet.
    pub fn new(limit: usize) -> Self {
        Self {
            buffer: Vec::new(),
            head: 0,
            len: 0,
            limit,
        }
    }

    /// Bytes held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that still fit.
    pub fn free(&self) -> usize {
        self.limit - self.len
    }

    /// Host memory held, in bytes.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn capacity(&self) -> usize {
        self.buffer.len()
    }

    /// Forgets all bytes and gives the memory back.
    pub fn release(&mut self) {
        *self = Self::new(self.limit);
    }

    /// Appends `count` bytes, at most [`ByteRing::free`], that `fill` writes into one or two
    /// slices in order.
    ///
    /// # Panics
    /// When `count` is more than is free: the caller has checked it.
    pub fn push_with(&mut self, count: usize, mut fill: impl FnMut(&mut [u8])) {
        assert!(
            count <= self.free(),
            "{count} bytes into a ring with {} free",
            self.free()
        );
        if count == 0 {
            return;
        }
        self.grow(self.len + count);
        let size = self.buffer.len();
        let tail = (self.head + self.len) % size;
        let first = count.min(size - tail);
        fill(&mut self.buffer[tail..tail + first]);
        if first < count {
            fill(&mut self.buffer[..count - first]);
        }
        self.len += count;
    }

    /// Appends as much of `bytes` as fits; gives how much.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.free());
        let mut rest = &bytes[..count];
        self.push_with(count, |dst| {
            let (now, later) = rest.split_at(dst.len());
            dst.copy_from_slice(now);
            rest = later;
        });
        count
    }

    /// The first `count` bytes or fewer, as they lie.
    pub fn front(&self, count: usize) -> [&[u8]; 2] {
        let count = count.min(self.len);
        let first = count.min(self.buffer.len() - self.head);
        [
            &self.buffer[self.head..self.head + first],
            &self.buffer[..count - first],
        ]
    }

    /// Drops the first `count` bytes, or all if there are fewer.
    pub fn consume(&mut self, count: usize) {
        let count = count.min(self.len);
        self.len -= count;
        self.head = if self.len == 0 {
            0
        } else {
            (self.head + count) % self.buffer.len()
        };
    }

    fn grow(&mut self, needed: usize) {
        if needed <= self.buffer.len() {
            return;
        }
        let size = needed
            .next_power_of_two()
            .max(SMALLEST)
            .min(self.limit.max(needed));
        let mut larger = vec![0; size];
        let [first, second] = self.front(self.len);
        larger[..first.len()].copy_from_slice(first);
        larger[first.len()..self.len].copy_from_slice(second);
        self.buffer = larger;
        self.head = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(ring: &ByteRing) -> Vec<u8> {
        ring.front(usize::MAX).concat()
    }

    #[test]
    fn takes_no_memory_until_used_and_no_more_than_its_limit() {
        let mut ring = ByteRing::new(10_000);
        assert_eq!(ring.capacity(), 0);
        assert_eq!(content(&ring), b"");
        assert_eq!(ring.push(&[1; 20_000]), 10_000);
        assert_eq!(ring.capacity(), 10_000);
        assert_eq!(ring.free(), 0);
        ring.release();
        assert_eq!((ring.capacity(), ring.len(), ring.free()), (0, 0, 10_000));
    }

    #[test]
    fn keeps_order_across_the_wrap_and_while_growing() {
        let mut ring = ByteRing::new(3 * SMALLEST);
        let mut expected = std::collections::VecDeque::new();
        let mut next = 0u8;
        for round in 0..4000usize {
            let count = (round * 37) % 900;
            let bytes: Vec<u8> = (0..count)
                .map(|_| {
                    next = next.wrapping_add(1);
                    next
                })
                .collect();
            let taken = ring.push(&bytes);
            assert_eq!(taken, count.min(3 * SMALLEST - expected.len()));
            expected.extend(&bytes[..taken]);
            let out = (round * 53) % 950;
            let front = ring.front(out).concat();
            let drained: Vec<u8> = expected.drain(..out.min(expected.len())).collect();
            assert_eq!(front, drained);
            ring.consume(out);
            assert_eq!(ring.len(), expected.len());
        }
        assert_eq!(content(&ring), expected.make_contiguous());
    }
}
