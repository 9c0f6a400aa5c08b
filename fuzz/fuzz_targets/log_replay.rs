//! A log of any entries: torn, foreign, around the end of the ring.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: storage::fuzzing::Log| storage::fuzzing::log_replay(&input));
