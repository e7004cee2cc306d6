//! See `nacre::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: nacre_fuzz::seed("mem"),
    |data: &[u8]| nacre::fuzzing::run("mem", data)
);
