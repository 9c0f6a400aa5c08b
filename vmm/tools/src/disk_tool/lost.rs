//! What is lost of a disk.

use std::fmt::Write as _;

use serde_json::{Value, json};
use storage::ByteRange;

use super::size::human;

/// Ranges that are written out for people; all are in the JSON.
const SHOWN: usize = 100;
/// What is lost of a disk, for programs.
pub(super) fn lost_json(lost: &[ByteRange]) -> Value {
    lost.iter()
        .map(|range| json!({"offset": range.offset(), "length": range.len()}))
        .collect()
}

/// What is lost of a disk, for people: a line a range.
pub(super) fn lost_text(lost: &[ByteRange]) -> String {
    let mut text = String::new();
    for range in lost.iter().take(SHOWN) {
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "lost: {} of the disk at {:#x}",
            human(range.len()),
            range.offset()
        );
    }
    let more = lost.len().saturating_sub(SHOWN);
    if more > 0 {
        let _ = writeln!(text, "lost: {more} more ranges, which --json lists");
    }
    text
}

/// Bytes of ranges.
pub(super) fn total(ranges: &[ByteRange]) -> u64 {
    ranges.iter().map(|range| range.len()).sum()
}
