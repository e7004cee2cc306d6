//! See `nacre::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: nacre_fuzz::seed("resize"),
    |data: &[u8]| nacre::fuzzing::run("resize", data)
);
