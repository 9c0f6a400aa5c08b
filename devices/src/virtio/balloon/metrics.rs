//! What a balloon device has done.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters since the device was made; only ever added to, and read from any thread.
#[derive(Debug, Default)]
pub struct BalloonMetrics {
    /// Buffers of pages that went into the balloon.
    pub inflations: AtomicU64,
    /// Buffers of pages that left it.
    pub deflations: AtomicU64,
    /// Statistics that the driver sent.
    pub statistics: AtomicU64,
    /// Statistics that were none.
    pub statistics_failures: AtomicU64,
    /// What the pages that went into the balloon gave back.
    pub inflated: Returned,
    /// What hints of free pages gave back.
    pub hinted: Returned,
    /// What reports of free pages gave back.
    pub reported: Returned,
    /// Times that the driver asked for what cannot be, or broke a ring, so that the device needed a reset.
    pub failures: AtomicU64,
}

/// Memory that went back to the host.
#[derive(Debug, Default)]
pub struct Returned {
    /// Ranges.
    pub ranges: AtomicU64,
    /// Bytes in them.
    pub bytes: AtomicU64,
    /// Ranges that were refused, by the device or by the host, and buffers that could not be understood.
    pub failures: AtomicU64,
}

/// Counters are independent of each other: nothing is ordered by them.
pub(super) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}
