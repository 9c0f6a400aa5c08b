//! Why a tool failed.

use std::path::{Path, PathBuf};

use storage::DiskError;
use storage::vhdx::ChainError;

use super::watch::Watch;

/// Why a tool failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// A disk cannot be opened.
    #[error(transparent)]
    Open(#[from] storage::OpenError),
    /// A disk cannot be made.
    #[error(transparent)]
    Create(#[from] storage::vhdx::CreateError),
    /// A conversion failed.
    #[error(transparent)]
    Convert(storage::convert::ConvertError),
    /// An operation on a disk failed.
    #[error("{}", path.display())]
    Disk {
        /// The disk.
        path: PathBuf,
        /// Its error.
        #[source]
        error: DiskError,
    },
    /// An operation on a chain failed.
    #[error("{}", path.display())]
    Chain {
        /// The disk.
        path: PathBuf,
        /// Its error.
        #[source]
        error: ChainError,
    },
    /// The request cannot be done.
    #[error("{0}")]
    Refused(String),
    /// The host refused an operation.
    #[error("cannot {operation}")]
    Io {
        /// What was tried.
        operation: String,
        /// The host's error.
        #[source]
        error: std::io::Error,
    },
    /// The outcome could not be written as JSON.
    #[error("cannot write JSON")]
    Json(#[from] serde_json::Error),
    /// A signal has ended the work; its number.
    #[error("interrupted by signal {0}")]
    Cancelled(u8),
}

impl ToolError {
    pub(super) fn io(operation: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let operation = operation.into();
        move |error| Self::Io { operation, error }
    }

    /// The error for a disk at `path`. A cancellation becomes the signal that the watch has received.
    pub(super) fn disk(path: &Path, watch: &Watch) -> impl FnOnce(DiskError) -> Self {
        let (path, signal) = (path.to_owned(), watch.signal());
        move |error| match error {
            DiskError::Cancelled => Self::Cancelled(signal),
            error => Self::Disk { path, error },
        }
    }

    pub(super) fn chain(path: &Path, watch: &Watch) -> impl FnOnce(ChainError) -> Self {
        let (path, signal) = (path.to_owned(), watch.signal());
        move |error| match error {
            ChainError::Disk(DiskError::Cancelled) => Self::Cancelled(signal),
            ChainError::Disk(error) => Self::Disk { path, error },
            // These errors name their files themselves.
            ChainError::Create(error) => error.into(),
            ChainError::Open(error) => error.into(),
            error @ ChainError::Refused(_) => Self::Chain { path, error },
        }
    }
}
