//! `coppice serve`: guests from their creation to their end, and what a daemon finds of an earlier one.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

#[path = "serve/mod.rs"]
mod serve;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::ptr;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use serve::daemon::{Daemon, coppice, until};

fn signal(vm: &Value, signal: Signal) {
    let pid = i32::try_from(vm["pid"].as_i64().unwrap()).unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

fn kill(vm: &Value) {
    signal(vm, Signal::KILL);
}

#[test]
fn a_guest_is_made_once_shown_and_deleted_without_a_trace() {
    let daemon = Daemon::start(&[]);
    let vm = daemon.create_waiting("web-1");
    assert_eq!(vm["state"], "not_started");
    let again = daemon.post("/vms", &json!({"id": "web-1", "start": false}));
    assert_eq!((again.0, &again.1["pid"]), (200, &vm["pid"]));
    let other = json!({"id": "web-1", "start": false, "labels": {"a": "b"}});
    assert_eq!(daemon.post("/vms", &other).0, 409);
    assert_eq!(daemon.get("/vms")["vms"].as_array().unwrap().len(), 1);
    assert!(
        daemon.get("/vms/web-1?stats")["memory"]["private_kib"]
            .as_u64()
            .unwrap()
            > 0
    );
    assert_eq!(daemon.get("/vms/web-1/")["id"], "web-1");
    let nameless = daemon.post("/vms", &json!({"start": false})).1;
    let nameless = format!("/vms/{}", nameless["id"].as_str().unwrap());
    for path in ["/vms/web-1", &nameless] {
        assert_eq!(daemon.call("DELETE", path, None), (204, Value::Null));
        assert_eq!(daemon.call("GET", path, None).0, 404);
    }
    assert_eq!(daemon.processes(), [0u32; 0]);
    assert_eq!(fs::read_dir(daemon.vm_folder("")).unwrap().count(), 0);
}

#[test]
fn an_invalid_request_is_refused_with_a_reason_and_leaves_nothing() {
    let daemon = Daemon::start(&[]);
    let path = daemon.folder().join("no kernel");
    fs::write(&path, "#".repeat(8192)).unwrap();
    let kernel =
        |path: &str| json!({"id": "x", "config": {"boot-source": {"kernel_image_path": path}}});
    for (spec, status, named) in [
        (json!({"id": "X"}), 400, "lower case"),
        (json!({"id": "x"}), 400, "boot-source"),
        (json!({"id": "x", "colour": 1}), 400, "colour"),
        (
            json!({"id": "x", "start": false, "config": {"machine-config": {"vcpu_count": 99, "mem_size_mib": 1}}}),
            400,
            "vcpu_count",
        ),
        (kernel("vmlinux"), 400, "absolute"),
        (kernel("image:none"), 404, "image"),
        (kernel("/nowhere"), 422, "/nowhere"),
        (kernel(path.to_str().unwrap()), 422, "kernel"),
        (json!({"id": "x", "template": "t"}), 404, "template"),
        (
            json!({"id": "x", "template": "t", "config": {}}),
            400,
            "template",
        ),
    ] {
        let (code, answer) = daemon.post("/vms", &spec);
        let text = answer["fault_message"].as_str().unwrap();
        assert!(
            code == status && text.contains(named),
            "{spec}: {code} {text}"
        );
    }
    assert_eq!(daemon.get("/vms")["vms"], json!([]));
    assert_eq!(daemon.processes(), [0u32; 0]);
    assert_eq!(fs::read_dir(daemon.vm_folder("")).unwrap().count(), 0);
    assert_eq!(daemon.call("GET", "/nothing", None).0, 404);
    assert_eq!(daemon.call("PATCH", "/vms", None).0, 405);
    for (body, status) in [
        (json!({"id": "t", "vm": "none"}), 404),
        (json!({"id": "T", "vm": "none"}), 400),
        (json!({"id": "t"}), 400),
    ] {
        assert_eq!(daemon.post("/templates", &body).0, status, "{body}");
    }
}

#[test]
fn a_guest_is_configured_started_paused_and_stopped() {
    let daemon = Daemon::start(&[]);
    let mut events = daemon.events(0);
    daemon.create_waiting("g");
    let put = |path: &str, body: Value| {
        let (status, answer) = daemon.call("PUT", &format!("/vms/g{path}"), Some(&body));
        assert_eq!(status, 204, "{answer}");
    };
    put(
        "/boot-source",
        json!({"kernel_image_path": daemon.kernel()}),
    );
    put(
        "/machine-config",
        json!({"vcpu_count": 1, "mem_size_mib": 20}),
    );
    put("/sharing", json!({"mode": "off"}));
    assert_eq!(daemon.get("/vms/g")["mem_size_mib"], 20);
    put("/actions", json!({"action_type": "InstanceStart"}));
    assert_eq!(daemon.get("/vms/g")["state"], "running");
    events.next("g", "started");
    assert_eq!(
        daemon.post("/vms/g/pause", &json!(null)).1["state"],
        "paused"
    );
    events.next("g", "paused");
    assert_eq!(daemon.post("/vms/g/start", &json!(null)).0, 409);
    assert_eq!(
        daemon
            .call("PATCH", "/vms/g/vm", Some(&json!({"state": "Resumed"})))
            .0,
        204
    );
    events.next("g", "resumed");
    assert_eq!(daemon.get("/vms/g")["state"], "running");
    // It powers off by Ctrl-Alt-Del.
    let (status, vm) = daemon.post("/vms/g/stop", &json!({"timeout_s": 30}));
    assert_eq!(
        (status, &vm["state"], &vm["end"]["kind"]),
        (200, &json!("stopped"), &json!("power_off")),
        "{vm}"
    );
    events.next("g", "stopped");
    assert_eq!(daemon.post("/vms/g/stop", &json!(null)).0, 200);
    assert_eq!(daemon.call("GET", "/vms/g/vm/config", None).0, 409);
}

#[test]
fn a_stopped_guest_starts_again_as_it_was_made() {
    let daemon = Daemon::start(&[]);
    let first = daemon.create_running("g");
    assert_eq!(
        daemon.post("/vms/g/start", &json!(null)).1["pid"],
        first["pid"]
    );
    let (_, stopped) = daemon.post("/vms/g/stop", &json!({"timeout_s": 0}));
    assert_eq!(
        (&stopped["state"], &stopped["end"]["kind"]),
        (&json!("stopped"), &json!("signal"))
    );
    let (status, second) = daemon.post("/vms/g/start", &json!(null));
    assert_eq!(
        (status, &second["state"]),
        (200, &json!("running")),
        "{second}"
    );
    assert_ne!(second["pid"], first["pid"]);
    assert_eq!(daemon.call("DELETE", "/vms/g?timeout_s=20", None).0, 204);
}

#[test]
fn guests_outlive_their_daemon_and_the_next_one_finds_them() {
    let mut daemon = Daemon::start(&[]);
    let ids = ["running", "paused", "waiting", "stopped"];
    let made = [
        daemon.create_running("running"),
        daemon.create_running("paused"),
        daemon.create_waiting("waiting"),
        daemon.create_running("stopped"),
    ];
    daemon.post("/vms/paused/pause", &json!(null));
    daemon.post("/vms/stopped/stop", &json!({"timeout_s": 0}));
    for round in 0..2 {
        if round == 0 {
            daemon.kill_and_restart();
        } else {
            daemon.terminate();
            daemon.restart();
        }
        for (id, made) in ids.iter().zip(&made) {
            let state = if *id == "waiting" { "not_started" } else { id };
            let vm = daemon.until_state(id, state);
            if *id != "stopped" {
                assert_eq!(vm["pid"], made["pid"]);
            }
        }
    }
    assert_eq!(
        daemon.post("/vms/paused/resume", &json!(null)).1["state"],
        "running"
    );
    assert_eq!(daemon.processes().len(), 3);
    // A guest ends while there is no daemon, and leaves its reason.
    daemon.terminate();
    let pid = i32::try_from(made[0]["pid"].as_i64().unwrap()).unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    until("it wrote why", || {
        daemon.vm_folder("running").join("end.json").exists()
    });
    kill(&made[1]);
    daemon.restart();
    let ended = daemon.until_state("running", "stopped");
    assert_eq!(ended["end"]["code"], 143);
    assert_eq!(
        daemon.until_state("paused", "failed")["end"]["kind"],
        "unknown"
    );
    for id in ids {
        assert_eq!(daemon.call("DELETE", &format!("/vms/{id}"), None).0, 204);
    }
    assert_eq!(daemon.processes(), [0u32; 0]);
}

#[test]
fn the_end_of_one_guest_is_reported_with_its_reason_and_no_other_ends() {
    let daemon = Daemon::start(&[]);
    let mut events = daemon.events(0);
    let other = daemon.create_running("other");
    for (id, keys, kind, state) in [
        ("quits", Some("q"), "power_off", "stopped"),
        ("resets", Some("r"), "reset", "stopped"),
        ("crashes", Some("t"), "crash", "failed"),
        ("panics", Some("p"), "panic", "failed"),
        ("killed", None, "killed", "failed"),
    ] {
        let vm = daemon.create_running(id);
        match keys {
            Some(keys) => {
                let input = daemon.folder().join("keys");
                fs::write(&input, keys).unwrap();
                let line = format!(
                    "--data-binary @{} --unix-socket {} -X PUT -sS http://l/vms/{id}/console",
                    input.display(),
                    daemon.socket().display()
                );
                assert!(
                    std::process::Command::new("curl")
                        .args(line.split(' '))
                        .status()
                        .unwrap()
                        .success()
                );
            }
            None => kill(&vm),
        }
        let vm = daemon.until_state(id, state);
        assert_eq!(vm["end"]["kind"], kind, "{vm}");
        let event = events.next(id, state);
        assert_eq!(event["reason"], vm["end"]["text"]);
    }
    assert_eq!(daemon.get("/vms/other")["pid"], other["pid"]);
    assert!(daemon.log().contains("SIGKILL"));
}

#[test]
fn a_guest_that_fails_again_and_again_is_not_started_for_ever() {
    let daemon = Daemon::start(&[]);
    let mut events = daemon.events(0);
    let mut spec = daemon.spec("g");
    spec["restart"] = json!("on-failure");
    let (_, vm) = daemon.post("/vms", &spec);
    kill(&vm);
    events.next("g", "restarting");
    events.next("g", "started");
    let vm = daemon.until_state("g", "running");
    assert_eq!(vm["restarts"], 1);
    // Without its kernel, it cannot start again.
    fs::remove_file(daemon.kernel()).unwrap();
    kill(&vm);
    let waits: Vec<_> = (0..4)
        .map(|_| events.next("g", "restarting")["reason"].clone())
        .collect();
    assert!(waits[1].as_str().unwrap().contains("in 4 s"), "{waits:?}");
    let last = events.next("g", "restarts_exhausted");
    assert!(
        last["reason"].as_str().unwrap().contains("kernel"),
        "{last}"
    );
    assert_eq!(daemon.until_state("g", "failed")["restarts"], 5);
    // A guest that waits for its restart can be deleted.
    assert_eq!(daemon.call("DELETE", "/vms/g", None).0, 204);
}

#[test]
fn a_daemon_waits_for_what_a_killed_one_has_left_in_a_process_that_it_was_starting() {
    let mut daemon = Daemon::start(&[]);
    daemon.kill();
    let lock = fs::File::open(daemon.folder().join("state/lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    fs::remove_file(daemon.socket()).unwrap();
    let listener = UnixListener::bind(daemon.socket()).unwrap();
    let (lock_goes, listener_goes) = (Duration::from_millis(200), Duration::from_millis(400));
    let holder = thread::spawn(move || {
        thread::sleep(lock_goes);
        drop(lock);
        thread::sleep(listener_goes);
        drop(listener);
    });
    // Not `restart`, as the listener above accepts connections and never answers.
    daemon.start_again();
    holder.join().unwrap();
    daemon.answers();
    assert_eq!(daemon.get("/vms")["vms"], json!([]));
}

/// Where the program of a process is.
fn program_at(vm: &Value) -> String {
    let maps = fs::read_to_string(format!("/proc/{}/maps", vm["pid"])).unwrap();
    let line = maps.lines().find(|line| line.ends_with("/coppice"));
    let (start, _) = line.unwrap().split_once('-').unwrap();
    start.to_owned()
}

#[test]
fn guests_are_copies_of_a_process_that_may_end_at_any_time() {
    let daemon = Daemon::start(&[]);
    let (a, b) = (daemon.create_waiting("a"), daemon.create_waiting("b"));
    assert_eq!(program_at(&a), program_at(&b));
    let line = fs::read_to_string(format!("/proc/{}/cmdline", b["pid"])).unwrap();
    assert!(
        line.starts_with("coppice\0run\0--held\0--id\0b\0"),
        "{line}"
    );
    let zygote = daemon.zygote();
    kill(&json!({"pid": zygote}));
    let c = daemon.create_waiting("c");
    assert_ne!(daemon.zygote(), zygote);
    assert_eq!(daemon.processes().len(), 3);
    kill(&c);
    let c = daemon.until_state("c", "failed");
    assert_eq!(c["end"]["kind"], "killed", "{c}");
    for id in ["a", "b", "c"] {
        let (status, _) = daemon.call("DELETE", &format!("/vms/{id}"), None);
        assert_eq!(status, 204);
    }
    let zygote = format!("/proc/{}", daemon.zygote());
    drop(daemon);
    until("it ends with its daemon", || !fs::exists(&zygote).unwrap());
}

/// The stack canary of a process, which lies in the descriptor of its thread (System V ABI, AMD64: `%fs:0x28`).
fn canary(vm: &Value) -> u64 {
    let pid = i32::try_from(vm["pid"].as_i64().unwrap()).unwrap();
    let trace = |request, data: *mut libc::user_regs_struct| {
        // SAFETY: where the request writes registers, `data` has room for them; it is null otherwise.
        let done = unsafe { libc::ptrace(request, pid, ptr::null_mut::<u8>(), data) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    };
    let mut registers = MaybeUninit::uninit();
    trace(libc::PTRACE_ATTACH, ptr::null_mut());
    // SAFETY: waitpid(2) takes a null pointer where the status is not asked for.
    assert_eq!(unsafe { libc::waitpid(pid, ptr::null_mut(), 0) }, pid);
    trace(libc::PTRACE_GETREGS, registers.as_mut_ptr());
    // SAFETY: the request has succeeded, so all registers have been written.
    let thread = unsafe { registers.assume_init() }.fs_base;
    let mut word = [0; 8];
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    memory.read_exact_at(&mut word, thread + 0x28).unwrap();
    trace(libc::PTRACE_DETACH, ptr::null_mut());
    u64::from_ne_bytes(word)
}

#[test]
fn copies_of_one_process_have_stack_canaries_of_their_own() {
    if !skip::unless_root() {
        return;
    }
    let daemon = Daemon::start(&[]);
    let (a, b) = (daemon.create_waiting("a"), daemon.create_waiting("b"));
    let zygote = json!({"pid": daemon.zygote()});
    let canaries = BTreeSet::from([canary(&zygote), canary(&a), canary(&b)]);
    assert_eq!(canaries.len(), 3, "{canaries:x?}");
    assert!(canaries.iter().all(|canary| canary.to_ne_bytes()[0] == 0));
    // The zygote goes on where it was, and so do the copies, to their end.
    daemon.create_running("c");
    for id in ["a", "b", "c"] {
        let (status, _) = daemon.call("DELETE", &format!("/vms/{id}"), None);
        assert_eq!(status, 204);
    }
}

#[test]
fn guests_have_layouts_of_their_own_where_that_is_asked_for() {
    let daemon = Daemon::start(&["--own-layout"]);
    let (a, b) = (daemon.create_waiting("a"), daemon.create_waiting("b"));
    assert_ne!(program_at(&a), program_at(&b));
}

#[test]
fn one_state_folder_has_one_daemon() {
    let daemon = Daemon::start(&[]);
    let output = coppice()
        .args(["serve", "--socket"])
        .arg(daemon.folder().join("other"))
        .arg("--state")
        .arg(daemon.folder().join("state"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("another daemon"));
    assert!(!daemon.folder().join("other").exists());
}

#[test]
fn guests_end_with_a_daemon_that_is_started_with_stop_guests() {
    let mut daemon = Daemon::start(&["--stop-guests", "0"]);
    daemon.create_running("a");
    daemon.create_waiting("b");
    daemon.terminate();
    assert_eq!(daemon.processes(), [0u32; 0]);
    daemon.restart();
    assert_eq!(daemon.until_state("a", "stopped")["end"]["kind"], "signal");
}

#[test]
fn a_guest_that_is_always_to_run_is_started_again_until_it_is_stopped() {
    let mut daemon = Daemon::start(&[]);
    let mut events = daemon.events(0);
    let mut spec = daemon.spec("g");
    spec["restart"] = json!("always");
    let first = daemon.post("/vms", &spec).1;
    events.next("g", "started");
    // The guest powers itself off.
    let mut console = UnixStream::connect(daemon.vm_folder("g").join("console.sock")).unwrap();
    console.write_all(b"q").unwrap();
    events.next("g", "restarting");
    events.next("g", "started");
    let second = daemon.until_state("g", "running");
    assert_ne!(first["pid"], second["pid"]);

    // As when the host shuts down: first the daemon is ended, then the guest's process.
    until("that it runs is noted", || {
        let record = fs::read(daemon.vm_folder("g").join("vm.json")).unwrap();
        serde_json::from_slice::<Value>(&record).unwrap()["state"] == "running"
    });
    daemon.terminate();
    signal(&second, Signal::TERM);
    until("it has ended", || daemon.processes().is_empty());
    daemon.restart();
    let mut events = daemon.events(0);
    let reported = events.next("g", "restarting")["reason"].clone();
    assert!(
        reported.as_str().unwrap().contains("signal 15"),
        "{reported}"
    );
    events.next("g", "started");
    assert!(daemon.echoes("g"));

    // A daemon that stops its guests at its end: the next one starts those that are always to run.
    daemon.terminate();
    daemon.change_arguments(&["--stop-guests", "0"]);
    daemon.restart();
    daemon.create_running("other");
    daemon.terminate();
    assert_eq!(daemon.processes(), [0u32; 0]);
    daemon.restart();
    daemon.until_state("g", "running");
    assert_eq!(daemon.get("/vms/other")["state"], "stopped");

    // A guest that was stopped by request stays stopped, with the next daemon as well.
    let stop = json!({"timeout_s": 0});
    assert_eq!(daemon.post("/vms/g/stop", &stop).1["state"], "stopped");
    daemon.terminate();
    daemon.restart();
    assert_eq!(daemon.get("/vms/g")["state"], "stopped");
}

#[test]
fn a_guest_that_has_not_run_is_not_started_again() {
    let mut daemon = Daemon::start(&[]);
    let ended = |daemon: &Daemon, id: &str| {
        let vm = daemon.get(&format!("/vms/{id}"));
        assert_ne!(vm["state"], "restarting", "{vm}");
        vm["pid"].is_null()
    };
    for policy in ["on-failure", "always"] {
        let spec = json!({"id": policy, "start": false, "restart": policy});
        let (status, vm) = daemon.post("/vms", &spec);
        assert_eq!(status, 201);
        kill(&vm);
        until("it has ended", || ended(&daemon, policy));
        assert_eq!(daemon.get(&format!("/vms/{policy}"))["state"], "failed");
    }
    let spec = json!({"id": "g", "start": false, "restart": "always"});
    let vm = daemon.post("/vms", &spec).1;
    daemon.terminate();
    signal(&vm, Signal::TERM);
    until("it has ended", || daemon.processes().is_empty());
    daemon.restart();
    assert_eq!(daemon.get("/vms/g")["state"], "stopped");
}

#[test]
fn what_prevents_a_start_is_reported() {
    let daemon = Daemon::start(&[]);
    // The remains of a guest of that name are removed.
    fs::create_dir_all(daemon.vm_folder("g").join("vm.json.new")).unwrap();
    daemon.create_waiting("g");
    daemon.post("/vms/g/stop", &json!({"timeout_s": 0}));
    fs::write(daemon.vm_folder("g").join("api.sock"), "no socket").unwrap();
    let (status, answer) = daemon.post("/vms/g/start", &json!(null));
    assert_eq!(status, 422, "{answer}");
    let text = answer["fault_message"].as_str().unwrap();
    assert!(text.contains("not a socket"), "{text}");
    assert_eq!(daemon.get("/vms/g")["state"], "failed");
    assert_eq!(daemon.processes(), [0u32; 0]);
}

#[test]
fn the_daemon_knows_which_guests_share_a_page_of_a_file() {
    let daemon = Daemon::start(&[]);
    let initrd = daemon.folder().join("initrd");
    fs::write(&initrd, [7; 3 * 4096]).unwrap();
    for (id, mode) in [("a", "boot"), ("b", "boot"), ("c", "off")] {
        let mut spec = daemon.spec(id);
        spec["config"]["boot-source"]["initrd_path"] = json!(initrd);
        spec["config"]["sharing"] = json!({"mode": mode});
        assert_eq!(daemon.post("/vms", &spec).0, 201);
    }
    daemon.create_waiting("d");
    // Guests map an unpacked copy of the kernel, which does not change with the file.
    // The cache has a folder for the owner of the guests.
    let cache = fs::read_dir(daemon.folder().join("cache/coppice/kernels")).unwrap();
    let copy = cache
        .flat_map(|folder| fs::read_dir(folder.unwrap().path()).unwrap())
        .map(|entry| entry.unwrap().path())
        .find(|path| path.metadata().unwrap().len() == 3 * 4096)
        .unwrap();
    let found = daemon.get(&format!("/sharers?path={}&offset=5000", copy.display()));
    let guests = found["guests"].as_array().unwrap();
    let ids: Vec<_> = guests.iter().map(|guest| &guest["id"]).collect();
    assert_eq!(
        (ids, &found["answered"]),
        (vec![&json!("a"), &json!("b")], &json!(3)),
        "{found}"
    );
    let addresses = guests[0]["addresses"].as_array().unwrap();
    assert_eq!(addresses.len(), 1, "{found}");
    let page = daemon.get(&format!("/vms/a/vm/sharing/pages/{}", addresses[0]));
    let name = copy.file_name().unwrap().to_str().unwrap();
    assert!(page["path_on_host"].as_str().unwrap().ends_with(name));
    assert_eq!(
        (&page["state"], &page["offset"]),
        (&json!("mapped"), &json!(4096))
    );
    let of_c = daemon.get(&format!("/vms/c/vm/sharing/pages/{}", addresses[0]));
    assert_eq!(
        (&of_c["state"], &of_c["offset"]),
        (&json!("own"), &Value::Null)
    );
    let (status, refused) = daemon.call("GET", "/vms/a/vm/sharing/pages/0xffffffffff", None);
    assert_eq!(status, 400);
    assert!(
        refused["fault_message"]
            .as_str()
            .unwrap()
            .contains("no RAM")
    );
    let (status, refused) = daemon.call("GET", "/sharers?path=/nowhere", None);
    assert_eq!(status, 400);
    assert!(
        refused["fault_message"]
            .as_str()
            .unwrap()
            .contains("/nowhere")
    );
}
