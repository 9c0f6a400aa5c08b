//! What a request makes of settings is what it makes of the guest's process.

use std::collections::BTreeSet;

use super::*;
use crate::api::keep::GuestSettings;
use crate::api::operations::{GUEST_OPERATIONS, find_operation};

/// The settings of a process.
fn settings(bench: &Bench) -> GuestSettings {
    let metadata = bench.get("/mmds");
    GuestSettings {
        config: serde_json::from_value(bench.get("/vm/config")).unwrap(),
        metadata: metadata.as_object().cloned().unwrap_or_default(),
    }
}

/// The operations whose requests have been compared.
struct Compared(BTreeSet<(&'static str, &'static str)>);

impl Compared {
    fn request(&mut self, bench: &Bench, method: &str, path: &str, body: &Value) {
        let before = settings(bench);
        let (operation, name) = find_operation(method, path).unwrap();
        let (status, answer) = bench.request(method, path, &body.to_string());
        assert_eq!(status, 204, "{method} {path} {body}: {answer}");
        let body = body.to_string();
        let applied = operation
            .applied_to(&before, name, body.as_bytes())
            .unwrap();
        assert_eq!(settings(bench), applied, "{method} {path} {body}");
        self.0.insert((operation.method.as_str(), operation.path));
    }
}

#[test]
#[allow(clippy::too_many_lines, reason = "a line or two for each request")]
fn a_request_makes_of_settings_what_it_makes_of_the_process() {
    let bench = Bench::new();
    let at = |name: &str| file(bench.folder.path(), name);
    let mut compared = Compared(BTreeSet::new());
    let mut request = |method, path: &str, body: Value| {
        compared.request(&bench, method, path, &body);
    };
    request(
        "PUT",
        "/machine-config",
        json!({"vcpu_count": 2, "mem_size_mib": 64}),
    );
    request("PATCH", "/machine-config", json!({"mem_size_mib": 96}));
    request(
        "PATCH",
        "/machine-config",
        json!({"smt": true, "cpu_template": "T2"}),
    );
    request("PUT", "/cpu-config", json!({"kvm_capabilities": ["!56"]}));
    request(
        "PUT",
        "/boot-source",
        json!({"kernel_image_path": at("kernel"), "boot_args": "quiet"}),
    );
    request("PUT", "/drives/root", drive("root", &at("disk")));
    request("PUT", "/drives/data", drive("data", &at("data")));
    request("PUT", "/drives/root", drive("root", &at("other")));
    request(
        "PUT",
        "/pmem/base",
        json!({"id": "base", "path_on_host": at("base")}),
    );
    request(
        "PUT",
        "/entropy",
        json!({"rate_limiter": {"ops": {"size": 1, "refill_time": 5}}}),
    );
    // Nobody opens the tap before the start.
    request(
        "PUT",
        "/network-interfaces/eth0",
        json!({"iface_id": "eth0", "host_dev_name": "lo", "mtu": 1400}),
    );
    request(
        "PUT",
        "/vsock",
        json!({"guest_cid": 7, "uds_path": bench.path("v")}),
    );
    request(
        "PUT",
        "/balloon",
        json!({"amount_mib": 8, "deflate_on_oom": true, "stats_polling_interval_s": 1}),
    );
    request(
        "PUT",
        "/mmds/config",
        json!({"imds_compat": true, "vsock_port": 80}),
    );
    request("PUT", "/sharing", json!({"mode": "read"}));
    request(
        "PUT",
        "/serial",
        json!({"serial_out_path": bench.path("serial"), "rate_limiter": {"size": 1, "refill_time": 5}}),
    );
    request("PUT", "/logger", json!({"level": "Warn"}));
    request(
        "PUT",
        "/metrics",
        json!({"metrics_path": bench.path("metrics")}),
    );
    request("PUT", "/mmds", json!({"a": {"b": 1, "c": 2}}));
    request("PATCH", "/mmds", json!({"a": {"b": null}, "d": [3]}));
    bench.start();
    request(
        "PATCH",
        "/drives/root",
        json!({"drive_id": "root", "path_on_host": at("next")}),
    );
    let limit = json!({"bandwidth": {"size": 1000, "refill_time": 100}});
    request(
        "PATCH",
        "/network-interfaces/eth0",
        json!({"iface_id": "eth0", "rx_rate_limiter": limit}),
    );
    let bucket = |size| json!({"size": size, "one_time_burst": 3, "refill_time": 100});
    request(
        "PATCH",
        "/drives/data",
        json!({"drive_id": "data", "rate_limiter": {"ops": bucket(0), "bandwidth": bucket(9)}}),
    );
    request(
        "PATCH",
        "/drives/root",
        json!({"drive_id": "root", "path_on_host": at("last"), "rate_limiter": {"bandwidth": null, "ops": bucket(9)}}),
    );
    request(
        "PATCH",
        "/pmem/base",
        json!({"id": "base", "rate_limiter": {"ops": bucket(4)}}),
    );
    request("PATCH", "/pmem/base", json!({"id": "base"}));
    request("PATCH", "/balloon", json!({"amount_mib": 16}));
    request(
        "PATCH",
        "/balloon/statistics",
        json!({"stats_polling_interval_s": 5}),
    );
    request("PUT", "/mmds", json!({"e": 4}));
    let kept = GUEST_OPERATIONS
        .iter()
        .filter(|operation| operation.is_kept());
    let kept: BTreeSet<_> = kept.map(|kept| (kept.method.as_str(), kept.path)).collect();
    assert_eq!(compared.0, kept);
}

#[test]
fn what_the_process_refuses_for_what_it_says_is_not_applied_either() {
    let bench = Bench::new();
    let before = settings(&bench);
    for (method, path, body) in [
        (
            "PUT",
            "/drives/../a",
            json!({"drive_id": "../a", "path_on_host": "/d", "is_root_device": false}),
        ),
        (
            "PUT",
            "/drives/a",
            json!({"drive_id": "b", "path_on_host": "/d", "is_root_device": false}),
        ),
        (
            "PUT",
            "/drives/a",
            json!({"drive_id": "a/b", "path_on_host": "/d", "is_root_device": false}),
        ),
        (
            "PATCH",
            "/drives/a",
            json!({"drive_id": "a", "path_on_host": "/d"}),
        ),
        ("PATCH", "/pmem/a", json!({"id": "a", "rate_limiter": {}})),
        (
            "PUT",
            "/machine-config",
            json!({"vcpu_count": 0, "mem_size_mib": 64}),
        ),
        ("PATCH", "/machine-config", json!({"mem_size_mib": 0})),
        (
            "PUT",
            "/balloon",
            json!({"amount_mib": 4_000_000, "deflate_on_oom": true}),
        ),
        ("PUT", "/mmds", json!([])),
        ("PUT", "/entropy", json!({"unknown": 1})),
    ] {
        let Some((operation, name)) = find_operation(method, path) else {
            continue;
        };
        let text = body.to_string();
        let applied = operation.applied_to(&before, name, text.as_bytes());
        assert!(applied.is_err(), "{method} {path} {body}");
        assert_eq!(bench.request(method, path, &text).0, 400, "{method} {path}");
        assert_eq!(settings(&bench), before);
    }
}
