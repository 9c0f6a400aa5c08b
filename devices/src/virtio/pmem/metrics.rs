//! What a pmem device has done.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters since the device was made; only ever added to, and read from any thread.
#[derive(Debug, Default)]
pub struct PmemMetrics {
    /// Flushes that succeeded; requests that share one count once.
    pub flushes: AtomicU64,
    /// Bytes that they wrote to the disk.
    pub written_bytes: AtomicU64,
    /// Flushes that failed, and requests that asked for something else.
    pub errors: AtomicU64,
    /// Times that the driver broke the ring, so that the device needed a reset.
    pub failures: AtomicU64,
}

/// Counters are independent of each other: nothing is ordered by them.
pub(super) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}
