//! Why guests cannot be shown.

use std::io;

/// Why guests cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// The host does not list processes.
    #[error("cannot read /proc")]
    Processes(#[source] io::Error),
    /// The terminal, or what waits for it.
    #[error("terminal")]
    Terminal(#[source] io::Error),
    /// Nobody reads the output.
    #[error("standard output")]
    Output(#[from] io::Error),
    /// JSON cannot be made.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}
