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
    /// Times that the rate limiter had requests wait.
    pub throttled: AtomicU64,
    /// Times that such a wait ended.
    pub limiter_events: AtomicU64,
}

/// What the memory of a pmem device is made of, from when it was mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MappingFigures {
    /// Mappings in the process, fresh memory among them.
    pub mappings: usize,
    /// Pages that are mapped from files.
    pub mapped: u64,
    /// Pages that had to be copied.
    pub copied: u64,
}

impl MappingFigures {
    /// The values.
    pub fn describe(&self) -> [Metric; 3] {
        [
            Metric::gauge(
                "pmem_mappings",
                "Mappings that the disk takes of the process",
                self.mappings as u64,
            )
            .field("mappings"),
            Metric::gauge(
                "pmem_mapped",
                "Pages of the disk that are mapped from its files",
                self.mapped,
            )
            .unit(Unit::Pages)
            .field("pages_mapped"),
            Metric::gauge(
                "pmem_copied",
                "Pages of the disk that had to be copied",
                self.copied,
            )
            .unit(Unit::Pages)
            .field("pages_copied"),
        ]
    }
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
            Metric::counter(
                "pmem_throttled",
                "Times that the rate limiter had requests wait",
                &self.throttled,
            )
            .field("rate_limiter_throttled_events"),
            Metric::counter(
                "pmem_limiter_events",
                "Times that a wait for the rate limiter ended",
                &self.limiter_events,
            )
            .field("rate_limiter_event_count"),
        ]
    }
}
