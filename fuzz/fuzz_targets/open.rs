//! A file with damage in any structure, checksums made to match.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: storage::fuzzing::Damaged| storage::fuzzing::open(&input));
