//! See `outrigger::fuzz::path`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| outrigger::fuzz::path(bytes));
