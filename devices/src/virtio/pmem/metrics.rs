//! What a pmem device has done.

use std::sync::atomic::AtomicU64;

use crate::metrics::{Metric, Unit};

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

impl PmemMetrics {
    /// The values at this moment.
    pub fn describe(&self) -> Vec<Metric> {
        vec![
            Metric::counter("pmem_flushes", "Flushes that succeeded", &self.flushes)
                .field("flush_count"),
            Metric::counter(
                "pmem_written",
                "What they wrote to the disk",
                &self.written_bytes,
            )
            .unit(Unit::Bytes)
            .field("flush_bytes"),
            Metric::counter(
                "pmem_errors",
                "Flushes that failed, and requests that asked for something else",
                &self.errors,
            )
            .field("flush_fails"),
            Metric::counter(
                "pmem_failures",
                "Times that the driver broke the ring",
                &self.failures,
            )
            .field("event_fails"),
        ]
    }
}
