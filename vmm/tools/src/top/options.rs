//! What is to be shown, and how.

use std::time::Duration;

use super::column::Column;

/// What `coppice top` was asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long to wait between two readings.
    pub delay: Duration,
    /// The column to sort by.
    pub sort: Column,
    /// Print one table.
    pub once: bool,
    /// Print JSON.
    pub json: bool,
    /// Show files.
    pub files: bool,
}
