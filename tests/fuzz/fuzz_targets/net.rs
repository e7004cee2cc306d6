//! See `nacre::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: nacre_fuzz::seed("net"),
    |data: &[u8]| nacre::fuzzing::run("net", data)
);
