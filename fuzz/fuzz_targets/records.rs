//! A file in a daemon's state folder, as each of the records that it may be, and as what a guest's process hands over.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| daemon::serve::fuzzing::records(input));
