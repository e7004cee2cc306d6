//! Which blocks are plugged: one bit each, bounded by the size of the region.

use std::ops::Range;

/// A bit a block, all clear at first. Ranges lie within its length.
#[derive(Debug, Clone)]
pub(super) struct Blocks {
    words: Vec<u64>,
    len: u32,
}

const WORD: u32 = u64::BITS;

impl Blocks {
    pub fn new(len: u32) -> Self {
        Self {
            words: vec![0; len.div_ceil(WORD) as usize],
            len,
        }
    }

    pub fn len(&self) -> u32 {
        self.len
    }

    pub fn set(&mut self, range: Range<u32>) {
        for (word, mask) in self.masks(range) {
            self.words[word] |= mask;
        }
    }

    pub fn clear(&mut self, range: Range<u32>) {
        for (word, mask) in self.masks(range) {
            self.words[word] &= !mask;
        }
    }

    /// How many of the range's bits are set.
    pub fn count(&self, range: Range<u32>) -> u32 {
        self.masks(range)
            .map(|(word, mask)| (self.words[word] & mask).count_ones())
            .sum()
    }

    /// The words that a range lies in, each with the bits that belong to it.
    fn masks(&self, range: Range<u32>) -> impl Iterator<Item = (usize, u64)> + use<> {
        debug_assert!(range.end <= self.len, "{range:?} of {}", self.len);
        let Range { start, end } = range;
        let words = if start < end {
            start / WORD..end.div_ceil(WORD)
        } else {
            0..0
        };
        words.map(move |word| {
            let from = start.saturating_sub(word * WORD);
            let to = (end - word * WORD).min(WORD);
            (word as usize, u64::MAX >> (WORD - (to - from)) << from)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_change_their_bits_and_no_others() {
        for (start, end) in [
            (0, 0),
            (0, 1),
            (63, 64),
            (63, 65),
            (64, 128),
            (1, 199),
            (0, 200),
            (199, 200),
            (200, 200),
        ] {
            let mut blocks = Blocks::new(200);
            blocks.set(start..end);
            assert_eq!(blocks.count(0..200), end - start, "{start}..{end}");
            assert_eq!(blocks.count(start..end), end - start, "{start}..{end}");
            assert_eq!(blocks.count(0..start), 0, "{start}..{end}");
            blocks.set(0..200);
            blocks.clear(start..end);
            assert_eq!(blocks.count(0..200), 200 - (end - start), "{start}..{end}");
        }
    }

    proptest! {
        #[test]
        fn it_is_the_same_as_a_list_of_flags(
            steps in prop::collection::vec((any::<bool>(), 0..300_u32, 0..300_u32), 0..20),
        ) {
            let mut blocks = Blocks::new(300);
            let mut flags = vec![false; 300];
            for (set, a, b) in steps {
                let range = a.min(b)..a.max(b);
                flags[range.start as usize..range.end as usize].fill(set);
                if set {
                    blocks.set(range);
                } else {
                    blocks.clear(range);
                }
                for (at, flag) in flags.iter().enumerate() {
                    let at = at as u32;
                    prop_assert_eq!(blocks.count(at..at + 1) == 1, *flag);
                }
            }
        }
    }
}
