use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use devices::virtio::rng::RngMetrics;

use super::*;

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

/// Reads `OpenMetrics` text 1.0 as strictly as its specification and Prometheus' naming rules are, as far as this program uses it.
fn parse(text: &str) -> BTreeMap<String, Family> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut current = String::new();
    let body = text.strip_suffix("# EOF\n").expect("an end");
    for line in body.lines() {
        if let Some(said) = line.strip_prefix("# ") {
            let mut words = said.splitn(3, ' ');
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
        let expected = match family.kind.as_str() {
            "counter" => format!("{current}_total"),
            "gauge" => current.clone(),
            kind => panic!("{current} is a {kind}"),
        };
        assert_eq!(name, expected);
        if !labels.is_empty() {
            check_labels(labels);
        }
        let before = family
            .samples
            .insert(labels.to_owned(), value.parse().unwrap());
        assert!(before.is_none(), "{series} is there twice");
    }
    for (name, family) in &families {
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

fn scrape() -> Scrape {
    Scrape {
        api: Arc::default(),
        process: None,
        sharing: None,
        devices: None,
    }
}

fn full() -> Scrape {
    let block = Arc::new(BlockMetrics::default());
    block.read_bytes.store(u64::MAX, Ordering::Relaxed);
    let pmem = PmemCounters {
        device: Arc::default(),
        mapping: crate::pmem::Figures {
            mappings: 3,
            mapped: 40,
            copied: 1,
        },
    };
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
        devices: Some(DeviceMetrics {
            drives: [
                ("root".to_owned(), block),
                ("data_1".to_owned(), Arc::default()),
            ]
            .into(),
            pmem: [("base".to_owned(), pmem)].into(),
            entropy: Some(Arc::new(RngMetrics::default())),
            balloon: Some(Arc::default()),
        }),
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
fn names_units_and_values_are_as_prometheus_wants_them() {
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
        ("coppice_api_requests", r#"{method="GET"}"#, 0.0),
    ];
    for (name, labels, expected) in cases {
        let found = value(name, labels);
        assert!((found - expected).abs() < 1e-9, "{name}{labels}: {found}");
    }
    assert!(value("coppice_block_read_bytes", r#"{drive="root"}"#) > 1.8e19);
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
        "guest_memory_bytes",
        "pmem_copied_pages",
        "pmem_mapped_pages",
        "pmem_mappings",
        "process_private_bytes",
        "process_proportional_bytes",
        "process_shared_bytes",
        "sharing_candidate_pages",
        "sharing_longest_hold_seconds",
        "sharing_runs",
        "sharing_saved_bytes",
    ];
    assert_eq!(gauges, expected.into());
}
