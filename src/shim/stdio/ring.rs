//! Output that waits for its reader, in order and bounded.

use std::collections::VecDeque;

/// A queue of bytes.
#[derive(Debug, Default)]
pub struct Ring {
    bytes: VecDeque<u8>,
    dropped: u64,
}

impl Ring {
    /// Appends, whatever there is.
    pub fn push(&mut self, data: &[u8]) {
        self.bytes.extend(data);
    }

    /// Drops the oldest until at most `limit` bytes are left, and counts them.
    pub fn trim(&mut self, limit: usize) {
        let excess = self.bytes.len().saturating_sub(limit);
        self.bytes.drain(..excess);
        self.dropped += excess as u64;
    }

    /// The oldest bytes, as many as lie together.
    pub fn front(&self) -> &[u8] {
        self.bytes.as_slices().0
    }

    /// Takes the oldest `count` away.
    pub fn consume(&mut self, count: usize) {
        self.bytes.drain(..count.min(self.bytes.len()));
    }

    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether none wait.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes that were dropped since it was asked last.
    pub fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_go_first_and_are_counted() {
        let mut ring = Ring::default();
        ring.push(b"abcdef");
        ring.trim(4);
        assert_eq!(ring.front(), b"cdef");
        ring.consume(1);
        ring.push(b"gh");
        ring.trim(4);
        let mut all = Vec::new();
        while !ring.is_empty() {
            let front = ring.front().to_vec();
            all.extend_from_slice(&front);
            ring.consume(front.len());
        }
        assert_eq!(all, b"efgh");
        assert_eq!(
            (ring.take_dropped(), ring.take_dropped(), ring.len()),
            (3, 0, 0)
        );
    }
}
