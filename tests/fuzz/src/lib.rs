//! What the targets share. Their bodies are in `nacre::fuzzing`.

use std::path::PathBuf;

/// Writes the target's first inputs to the folder that `NACRE_FUZZ_SEEDS` names, if it is set: libFuzzer calls this before it
/// reads the corpus.
///
/// # Panics
/// When the folder cannot be written to.
pub fn seed(name: &str) {
    for target in nacre::fuzzing::targets() {
        if target.name == name {
            seed_with(target.seeds);
        }
    }
}

/// As [`seed`], for a target of another crate.
///
/// # Panics
/// As there.
pub fn seed_with(seeds: fn() -> Vec<Vec<u8>>) {
    let Some(folder) = std::env::var_os("NACRE_FUZZ_SEEDS").map(PathBuf::from) else {
        return;
    };
    std::fs::create_dir_all(&folder).expect("the folder for seeds");
    for (number, seed) in seeds().iter().enumerate() {
        std::fs::write(folder.join(format!("seed-{number}")), seed).expect("a seed");
    }
}
