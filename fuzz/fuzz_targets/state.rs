//! The file of a snapshot's state, with its checksum made to match.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| machine::snapshot::fuzzing::state(input));
