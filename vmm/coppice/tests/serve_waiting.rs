//! `coppice serve`: guests that wait to be configured over their own API, and how far that configuration is kept for
//! their next start.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

#[path = "serve/mod.rs"]
mod serve;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;

use serde_json::{Value, json};
use serve::daemon::{Daemon, call, until};
use serve::steps::{Killer, Victim};
use serve::traces::{make_disk, no_processes_but, pid};

/// A raw disk that any guest may write to.
fn raw_disk(daemon: &Daemon, name: &str) -> PathBuf {
    let disk = daemon.folder().join(name);
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o666)).unwrap();
    disk
}

fn tell(daemon: &Daemon, method: &str, path: &str, body: &Value) {
    let (status, answer) = daemon.call(method, &format!("/vms/g{path}"), Some(body));
    assert_eq!(status, 204, "{method} {path}: {answer}");
}

fn start() -> Value {
    json!({"action_type": "InstanceStart"})
}

/// Requests for all that a waiting guest can be configured to.
fn everything(daemon: &Daemon) -> Vec<(&'static str, Value)> {
    let file = |name: &str| daemon.folder().join(name);
    let disk = make_disk(daemon.folder());
    let raw = raw_disk(daemon, "raw");
    vec![
        (
            "/boot-source",
            json!({"kernel_image_path": daemon.kernel(), "boot_args": "told"}),
        ),
        (
            "/drives/root",
            json!({"drive_id": "root", "path_on_host": disk, "is_root_device": true}),
        ),
        (
            "/drives/raw",
            json!({"drive_id": "raw", "path_on_host": raw, "is_root_device": false, "format": "raw", "serial": "S1"}),
        ),
        (
            "/pmem/p",
            json!({"id": "p", "path_on_host": raw_disk(daemon, "p"), "mode": "cow"}),
        ),
        (
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 24}),
        ),
        ("/sharing", json!({"mode": "off"})),
        ("/entropy", json!({})),
        (
            "/balloon",
            json!({"amount_mib": 1, "deflate_on_oom": true, "stats_polling_interval_s": 1}),
        ),
        ("/vsock", json!({"guest_cid": 77})),
        (
            "/mmds/config",
            json!({"network_interfaces": [], "vsock_port": 8000}),
        ),
        ("/mmds", json!({"role": "db"})),
        ("/serial", json!({"serial_out_path": file("serial")})),
        (
            "/logger",
            json!({"log_path": file("guest.log"), "level": "Info"}),
        ),
        ("/metrics", json!({"metrics_path": file("guest.metrics")})),
    ]
}

/// The configuration of the guest's process, without the domain, and the formats of disks, that the daemon adds when a
/// guest starts for which nobody has named them.
fn config(daemon: &Daemon) -> Value {
    let mut config = daemon.get("/vms/g/vm/config");
    let owner = format!("uid_{}", rustix::process::geteuid().as_raw());
    let domain = config["sharing"]["domain"].take();
    assert!(domain.is_null() || domain == owner, "{domain}");
    for kind in ["drives", "pmem"] {
        for disk in config[kind].as_array_mut().into_iter().flatten() {
            disk["format"].take();
        }
    }
    config
}

/// Checks that the guest has what it was configured to, and its disks open.
fn has_all(daemon: &Daemon, reported: &Value, role: &str) {
    assert_eq!(config(daemon), *reported);
    let domain = &daemon.get("/vms/g/vm/config")["sharing"]["domain"];
    assert!(domain.is_string(), "{domain}");
    let mmds = daemon.get("/vms/g/mmds");
    assert_eq!(
        (&mmds["role"], &mmds["coppice"]["cid"]),
        (&json!(role), &json!(77)),
        "{mmds}"
    );
    let vm = daemon.get("/vms/g");
    assert_eq!(
        (&vm["mem_size_mib"], &vm["vsock"]["guest_cid"]),
        (&json!(24), &json!(77)),
        "{vm}"
    );
    let socket = vm["vsock"]["uds_path"].as_str().unwrap();
    UnixStream::connect(socket).unwrap();
}

fn again(daemon: &Daemon) {
    daemon.post("/vms/g/stop", &json!({"timeout_s": 0}));
    let (status, vm) = daemon.post("/vms/g/start", &json!(null));
    assert_eq!((status, &vm["state"]), (200, &json!("running")), "{vm}");
}

#[test]
fn the_configuration_of_a_waiting_guest_holds_at_its_start_and_at_every_later_one() {
    let mut daemon = Daemon::start(&[]);
    let waiting = daemon.create_waiting("g");
    for (path, body) in everything(&daemon) {
        tell(&daemon, "PUT", path, &body);
    }
    tell(
        &daemon,
        "PATCH",
        "/machine-config",
        &json!({"track_dirty_pages": true}),
    );
    let reported = config(&daemon);
    // A request that is refused changes nothing, nor does a restart of the daemon.
    let (status, _) = daemon.call(
        "PUT",
        "/vms/g/boot-source",
        Some(&json!({"kernel_image_path": "/nowhere"})),
    );
    assert_eq!(status, 400);
    daemon.kill_and_restart();
    let found = daemon.until_state("g", "not_started");
    assert_eq!(
        (&found["pid"], &found["mem_size_mib"]),
        (&waiting["pid"], &json!(24))
    );
    tell(&daemon, "PUT", "/actions", &start());
    has_all(&daemon, &reported, "db");
    assert_ne!(daemon.get("/vms/g")["pid"], waiting["pid"]);
    until("the guest says that it is up", || {
        fs::read_to_string(daemon.folder().join("serial")).is_ok_and(|text| text.contains("up"))
    });
    assert_eq!(daemon.call("PUT", "/vms/g/actions", Some(&start())).0, 400);
    again(&daemon);
    has_all(&daemon, &reported, "db");
    daemon.kill_and_restart();
    daemon.until_state("g", "running");
    again(&daemon);
    has_all(&daemon, &reported, "db");
    // A second request to make it finds the same guest, and shows its later configuration.
    let (status, vm) = daemon.post("/vms", &json!({"id": "g", "start": false}));
    assert_eq!(status, 200);
    assert_eq!(vm["config"]["boot-source"]["boot_args"], "told");
    assert_eq!(daemon.call("DELETE", "/vms/g", None).0, 204);
    no_processes_but(&daemon, &[]);
}

#[test]
fn a_changed_configuration_of_a_running_guest_holds_at_its_next_start() {
    let mut daemon = Daemon::start(&[]);
    for is_killed in [false, true] {
        daemon.create_waiting("g");
        for (path, body) in everything(&daemon) {
            tell(&daemon, "PUT", path, &body);
        }
        tell(&daemon, "PUT", "/actions", &start());
        // In the guest's own folder, where a jailed guest, too, may open files that appear later.
        let other = daemon.vm_folder("g").canonicalize().unwrap().join("other");
        fs::copy(raw_disk(&daemon, "other"), &other).unwrap();
        let drive = json!({"drive_id": "raw", "path_on_host": other});
        tell(&daemon, "PATCH", "/drives/raw", &drive);
        tell(&daemon, "PATCH", "/balloon", &json!({"amount_mib": 3}));
        let interval = json!({"stats_polling_interval_s": 7});
        tell(&daemon, "PATCH", "/balloon/statistics", &interval);
        tell(&daemon, "PUT", "/mmds", &json!({"role": "x", "more": 1}));
        tell(&daemon, "PATCH", "/mmds", &json!({"role": "web"}));
        let reported = config(&daemon);
        assert_eq!(reported["drives"][1]["path_on_host"], json!(other));
        if is_killed {
            daemon.kill_and_restart();
            daemon.until_state("g", "running");
        }
        again(&daemon);
        has_all(&daemon, &reported, "web");
        assert_eq!(
            (
                &reported["balloon"]["amount_mib"],
                &reported["balloon"]["stats_polling_interval_s"]
            ),
            (&json!(3), &json!(7))
        );
        assert_eq!(daemon.get("/vms/g/mmds")["more"], 1);
        assert_eq!(daemon.call("DELETE", "/vms/g", None).0, 204);
    }
}

#[test]
fn a_disk_that_takes_the_place_of_a_snapshot_is_that_of_the_next_start() {
    let daemon = Daemon::start(&[]);
    let mut spec = daemon.spec("g");
    let disk = make_disk(daemon.folder());
    spec["config"]["drives"] =
        json!([{"drive_id": "d", "path_on_host": disk, "is_root_device": false}]);
    assert_eq!(daemon.post("/vms", &spec).1["state"], "running");
    let child = daemon.vm_folder("g").canonicalize().unwrap().join("child");
    tell(
        &daemon,
        "PUT",
        "/drives/d/snapshot",
        &json!({"path_on_host": child}),
    );
    let other = child.with_file_name("other.vhdx");
    fs::copy(&disk, &other).unwrap();
    fs::set_permissions(&other, fs::Permissions::from_mode(0o666)).unwrap();
    let drive = json!({"drive_id": "d", "path_on_host": other});
    tell(&daemon, "PATCH", "/drives/d", &drive);
    again(&daemon);
    assert_eq!(config(&daemon)["drives"][0]["path_on_host"], json!(other));
}

#[test]
fn a_guest_that_cannot_start_waits_with_its_configuration_until_that_is_corrected() {
    let mut daemon = Daemon::start(&[]);
    daemon.create_waiting("g");
    let refused = |daemon: &Daemon, expected: u16, named: &str| {
        for (path, method, body) in [
            ("/vms/g/actions", "PUT", start()),
            ("/vms/g/start", "POST", json!(null)),
        ] {
            let (status, answer) = daemon.call(method, path, Some(&body));
            let text = answer["fault_message"].as_str().unwrap();
            assert!(
                status == expected && text.contains(named),
                "{status} {text}"
            );
            assert_eq!(daemon.get("/vms/g")["state"], "not_started");
        }
    };
    refused(&daemon, 400, "no kernel is configured");
    let kernel = daemon.folder().join("no kernel");
    fs::write(&kernel, "#".repeat(8192)).unwrap();
    let source = |kernel: &str| json!({"kernel_image_path": kernel});
    tell(
        &daemon,
        "PUT",
        "/boot-source",
        &source(kernel.to_str().unwrap()),
    );
    tell(&daemon, "PUT", "/sharing", &json!({"mode": "off"}));
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 20});
    tell(&daemon, "PUT", "/machine-config", &machine);
    tell(&daemon, "PUT", "/mmds", &json!({"kept": true}));
    let reported = config(&daemon);
    refused(&daemon, 422, "kernel");
    assert_eq!(config(&daemon), reported);
    assert_eq!(daemon.get("/vms/g/mmds")["kept"], true);
    assert_eq!(daemon.processes().len(), 1);
    daemon.kill_and_restart();
    daemon.until_state("g", "not_started");
    tell(&daemon, "PUT", "/boot-source", &source(&daemon.kernel()));
    tell(&daemon, "PUT", "/actions", &start());
    assert_eq!(daemon.until_state("g", "running")["mem_size_mib"], 20);
    assert!(daemon.echoes("g"));
}

#[test]
fn a_configuring_process_never_starts_a_guest() {
    let daemon = Daemon::start(&[]);
    daemon.create_waiting("g");
    let source = json!({"kernel_image_path": daemon.kernel()});
    tell(&daemon, "PUT", "/boot-source", &source);
    assert_eq!(daemon.get("/vms/g/vm/jail")["jailed"], false);
    let socket = daemon.vm_folder("g").join("api.sock");
    let (status, answer) = call(&socket, "PUT", "/actions", Some(&start())).unwrap();
    let text = answer["fault_message"].as_str().unwrap();
    assert!(
        status == 400 && text.contains("the daemon starts"),
        "{text}"
    );
    assert_eq!(daemon.get("/vms/g/")["state"], "Not started");
    // The path is passed on as the daemon has read it.
    for path in ["/vms/g/actions", "/vms/g//actions", "/vms/g/actions/?x"] {
        let (status, _) = daemon.call("PUT", path, Some(&start()));
        assert!(status == 204 || status == 400, "{path}: {status}");
        assert_eq!(daemon.get("/vms/g/")["state"], "Running");
    }
}

#[test]
fn of_many_who_start_a_guest_one_does_and_no_change_that_was_answered_is_lost() {
    let daemon = Daemon::start(&[]);
    for round in 0..4 {
        daemon.create_waiting("g");
        let source = json!({"kernel_image_path": daemon.kernel()});
        tell(&daemon, "PUT", "/boot-source", &source);
        tell(&daemon, "PUT", "/sharing", &json!({"mode": "off"}));
        let (socket, before) = (daemon.socket(), std::sync::Barrier::new(8));
        let ask = |method: &'static str, path: &'static str, body: Value| {
            before.wait();
            call(&socket, method, path, Some(&body)).unwrap().0
        };
        let (starts, changes) = thread::scope(|scope| {
            let ask = &ask;
            let starts: Vec<_> = (0..4)
                .map(|_| scope.spawn(move || ask("PUT", "/vms/g/actions", start())))
                .collect();
            let changes: Vec<_> = (0..4u32)
                .map(|n| {
                    let body = json!({"vcpu_count": 1, "mem_size_mib": 16 + n});
                    scope.spawn(move || (n, ask("PUT", "/vms/g/machine-config", body)))
                })
                .collect();
            let starts: Vec<_> = starts.into_iter().map(|s| s.join().unwrap()).collect();
            let changes: Vec<_> = changes.into_iter().map(|c| c.join().unwrap()).collect();
            (starts, changes)
        });
        let mut starts = starts;
        starts.sort_unstable();
        assert_eq!(starts, [204, 400, 400, 400], "{round}");
        let made: BTreeSet<_> = changes
            .iter()
            .filter(|(_, status)| *status == 204)
            .map(|(n, _)| u64::from(16 + n))
            .collect();
        let vm = daemon.get("/vms/g");
        let ram = vm["mem_size_mib"].as_u64().unwrap();
        assert!(made.contains(&ram) || made.is_empty(), "{ram}: {changes:?}");
        assert_eq!(config(&daemon)["machine-config"]["mem_size_mib"], ram);
        no_processes_but(&daemon, &[pid(&vm)]);
        assert_eq!(daemon.call("DELETE", "/vms/g", None).0, 204);
    }
}

#[test]
fn a_client_at_the_console_of_a_waiting_guest_sees_it_start() {
    let daemon = Daemon::start(&[]);
    daemon.create_waiting("g");
    let source = json!({"kernel_image_path": daemon.kernel()});
    tell(&daemon, "PUT", "/boot-source", &source);
    tell(&daemon, "PUT", "/sharing", &json!({"mode": "off"}));
    // The body of an HTTP/1.1 response comes in chunks, whose bounds may be anywhere in the guest's output.
    let ways = [
        ("1.0", ""),
        ("1.1", "Connection: upgrade\r\nUpgrade: coppice-console\r\n"),
    ];
    let mut watching = ways.map(|(version, upgrade)| {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        stream
            .set_read_timeout(Some(serve::daemon::PATIENCE))
            .unwrap();
        let head = format!("GET /vms/g/console HTTP/{version}\r\nHost: l\r\n{upgrade}\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.extend(byte);
        }
        stream
    });
    tell(&daemon, "PUT", "/actions", &start());
    for stream in &mut watching {
        let (mut seen, mut byte) = (Vec::new(), [0]);
        while !seen.ends_with(b"up") {
            stream.read_exact(&mut byte).unwrap();
            seen.extend(byte);
        }
    }
    // The serial line works in both directions.
    watching[1].write_all(b"z").unwrap();
    let mut byte = [0];
    while byte != *b"z" {
        watching[1].read_exact(&mut byte).unwrap();
    }
}

#[test]
fn no_two_guests_are_given_the_same_identifier_over_their_own_api() {
    let daemon = Daemon::start(&[]);
    let vsock = |id: &str, body: &Value| {
        daemon.create_waiting(id);
        daemon
            .call("PUT", &format!("/vms/{id}/vsock"), Some(body))
            .0
    };
    assert_eq!(vsock("a", &json!({"guest_cid": 4})), 204);
    assert_eq!(vsock("b", &json!({"guest_cid": 4})), 409);
    assert_eq!(vsock("c", &json!({})), 204);
    let elsewhere = daemon.folder().join("v.sock");
    let body = json!({"guest_cid": 9, "uds_path": elsewhere});
    assert_eq!(vsock("d", &body), 204);
    // A wrong one is refused, and the guest has none.
    assert_eq!(vsock("e", &json!({"guest_cid": 1})), 400);
    let found =
        ["a", "b", "c", "d", "e"].map(|id| daemon.get(&format!("/vms/{id}"))["vsock"].clone());
    let cids = found.each_ref().map(|vsock| vsock["guest_cid"].as_u64());
    assert_eq!(cids, [Some(4), None, Some(3), Some(9), None]);
    assert_eq!(found[3]["uds_path"], json!(elsewhere));
    let source = json!({"kernel_image_path": daemon.kernel()});
    daemon.call("PUT", "/vms/d/boot-source", Some(&source));
    assert_eq!(daemon.post("/vms/d/start", &json!(null)).0, 200);
    UnixStream::connect(elsewhere).unwrap();
}

/// Every step is tried, but with jailed guests only every third.
const STRIDE: usize = if matches!(env!("CARGO_CRATE_NAME").as_bytes(), b"serve_jailed") {
    3
} else {
    1
};

#[test]
fn a_daemon_that_is_killed_at_any_step_of_a_start_leaves_a_guest_that_runs_or_waits_as_before() {
    let (mut daemon, mut killed, mut states) = (Daemon::start(&[]), 0, BTreeSet::new());
    for step in (1..).step_by(STRIDE) {
        daemon.create_waiting("g");
        let source = json!({"kernel_image_path": daemon.kernel()});
        tell(&daemon, "PUT", "/boot-source", &source);
        tell(&daemon, "PUT", "/sharing", &json!({"mode": "off"}));
        let killer = Killer::new(daemon.pid(), Victim::Itself, step);
        let answer = daemon.try_call("PUT", "/vms/g/actions", Some(&start()));
        let died = killer.end(|| drop(daemon.try_call("GET", "/healthz", None)));
        if died.is_some() {
            killed += 1;
            daemon.kill_and_restart();
            until("nothing is pending", || {
                let state = daemon.get("/vms/g")["state"].clone();
                state == "running" || state == "not_started"
            });
        }
        let record = || {
            let record = fs::read(daemon.vm_folder("g").join("vm.json")).unwrap();
            serde_json::from_slice::<Value>(&record).unwrap()
        };
        until("nothing is under way", || {
            record()["pending"]["start"] == false
        });
        let vm = daemon.get("/vms/g");
        let state = vm["state"].as_str().unwrap().to_owned();
        no_processes_but(&daemon, &[pid(&vm)]);
        assert_eq!(
            config(&daemon)["boot-source"]["kernel_image_path"],
            daemon.kernel()
        );
        if state == "not_started" {
            tell(&daemon, "PUT", "/actions", &start());
        }
        states.insert(state);
        let vm = daemon.until_state("g", "running");
        assert_eq!(vm["restarts"], 0);
        assert!(daemon.echoes("g"));
        again(&daemon);
        assert_eq!(daemon.call("DELETE", "/vms/g", None).0, 204);
        no_processes_but(&daemon, &[]);
        if died.is_none() {
            assert_eq!(answer.unwrap().0, 204);
            break;
        }
    }
    eprintln!("killed at {killed} steps");
    assert!(killed > 3 && states.len() == 2, "{killed}: {states:?}");
}

#[test]
fn a_guest_whose_process_is_killed_at_any_step_of_its_start_waits_again_or_has_failed() {
    let (daemon, mut killed) = (Daemon::start(&[]), 0);
    for step in (1..).step_by(STRIDE) {
        daemon.create_waiting("g");
        let source = json!({"kernel_image_path": daemon.kernel()});
        tell(&daemon, "PUT", "/boot-source", &source);
        tell(&daemon, "PUT", "/sharing", &json!({"mode": "off"}));
        let killer = Killer::new(daemon.zygote(), Victim::Child, step);
        let (status, answer) = daemon.call("PUT", "/vms/g/actions", Some(&start()));
        let died = killer.end(|| drop(daemon.try_call("GET", "/vms/g/", None)));
        killed += usize::from(died.is_some());
        match (status, died) {
            (204, None) => {}
            // Killed after the start had begun.
            (204, Some(_)) => drop(daemon.until_state("g", "failed")),
            (422 | 503, Some(_)) => {
                assert_eq!(daemon.get("/vms/g")["state"], "not_started");
                tell(&daemon, "PUT", "/actions", &start());
            }
            (_, _) => panic!("{status} {answer}"),
        }
        assert_eq!(daemon.call("DELETE", "/vms/g", None).0, 204);
        no_processes_but(&daemon, &[]);
        if died.is_none() {
            break;
        }
    }
    assert!(killed > 3, "{killed}");
}
