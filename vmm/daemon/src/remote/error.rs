//! Why the client fails.

use std::io;

use hyper::StatusCode;

/// Why a command of the client was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// No daemon listens there.
    #[error("{socket} (is coppice serve running? See --socket)")]
    Connect {
        /// The socket.
        socket: String,
        /// The host's error.
        source: io::Error,
    },
    /// What the daemon sends is no HTTP.
    #[error("the daemon cannot be understood")]
    Http(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The daemon refuses the request.
    #[error("{1}")]
    Refused(StatusCode, String),
    /// The terminal.
    #[error("the terminal")]
    Terminal(#[source] io::Error),
    /// The host.
    #[error(transparent)]
    Host(io::Error),
}
