//! Random requests: see the crate's `fuzzing`.

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

use crate::fuzzing::{run, seeds};

#[test]
fn hostile_requests_touch_nothing_else_and_are_answered_or_not() {
    for seed in seeds() {
        run(&seed);
    }
    let noise = || prop::collection::vec(any::<u8>(), 0..1024);
    let edits = prop::collection::vec((any::<Index>(), any::<u8>()), 1..16);
    let edited = (prop::sample::select(seeds()), edits, noise()).prop_map(|(seed, edits, end)| {
        let mut bytes = seed;
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.extend(end);
        bytes
    });
    let config = ProptestConfig {
        cases: 100,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let strategy = prop_oneof![noise(), edited];
    if let Err(failure) = TestRunner::new_with_rng(config, rng).run(&strategy, |bytes| {
        run(&bytes);
        Ok(())
    }) {
        panic!("{failure}");
    }
}
