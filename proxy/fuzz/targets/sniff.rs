//! See `outrigger::fuzz::sniff`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| outrigger::fuzz::sniff(bytes));
