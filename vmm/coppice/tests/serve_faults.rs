//! `coppice serve`: a daemon, or a guest, that is killed at any step of a template, a clone or a snapshot.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

#[path = "serve/mod.rs"]
mod serve;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use serve::daemon::{Daemon, call, until};
use serve::steps::{Killer, Victim};
use serve::traces::{
    clone, disk, files, has_nothing_pending, ids, no_processes_but, nothing_is_left_over, pid,
    source, template,
};

/// Checks that a template is whole, or does not exist and can be made; that clones of it run; and that its guest boots
/// again without a write to the template's disks. Deletes both.
fn the_template_can_be_used(daemon: &Daemon) {
    let is_there = ids(&daemon.get("/templates")) == ["t"];
    let folder = daemon.folder().join("state/templates");
    if is_there {
        assert_eq!(files(&folder), ["t"]);
    } else {
        assert_eq!(files(&folder), [""; 0]);
        if daemon.get("/vms/a")["state"] != "running" {
            let (status, vm) = daemon.post("/vms/a/start", &json!(null));
            assert_eq!(status, 200, "{vm}");
        }
        let (status, made) = daemon.post("/templates", &template());
        assert_eq!(status, 201, "{made}");
    }
    let mut parts = files(&folder.join("t"));
    // Where an attempt gave the guest a child of its first disk, that disk is copied as well.
    parts.retain(|name| !name.starts_with("disk-root"));
    assert_eq!(parts, ["memory", "state", "template.json"]);
    let sealed = daemon.get("/templates/t")["disks"]["root"].clone();
    let sealed = PathBuf::from(sealed.as_str().unwrap());
    let before = fs::metadata(&sealed).unwrap().modified().unwrap();
    // One at a time, as each of these guests keeps a processor busy.
    daemon.post("/vms/a/stop", &json!({"timeout_s": 0}));
    let (status, vm) = daemon.post("/vms", &clone());
    assert_eq!((status, &vm["state"]), (201, &json!("running")), "{vm}");
    for id in ["b", "a"] {
        if id == "a" {
            let (status, vm) = daemon.post("/vms/a/start", &json!(null));
            assert_eq!((status, &vm["state"]), (200, &json!("running")), "{vm}");
        }
        assert_ne!(disk(daemon, id), sealed, "{id}");
        assert!(daemon.echoes(id), "{id}");
        assert_eq!(daemon.call("DELETE", &format!("/vms/{id}"), None).0, 204);
    }
    assert_eq!(fs::metadata(&sealed).unwrap().modified().unwrap(), before);
}

fn delete_all(daemon: &Daemon) {
    assert_eq!(daemon.call("DELETE", "/templates/t", None).0, 204);
    no_processes_but(daemon, &[]);
    for folder in ["state/vms", "state/templates"] {
        assert_eq!(files(&daemon.folder().join(folder)), [""; 0]);
    }
}

/// Every step is tried, but with jailed guests only every fourth.
const STRIDE: usize = if matches!(env!("CARGO_CRATE_NAME").as_bytes(), b"serve_jailed") {
    4
} else {
    1
};

/// The steps to kill at, by number.
fn steps() -> impl Iterator<Item = usize> {
    (1..).step_by(STRIDE)
}

/// Sends a request to the daemon and one to the guest, so that a traced process of either makes a system call.
fn wake(daemon: &Daemon) {
    for path in ["/healthz", "/vms/a/"] {
        let _ = daemon.try_call("GET", path, None);
    }
}

fn mounts() -> usize {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.lines().count()
}

/// Checks that processes were killed at several steps, the wanted ones among them.
fn were_killed_at(killed: &[&str], wanted: &[&str]) {
    eprintln!("{} steps: {killed:?}", killed.len());
    assert!(killed.len() > 2);
    let there: BTreeSet<_> = killed.iter().collect();
    for step in wanted.iter().filter(|_| STRIDE == 1) {
        assert!(there.contains(step), "never at {step}: {there:?}");
    }
}

#[test]
fn a_daemon_that_is_killed_at_any_step_of_a_template_leaves_it_whole_or_not_at_all() {
    let (mut daemon, mut killed, before) = (Daemon::start(&[]), Vec::new(), mounts());
    for step in steps() {
        let guest = source(&daemon, 16);
        let killer = Killer::new(daemon.pid(), Victim::Itself, step);
        let answer = daemon.try_call("POST", "/templates", Some(&template()));
        let at = killer.end(|| wake(&daemon));
        if let Some(at) = at {
            killed.push(at);
            daemon.kill_and_restart();
        }
        daemon.until_state("a", "running");
        until("what was begun is ended", || {
            has_nothing_pending(&daemon, "a")
        });
        assert_eq!(pid(&daemon.get("/vms/a")), guest);
        let own = disk(&daemon, "a");
        nothing_is_left_over(&daemon, "a", &[&own]);
        no_processes_but(&daemon, &[guest]);
        the_template_can_be_used(&daemon);
        delete_all(&daemon);
        if at.is_none() {
            assert_eq!(answer.unwrap().0, 201);
            break;
        }
    }
    were_killed_at(
        &killed,
        &["create a file", "sync", "rename", "mkdir", "connect"],
    );
    assert_eq!(mounts(), before);
}

#[test]
fn a_guest_that_is_killed_at_any_step_of_its_template_has_failed_and_nothing_half_made_stays() {
    let (daemon, mut killed, before) = (Daemon::start(&[]), Vec::new(), mounts());
    for step in steps() {
        let guest = source(&daemon, 16);
        let killer = Killer::new(guest, Victim::Itself, step);
        let (status, answer) = daemon.post("/templates", &template());
        let at = killer.end(|| wake(&daemon));
        if let Some(at) = at {
            killed.push(at);
            let vm = daemon.until_state("a", "failed");
            assert_eq!(vm["end"]["kind"], "killed", "{vm}");
            until("what was begun is ended", || {
                has_nothing_pending(&daemon, "a")
            });
            no_processes_but(&daemon, &[]);
        }
        let made = ids(&daemon.get("/templates")) == ["t"];
        assert_eq!(made, status == 201, "{answer}");
        let own = daemon.vm_folder("a").join("disk-root-after-t.vhdx");
        nothing_is_left_over(&daemon, "a", &[&own]);
        the_template_can_be_used(&daemon);
        delete_all(&daemon);
        if at.is_none() {
            assert!(made);
            break;
        }
    }
    were_killed_at(
        &killed,
        &["create a file", "link", "sync", "pwrite", "send"],
    );
    assert_eq!(mounts(), before);
}

#[test]
fn a_daemon_that_is_killed_at_any_step_of_a_clone_leaves_it_whole_or_not_at_all() {
    let (mut daemon, mut killed, before) = (Daemon::start(&[]), Vec::new(), mounts());
    let guest = source(&daemon, 16);
    assert_eq!(daemon.post("/templates", &template()).0, 201);
    for step in steps() {
        let killer = Killer::new(daemon.pid(), Victim::Itself, step);
        let answer = daemon.try_call("POST", "/vms", Some(&clone()));
        let at = killer.end(|| wake(&daemon));
        if let Some(at) = at {
            killed.push(at);
            daemon.kill_and_restart();
        }
        let vms = daemon.get("/vms")["vms"].clone();
        let is_there = ids(&vms).contains(&"b");
        assert_eq!(
            files(&daemon.vm_folder("")).len(),
            vms.as_array().unwrap().len()
        );
        if is_there {
            assert_eq!(daemon.until_state("b", "running")["restarts"], 0);
        } else {
            no_processes_but(&daemon, &[guest]);
        }
        let (status, vm) = daemon.post("/vms", &clone());
        assert_eq!(status, if is_there { 200 } else { 201 }, "{vm}");
        no_processes_but(&daemon, &[guest, pid(&vm)]);
        nothing_is_left_over(&daemon, "b", &[&disk(&daemon, "b")]);
        assert!(daemon.echoes("b"));
        assert_eq!(daemon.call("DELETE", "/vms/b", None).0, 204);
        if at.is_none() {
            assert_eq!(answer.unwrap().0, 201);
            break;
        }
    }
    were_killed_at(&killed, &["mkdir", "create a file", "rename", "pidfd"]);
    assert!(daemon.echoes("a"));
    assert_eq!(daemon.call("DELETE", "/vms/a", None).0, 204);
    no_processes_but(&daemon, &[]);
    assert_eq!(mounts(), before);
}

#[test]
fn a_clone_that_is_killed_at_any_step_of_its_making_is_refused_with_a_reason_and_leaves_nothing() {
    clones_are_killed(&Daemon::start(&[]), Daemon::zygote, &[]);
}

#[test]
fn so_is_a_clone_that_is_executed() {
    clones_are_killed(&Daemon::start(&["--own-layout"]), Daemon::pid, &["execute"]);
}

/// Kills a clone at each step of its start. `maker` gives the process that starts guests' processes.
fn clones_are_killed(daemon: &Daemon, maker: fn(&Daemon) -> u32, more_steps: &[&str]) {
    let (mut killed, before) = (Vec::new(), mounts());
    let guest = source(daemon, 16);
    assert_eq!(daemon.post("/templates", &template()).0, 201);
    for step in steps() {
        let killer = Killer::new(maker(daemon), Victim::Child, step);
        let (status, answer) = daemon.post("/vms", &clone());
        let at = killer.end(|| wake(daemon));
        killed.extend(at);
        match status {
            // The clone was killed after it had started.
            201 if at.is_some() => {
                let vm = daemon.until_state("b", "failed");
                assert_eq!(vm["end"]["kind"], "killed", "{vm}");
                assert_eq!(daemon.call("DELETE", "/vms/b", None).0, 204);
            }
            201 => {
                assert!(daemon.echoes("b"));
                assert_eq!(daemon.call("DELETE", "/vms/b", None).0, 204);
            }
            422 | 503 => {
                let text = answer["fault_message"].as_str().unwrap();
                assert!(text.contains("start"), "{text}");
            }
            _ => panic!("{status} {answer}"),
        }
        assert_eq!(files(&daemon.vm_folder("")), ["a"]);
        no_processes_but(daemon, &[guest]);
        if at.is_none() {
            assert_eq!(status, 201);
            break;
        }
    }
    were_killed_at(&killed, &["create a file", "bind", "sync"]);
    were_killed_at(&killed, more_steps);
    let (status, vm) = daemon.post("/vms", &clone());
    assert_eq!((status, &vm["state"]), (201, &json!("running")), "{vm}");
    assert_eq!(daemon.call("DELETE", "/vms/b", None).0, 204);
    assert_eq!(mounts(), before);
}

#[test]
fn a_guest_that_is_killed_at_any_step_of_its_own_snapshot_leaves_no_file_that_is_not_whole() {
    let (daemon, mut killed) = (Daemon::start(&[]), Vec::new());
    let spec = daemon.spec("a");
    for step in steps() {
        let (_, vm) = daemon.post("/vms", &spec);
        daemon.post("/vms/a/pause", &json!(null));
        let folder = daemon.vm_folder("a");
        let folder = folder.canonicalize().unwrap();
        let at = |name: &str| folder.join(name);
        let snapshot = json!({"snapshot_path": at("state"), "mem_file_path": at("memory")});
        let killer = Killer::new(pid(&vm), Victim::Itself, step);
        let (status, _) = daemon.call("PUT", "/vms/a/snapshot/create", Some(&snapshot));
        let died = killer.end(|| wake(&daemon));
        if let Some(died) = died {
            killed.push(died);
            let vm = daemon.until_state("a", "failed");
            assert_eq!(vm["end"]["kind"], "killed", "{vm}");
        }
        let (state, memory) = (at("state"), at("memory"));
        nothing_is_left_over(&daemon, "a", &[&state, &memory]);
        assert!(memory.exists() || !state.exists());
        if memory.exists() {
            assert_eq!(memory.metadata().unwrap().len(), 16 << 20);
        }
        assert_eq!(daemon.call("DELETE", "/vms/a", None).0, 204);
        if died.is_none() {
            assert_eq!(status, 204);
            break;
        }
    }
    were_killed_at(&killed, &["sync", "link"]);
}

#[test]
fn a_daemon_that_is_killed_while_a_disk_is_given_a_child_knows_which_of_them_its_guest_has() {
    let (mut daemon, mut killed, mut given) = (Daemon::start(&[]), Vec::new(), BTreeSet::new());
    for step in steps() {
        source(&daemon, 16);
        let child = daemon
            .vm_folder("a")
            .canonicalize()
            .unwrap()
            .join("child.vhdx");
        let body = json!({"path_on_host": child});
        let killer = Killer::new(daemon.pid(), Victim::Itself, step);
        let answer = daemon.try_call("PUT", "/vms/a/drives/root/snapshot", Some(&body));
        let died = killer.end(|| wake(&daemon));
        let mut had_it = died.is_none();
        if let Some(died) = died {
            killed.push(died);
            daemon.kill();
            // There is no daemon to pass a request on, so the guest's process is asked directly which disk it has.
            let socket = daemon.vm_folder("a").join("api.sock");
            let (_, config) = call(&socket, "GET", "/vm/config", None).unwrap();
            had_it = config["drives"][0]["path_on_host"] == json!(child);
            // In every other round the guest ends, too, while there is no daemon.
            if step % 2 == 0 {
                for pid in daemon.processes() {
                    let pid = Pid::from_raw(pid.cast_signed()).unwrap();
                    let _ = kill_process(pid, Signal::KILL);
                }
                no_processes_but(&daemon, &[]);
            }
            daemon.restart();
        }
        daemon.until_state(
            "a",
            if died.is_some() && step % 2 == 0 {
                "failed"
            } else {
                "running"
            },
        );
        daemon.post("/vms/a/stop", &json!({"timeout_s": 0}));
        let (status, vm) = daemon.post("/vms/a/start", &json!(null));
        assert_eq!(status, 200, "{vm}");
        // Where the guest did not have the child then, a waiting request may have given it the child afterwards.
        assert!(child.exists() || !had_it);
        assert_eq!(disk(&daemon, "a") == child, child.exists());
        given.insert(child.exists());
        nothing_is_left_over(&daemon, "a", &[&disk(&daemon, "a")]);
        assert_eq!(daemon.call("DELETE", "/vms/a", None).0, 204);
        if died.is_none() {
            assert_eq!(answer.unwrap().0, 204);
            break;
        }
    }
    were_killed_at(&killed, &["sync"]);
    assert!(STRIDE > 1 || given.len() == 2, "with and without a child");
}
