//! See `outrigger::fuzz::documents`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| outrigger::fuzz::documents(bytes));
