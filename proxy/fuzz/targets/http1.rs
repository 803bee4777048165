//! See `outrigger::fuzz::http1`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| outrigger::fuzz::http1(bytes));
