//! What devices have done: the families that they describe, whatever the devices are.

use std::fmt;

use devices::device_list::DeviceMetrics;
use devices::latency::LatencyReading;
use devices::metrics::{self, Metric, Value};
use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use super::{Writer, pages};

/// The latencies of one kind of request.
struct Histogram<'a>(&'a LatencyReading);

impl EncodeMetric for Histogram<'_> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let LatencyReading { buckets, sum } = self.0;
        let bound =
            |bound: Option<std::time::Duration>| bound.map_or(f64::INFINITY, |b| b.as_secs_f64());
        let buckets = buckets.map(|(upper, count)| (bound(upper), count));
        // Of the same moment as the buckets: it has to be their sum.
        let count = buckets.iter().map(|(_, count)| count).sum();
        encoder.encode_histogram::<NoLabelSet>(sum.as_secs_f64(), count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

fn kind(value: &Value) -> MetricType {
    match value {
        Value::Counter(_) => MetricType::Counter,
        Value::Gauge(_) => MetricType::Gauge,
        Value::Latencies(_) => MetricType::Histogram,
    }
}

fn unit(unit: metrics::Unit) -> Unit {
    match unit {
        metrics::Unit::Bytes => Unit::Bytes,
        metrics::Unit::Pages => pages(),
        metrics::Unit::Seconds => Unit::Seconds,
    }
}

/// What a metric has in common with all of its family.
fn family(metric: &Metric) -> (&'static str, Option<metrics::Unit>) {
    (metric.name, metric.unit)
}

impl Writer<'_> {
    /// Writes the families in the order in which the devices have them, each with the values of all devices.
    pub(super) fn of_devices(&mut self, devices: &[DeviceMetrics]) -> fmt::Result {
        let all = || {
            devices
                .iter()
                .flat_map(|device| device.metrics.iter().map(move |metric| (device, metric)))
        };
        let mut written = Vec::new();
        for (_, first) in all() {
            let this = family(first);
            if written.contains(&this) {
                continue;
            }
            written.push(this);
            let unit = first.unit.map(unit);
            let mut encoder = self.0.encode_descriptor(
                first.name,
                first.help,
                unit.as_ref(),
                kind(&first.value),
            )?;
            for (device, metric) in all().filter(|(_, metric)| family(metric) == this) {
                let label = device.kind.metrics.and_then(|group| group.label);
                let of_device = label.map(|label| (label, device.id.as_str()));
                let labels: Vec<_> = of_device.into_iter().chain(metric.label).collect();
                if labels.is_empty() {
                    encode(&metric.value, encoder)?;
                    // It is the only one of its family.
                    break;
                }
                encode(&metric.value, encoder.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

fn encode(value: &Value, encoder: MetricEncoder<'_>) -> fmt::Result {
    match value {
        Value::Counter(value) => ConstCounter::new(*value).encode(encoder),
        Value::Gauge(value) => ConstGauge::new(*value).encode(encoder),
        Value::Latencies(reading) => Histogram(reading).encode(encoder),
    }
}
