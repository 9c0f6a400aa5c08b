//! Counters, written as lines of JSON, and read by Prometheus.
//!
//! Names are Firecracker's where it counts the same thing. Unlike there, every line holds totals since the start: a
//! line that is lost loses nothing.

mod prometheus;

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use devices::device_list::DeviceMetrics;
use devices::metrics;
use serde_json::{Map, Value, json};

use host::output::open_output;
use machine::MachineMetrics;

pub use prometheus::{CONTENT_TYPE, Family, FamilyKind, Scrape, families};

/// Requests to the REST socket.
#[derive(Debug, Default)]
pub struct ApiMetrics {
    /// `GET` requests.
    pub get: AtomicU64,
    /// `PUT` requests.
    pub put: AtomicU64,
    /// `PATCH` requests.
    pub patch: AtomicU64,
    /// Requests that were refused or failed, of any method.
    pub failures: AtomicU64,
}

/// Counts one more. Counters are independent of each other: nothing is ordered by them.
pub fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// All counters, as they are written.
pub fn snapshot(api: &ApiMetrics, devices: Option<&MachineMetrics>) -> Value {
    let mut line = Map::new();
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    line.insert(
        "utc_timestamp_ms".to_owned(),
        json!(u64::try_from(now.as_millis()).unwrap_or(u64::MAX)),
    );
    line.insert(
        "api_server".to_owned(),
        json!({
            "get_count": get(&api.get),
            "put_count": get(&api.put),
            "patch_count": get(&api.patch),
            "fails": get(&api.failures),
        }),
    );
    let Some(devices) = devices else {
        return Value::Object(line);
    };
    let exits = devices.exits.iter();
    let exits: Map<_, _> = exits
        .map(|(kind, count)| (format!("exit_{}", kind.name()), json!(count)))
        .collect();
    line.insert("vcpu".to_owned(), Value::Object(exits));
    line.extend(devices.devices.iter().filter_map(of_device));
    Value::Object(line)
}

/// The object of a device: its name and the counters.
fn of_device(device: &DeviceMetrics) -> Option<(String, Value)> {
    let group = device.kind.metrics?;
    let name = match group.label {
        Some(_) => format!("{}_{}", group.name, device.id),
        None => group.name.to_owned(),
    };
    let fields = device.metrics.iter().filter_map(|metric| {
        let value = match metric.value {
            metrics::Value::Counter(value) | metrics::Value::Gauge(value) => value,
            metrics::Value::Latencies(_) => return None,
        };
        Some((metric.field?.to_owned(), json!(value)))
    });
    Some((name, Value::Object(fields.collect())))
}

/// A file or named pipe that gets the lines.
#[derive(Debug)]
pub struct MetricsFile(File);

impl MetricsFile {
    /// Opens `path`, and makes it if it is not there. Does not wait for a reader of a pipe.
    ///
    /// # Errors
    /// The host's error.
    pub fn open(path: &Path) -> io::Result<Self> {
        open_output(path).map(Self)
    }

    /// Appends a line. One write: lines of several guests in one file do not mix.
    ///
    /// # Errors
    /// The host's error.
    pub fn write(&mut self, line: &Value) -> io::Result<()> {
        self.0.write_all(format!("{line}\n").as_bytes())
    }
}

/// Counters as a device of a kind would have them.
#[cfg(test)]
pub(crate) fn of_kind(name: &str, id: &str, metrics: Vec<metrics::Metric>) -> DeviceMetrics {
    let kind = devices::KINDS.into_iter().find(|kind| kind.name == name);
    DeviceMetrics {
        id: id.to_owned(),
        kind: kind.expect("a kind of device"),
        metrics,
    }
}

#[cfg(test)]
mod tests {
    use devices::legacy::SerialMetrics;
    use devices::virtio::balloon::BalloonMetrics;
    use devices::virtio::block::BlockMetrics;
    use devices::virtio::pmem::{MappingFigures, PmemMetrics};
    use devices::virtio::rng::RngMetrics;
    use devices::virtio::vsock::VsockMetrics;

    use super::*;

    #[test]
    fn devices_have_their_objects_and_fields_in_a_line() {
        let block = BlockMetrics::default();
        count(&block.read_bytes);
        let vsock = VsockMetrics::default();
        count(&vsock.connections);
        let mut pmem = PmemMetrics::default().describe();
        let mapping = MappingFigures {
            mappings: 3,
            mapped: 40,
            copied: 1,
        };
        pmem.extend(mapping.describe());
        let devices = vec![
            of_kind("virtio-blk", "root", block.describe()),
            of_kind("virtio-pmem", "base", pmem),
            of_kind("virtio-rng", "entropy", RngMetrics::default().describe()),
            of_kind(
                "virtio-balloon",
                "balloon",
                BalloonMetrics::default().describe(),
            ),
            of_kind("serial port", "", SerialMetrics::default().describe()),
            of_kind("virtio-vsock", "vsock", vsock.describe()),
        ];
        let machine = MachineMetrics {
            devices,
            exits: Vec::new(),
            booted: None,
        };
        let line = snapshot(&ApiMetrics::default(), Some(&machine));
        assert_eq!(
            line["block_root"],
            json!({
                "read_count": 0, "read_bytes": 1, "write_count": 0, "write_bytes": 0, "flush_count": 0,
                "discard_count": 0, "execute_fails": 0, "event_fails": 0,
                "rate_limiter_throttled_events": 0, "rate_limiter_event_count": 0,
            })
        );
        assert_eq!(
            line["pmem_base"],
            json!({
                "flush_count": 0, "flush_bytes": 0, "flush_fails": 0, "event_fails": 0,
                "rate_limiter_throttled_events": 0, "rate_limiter_event_count": 0,
                "mappings": 3, "pages_mapped": 40, "pages_copied": 1,
            })
        );
        assert_eq!(
            line["entropy"],
            json!({
                "entropy_bytes": 0, "entropy_event_fails": 0, "entropy_rate_limiter_throttled": 0,
                "rate_limiter_event_count": 0,
            })
        );
        assert_eq!(line["uart"], json!({"rate_limiter_dropped_bytes": 0}));
        assert_eq!(
            line["balloon"],
            json!({
                "inflate_count": 0, "deflate_count": 0, "stats_updates_count": 0, "stats_update_fails": 0,
                "event_fails": 0, "inflate_freed": 0, "inflate_fails": 0, "free_page_hint_count": 0,
                "free_page_hint_freed": 0, "free_page_hint_fails": 0, "free_page_report_count": 0,
                "free_page_report_freed": 0, "free_page_report_fails": 0,
            })
        );
        assert_eq!(
            line["vsock"],
            json!({
                "rx_packets_count": 0, "rx_bytes_count": 0, "tx_packets_count": 0, "tx_bytes_count": 0,
                "conns_added": 0, "conns_open": 1, "conns_killed": 0, "event_fails": 0,
            })
        );
    }

    #[test]
    fn lines_are_appended_and_hold_every_counter() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics");
        let api = ApiMetrics::default();
        count(&api.put);
        count(&api.failures);
        for _ in 0..2 {
            MetricsFile::open(&path)
                .unwrap()
                .write(&snapshot(&api, None))
                .unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(
            lines[1]["api_server"],
            json!({"get_count": 0, "put_count": 1, "patch_count": 0, "fails": 1})
        );
    }

    #[test]
    fn a_pipe_that_nobody_reads_does_not_hold_anybody_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
        let mut file = MetricsFile::open(&path).unwrap();
        file.write(&json!({})).unwrap();
    }

    #[test]
    fn the_counters_of_a_device_are_listed_by_its_name() {
        let device = PmemMetrics::default();
        device.flushes.store(3, Ordering::Relaxed);
        let mapping = MappingFigures {
            mappings: 7,
            mapped: 5,
            copied: 1,
        };
        let mut described = device.describe();
        described.extend(mapping.describe());
        let devices = MachineMetrics {
            devices: vec![of_kind("virtio-pmem", "root", described)],
            exits: Vec::new(),
            booted: None,
        };
        let line = snapshot(&ApiMetrics::default(), Some(&devices));
        let pmem = &line["pmem_root"];
        for (name, value) in [
            ("flush_count", 3),
            ("flush_bytes", 0),
            ("flush_fails", 0),
            ("event_fails", 0),
            ("mappings", 7),
            ("pages_mapped", 5),
            ("pages_copied", 1),
        ] {
            assert_eq!(pmem[name], value, "{name}");
        }
    }
}
