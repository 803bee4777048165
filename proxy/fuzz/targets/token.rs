//! See `outrigger::fuzz::token`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| outrigger::fuzz::token(bytes));
