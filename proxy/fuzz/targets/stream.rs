//! See `outrigger::fuzz::stream`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| outrigger::fuzz::stream(bytes));
