//! The lost ranges of a disk, as JSON and as text.

use std::fmt::Write as _;

use serde_json::{Value, json};
use storage::ByteRange;

use super::size::human;

/// The most ranges that the text lists; the JSON has all.
const SHOWN: usize = 100;
/// The lost ranges as JSON.
pub(super) fn lost_json(lost: &[ByteRange]) -> Value {
    lost.iter()
        .map(|range| json!({"offset": range.offset(), "length": range.len()}))
        .collect()
}

/// The lost ranges as text, one in a line.
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

/// The sum of the ranges, in bytes.
pub(super) fn total(ranges: &[ByteRange]) -> u64 {
    ranges.iter().map(|range| range.len()).sum()
}
