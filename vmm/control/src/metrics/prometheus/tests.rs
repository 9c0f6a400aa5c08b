use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use devices::legacy::SerialMetrics;
use devices::virtio::balloon::BalloonMetrics;
use devices::virtio::block::BlockMetrics;
use devices::virtio::pmem::{MappingFigures, PmemMetrics};
use devices::virtio::rng::RngMetrics;
use devices::virtio::vsock::VsockMetrics;

use super::*;
use crate::metrics::of_kind;
use kvm::vm::ExitKind;

mod reference;

/// A metric family, as a reader of the text finds it.
#[derive(Debug, Default)]
struct Family {
    kind: String,
    unit: Option<String>,
    help: String,
    samples: BTreeMap<String, f64>,
}

fn is_name(text: &str) -> bool {
    let first = |c: char| c.is_ascii_lowercase();
    text.starts_with(first) && text.chars().all(|c| first(c) || c == '_')
}

/// `{name="value",...}`, without what would have to be escaped.
fn check_labels(labels: &str) {
    let inside = labels
        .strip_prefix('{')
        .and_then(|rest| rest.strip_suffix('}'))
        .unwrap_or_else(|| panic!("{labels}"));
    for label in inside.split(',') {
        let (name, value) = label.split_once('=').unwrap();
        assert!(is_name(name), "{labels}");
        let value = value.strip_prefix('"').unwrap().strip_suffix('"').unwrap();
        assert!(!value.contains(['"', '\\']), "{labels}");
    }
}

/// Reads `OpenMetrics` text 1.0 as strictly as its specification and Prometheus' naming rules are, as far as this
/// program uses it.
fn parse(text: &str) -> BTreeMap<String, Family> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut current = String::new();
    let body = text.strip_suffix("# EOF\n").expect("an end");
    for line in body.lines() {
        if let Some(printed) = line.strip_prefix("# ") {
            let mut words = printed.splitn(3, ' ');
            let mut next = || words.next().unwrap_or_else(|| panic!("{line}")).to_owned();
            let (keyword, name, value) = (next(), next(), next());
            if name != current {
                let before = families.insert(name.clone(), Family::default());
                assert!(before.is_none(), "{name} is in two places");
                current.clone_from(&name);
            }
            let family = families.get_mut(&name).unwrap();
            assert!(family.samples.is_empty(), "{line} stands behind samples");
            match keyword.as_str() {
                "HELP" => family.help = value,
                "TYPE" => family.kind = value,
                "UNIT" => family.unit = Some(value),
                _ => panic!("{line}"),
            }
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap();
        let at = series.find('{').unwrap_or(series.len());
        let (name, labels) = series.split_at(at);
        let family = families.get_mut(&current).unwrap();
        let suffixes: &[&str] = match family.kind.as_str() {
            "counter" => &["_total"],
            "gauge" => &[""],
            "histogram" => &["_bucket", "_count", "_sum"],
            kind => panic!("{current} is a {kind}"),
        };
        let suffix = name
            .strip_prefix(current.as_str())
            .unwrap_or_else(|| panic!("{name}"));
        assert!(suffixes.contains(&suffix), "{name}");
        if !labels.is_empty() {
            check_labels(labels);
        }
        let key = key(&family.kind, suffix, labels);
        let before = family.samples.insert(key, value.parse().unwrap());
        assert!(before.is_none(), "{series} is there twice");
    }
    for (name, family) in &families {
        if family.kind == "histogram" {
            check_histogram(name, family);
        }
        assert!(is_name(name) && name.starts_with("coppice_"), "{name}");
        assert!(
            !family.help.is_empty() && !family.samples.is_empty(),
            "{name}"
        );
        assert!(!name.ends_with("_total"), "{name}");
        let unit = family.unit.as_deref();
        for known in ["bytes", "seconds", "pages"] {
            let is_named = name.ends_with(&format!("_{known}"));
            assert_eq!(
                is_named,
                unit == Some(known),
                "{name} and its unit {unit:?}"
            );
        }
    }
    families
}

/// The other labels of a bucket, and its bound, which stands first.
fn bound(labels: &str) -> (String, f64) {
    let (bound, rest) = labels
        .strip_prefix("{le=\"")
        .and_then(|labels| labels.split_once("\","))
        .unwrap_or_else(|| panic!("{labels}"));
    let bound = bound.replace("+Inf", "inf").parse().unwrap();
    (format!("{{{rest}"), bound)
}

/// Buckets grow with their bounds, the last has none, and counts what `_count` does; there is a `_sum` for each.
fn check_histogram(name: &str, family: &Family) {
    let mut series: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for (labels, count) in &family.samples {
        if let Some(labels) = labels.strip_prefix("_bucket") {
            let (rest, bound) = bound(labels);
            series.entry(rest).or_default().push((bound, *count));
        }
    }
    assert!(!series.is_empty(), "{name}");
    for (labels, mut buckets) in series {
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        assert!(
            buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1),
            "{name}{labels}"
        );
        let (last, count) = buckets.pop().unwrap();
        assert!(last.is_infinite(), "{name}{labels}");
        let reported = family.samples[&format!("_count{labels}")];
        assert!((reported - count).abs() < 0.5, "{name}{labels}");
        assert!(family.samples[&format!("_sum{labels}")] >= 0.0);
    }
}

/// How a sample is found: by its labels, and that of a histogram by what it is of it as well.
fn key(kind: &str, suffix: &str, labels: &str) -> String {
    match kind {
        "histogram" => format!("{suffix}{labels}"),
        _ => labels.to_owned(),
    }
}

fn scrape() -> Scrape {
    Scrape {
        api: Arc::default(),
        process: None,
        sharing: None,
        devices: None,
        boot: None,
        restore: None,
    }
}

fn full() -> Scrape {
    let block = BlockMetrics::default();
    block.read_bytes.store(u64::MAX, Ordering::Relaxed);
    for micros in [7, 25, 30, 20_000_000] {
        block.read_latency.record(Duration::from_micros(micros));
    }
    let mapping = MappingFigures {
        mappings: 3,
        mapped: 40,
        copied: 1,
    };
    let mut pmem = PmemMetrics::default().describe();
    pmem.extend(mapping.describe());
    Scrape {
        process: Some(Usage {
            private: 3,
            ..Usage::default()
        }),
        sharing: Some(SharingReport {
            shared_pages: 2,
            merged_pages: 7,
            held_microseconds: 1_500_000,
            longest_hold_microseconds: 250,
            refused_pages: [("differs", 5), ("partial", 0)].into(),
            ..SharingReport::default()
        }),
        devices: Some(MachineMetrics {
            devices: vec![
                of_kind("virtio-blk", "root", block.describe()),
                of_kind("virtio-blk", "data_1", BlockMetrics::default().describe()),
                of_kind("virtio-pmem", "base", pmem),
                of_kind("virtio-rng", "entropy", RngMetrics::default().describe()),
                of_kind("serial port", "", SerialMetrics::default().describe()),
                of_kind("virtio-vsock", "vsock", VsockMetrics::default().describe()),
                of_kind(
                    "virtio-balloon",
                    "balloon",
                    BalloonMetrics::default().describe(),
                ),
            ],
            exits: vec![(ExitKind::IoOut, 12), (ExitKind::MmioRead, 0)],
            booted: None,
        }),
        boot: Some(Duration::from_millis(125)),
        restore: Some(Duration::from_micros(1500)),
        ..scrape()
    }
}

#[test]
fn before_a_guest_has_started_there_is_what_there_is() {
    let families = parse(&scrape().encode().unwrap());
    let names: Vec<_> = families.keys().map(String::as_str).collect();
    assert_eq!(names, ["coppice_api_failures", "coppice_api_requests"]);
}

#[test]
fn names_units_and_values_follow_the_conventions_of_prometheus() {
    let families = parse(&full().encode().unwrap());
    let value = |name: &str, labels: &str| {
        let family = families.get(name).unwrap_or_else(|| panic!("{name}"));
        *family
            .samples
            .get(labels)
            .unwrap_or_else(|| panic!("{name}{labels}"))
    };
    let cases = [
        ("coppice_process_private_bytes", "", 3072.0),
        ("coppice_guest_memory_bytes", r#"{state="shared"}"#, 8192.0),
        ("coppice_sharing_merged_pages", "", 7.0),
        (
            "coppice_sharing_refused_pages",
            r#"{reason="differs"}"#,
            5.0,
        ),
        ("coppice_sharing_held_seconds", "", 1.5),
        ("coppice_sharing_longest_hold_seconds", "", 0.00025),
        ("coppice_block_reads", r#"{drive="data_1"}"#, 0.0),
        ("coppice_pmem_mapped_pages", r#"{pmem="base"}"#, 40.0),
        ("coppice_balloon_returned_bytes", r#"{way="hinted"}"#, 0.0),
        ("coppice_entropy_bytes", "", 0.0),
        ("coppice_vsock_bytes", r#"{to="guest"}"#, 0.0),
        ("coppice_vsock_opened", "", 0.0),
        ("coppice_api_requests", r#"{method="GET"}"#, 0.0),
        ("coppice_vcpu_exits", r#"{kind="io_out"}"#, 12.0),
        ("coppice_boot_time_seconds", "", 0.125),
        ("coppice_restore_time_seconds", "", 0.0015),
    ];
    for (name, labels, expected) in cases {
        let found = value(name, labels);
        assert!((found - expected).abs() < 1e-9, "{name}{labels}: {found}");
    }
    assert!(value("coppice_block_read_bytes", r#"{drive="root"}"#) > 1.8e19);
}

#[test]
fn latencies_are_a_histogram_by_drive_and_operation() {
    let families = parse(&full().encode().unwrap());
    let samples = &families["coppice_block_request_duration_seconds"].samples;
    let read = r#"drive="root",operation="read""#;
    let cases = [
        (format!("_bucket{{le=\"0.00001\",{read}}}"), 1.0),
        (format!("_bucket{{le=\"0.00002\",{read}}}"), 1.0),
        (format!("_bucket{{le=\"0.00004\",{read}}}"), 3.0),
        (format!("_bucket{{le=\"10.48576\",{read}}}"), 3.0),
        (format!("_bucket{{le=\"+Inf\",{read}}}"), 4.0),
        (format!("_count{{{read}}}"), 4.0),
        (format!("_sum{{{read}}}"), 20.000_062),
        (
            r#"_count{drive="data_1",operation="flush"}"#.to_owned(),
            0.0,
        ),
    ];
    for (key, expected) in cases {
        let found = samples
            .get(&key)
            .unwrap_or_else(|| panic!("{key} in {samples:?}"));
        assert!((found - expected).abs() < 1e-9, "{key}: {found}");
    }
}

#[test]
fn what_only_grows_is_a_counter() {
    let families = parse(&full().encode().unwrap());
    let gauges: BTreeSet<_> = families
        .iter()
        .filter(|(_, family)| family.kind == "gauge")
        .map(|(name, _)| name.trim_start_matches("coppice_"))
        .collect();
    let expected = [
        "boot_time_seconds",
        "guest_memory_bytes",
        "pmem_copied_pages",
        "pmem_mapped_pages",
        "pmem_mappings",
        "process_private_bytes",
        "process_proportional_bytes",
        "process_shared_bytes",
        "restore_time_seconds",
        "sharing_candidate_pages",
        "sharing_longest_hold_seconds",
        "sharing_runs",
        "sharing_saved_bytes",
        "vsock_connections",
    ];
    assert_eq!(gauges, expected.into());
}

#[test]
fn the_families_of_devices_are_named_as_ever() {
    let families = parse(&full().encode().unwrap());
    let of_devices = ["balloon", "block", "entropy", "pmem", "uart", "vsock"];
    let names: Vec<_> = families
        .keys()
        .map(|name| name.trim_start_matches("coppice_"))
        .filter(|name| of_devices.iter().any(|device| name.starts_with(device)))
        .collect();
    let expected = [
        "balloon_deflations",
        "balloon_failures",
        "balloon_inflations",
        "balloon_refused_ranges",
        "balloon_returned_bytes",
        "balloon_returned_ranges",
        "balloon_statistics",
        "balloon_statistics_failures",
        "block_discards",
        "block_errors",
        "block_failures",
        "block_flushes",
        "block_limiter_events",
        "block_read_bytes",
        "block_reads",
        "block_request_duration_seconds",
        "block_throttled",
        "block_writes",
        "block_written_bytes",
        "entropy_bytes",
        "entropy_failures",
        "entropy_limiter_events",
        "entropy_throttled",
        "pmem_copied_pages",
        "pmem_errors",
        "pmem_failures",
        "pmem_flushes",
        "pmem_limiter_events",
        "pmem_mapped_pages",
        "pmem_mappings",
        "pmem_throttled",
        "pmem_written_bytes",
        "uart_dropped_bytes",
        "vsock_bytes",
        "vsock_connections",
        "vsock_failures",
        "vsock_opened",
        "vsock_packets",
        "vsock_resets",
    ];
    assert_eq!(names, expected);
}
