//! A damaged child over a sound parent, and any locator.
#![no_main]

libfuzzer_sys::fuzz_target!(
    |input: (storage::fuzzing::Damaged, Vec<u8>)| storage::fuzzing::chain(&input)
);
