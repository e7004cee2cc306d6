//! See `nacre_fs::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: nacre_fuzz::seed_with(nacre_fs::fuzzing::seeds),
    |data: &[u8]| nacre_fs::fuzzing::run(data)
);
