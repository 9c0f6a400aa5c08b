//! Why guests cannot be shown.

use std::io;

/// Why guests cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// The host does not list processes.
    #[error("cannot read /proc: {0}")]
    Processes(io::Error),
    /// The terminal, or what waits for it.
    #[error("terminal: {0}")]
    Terminal(io::Error),
    /// Nobody reads the output.
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
    /// JSON cannot be made.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}
