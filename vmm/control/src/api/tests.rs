//! Clients that are slow, hostile, in a hurry, or all of it, by raw sockets.

mod client;
mod metrics;
mod mmds;
mod pmem;
mod settings;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use config::VmConfig;

use super::connections::MAX_CONNECTIONS;
use super::*;
use crate::control::tests::{Calls, control, file, launch};

struct Bench {
    folder: tempfile::TempDir,
    _socket: ApiSocket,
    server: ApiServer,
    calls: Calls,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = ApiSocket::bind(&folder.path().join("s")).unwrap();
        let calls = Calls::default();
        let launched = calls.clone();
        let launch = Arc::new(move |config: &VmConfig, _| launch(&launched, config));
        let control = Arc::new(Mutex::new(control()));
        let server = ApiServer::start(&socket, control, Arc::default(), launch).unwrap();
        Self {
            folder,
            _socket: socket,
            server,
            calls,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.path("s")).unwrap()
    }

    /// Sends `bytes`, closes that side, and returns all that is answered.
    fn raw(&self, bytes: &[u8]) -> String {
        let mut client = self.connect();
        // A server that refuses early need not read it all.
        let _ = client.write_all(bytes);
        let _ = client.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }

    fn request(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        parse(&self.raw(request(method, path, body).as_bytes()))
    }

    fn put(&self, path: &str, body: &Value) -> (u16, Value) {
        self.request("PUT", path, &body.to_string())
    }

    fn patch(&self, path: &str, body: &Value) -> (u16, Value) {
        self.request("PATCH", path, &body.to_string())
    }

    fn get(&self, path: &str) -> Value {
        let (status, body) = self.request("GET", path, "");
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    fn start(&self) {
        let kernel = file(self.folder.path(), "kernel");
        assert_eq!(
            self.put("/boot-source", &json!({"kernel_image_path": kernel}))
                .0,
            204
        );
        assert_eq!(
            self.put("/actions", &json!({"action_type": "InstanceStart"})),
            (204, Value::Null)
        );
    }
}

fn request(method: &str, path: &str, body: &str) -> String {
    let length = if body.is_empty() {
        String::new()
    } else {
        format!("Content-Length: {}\r\n", body.len())
    };
    format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n{body}")
}

fn parse(answer: &str) -> (u16, Value) {
    let status = answer
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.get(..3))
        .unwrap_or_else(|| panic!("{answer:?}"));
    let body = answer.split_once("\r\n\r\n").unwrap().1;
    let value = if body.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(body).unwrap()
    };
    (status.parse().unwrap(), value)
}

fn drive(id: &str, path: &Path) -> Value {
    json!({"drive_id": id, "path_on_host": path, "is_root_device": false})
}

#[test]
fn a_guest_is_configured_started_and_ruled() {
    let bench = Bench::new();
    let info = bench.get("/");
    assert_eq!(
        (&info["app_name"], &info["state"]),
        (&json!("Coppice"), &json!("Not started"))
    );
    assert_eq!(
        bench.get("/version"),
        json!({"firecracker_version": env!("CARGO_PKG_VERSION")})
    );
    let disk = file(bench.folder.path(), "disk");
    let done = (204, Value::Null);
    assert_eq!(bench.put("/drives/root", &drive("root", &disk)), done);
    assert_eq!(
        bench.put(
            "/machine-config",
            &json!({"vcpu_count": 2, "mem_size_mib": 256})
        ),
        done
    );
    assert_eq!(
        bench.patch("/machine-config", &json!({"mem_size_mib": 512})),
        done
    );
    assert_eq!(bench.put("/entropy", &json!({})), done);
    assert_eq!(
        bench.put("/serial", &json!({"serial_out_path": bench.path("serial")})),
        done
    );
    assert_eq!(
        bench.put("/metrics", &json!({"metrics_path": bench.path("metrics")})),
        done
    );
    bench.start();
    assert_eq!(bench.get("/")["state"], "Running");
    assert_eq!(bench.patch("/vm", &json!({"state": "Paused"})), done);
    assert_eq!(bench.get("/")["state"], "Paused");
    assert_eq!(bench.patch("/vm", &json!({"state": "Resumed"})), done);
    assert_eq!(
        bench.patch(
            "/drives/root",
            &json!({"drive_id": "root", "path_on_host": disk})
        ),
        done
    );
    let next = bench.path("next");
    for (path, body) in [
        ("snapshot", json!({"path_on_host": next})),
        ("resize", json!({"size": 1 << 20})),
        ("compact", json!({"find_zeros": true})),
        ("commit", json!({})),
        ("job", json!({"state": "Cancelled"})),
    ] {
        assert_eq!(
            bench.put(&format!("/drives/root/{path}"), &body),
            done,
            "{path}"
        );
        let (status, _) = bench.put(&format!("/drives/none/{path}"), &body);
        assert_eq!(status, 400, "{path}");
        let (status, _) = bench.put(&format!("/drives/root/{path}"), &json!({"what": 1}));
        assert_eq!(status, 400, "{path}");
    }
    assert_eq!(bench.get("/drives/root/job")["state"], "Done");
    assert_eq!(
        bench.get("/vm/config")["drives"][0]["path_on_host"],
        "/base"
    );
    assert_eq!(
        bench.put("/actions", &json!({"action_type": "FlushMetrics"})),
        done
    );
    let (status, fault) = bench.put("/actions", &json!({"action_type": "SendCtrlAltDel"}));
    assert_eq!(status, 400, "the double's keyboard is busy");
    assert!(
        fault["fault_message"]
            .as_str()
            .unwrap()
            .contains("Ctrl-Alt-Del")
    );
    assert_eq!(
        *bench.calls.lock().unwrap(),
        [
            "pause",
            "resume",
            "replace root",
            "snapshot root disk next",
            "resize root 1048576",
            "compact root true",
            "commit root",
            "cancel root",
            "metrics",
            "ctrl-alt-del"
        ]
    );
    let config = bench.get("/vm/config");
    assert_eq!(config["machine-config"]["mem_size_mib"], 512);
    assert_eq!(config["machine-config"], bench.get("/machine-config"));
    assert_eq!(config["drives"][0]["drive_id"], "root");
    bench.server.finish();
}

#[test]
#[allow(clippy::too_many_lines, reason = "a table")]
fn an_invalid_request_gets_a_fault_and_changes_nothing() {
    let bench = Bench::new();
    let disk = file(bench.folder.path(), "disk");
    assert_eq!(bench.put("/drives/a", &drive("a", &disk)).0, 204);
    let before = bench.get("/vm/config");
    let missing = bench.path("missing");
    let with = |field: &str, value: Value| {
        let mut drive = drive("a", &disk);
        drive[field] = value;
        drive.to_string()
    };
    let cases = [
        (
            "PUT",
            "/boot-source",
            json!({"kernel_image_path": missing}).to_string(),
            "missing",
        ),
        (
            "PUT",
            "/boot-source",
            json!({"kernel_image_path": disk, "cmdline": ""}).to_string(),
            "unknown field `cmdline`",
        ),
        (
            "PUT",
            "/boot-source",
            json!({"kernel_image_path": disk, "initrd_path": missing}).to_string(),
            "initrd_path",
        ),
        (
            "PUT",
            "/drives/b",
            drive("b", &missing).to_string(),
            "missing",
        ),
        (
            "PUT",
            "/drives/b",
            drive("a", &disk).to_string(),
            "does not match",
        ),
        (
            "PUT",
            "/drives/",
            drive("a", &disk).to_string(),
            "ID cannot be empty",
        ),
        (
            "PUT",
            "/drives/a/b",
            drive("a", &disk).to_string(),
            "Invalid request",
        ),
        (
            "PUT",
            "/drives/a",
            with("rate_limiter", json!({"ops": {"size": 1}})),
            "refill_time",
        ),
        (
            "PUT",
            "/drives/a",
            with("colour", json!("red")),
            "unknown field `colour`",
        ),
        (
            "PUT",
            "/drives/a",
            with("path_on_host", json!(bench.folder.path())),
            "not a regular file",
        ),
        (
            "PUT",
            "/machine-config",
            json!({"vcpu_count": 2}).to_string(),
            "mem_size_mib",
        ),
        (
            "PUT",
            "/machine-config",
            json!({"vcpu_count": 3, "mem_size_mib": 64, "smt": true}).to_string(),
            "machine-config.smt is true",
        ),
        (
            "PUT",
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 64, "cpu_template": "V1N1"}).to_string(),
            "V1N1",
        ),
        (
            "PUT",
            "/cpu-config",
            json!({"msr_modifiers": [{"addr": "10a", "bitmap": "0b1"}]}).to_string(),
            "addr",
        ),
        ("PUT", "/cpu-config", "\"/file\"".to_owned(), "CpuConfig"),
        ("PATCH", "/machine-config", "{}".to_owned(), "empty"),
        (
            "PATCH",
            "/machine-config",
            json!({"vcpu_count": 99}).to_string(),
            "vcpu_count",
        ),
        (
            "PUT",
            "/metrics",
            json!({"metrics_path": "/nonexistent/m"}).to_string(),
            "metrics_path",
        ),
        (
            "PUT",
            "/logger",
            json!({"log_path": "/nonexistent/l"}).to_string(),
            "log_path",
        ),
        (
            "PUT",
            "/logger",
            json!({"level": "loud"}).to_string(),
            "loud",
        ),
        (
            "PUT",
            "/entropy",
            json!({"rate_limiter": {"size": 1, "refill_time": 1}}).to_string(),
            "expected `bandwidth` or `ops`",
        ),
        (
            "PUT",
            "/vsock",
            json!({"guest_cid": 3}).to_string(),
            "vsock.uds_path",
        ),
        (
            "PUT",
            "/mmds/config",
            json!({"network_interfaces": ["eth0"]}).to_string(),
            "network_interfaces",
        ),
        (
            "PUT",
            "/actions",
            json!({"action_type": "Explode"}).to_string(),
            "Explode",
        ),
        (
            "PUT",
            "/actions",
            json!({"action_type": "InstanceStart"}).to_string(),
            "no kernel",
        ),
        (
            "PUT",
            "/actions",
            json!({"action_type": "SendCtrlAltDel"}).to_string(),
            "before starting",
        ),
        (
            "PUT",
            "/actions",
            json!({"action_type": "FlushMetrics"}).to_string(),
            "before starting",
        ),
        (
            "PATCH",
            "/vm",
            json!({"state": "Paused"}).to_string(),
            "before starting",
        ),
        (
            "PATCH",
            "/vm",
            json!({"state": "Flying"}).to_string(),
            "Flying",
        ),
        (
            "PATCH",
            "/drives/a",
            json!({"drive_id": "a", "path_on_host": disk}).to_string(),
            "before starting",
        ),
        (
            "PATCH",
            "/pmem/a",
            json!({"id": "a", "rate_limiter": {}}).to_string(),
            "before starting",
        ),
        ("PUT", "/entropy", "{".to_owned(), "EOF"),
        ("PUT", "/entropy", "\u{0}".to_owned(), "expected value"),
        (
            "PATCH",
            "/machine-config",
            "[".repeat(20_000),
            "recursion limit",
        ),
        ("PUT", "/entropy", String::new(), "Empty PUT"),
        ("PATCH", "/vm", String::new(), "Empty PATCH"),
        ("GET", "/", "{}".to_owned(), "cannot have a body"),
        (
            "GET",
            "/nothing",
            String::new(),
            "Invalid request method and/or path",
        ),
        (
            "DELETE",
            "/drives/a",
            String::new(),
            "Invalid request method and/or path",
        ),
        (
            "OPTIONS",
            "/",
            String::new(),
            "Invalid request method and/or path",
        ),
    ];
    for (method, path, body, named) in cases {
        let (status, fault) = bench.request(method, path, &body);
        let message = fault["fault_message"].as_str().unwrap_or_default();
        assert_eq!(status, 400, "{method} {path} {body:.200}: {fault}");
        assert!(
            message.contains(named),
            "{method} {path} {body:.200}: {message}"
        );
    }
    assert_eq!(bench.get("/vm/config"), before);
    assert_eq!(bench.get("/")["state"], "Not started");
}

#[test]
fn a_started_guest_is_not_configured_any_more() {
    let bench = Bench::new();
    bench.start();
    let disk = file(bench.folder.path(), "disk");
    let before = bench.get("/vm/config");
    let cases = [
        ("PUT", "/boot-source", json!({"kernel_image_path": disk})),
        ("PUT", "/drives/a", drive("a", &disk)),
        (
            "PUT",
            "/machine-config",
            json!({"vcpu_count": 2, "mem_size_mib": 256}),
        ),
        ("PATCH", "/machine-config", json!({"vcpu_count": 2})),
        ("PUT", "/cpu-config", json!({})),
        ("PUT", "/entropy", json!({})),
        ("PUT", "/vsock", json!({"guest_cid": 3, "uds_path": "v"})),
        ("PUT", "/mmds/config", json!({"vsock_port": 80})),
        (
            "PUT",
            "/balloon",
            json!({"amount_mib": 0, "deflate_on_oom": false}),
        ),
        ("PUT", "/serial", json!({})),
        ("PUT", "/logger", json!({"level": "Info"})),
        (
            "PUT",
            "/metrics",
            json!({"metrics_path": bench.path("metrics")}),
        ),
        ("PUT", "/actions", json!({"action_type": "InstanceStart"})),
    ];
    for (method, path, body) in cases {
        let (status, fault) = bench.request(method, path, &body.to_string());
        assert_eq!(status, 400, "{method} {path}");
        assert!(
            fault["fault_message"]
                .as_str()
                .unwrap()
                .contains("after starting"),
            "{path}: {fault}"
        );
    }
    assert_eq!(bench.get("/vm/config"), before);
}

#[test]
fn a_balloon_is_ruled_as_in_firecracker() {
    let bench = Bench::new();
    let done = (204, Value::Null);
    let refused = |method: &str, path: &str, body: &str, named: &str| {
        let (status, fault) = bench.request(method, path, body);
        let message = fault["fault_message"].as_str().unwrap_or_default();
        assert_eq!(status, 400, "{method} {path} {body}: {fault}");
        assert!(message.contains(named), "{method} {path} {body}: {message}");
    };
    refused("GET", "/balloon", "", "no balloon");
    refused("PUT", "/balloon", r#"{"amount_mib": 1}"#, "deflate_on_oom");
    refused("PUT", "/balloon", "", "Empty PUT");
    let amount = r#"{"amount_mib": 129, "deflate_on_oom": true}"#;
    refused("PUT", "/balloon", amount, "balloon.amount_mib");
    let balloon = json!({
        "amount_mib": 16, "deflate_on_oom": true, "stats_polling_interval_s": 1,
        "free_page_hinting": true, "free_page_reporting": false
    });
    assert_eq!(bench.put("/balloon", &balloon), done);
    assert_eq!(bench.get("/balloon"), balloon);
    let less = json!({"mem_size_mib": 8});
    let (status, _) = bench.patch("/machine-config", &less);
    assert_eq!(status, 400, "less memory than is in the balloon");
    refused(
        "PATCH",
        "/balloon",
        r#"{"amount_mib": 8}"#,
        "before starting",
    );
    refused("PATCH", "/balloon/hinting/start", "", "before starting");
    refused("GET", "/balloon/statistics", "", "before starting");
    refused("GET", "/balloon/hinting/status", "", "before starting");
    bench.start();

    assert_eq!(bench.patch("/balloon", &json!({"amount_mib": 8})), done);
    assert_eq!(bench.get("/balloon")["amount_mib"], 8);
    assert_eq!(bench.get("/vm/config")["balloon"]["amount_mib"], 8);
    let statistics = bench.get("/balloon/statistics");
    assert_eq!(
        (&statistics["target_mib"], &statistics["actual_pages"]),
        (&json!(8), &json!(0))
    );
    let interval = json!({"stats_polling_interval_s": 2});
    assert_eq!(bench.patch("/balloon/statistics", &interval), done);
    assert_eq!(bench.get("/balloon")["stats_polling_interval_s"], 2);
    let status = json!({"host_cmd": 0, "guest_cmd": null});
    assert_eq!(bench.get("/balloon/hinting/status"), status);
    // The double has no driver, which is reported only after the body was parsed.
    for body in ["", "{}", r#"{"acknowledge_on_stop": false}"#] {
        refused("PATCH", "/balloon/hinting/start", body, "no driver");
    }
    for body in ["", "{}"] {
        refused("PATCH", "/balloon/hinting/stop", body, "no driver");
    }
    let off = r#"{"stats_polling_interval_s": 0}"#;
    refused("PATCH", "/balloon/statistics", off, "on or off");
    refused("PATCH", "/balloon/statistics", "", "Empty PATCH");
    refused(
        "PATCH",
        "/balloon",
        r#"{"amount_mib": 129}"#,
        "balloon.amount_mib",
    );
    refused("PATCH", "/balloon", r#"{"amount_mib": -1}"#, "-1");
    refused("PATCH", "/balloon", "", "Empty PATCH");
    refused(
        "PATCH",
        "/balloon/hinting/start",
        r#"{"stop": 1}"#,
        "unknown field",
    );
    refused(
        "PATCH",
        "/balloon/hinting/stop",
        r#"{"stop": 1}"#,
        "unknown field",
    );
    for path in [
        "/balloon/hinting",
        "/balloon/nothing",
        "/balloon/hinting/start/now",
    ] {
        refused("PATCH", path, "{}", "Invalid request");
        refused("GET", path, "", "Invalid request");
    }
}

#[test]
fn bodies_over_the_limit_are_refused_however_they_come() {
    let bench = Bench::new();
    let padded = |length: usize| format!("{{{}}}", " ".repeat(length - 2));
    assert_eq!(
        bench
            .request("PUT", "/entropy", &padded(config::limits::MAX_BODY))
            .0,
        204
    );
    assert_eq!(
        bench
            .request("PUT", "/entropy", &padded(config::limits::MAX_BODY + 1))
            .0,
        413
    );
    let reported = "PUT /entropy HTTP/1.1\r\nHost: l\r\nContent-Length: 99999999999\r\n\r\n";
    assert_eq!(
        parse(&bench.raw(reported.as_bytes())).0,
        413,
        "before any of it is sent"
    );
    let chunk = format!("1000\r\n{}\r\n", " ".repeat(0x1000));
    let chunked = format!(
        "PUT /entropy HTTP/1.1\r\nHost: l\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        chunk.repeat(20)
    );
    assert_eq!(parse(&bench.raw(chunked.as_bytes())).0, 413);
}

#[test]
fn what_is_not_http_is_refused_and_the_next_client_is_served() {
    let bench = Bench::new();
    let long_head = format!(
        "GET / HTTP/1.1\r\nHost: l\r\nX: {}\r\n\r\n",
        "x".repeat(100_000)
    );
    let many_headers = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(500));
    let cases: [&[u8]; 9] = [
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: l\r\n\r\n",
        b"GET / HTTP/1.1\r\nBad Header: x\r\n\r\n",
        b"PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        long_head.as_bytes(),
        many_headers.as_bytes(),
    ];
    for case in cases {
        let answer = bench.raw(case);
        assert!(answer.starts_with("HTTP/1.1 4"), "{case:.80?}: {answer:?}");
    }
    // A request that breaks off is no request.
    for case in [
        &b""[..],
        b"GET",
        b"PUT /entropy HTTP/1.1\r\nHost: l\r\nContent-Length: 2\r\n\r\n{",
    ] {
        let answer = bench.raw(case);
        assert!(!answer.starts_with("HTTP/1.1 2"), "{case:?}: {answer:?}");
    }
    assert_eq!(bench.get("/vm/config")["entropy"], Value::Null);
}

#[test]
fn requests_share_a_connection_also_without_waiting() {
    let bench = Bench::new();
    let pipelined = [
        request("PUT", "/entropy", "{}"),
        request("GET", "/machine-config", ""),
        request("PATCH", "/machine-config", r#"{"vcpu_count": 3}"#),
        request("GET", "/machine-config", ""),
    ];
    let answer = bench.raw(pipelined.concat().as_bytes());
    let statuses: Vec<_> = answer
        .matches("HTTP/1.1 ")
        .zip(answer.split("HTTP/1.1 ").skip(1))
        .map(|(_, a)| &a[..3])
        .collect();
    assert_eq!(statuses, ["204", "200", "204", "200"]);
    assert!(answer.find("\"vcpu_count\":1").unwrap() < answer.find("\"vcpu_count\":3").unwrap());
}

#[test]
fn a_request_that_comes_byte_by_byte_is_served_while_others_are() {
    let bench = Bench::new();
    let mut slow = bench.connect();
    let text = request("PUT", "/entropy", "{}");
    for (number, byte) in text.bytes().enumerate() {
        slow.write_all(&[byte]).unwrap();
        if number % 16 == 0 {
            bench.get("/");
        }
    }
    let mut answer = [0; 12];
    slow.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 204");
}

#[test]
fn clients_beyond_the_limit_wait_for_their_turn() {
    let bench = Bench::new();
    let idle: Vec<_> = (0..MAX_CONNECTIONS).map(|_| bench.connect()).collect();
    // Each has been accepted once it has been answered.
    for mut client in &idle {
        client
            .write_all(request("GET", "/", "").as_bytes())
            .unwrap();
        client.read_exact(&mut [0; 12]).unwrap();
    }
    let mut late = bench.connect();
    late.write_all(request("GET", "/", "").as_bytes()).unwrap();
    assert_eq!(bench.server.0.open(), MAX_CONNECTIONS);
    drop(idle);
    let mut answer = [0; 12];
    late.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
}

#[test]
fn threads_and_cpu_templates_are_taken_before_the_start_and_shown_as_firecracker_shows_them() {
    let bench = Bench::new();
    let machine = json!({"vcpu_count": 2, "mem_size_mib": 64, "smt": true, "cpu_template": "T2"});
    assert_eq!(bench.put("/machine-config", &machine).0, 204);
    let shown = bench.get("/machine-config");
    assert_eq!(
        (&shown["smt"], &shown["cpu_template"]),
        (&json!(true), &json!("T2"))
    );
    let template = json!({
        "kvm_capabilities": ["!56"],
        "cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0,
            "modifiers": [{"register": "ecx", "bitmap": "0b0xx"}]}],
        "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b1"}],
    });
    assert_eq!(bench.put("/cpu-config", &template).0, 204);
    assert_eq!(bench.get("/machine-config").get("cpu_template"), None);
    let config = bench.get("/vm/config");
    assert_eq!(config["cpu-config"]["kvm_capabilities"], json!(["!56"]));
    let update = json!({"cpu_template": "T2A"});
    assert_eq!(bench.patch("/machine-config", &update).0, 204);
    assert_eq!(bench.get("/vm/config").get("cpu-config"), None);
}
