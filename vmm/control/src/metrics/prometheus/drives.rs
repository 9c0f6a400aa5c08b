//! What block devices have done, and how long it took.

use std::fmt;
use std::sync::atomic::AtomicU64;

use devices::virtio::block::{BlockMetrics, Latencies};
use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

use super::Writer;
use crate::metrics::get;
use machine::DeviceMetrics;

/// The latencies of one kind of request.
struct Histogram<'a>(&'a Latencies);

impl EncodeMetric for Histogram<'_> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let reading = self.0.read();
        let bound =
            |bound: Option<std::time::Duration>| bound.map_or(f64::INFINITY, |b| b.as_secs_f64());
        let buckets = reading.buckets.map(|(upper, count)| (bound(upper), count));
        // Of the same moment as the buckets: it has to be their sum.
        let count = buckets.iter().map(|(_, count)| count).sum();
        encoder.encode_histogram::<NoLabelSet>(reading.sum.as_secs_f64(), count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

impl Writer<'_> {
    pub(super) fn drives(&mut self, devices: &DeviceMetrics) -> fmt::Result {
        type Counter = fn(&BlockMetrics) -> &AtomicU64;
        let bytes = Some(&Unit::Bytes);
        let counters: [(&str, _, &str, Counter); 8] = [
            ("block_reads", None, "Reads that succeeded", |drive| {
                &drive.reads
            }),
            ("block_read", bytes, "What they read", |drive| {
                &drive.read_bytes
            }),
            ("block_writes", None, "Writes that succeeded", |drive| {
                &drive.writes
            }),
            ("block_written", bytes, "What they wrote", |drive| {
                &drive.written_bytes
            }),
            ("block_flushes", None, "Flushes that succeeded", |drive| {
                &drive.flushes
            }),
            (
                "block_discards",
                None,
                "Discard and write-zeroes requests that succeeded",
                |drive| &drive.discards,
            ),
            (
                "block_errors",
                None,
                "Requests that ended in an error status",
                |drive| &drive.errors,
            ),
            (
                "block_failures",
                None,
                "Times that the driver broke a ring",
                |drive| &drive.failures,
            ),
        ];
        for (name, unit, help, counter) in counters {
            let drives = devices.drives.iter();
            let samples = drives.map(|(id, drive)| (("drive", id.as_str()), get(counter(drive))));
            self.counters(name, unit, help, samples)?;
        }
        Ok(())
    }

    pub(super) fn latencies(&mut self, devices: &DeviceMetrics) -> fmt::Result {
        if devices.drives.is_empty() {
            return Ok(());
        }
        let mut family = self.0.encode_descriptor(
            "block_request_duration",
            "How long requests took that succeeded, from the ring to the end of their I/O",
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        for (id, drive) in &devices.drives {
            let operations = [
                ("read", &drive.read_latency),
                ("write", &drive.write_latency),
                ("flush", &drive.flush_latency),
            ];
            for (operation, latencies) in operations {
                let labels = [("drive", id.as_str()), ("operation", operation)];
                Histogram(latencies).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}
