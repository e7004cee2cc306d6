//! What a hostile guest can send to the VMM, as functions of bytes: bodies of
//! fuzz targets, which `tests/fuzz` hands to libFuzzer and the tests below run
//! over pseudo-random input. Each ends by itself, panics when a promise is
//! broken, and leaves nothing behind. Only with the feature `fuzzing`.

mod virtio;
mod vsock;

/// A fuzz target.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name: also the libFuzzer target's, and its corpus folder's.
    pub name: &'static str,
    /// Runs one input.
    pub run: fn(&[u8]),
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// The targets of this crate.
pub const TARGETS: &[Target] = &[
    Target {
        name: "virtio",
        run: virtio::run,
        seeds: virtio::seeds,
    },
    Target {
        name: "mem",
        run: virtio::mem,
        seeds: virtio::mem_seeds,
    },
    Target {
        name: "balloon",
        run: virtio::balloon,
        seeds: virtio::balloon_seeds,
    },
    Target {
        name: "net",
        run: virtio::net,
        seeds: virtio::net_seeds,
    },
    Target {
        name: "vsock",
        run: vsock::run,
        seeds: vsock::seeds,
    },
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;
    use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

    use super::*;

    /// Runs a target over the seeds, over noise, and over seeds with noise in them; the same each time.
    fn rehearse(target: &Target) {
        let seeds = (target.seeds)();
        for seed in &seeds {
            (target.run)(seed);
        }
        let noise = || prop::collection::vec(any::<u8>(), 0..2048);
        let edits = prop::collection::vec((any::<Index>(), any::<u8>()), 1..16);
        let edited =
            (prop::sample::select(seeds), edits, noise()).prop_map(|(seed, edits, end)| {
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

    fn rehearse_named(name: &str) {
        let target = TARGETS.iter().find(|target| target.name == name);
        rehearse(target.expect("a target of this name"));
    }

    #[test]
    fn hostile_drivers_of_virtio_devices_break_nothing() {
        rehearse_named("virtio");
    }

    #[test]
    fn hostile_drivers_of_the_memory_device_break_nothing() {
        rehearse_named("mem");
    }

    #[test]
    fn hostile_drivers_of_the_balloon_break_nothing() {
        rehearse_named("balloon");
    }

    #[test]
    fn hostile_drivers_of_the_network_device_break_nothing() {
        rehearse_named("net");
    }

    #[test]
    fn hostile_vsock_packets_break_nothing() {
        rehearse_named("vsock");
    }
}
