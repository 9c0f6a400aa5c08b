//! Counters, written as lines of JSON, and read by Prometheus.
//!
//! Names are Firecracker's where it counts the same thing. Unlike there, every line holds totals since the start: a line that is lost
//! loses nothing.

mod prometheus;

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use devices::virtio::balloon::BalloonMetrics;
use devices::virtio::vsock::VsockMetrics;
use serde_json::{Map, Value, json};

use host::output::open_output;
use machine::DeviceMetrics;

pub use prometheus::{CONTENT_TYPE, Scrape};

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
pub fn snapshot(api: &ApiMetrics, devices: Option<&DeviceMetrics>) -> Value {
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
    for (id, drive) in &devices.drives {
        line.insert(
            format!("block_{id}"),
            json!({
                "read_count": get(&drive.reads),
                "read_bytes": get(&drive.read_bytes),
                "write_count": get(&drive.writes),
                "write_bytes": get(&drive.written_bytes),
                "flush_count": get(&drive.flushes),
                "discard_count": get(&drive.discards),
                "execute_fails": get(&drive.errors),
                "event_fails": get(&drive.failures),
            }),
        );
    }
    for (id, pmem) in &devices.pmem {
        line.insert(
            format!("pmem_{id}"),
            json!({
                "flush_count": get(&pmem.device.flushes),
                "flush_bytes": get(&pmem.device.written_bytes),
                "flush_fails": get(&pmem.device.errors),
                "event_fails": get(&pmem.device.failures),
                "mappings": pmem.mapping.mappings,
                "pages_mapped": pmem.mapping.mapped,
                "pages_copied": pmem.mapping.copied,
            }),
        );
    }
    if let Some(entropy) = &devices.entropy {
        line.insert(
            "entropy".to_owned(),
            json!({"entropy_bytes": get(&entropy.bytes), "entropy_event_fails": get(&entropy.failures)}),
        );
    }
    if let Some(balloon) = &devices.balloon {
        line.insert("balloon".to_owned(), balloon_counters(balloon));
    }
    if let Some(vsock) = &devices.vsock {
        line.insert("vsock".to_owned(), vsock_counters(vsock));
    }
    Value::Object(line)
}

fn vsock_counters(vsock: &VsockMetrics) -> Value {
    json!({
        "rx_packets_count": get(&vsock.received_packets),
        "rx_bytes_count": get(&vsock.received_bytes),
        "tx_packets_count": get(&vsock.sent_packets),
        "tx_bytes_count": get(&vsock.sent_bytes),
        "conns_added": get(&vsock.opened),
        "conns_open": get(&vsock.connections),
        "conns_killed": get(&vsock.resets),
        "event_fails": get(&vsock.failures),
    })
}

fn balloon_counters(balloon: &BalloonMetrics) -> Value {
    json!({
        "inflate_count": get(&balloon.inflations),
        "deflate_count": get(&balloon.deflations),
        "stats_updates_count": get(&balloon.statistics),
        "stats_update_fails": get(&balloon.statistics_failures),
        "event_fails": get(&balloon.failures),
        "inflate_freed": get(&balloon.inflated.bytes),
        "inflate_fails": get(&balloon.inflated.failures),
        "free_page_hint_count": get(&balloon.hinted.ranges),
        "free_page_hint_freed": get(&balloon.hinted.bytes),
        "free_page_hint_fails": get(&balloon.hinted.failures),
        "free_page_report_count": get(&balloon.reported.ranges),
        "free_page_report_freed": get(&balloon.reported.bytes),
        "free_page_report_fails": get(&balloon.reported.failures),
    })
}

/// A file or named pipe that gets the lines.
#[derive(Debug)]
pub struct MetricsFile(File);

impl MetricsFile {
    /// Opens `path`, and makes it if it is not there. Does not wait for a reader of a pipe.
    ///
    /// # Errors
    /// What the host says.
    pub fn open(path: &Path) -> io::Result<Self> {
        open_output(path).map(Self)
    }

    /// Appends a line. One write: lines of several guests in one file do not mix.
    ///
    /// # Errors
    /// What the host says.
    pub fn write(&mut self, line: &Value) -> io::Result<()> {
        self.0.write_all(format!("{line}\n").as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use devices::virtio::pmem::PmemMetrics;
    use machine::pmem::{Figures, PmemCounters};

    use super::*;

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
    fn the_counters_of_a_device_are_told_by_its_name() {
        let device = Arc::<PmemMetrics>::default();
        device.flushes.store(3, Ordering::Relaxed);
        let mapping = Figures {
            mappings: 7,
            mapped: 5,
            copied: 1,
        };
        let devices = DeviceMetrics {
            drives: std::collections::BTreeMap::new(),
            pmem: [("root".to_owned(), PmemCounters { device, mapping })].into(),
            entropy: None,
            balloon: None,
            vsock: None,
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
