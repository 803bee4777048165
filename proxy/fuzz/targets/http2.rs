//! See `outrigger::fuzz::http2`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| outrigger::fuzz::http2(bytes));
