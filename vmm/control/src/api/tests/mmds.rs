//! The socket device, and the guest's metadata.

use super::*;

#[test]
fn metadata_are_set_and_changed_before_and_after_the_start() {
    let bench = Bench::new();
    let done = (204, Value::Null);
    assert_eq!(bench.get("/mmds"), json!({}));
    let (status, fault) = bench.patch("/mmds", &json!({"a": 1}));
    assert_eq!(status, 400, "{fault}");
    assert_eq!(bench.put("/mmds", &json!({"a": {"b": 1, "c": 2}})), done);
    bench.start();
    assert_eq!(bench.patch("/mmds", &json!({"a": {"b": null}})), done);
    assert_eq!(bench.get("/mmds"), json!({"a": {"c": 2}}));
    for body in [json!([]), json!("x"), json!(null)] {
        assert_eq!(bench.put("/mmds", &body).0, 400, "{body}");
        assert_eq!(bench.patch("/mmds", &body).0, 400, "{body}");
    }
    let half = "x".repeat(30_000);
    assert_eq!(bench.put("/mmds", &json!({"half": half})), done);
    let (status, fault) = bench.patch("/mmds", &json!({"other": half}));
    assert_eq!(status, 400, "{fault}");
    assert_eq!(bench.get("/mmds"), json!({"half": half}));
}

#[test]
fn a_socket_device_is_reported_as_it_was_configured() {
    let bench = Bench::new();
    let done = (204, Value::Null);
    let vsock = json!({"guest_cid": 52, "uds_path": bench.path("v")});
    assert_eq!(bench.put("/vsock", &vsock), done);
    assert_eq!(
        bench.put(
            "/mmds/config",
            &json!({"imds_compat": true, "vsock_port": 81})
        ),
        done
    );
    let config = bench.get("/vm/config");
    assert_eq!(config["vsock"], vsock);
    assert_eq!(
        config["mmds-config"],
        json!({"version": "V1", "imds_compat": true, "vsock_port": 81})
    );
}
