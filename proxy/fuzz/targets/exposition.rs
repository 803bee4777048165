//! See `outrigger::fuzz::exposition`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| outrigger::fuzz::exposition(bytes));
