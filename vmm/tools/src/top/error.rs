//! Why guests cannot be shown.

use std::io;

/// Why guests cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// The processes of the host cannot be listed.
    #[error("cannot read /proc")]
    Processes(#[source] io::Error),
    /// The terminal or the thread that reads cannot be used.
    #[error("terminal")]
    Terminal(#[source] io::Error),
    /// Nobody reads the output.
    #[error("standard output")]
    Output(#[from] io::Error),
    /// JSON cannot be made.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}
