//! Work that leaves the daemon's one thread: calls that wait for the host, and operations that outlive the connection
//! of their caller.

use std::future::Future;

use super::fault::Fault;

/// Runs what waits for the host, for its disks above all, on a thread for such work.
///
/// # Errors
/// `Internal` where it panicked.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Fault> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Fault::Internal(error.into()))
}

/// Runs an operation to its end, even where the caller has gone.
///
/// # Errors
/// Those of the operation; `Internal` where it panicked.
pub async fn detached<T: Send + 'static>(
    operation: impl Future<Output = Result<T, Fault>> + Send + 'static,
) -> Result<T, Fault> {
    let done = tokio::spawn(operation).await;
    done.map_err(|error| Fault::Internal(error.into()))?
}
