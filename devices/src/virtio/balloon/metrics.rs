//! What a balloon device has done.

use std::sync::atomic::AtomicU64;

use crate::metrics::{Metric, Unit};

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

impl BalloonMetrics {
    /// The values at this moment.
    pub fn describe(&self) -> Vec<Metric> {
        let mut metrics = self.returned();
        metrics.extend([
            Metric::counter(
                "balloon_inflations",
                "Buffers of pages that went into the balloon",
                &self.inflations,
            )
            .field("inflate_count"),
            Metric::counter(
                "balloon_deflations",
                "Buffers of pages that left the balloon",
                &self.deflations,
            )
            .field("deflate_count"),
            Metric::counter(
                "balloon_statistics",
                "Statistics that the driver sent",
                &self.statistics,
            )
            .field("stats_updates_count"),
            Metric::counter(
                "balloon_statistics_failures",
                "Statistics that were none",
                &self.statistics_failures,
            )
            .field("stats_update_fails"),
            Metric::counter(
                "balloon_failures",
                "Times that the driver asked for what cannot be, or broke a ring",
                &self.failures,
            )
            .field("event_fails"),
        ]);
        metrics
    }

    /// What went back to the host, by what the driver said of it.
    fn returned(&self) -> Vec<Metric> {
        let (inflated, hinted, reported) = (&self.inflated, &self.hinted, &self.reported);
        let bytes = |way, returned: &Returned, field| {
            let help = "Memory that went back to the host";
            let metric = Metric::counter("balloon_returned", help, &returned.bytes);
            metric.unit(Unit::Bytes).label("way", way).field(field)
        };
        let ranges = |way, returned: &Returned| {
            let help = "Ranges of memory that went back to the host";
            let metric = Metric::counter("balloon_returned_ranges", help, &returned.ranges);
            metric.label("way", way)
        };
        let refused = |way, returned: &Returned, field| {
            let help = "Ranges of memory that could not go back";
            let metric = Metric::counter("balloon_refused_ranges", help, &returned.failures);
            metric.label("way", way).field(field)
        };
        vec![
            bytes("inflated", inflated, "inflate_freed"),
            bytes("hinted", hinted, "free_page_hint_freed"),
            bytes("reported", reported, "free_page_report_freed"),
            ranges("inflated", inflated),
            ranges("hinted", hinted).field("free_page_hint_count"),
            ranges("reported", reported).field("free_page_report_count"),
            refused("inflated", inflated, "inflate_fails"),
            refused("hinted", hinted, "free_page_hint_fails"),
            refused("reported", reported, "free_page_report_fails"),
        ]
    }
}
