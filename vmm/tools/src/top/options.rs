//! The options of `coppice top`.

use std::time::Duration;

use super::column::Column;

/// What `coppice top` shows, and how.
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
