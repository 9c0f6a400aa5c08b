//! The outcome of an operation, and how it is printed.

use std::fmt::Write as _;

use clap::Args;
use serde_json::Value;

/// The exit code of an operation that is complete, except for a part of the disk that is lost.
pub(super) const LOST: u8 = 3;

/// How the outcome is written.
#[derive(Clone, Copy, Debug, Args)]
pub struct Output {
    /// Write JSON.
    #[arg(long)]
    pub(super) json: bool,
}

/// The outcome of an operation.
pub(super) struct Outcome {
    pub(super) json: Value,
    pub(super) text: String,
    /// The exit code.
    pub(super) code: u8,
}

impl Outcome {
    pub(super) fn new(json: Value, text: impl Into<String>) -> Self {
        Self {
            json,
            text: text.into(),
            code: 0,
        }
    }
}

/// Text with a name and a value in each line.
pub(super) fn lines<'a>(pairs: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let mut text = String::new();
    for (name, value) in pairs {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name:<20} {value}");
    }
    text
}
