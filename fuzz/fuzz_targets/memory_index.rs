//! Which pages a snapshot's memory files hold: any runs, loaded into the RAM of a guest and its pmem devices.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: machine::snapshot::fuzzing::Index| {
    machine::snapshot::fuzzing::memory_index(&input)
});
