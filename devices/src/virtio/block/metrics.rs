//! What a block device has done.

use std::sync::atomic::AtomicU64;

use crate::latency::Latencies;
use crate::metrics::{Metric, Unit};

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
    /// Times that the rate limiter had requests wait.
    pub throttled: AtomicU64,
    /// Times that such a wait ended.
    pub limiter_events: AtomicU64,
}

impl BlockMetrics {
    /// The values at this moment.
    pub fn describe(&self) -> Vec<Metric> {
        const DURATION: &str = "block_request_duration";
        const DURATION_HELP: &str =
            "How long requests took that succeeded, from the ring to the end of their I/O";
        let duration = |operation, latencies| {
            let metric = Metric::latencies(DURATION, DURATION_HELP, latencies);
            metric.label("operation", operation)
        };
        vec![
            Metric::counter("block_reads", "Reads that succeeded", &self.reads).field("read_count"),
            Metric::counter("block_read", "What they read", &self.read_bytes)
                .unit(Unit::Bytes)
                .field("read_bytes"),
            Metric::counter("block_writes", "Writes that succeeded", &self.writes)
                .field("write_count"),
            Metric::counter("block_written", "What they wrote", &self.written_bytes)
                .unit(Unit::Bytes)
                .field("write_bytes"),
            Metric::counter("block_flushes", "Flushes that succeeded", &self.flushes)
                .field("flush_count"),
            Metric::counter(
                "block_discards",
                "Discard and write-zeroes requests that succeeded",
                &self.discards,
            )
            .field("discard_count"),
            Metric::counter(
                "block_errors",
                "Requests that ended in an error status",
                &self.errors,
            )
            .field("execute_fails"),
            Metric::counter(
                "block_failures",
                "Times that the driver broke a ring",
                &self.failures,
            )
            .field("event_fails"),
            Metric::counter(
                "block_throttled",
                "Times that the rate limiter had requests wait",
                &self.throttled,
            )
            .field("rate_limiter_throttled_events"),
            Metric::counter(
                "block_limiter_events",
                "Times that a wait for the rate limiter ended",
                &self.limiter_events,
            )
            .field("rate_limiter_event_count"),
            duration("read", &self.read_latency),
            duration("write", &self.write_latency),
            duration("flush", &self.flush_latency),
        ]
    }
}
