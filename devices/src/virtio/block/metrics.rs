//! What a block device has done.

use std::sync::atomic::{AtomicU64, Ordering};

use super::latency::Latencies;

/// Counters since the device was made; only ever added to, and read from any thread.
#[derive(Debug, Default)]
pub struct BlockMetrics {
    /// Reads that succeeded.
    pub reads: AtomicU64,
    /// Bytes that they read.
    pub read_bytes: AtomicU64,
    /// How long they took, from when the device took them from the ring to when the disk had done them.
    pub read_latency: Latencies,
    /// Writes that succeeded.
    pub writes: AtomicU64,
    /// Bytes that they wrote.
    pub written_bytes: AtomicU64,
    /// How long they took.
    pub write_latency: Latencies,
    /// Flushes that succeeded.
    pub flushes: AtomicU64,
    /// How long they took.
    pub flush_latency: Latencies,
    /// Discard and write-zeroes requests that succeeded.
    pub discards: AtomicU64,
    /// Requests that ended in an error status.
    pub errors: AtomicU64,
    /// Times that the driver broke a ring, so that the device needed a reset.
    pub failures: AtomicU64,
}

/// Counters are independent of each other: nothing is ordered by them.
pub(super) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}
