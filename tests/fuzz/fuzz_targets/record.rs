//! See `nacre::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: nacre_fuzz::seed("record"),
    |data: &[u8]| nacre::fuzzing::run("record", data)
);
