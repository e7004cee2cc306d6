//! The targets over pseudo-random input.

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

use super::*;

/// Runs a target over the seeds, over noise, and over seeds with noise in them; the same each time.
fn rehearse(name: &str) {
    let target = targets()
        .into_iter()
        .find(|target| target.name == name)
        .expect("a target");
    let seeds = (target.seeds)();
    for seed in &seeds {
        (target.run)(seed);
    }
    let noise = || prop::collection::vec(any::<u8>(), 0..2048);
    let edits = prop::collection::vec((any::<Index>(), any::<u8>()), 1..16);
    let edited = (prop::sample::select(seeds), edits, noise()).prop_map(|(seed, edits, end)| {
        let mut bytes = seed;
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.extend(end);
        bytes
    });
    let config = ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let run = |bytes: Vec<u8>| {
        (target.run)(&bytes);
        Ok(())
    };
    if let Err(failure) =
        TestRunner::new_with_rng(config, rng).run(&prop_oneof![noise(), edited], run)
    {
        panic!("{}: {failure}", target.name);
    }
}

#[test]
fn frames_of_a_hostile_agent_neither_hang_nor_panic() {
    rehearse("agent");
}

#[test]
fn a_guest_that_resizes_as_it_likes_leaves_sizes_that_can_be_had() {
    rehearse("resize");
}

#[test]
fn lies_of_the_agent_leave_every_exit_told_once() {
    rehearse("shim");
}

#[test]
fn what_a_guest_prints_is_bounded_and_printable() {
    rehearse("console");
}

#[test]
fn an_adapted_specification_has_nothing_of_the_host() {
    rehearse("spec");
}

#[test]
fn any_bootstrap_is_answered() {
    rehearse("bootstrap");
}

#[test]
fn a_record_is_read_whole_or_refused() {
    rehearse("record");
}
