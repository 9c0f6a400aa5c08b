//! `coppice serve`: many callers at once, crashes at any moment, and who may call.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

#[path = "serve/mod.rs"]
mod serve;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use serve::daemon::{Daemon, call, coppice, until};

/// Descriptors that the daemon has open.
fn descriptors(daemon: &Daemon) -> usize {
    fs::read_dir(format!("/proc/{}/fd", daemon.pid()))
        .unwrap()
        .count()
}

/// Checks that nothing is left of any guest.
fn nothing_is_left(daemon: &Daemon) {
    assert_eq!(daemon.get("/vms")["vms"], json!([]));
    assert_eq!(daemon.processes(), [0u32; 0]);
    let left: Vec<_> = fs::read_dir(daemon.vm_folder(""))
        .unwrap()
        .flatten()
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let stat = |pid: &str| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let parent = format!(" {} ", daemon.pid());
    let zombies = fs::read_dir("/proc").unwrap().flatten().filter(|entry| {
        let stat = stat(&entry.file_name().to_string_lossy());
        stat.rsplit_once(')')
            .is_some_and(|(_, rest)| rest.starts_with(" Z") && rest[2..].starts_with(&parent))
    });
    assert_eq!(zombies.count(), 0, "a child was not waited for");
}

#[test]
fn sixty_four_clients_make_and_delete_at_once_and_nothing_is_left() {
    let daemon = Daemon::start(&[]);
    daemon.create_waiting("warm");
    daemon.call("DELETE", "/vms/warm", None);
    let before = descriptors(&daemon);
    thread::scope(|scope| {
        for client in 0..64 {
            let daemon = &daemon;
            scope.spawn(move || {
                for round in 0..3 {
                    // Four clients share each name.
                    let id = format!("g{}-{round}", client / 4);
                    let (status, answer) = daemon.post("/vms", &json!({"id": id, "start": false}));
                    assert!(matches!(status, 200 | 201), "{answer}");
                    let path = format!("/vms/{id}");
                    let (status, _) = daemon.call("GET", &path, None);
                    assert!(matches!(status, 200 | 404));
                    daemon.call("GET", &format!("{path}/machine-config"), None);
                    let (status, answer) = daemon.call("DELETE", &path, None);
                    assert!(matches!(status, 204 | 404), "{answer}");
                }
            });
        }
    });
    // Four clients make and delete a guest of one name, so that one may have made it again after another has deleted
    // it.
    for vm in daemon.get("/vms")["vms"].as_array().unwrap() {
        let id = vm["id"].as_str().unwrap();
        assert_eq!(daemon.call("DELETE", &format!("/vms/{id}"), None).0, 204);
    }
    nothing_is_left(&daemon);
    until("descriptors are closed", || {
        descriptors(&daemon) <= before + 1
    });
}

#[test]
fn a_daemon_that_is_killed_at_any_moment_leaves_whole_guests_or_none() {
    let mut daemon = Daemon::start(&[]);
    let socket = daemon.socket();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for client in 0..4 {
            let (socket, over) = (&socket, &over);
            scope.spawn(move || {
                let mut round = 0;
                while !over.load(Ordering::SeqCst) {
                    let id = format!("g{client}-{}", round % 3);
                    let body = json!({"id": id, "start": false});
                    call(socket, "POST", "/vms", Some(&body));
                    if round % 2 == 0 {
                        call(socket, "DELETE", &format!("/vms/{id}"), None);
                    }
                    round += 1;
                    thread::sleep(Duration::from_millis(1));
                }
            });
        }
        for round in 0..15u64 {
            thread::sleep(Duration::from_millis(5 + round * 7 % 40));
            daemon.kill_and_restart();
        }
        over.store(true, Ordering::SeqCst);
    });
    daemon.kill_and_restart();
    let vms = daemon.get("/vms")["vms"].clone();
    let vms = vms.as_array().unwrap();
    let mut known: Vec<_> = vms
        .iter()
        .map(|vm| u32::try_from(vm["pid"].as_u64().unwrap()).unwrap())
        .collect();
    let mut there = daemon.processes();
    known.sort_unstable();
    there.sort_unstable();
    assert_eq!(
        there, known,
        "every process is a guest's, and every guest has its process"
    );
    for vm in vms {
        let path = format!("/vms/{}", vm["id"].as_str().unwrap());
        assert_eq!(daemon.call("GET", &format!("{path}/"), None).0, 200);
        assert_eq!(daemon.call("DELETE", &path, None).0, 204);
    }
    nothing_is_left(&daemon);
}

#[test]
fn guests_that_are_killed_while_they_are_made_leave_nothing() {
    let daemon = Daemon::start(&[]);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let (daemon, over) = (&daemon, &over);
        scope.spawn(move || {
            while !over.load(Ordering::SeqCst) {
                for pid in daemon.processes() {
                    let _ = kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL);
                }
            }
        });
        for round in 0..30 {
            let id = format!("g{round}");
            let (status, answer) = daemon.post("/vms", &json!({"id": id, "start": false}));
            match status {
                201 => assert_eq!(daemon.call("DELETE", &format!("/vms/{id}"), None).0, 204),
                422 => assert!(
                    answer["fault_message"]
                        .as_str()
                        .unwrap()
                        .contains("could not start")
                ),
                503 => {}
                _ => panic!("{status} {answer}"),
            }
        }
        over.store(true, Ordering::SeqCst);
    });
    nothing_is_left(&daemon);
}

#[test]
fn a_guest_without_room_is_refused_with_the_figures() {
    let daemon = Daemon::start(&["--memory-ratio", "2", "--max-vms", "2", "--max-vcpus", "3"]);
    let mut events = daemon.events(0);
    let guest = |id: &str, vcpus: u8, mem: u32| json!({"id": id, "start": false, "config": {"machine-config": {"vcpu_count": vcpus, "mem_size_mib": mem}}});
    let refused = |spec: &Value| {
        let (status, answer) = daemon.post("/vms", spec);
        assert_eq!(status, 507, "{answer}");
        answer["fault_message"].as_str().unwrap().to_owned()
    };
    let text = refused(&guest("big", 1, 16_000_000));
    assert!(
        text.contains("16000000 MiB") && text.contains("--memory-ratio"),
        "{text}"
    );
    assert_eq!(events.next("big", "refused")["reason"], text);
    assert_eq!(daemon.post("/vms", &guest("a", 2, 128)).0, 201);
    assert!(refused(&guest("b", 2, 128)).contains("--max-vcpus"));
    assert_eq!(daemon.post("/vms", &guest("b", 1, 128)).0, 201);
    assert!(refused(&guest("c", 1, 128)).contains("--max-vms"));
    // Nor does a guest get more memory by way of its own API than can be admitted.
    let more = json!({"vcpu_count": 1, "mem_size_mib": 16_000_000});
    let (status, _) = daemon.call("PUT", "/vms/b/machine-config", Some(&more));
    assert_eq!(status, 507);
    assert_eq!(daemon.get("/vms/b")["mem_size_mib"], 128);
    // A refused guest holds nothing.
    daemon.call("DELETE", "/vms/b", None);
    assert_eq!(daemon.post("/vms", &guest("c", 1, 128)).0, 201);
}

#[test]
fn only_those_may_call_who_are_named() {
    if !skip::unless_root() {
        return;
    }
    let daemon = Daemon::start(&["--allow-uid", "12345", "--socket-mode", "666"]);
    fs::set_permissions(daemon.folder(), PermissionsExt::from_mode(0o755)).unwrap();
    let curl = |uid: u32| {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--unix-socket"]).arg(daemon.socket());
        curl.args(["-o", "/dev/null", "-w", "%{http_code}", "http://l/vms"]);
        let output = curl
            .uid(uid)
            .gid(uid)
            .stderr(Stdio::inherit())
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(curl(12345), "200");
    assert_eq!(curl(12346), "403");
    assert_eq!(curl(0), "200");
    assert!(daemon.log().contains("caller_refused"));
}

#[test]
fn images_have_names_and_stay_while_they_are_used() {
    let mut daemon = Daemon::start(&[]);
    let image = json!({"path": daemon.kernel(), "kind": "kernel"});
    let put = |daemon: &Daemon, name: &str, image: &Value| {
        daemon.call("PUT", &format!("/images/{name}"), Some(image))
    };
    assert_eq!(put(&daemon, "tiny", &image).0, 204);
    assert_eq!(put(&daemon, "bad%20name", &image).0, 400);
    assert_eq!(
        put(&daemon, "x", &json!({"path": "relative", "kind": "disk"})).0,
        400
    );
    assert_eq!(
        put(&daemon, "x", &json!({"path": "/nowhere", "kind": "disk"})).0,
        400
    );
    let mut spec = daemon.spec("g");
    spec["config"]["boot-source"]["kernel_image_path"] = json!("image:tiny");
    assert_eq!(daemon.post("/vms", &spec).1["state"], "running");
    daemon.kill_and_restart();
    assert_eq!(daemon.get("/images")["images"][0]["name"], "tiny");
    let (status, answer) = daemon.call("DELETE", "/images/tiny", None);
    assert!(
        status == 409
            && answer["fault_message"]
                .as_str()
                .unwrap()
                .contains("guest g"),
        "{answer}"
    );
    daemon.call("DELETE", "/vms/g", None);
    assert_eq!(daemon.call("DELETE", "/images/tiny", None).0, 204);
    assert_eq!(daemon.call("GET", "/images/tiny", None).0, 404);
    assert_eq!(daemon.post("/vms", &spec).0, 404);
}

#[test]
fn a_guest_that_hangs_holds_up_nobody_else() {
    let daemon = Daemon::start(&[]);
    let hung = daemon.create_waiting("hung");
    daemon.create_waiting("well");
    let pid = Pid::from_raw(i32::try_from(hung["pid"].as_i64().unwrap()).unwrap()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    thread::scope(|scope| {
        let asked = scope.spawn(|| daemon.call("GET", "/vms/hung/machine-config", None).0);
        for _ in 0..50 {
            assert_eq!(daemon.call("GET", "/vms/hung", None).0, 200);
            assert_eq!(daemon.call("GET", "/vms/well/machine-config", None).0, 200);
        }
        assert_eq!(asked.join().unwrap(), 504);
        // A process that is stopped ends by SIGKILL alone.
        assert_eq!(daemon.call("DELETE", "/vms/hung", None).0, 204);
    });
    assert_eq!(daemon.processes().len(), 1);
}

#[test]
fn listeners_get_the_events_that_they_have_missed_and_metrics_have_all_guests() {
    let daemon = Daemon::start(&[]);
    daemon.create_waiting("a");
    let first = daemon.events(0).next("a", "created");
    daemon.create_waiting("b");
    let mut late = daemon.events(first["id"].as_u64().unwrap());
    late.next("b", "created");
    daemon.call("DELETE", "/vms/a", None);
    late.next("a", "deleted");
    let text = |path: &str| match daemon.get(path) {
        Value::String(text) => text,
        other => panic!("{other}"),
    };
    let all = text("/metrics");
    for line in [
        "coppice_vms{state=\"not_started\"} 1",
        "coppice_vm_ram_bytes{vm=\"b\"} 134217728",
        "coppice_daemon_requests_total{method=\"POST\",code=\"201\"} 2",
        "# EOF",
    ] {
        assert!(
            all.lines().any(|reported| reported == line),
            "{line} is not in {all}"
        );
    }
    assert!(all.contains("coppice_vm_memory_private_bytes{vm=\"b\"} "));
    assert!(!all.contains("coppice_api_requests"));
    for path in ["/metrics?vm=b", "/metrics?guests"] {
        assert!(
            text(path).contains("coppice_api_requests_total{vm=\"b\",method=\"GET\"} "),
            "{path}"
        );
    }
    assert_eq!(daemon.call("GET", "/metrics?vm=x", None).0, 404);
    assert_eq!(daemon.call("GET", "/metrics?colour", None).0, 400);
}

#[test]
fn a_full_disk_refuses_guests_and_harms_none() {
    if !skip::unless_own_mounts() {
        return;
    }
    // A disk of its own for the state, in a mount namespace of its own.
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    fs::create_dir(&state).unwrap();
    let socket = folder.path().join("s");
    let script = format!(
        "mount -t tmpfs -o size=64k none {0} && exec {1} serve --socket {2} --state {0}",
        state.display(),
        env!("CARGO_BIN_EXE_coppice"),
        socket.display()
    );
    let mut unshare = Command::new("unshare");
    unshare.args(["--map-root-user", "--mount", "sh", "-c", &script]);
    let mut child = unshare.stderr(Stdio::null()).spawn().unwrap();
    until("the daemon answers", || {
        assert_eq!(child.try_wait().unwrap(), None, "the daemon ended");
        call(&socket, "GET", "/healthz", None).is_some()
    });
    let create = |id: &str| {
        let body = json!({"id": id, "start": false});
        call(&socket, "POST", "/vms", Some(&body)).unwrap()
    };
    let mut made = Vec::new();
    let refusal = loop {
        let id = format!("g{}", made.len());
        match create(&id) {
            (201, _) => made.push(id),
            refusal => break refusal,
        }
    };
    assert!(!made.is_empty() && refusal.0 == 507, "{refusal:?}");
    assert!(
        refusal.1["fault_message"]
            .as_str()
            .unwrap()
            .contains("No space left"),
        "{refusal:?}"
    );
    for id in &made {
        let path = format!("/vms/{id}");
        assert_eq!(
            call(&socket, "GET", &format!("{path}/"), None).unwrap().0,
            200
        );
        // With a full disk, guests can still be deleted.
        assert_eq!(call(&socket, "DELETE", &path, None).unwrap().0, 204);
    }
    assert_eq!(create("again").0, 201);
    assert_eq!(call(&socket, "DELETE", "/vms/again", None).unwrap().0, 204);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_guest_that_gets_no_memory_is_refused_and_the_daemon_goes_on() {
    let daemon = Daemon::start(&[]);
    daemon.create_waiting("before");
    // Guests inherit the limit.
    for process in [daemon.pid(), daemon.zygote()] {
        let mut prlimit = Command::new("prlimit");
        prlimit
            .arg(format!("--pid={process}"))
            .arg("--as=200000000");
        assert!(prlimit.status().unwrap().success());
    }
    let mut spec = daemon.spec("g");
    spec["config"]["machine-config"]["mem_size_mib"] = json!(512);
    for _ in 0..3 {
        let (status, answer) = daemon.post("/vms", &spec);
        assert!(matches!(status, 422 | 503), "{answer}");
    }
    assert_eq!(daemon.get("/vms")["vms"].as_array().unwrap().len(), 1);
    assert_eq!(daemon.call("DELETE", "/vms/before", None).0, 204);
    nothing_is_left(&daemon);
}

#[test]
fn the_dashboard_shows_metrics_that_there_are() {
    let daemon = Daemon::start(&[]);
    let disk = daemon.folder().join("disk.vhdx");
    let made = coppice()
        .args(["disk", "create", disk.to_str().unwrap(), "--size", "8M"])
        .status();
    assert!(made.unwrap().success());
    // Also a guest in a jail may use it.
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o666)).unwrap();
    let mut spec = daemon.spec("g");
    spec["config"]["drives"] =
        json!([{"drive_id": "root", "path_on_host": disk, "is_root_device": false}]);
    assert_eq!(daemon.post("/vms", &spec).0, 201);
    let metrics = || daemon.get("/metrics?guests");
    let booted = "coppice_boot_time_seconds{vm=\"g\"} ";
    until("the guest has booted", || {
        metrics().as_str().unwrap().contains(booted)
    });
    for (path, body) in [
        ("/templates", json!({"id": "t", "vm": "g"})),
        ("/vms", json!({"id": "clone", "template": "t"})),
    ] {
        let (status, answer) = daemon.post(path, &body);
        assert_eq!(status, 201, "{answer}");
    }
    let metrics = metrics();
    let metrics = metrics.as_str().unwrap();
    let dashboard = include_str!("../../../resources/grafana/coppice.json");
    let dashboard: Value = serde_json::from_str(dashboard).unwrap();
    let mut names = std::collections::BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().unwrap() {
            let words = target["expr"]
                .as_str()
                .unwrap()
                .split(|c: char| c != '_' && !c.is_ascii_alphanumeric());
            names.extend(
                words
                    .filter(|word| word.starts_with("coppice_"))
                    .map(ToOwned::to_owned),
            );
        }
    }
    assert!(names.len() > 10);
    for name in names {
        let reported = metrics.lines().any(|line| {
            line.strip_prefix(&name)
                .is_some_and(|rest| rest.starts_with([' ', '{']))
        });
        assert!(reported, "{name} is not in {metrics}");
    }
}

#[test]
fn the_address_for_reading_is_for_nothing_else() {
    let daemon = Daemon::start(&["--web", "127.0.0.1:0", "--web-all"]);
    daemon.create_waiting("g");
    let log = daemon.log();
    let (_, rest) = log.split_once("address=").unwrap();
    let address = rest.split_whitespace().next().unwrap();
    let status = |method: &str, path: &str| {
        let url = format!("http://{address}{path}");
        let curl = Command::new("curl")
            .args([
                "-sS",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                "-X",
                method,
                &url,
            ])
            .output();
        String::from_utf8(curl.unwrap().stdout).unwrap()
    };
    for path in ["/", "/vms?stats", "/vms/g", "/metrics", "/healthz"] {
        assert_eq!(status("GET", path), "200", "{path}");
    }
    for (method, path, code) in [
        ("DELETE", "/vms/g", "405"),
        ("POST", "/vms", "405"),
        ("GET", "/vms/g/vm/config", "404"),
        ("GET", "/vms/g/console", "404"),
        ("PUT", "/images/x", "404"),
    ] {
        assert_eq!(status(method, path), code, "{method} {path}");
    }
}

#[test]
fn a_hundred_guests_cost_the_daemon_little_and_a_status_costs_them_nothing() {
    let daemon = Daemon::start(&["--memory-ratio", "100"]);
    daemon.create_waiting("first");
    let number = |pid: u64, name: &str| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    let anonymous = || number(daemon.pid().into(), "RssAnon");
    let before = anonymous();
    thread::scope(|scope| {
        for client in 0..4 {
            let daemon = &daemon;
            scope.spawn(move || {
                for n in 0..25 {
                    daemon.create_waiting(&format!("g{client}-{n}"));
                }
            });
        }
    });
    let grown = anonymous().saturating_sub(before);
    assert!(grown < 4096, "100 guests take {grown} KiB");
    let guest = daemon.get("/vms/first")["pid"].as_u64().unwrap();
    let switches = || number(guest, "voluntary_ctxt_switches");
    let before = switches();
    for _ in 0..200 {
        daemon.get("/vms/first");
    }
    daemon.get("/vms");
    assert_eq!(switches(), before);
}
