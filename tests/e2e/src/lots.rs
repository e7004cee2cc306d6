//! Numbers by lot, the same for the same beginning, so that a failure can be repeated.

/// SplitMix64.
#[derive(Debug)]
pub(crate) struct Lots(u64);

impl Lots {
    pub fn beginning(seed: u64) -> Self {
        eprintln!("  the lots begin with {seed}");
        Lots(seed)
    }

    /// From 0 to just below 1.
    pub fn part(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn below(&mut self, limit: usize) -> usize {
        ((self.part() * limit as f64) as usize).min(limit.saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lots_are_the_same_for_the_same_beginning_and_stay_below() {
        let (mut one, mut other) = (Lots::beginning(7), Lots::beginning(7));
        for _ in 0..1000 {
            let lot = one.below(10);
            assert_eq!(lot, other.below(10));
            assert!(lot < 10);
        }
        assert_ne!(Lots::beginning(1).part(), Lots::beginning(2).part());
    }
}
