//! Pmem devices over REST.

use super::*;

fn pmem(id: &str, path: &Path) -> Value {
    json!({"id": id, "path_on_host": path})
}

#[test]
fn pmem_devices_are_configured_as_with_firecracker_and_beyond() {
    let bench = Bench::new();
    let disk = file(bench.folder.path(), "disk");
    let done = (204, Value::Null);
    let firecracker = json!({
        "id": "root", "path_on_host": disk, "root_device": true, "read_only": true, "rate_limiter": null
    });
    assert_eq!(bench.put("/pmem/root", &firecracker), done);
    let ours = json!({
        "id": "data", "path_on_host": disk, "mode": "cow", "format": "raw", "parents": bench.folder.path()
    });
    assert_eq!(bench.put("/pmem/data", &ours), done);
    let config = &bench.get("/vm/config")["pmem"];
    assert_eq!(
        (&config[0]["id"], &config[0]["read_only"]),
        (&json!("root"), &json!(true))
    );
    assert_eq!(
        (&config[1]["mode"], &config[1]["format"]),
        (&json!("cow"), &json!("raw"))
    );
    // The device of that name is replaced where it is.
    assert_eq!(bench.put("/pmem/root", &pmem("root", &disk)), done);
    let config = &bench.get("/vm/config")["pmem"];
    assert_eq!(config[0]["root_device"], false);
    assert_eq!(config.as_array().unwrap().len(), 2);
    bench.start();
    let (status, fault) = bench.put("/pmem/root", &pmem("root", &disk));
    assert_eq!(status, 400);
    assert!(fault["fault_message"].as_str().unwrap().contains("after"));
}

#[test]
fn a_pmem_device_that_cannot_be_is_a_fault_and_changes_nothing() {
    let bench = Bench::new();
    let disk = file(bench.folder.path(), "disk");
    let root = json!({"drive_id": "a", "path_on_host": disk, "is_root_device": true});
    assert_eq!(bench.put("/drives/a", &root).0, 204);
    assert_eq!(bench.put("/pmem/a", &pmem("a", &disk)).0, 204);
    let before = bench.get("/vm/config");
    let with = |field: &str, value: Value| {
        let mut pmem = pmem("a", &disk);
        pmem[field] = value;
        pmem
    };
    for (path, body, named) in [
        ("/pmem", pmem("a", &disk), "ID cannot be empty"),
        ("/pmem/b", pmem("a", &disk), "does not match"),
        ("/pmem/b", pmem("b", &bench.path("missing")), "missing"),
        ("/pmem/a", with("colour", json!("red")), "colour"),
        ("/pmem/a", with("mode", json!("wo")), "wo"),
        (
            "/pmem/a",
            with(
                "rate_limiter",
                json!({"ops": {"size": -1, "refill_time": 1}}),
            ),
            "-1",
        ),
        (
            "/pmem/a",
            with("root_device", json!(true)),
            "pmem: a is to be the root device, but a is the root",
        ),
        ("/pmem/a", json!({"id": "a"}), "path_on_host"),
    ] {
        let (status, fault) = bench.put(path, &body);
        assert_eq!(status, 400, "{path} {body}");
        let message = fault["fault_message"].as_str().unwrap();
        assert!(message.contains(named), "{path} {body}: {message}");
    }
    assert_eq!(bench.get("/vm/config"), before);
}
