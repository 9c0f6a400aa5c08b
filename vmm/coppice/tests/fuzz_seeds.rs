//! The files that the fuzzers of `fuzz/` begin with are those of a daemon, of a guest, its template and a clone of
//! that. With `UPDATE_EXPECT=1` they are written.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

#[path = "serve/mod.rs"]
mod serve;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use serve::daemon::Daemon;
use serve::kernel;
use serve::traces::{clone, make_disk, template};

/// What the file of a snapshot's state has before its JSON.
const HEADER: usize = 24;

/// A guest with devices of each kind, a template of it, a clone that has ended, and a template of that.
fn make_guests(daemon: &Daemon) {
    kernel::write_of_pmem(&daemon.folder().join("kernel"));
    let disk = make_disk(daemon.folder());
    let pmem = daemon.folder().join("pmem");
    fs::write(&pmem, vec![7; 2 << 20]).unwrap();
    let image = json!({"path": daemon.kernel(), "kind": "kernel"});
    assert_eq!(daemon.call("PUT", "/images/k", Some(&image)).0, 204);
    let mut spec = daemon.spec("a");
    spec["labels"] = json!({"for": "fuzzers"});
    spec["metadata"] = json!({"role": "web"});
    let devices = json!({
        "drives": [{"drive_id": "root", "path_on_host": disk, "is_root_device": false}],
        "pmem": [{"id": "p", "path_on_host": pmem, "mode": "cow", "format": "raw"}],
        "vsock": {}, "balloon": {"amount_mib": 0, "deflate_on_oom": true}, "entropy": {},
    });
    for (device, config) in devices.as_object().unwrap() {
        spec["config"][device] = config.clone();
    }
    spec["config"]["boot-source"]["kernel_image_path"] = json!("image:k");
    assert_eq!(daemon.post("/vms", &spec).0, 201);
    // The kernel keeps the letter in the memory that is a disk.
    assert!(daemon.echoes("a"));
    let unlike_its_own = json!({"role": "db"});
    assert_eq!(
        daemon.call("PATCH", "/vms/a/mmds", Some(&unlike_its_own)).0,
        204
    );
    for (path, body) in [
        ("/templates", template()),
        ("/vms", clone()),
        ("/templates", json!({"id": "u", "vm": "b"})),
        ("/vms/b/stop", json!({"timeout_s": 0})),
    ] {
        let (status, answer) = daemon.post(path, &body);
        assert!(status < 300, "{path}: {answer}");
    }
}

/// The names of fields in a JSON value.
fn fields(value: &Value, place: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                let place = format!("{place}.{name}");
                fields(value, &place, found);
                found.insert(place);
            }
        }
        Value::Array(list) => list.iter().for_each(|value| fields(value, place, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// What a seed has to have: the fields of its JSON, or the names of its samples.
fn form(seed: &[u8]) -> BTreeSet<String> {
    let json = seed
        .strip_prefix(b"COPPSNAP")
        .map_or(seed, |_| &seed[HEADER..]);
    let mut found = BTreeSet::new();
    if let Ok(value) = serde_json::from_slice(json) {
        fields(&value, "", &mut found);
    } else {
        let text = std::str::from_utf8(seed).unwrap();
        let names = text
            .split_inclusive('\n')
            .map(|line| line.split(['{', ' ']).next());
        found.extend(names.flatten().map(ToOwned::to_owned));
    }
    found
}

/// Replaces a text that differs from one run to the next.
fn replaced(bytes: &[u8], text: &str, by: &str) -> Vec<u8> {
    let mut new = Vec::new();
    let mut rest = bytes;
    while let Some(at) = rest
        .windows(text.len())
        .position(|part| part == text.as_bytes())
    {
        new.extend([&rest[..at], by.as_bytes()].concat());
        rest = &rest[at + text.len()..];
    }
    [new, rest.to_vec()].concat()
}

#[test]
fn the_fuzzers_begin_with_files_that_have_all_the_fields_of_todays() {
    let daemon = Daemon::start(&[]);
    make_guests(&daemon);
    let state = daemon.folder().join("state");
    let metrics = daemon.call("GET", "/vms/a/metrics", None).1;
    fs::write(state.join("metrics"), metrics.as_str().unwrap()).unwrap();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    for (seed, file) in [
        ("state/full", "templates/t/state"),
        ("state/diff", "templates/u/state"),
        ("records/vm", "vms/a/vm.json"),
        ("records/ended", "vms/b/vm.json"),
        ("records/config", "vms/a/config.json"),
        ("records/pid", "vms/a/pid.json"),
        ("records/end", "vms/b/end.json"),
        ("records/template", "templates/u/template.json"),
        ("records/images", "images.json"),
        ("records/metrics", "metrics"),
    ] {
        let found = fs::read(state.join(file)).unwrap();
        let found = replaced(&found, daemon.folder().to_str().unwrap(), "/d");
        let path = corpus.join(seed);
        if std::env::var_os("UPDATE_EXPECT").is_some() {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &found).unwrap();
        }
        let kept = fs::read(&path).unwrap_or_else(|error| panic!("{seed}: {error}"));
        assert_eq!(
            form(&kept),
            form(&found),
            "{seed}: UPDATE_EXPECT=1 writes it"
        );
    }
}
