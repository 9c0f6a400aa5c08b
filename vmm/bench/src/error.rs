//! Why a benchmark failed.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::configuration::Configuration;
use super::workload::Workload;
use host::procfs::ProcError;
use kvm::boot::BootError;

/// Why a benchmark failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The host refused an operation.
    #[error("cannot {operation}")]
    Io {
        /// What was tried.
        operation: String,
        /// The host's error.
        #[source]
        error: io::Error,
    },
    /// A guest did not do its work.
    #[error("{configuration}, {workload}: guest {guest}")]
    Guest {
        /// How it was started.
        configuration: Configuration,
        /// Its workload.
        workload: Workload,
        /// Its number, from 1.
        guest: usize,
        /// What is wrong.
        #[source]
        error: Box<BenchError>,
    },
    /// A guest ended before its time.
    #[error("it ended ({status}) before it said {awaited:?}; its last words: {words}")]
    Ended {
        /// How it ended.
        status: String,
        /// The line that was awaited.
        awaited: &'static str,
        /// The end of its log, or of its console.
        words: String,
    },
    /// A guest took too long.
    #[error("it did not say {awaited:?} within {patience:?}; its last words: {words}")]
    Silent {
        /// The line that was awaited.
        awaited: &'static str,
        /// How long the benchmark waited.
        patience: Duration,
        /// The end of its log, or of its console.
        words: String,
    },
    /// A guest read, computed or wrote something wrong.
    #[error("its checksum is {found}, and {expected} was expected")]
    Checksum {
        /// What it has to be.
        expected: String,
        /// What the guest printed.
        found: String,
    },
    /// The mappings of a process do not show where guest RAM is.
    #[error("no run of its mappings has the size of guest RAM, {0} KiB")]
    NoRam(u64),
    /// Something that the kernel or an earlier run wrote is not as expected.
    #[error("{}: expected {expected}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        expected: &'static str,
    },
    /// A process cannot be examined.
    #[error(transparent)]
    Process(#[from] ProcError),
    /// The kernel cannot be unpacked for the peer, or examined.
    #[error(transparent)]
    Kernel(#[from] BootError),
    /// A file is no JSON, or not of this benchmark.
    #[error("{}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        error: serde_json::Error,
    },
    /// The picture cannot be drawn.
    #[error("cannot draw {}", path.display())]
    Plot {
        /// The file.
        path: PathBuf,
        /// The error of the drawing library.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The request cannot be done.
    #[error("{0}")]
    Refused(String),
    /// A signal has ended the benchmark; its number.
    #[error("interrupted by signal {0}")]
    Cancelled(u8),
}

impl BenchError {
    pub(super) fn io(operation: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let operation = operation.into();
        move |error| Self::Io { operation, error }
    }
}
