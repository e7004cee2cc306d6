//! What comes to the shim from a hostile guest, and from callers that may be
//! mistaken, as functions of bytes: bodies of fuzz targets, which `tests/fuzz`
//! hands to libFuzzer and the tests below run over pseudo-random input. Each
//! ends by itself, panics when a promise is broken, and leaves nothing behind.
//! Only with the feature `fuzzing`.

mod files;
mod spec;

use crate::{sandbox, shim};

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
const OWN: &[Target] = &[
    Target {
        name: "agent",
        run: sandbox::fuzz::frames,
        seeds: sandbox::fuzz::frames_seeds,
    },
    Target {
        name: "resize",
        run: sandbox::resize::fuzz::run,
        seeds: sandbox::resize::fuzz::seeds,
    },
    Target {
        name: "shim",
        run: shim::task::fuzz::run,
        seeds: shim::task::fuzz::seeds,
    },
    Target {
        name: "console",
        run: sandbox::fuzz::console,
        seeds: sandbox::fuzz::console_seeds,
    },
    Target {
        name: "spec",
        run: spec::run,
        seeds: spec::seeds,
    },
    Target {
        name: "bootstrap",
        run: files::bootstrap,
        seeds: files::bootstrap_seeds,
    },
    Target {
        name: "record",
        run: files::record,
        seeds: files::record_seeds,
    },
];

/// All targets, the VMM's included (which tests its own).
pub fn targets() -> Vec<Target> {
    #[cfg(feature = "fuzzing")]
    let of_vmm = nacre_vmm::fuzzing::TARGETS.iter().map(|target| Target {
        name: target.name,
        run: target.run,
        seeds: target.seeds,
    });
    #[cfg(not(feature = "fuzzing"))]
    let of_vmm = [];
    OWN.iter().copied().chain(of_vmm).collect()
}

/// Runs one input of the target of this name.
///
/// # Panics
/// When the input breaks a promise, or there is no such target.
pub fn run(name: &str, data: &[u8]) {
    let mut targets = targets().into_iter();
    let target = targets.find(|target| target.name == name);
    (target.expect("a target of this name").run)(data);
}

#[cfg(test)]
mod tests;
