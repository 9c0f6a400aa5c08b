//! `coppice serve`: disks that are committed into their parents, and guests that boot again afterwards.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

#[path = "serve/mod.rs"]
mod serve;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use serve::daemon::{Daemon, call, until};
use serve::steps::{Killer, Victim};
use serve::traces::{disk, pid, source};
use storage::{OpenOptions, blocking};

/// What the guest's disk holds.
static WRITTEN: [u8; 3 << 20] = [7; 3 << 20];

/// Has the guest `a` run with a disk that is a child, which alone has what was written. Gives the number of its
/// process.
fn with_child(daemon: &Daemon) -> (u32, PathBuf) {
    source(daemon, 16);
    let child = daemon.vm_folder("a").canonicalize().unwrap();
    let child = child.join("child.vhdx");
    let body = json!({"path_on_host": child});
    let (status, answer) = daemon.call("PUT", "/vms/a/drives/root/snapshot", Some(&body));
    assert_eq!(status, 204, "{answer}");
    daemon.post("/vms/a/stop", &json!({"timeout_s": 0}));
    let opened = storage::open(&child, &OpenOptions::default()).unwrap();
    blocking::write_at(&*opened, &WRITTEN, 0).unwrap();
    opened.close().unwrap();
    drop(opened);
    let (status, vm) = daemon.post("/vms/a/start", &json!(null));
    assert_eq!(status, 200, "{vm}");
    (pid(&vm), child)
}

fn commit(daemon: &Daemon) -> Option<u16> {
    let answer = daemon.try_call("PUT", "/vms/a/drives/root/commit", Some(&json!({})));
    answer.map(|(status, _)| status)
}

/// Whether the guest's process reports no running commit, or has ended.
fn is_over(socket: &Path) -> bool {
    let job = call(socket, "GET", "/drives/root/job", None);
    job.is_none_or(|(status, job)| status != 200 || job["state"] != "Running")
}

fn record(daemon: &Daemon) -> Value {
    let record = fs::read(daemon.vm_folder("a").join("vm.json")).unwrap();
    serde_json::from_slice(&record).unwrap()
}

fn has_nothing_pending(daemon: &Daemon) -> bool {
    record(daemon)["pending"]["commits"] == json!({})
}

/// Boots the guest again, and checks that its disk has all that was written. Gives the disk.
fn starts_anew(daemon: &Daemon) -> PathBuf {
    if daemon.get("/vms/a")["state"] == "running" {
        daemon.post("/vms/a/stop", &json!({"timeout_s": 0}));
    }
    let (status, vm) = daemon.post("/vms/a/start", &json!(null));
    assert_eq!((status, &vm["state"]), (200, &json!("running")), "{vm}");
    let has = disk(daemon, "a");
    assert!(daemon.echoes("a"));
    assert!(has_nothing_pending(daemon));
    daemon.post("/vms/a/stop", &json!({"timeout_s": 0}));
    let opened = storage::open(&has, &OpenOptions::read_only()).unwrap();
    let mut found = vec![0; WRITTEN.len()];
    blocking::read_at(&*opened, &mut found, 0).unwrap();
    assert!(found == WRITTEN, "{}", has.display());
    has
}

#[test]
fn after_a_commit_the_record_names_the_disk_that_the_guest_has_also_for_the_next_daemon() {
    let mut daemon = Daemon::start(&[]);
    let base = daemon.folder().join("a.vhdx");
    for is_restarted in [false, true] {
        let (_, child) = with_child(&daemon);
        assert_eq!(record(&daemon)["disks"]["root"], json!(child));
        let parent = daemon.get("/vms/a/drives/root/parent");
        assert_eq!(parent, json!({"path_on_host": base}));
        assert_eq!(commit(&daemon), Some(204));
        if is_restarted {
            daemon.kill_and_restart();
            daemon.until_state("a", "running");
        }
        until("the commit is over", || has_nothing_pending(&daemon));
        assert_eq!(record(&daemon)["disks"]["root"], json!(base));
        assert!(!child.exists());
        assert_eq!(starts_anew(&daemon), base);
        // A disk without a parent cannot be committed, and the record stays as it is.
        daemon.post("/vms/a/start", &json!(null));
        assert_eq!(commit(&daemon), Some(400));
        assert!(has_nothing_pending(&daemon));
        assert_eq!(record(&daemon)["disks"]["root"], json!(base));
        assert_eq!(daemon.call("DELETE", "/vms/a", None).0, 204);
    }
}

#[test]
fn a_guest_that_is_killed_at_any_step_of_a_commit_starts_anew_with_the_disk_that_it_had() {
    let (daemon, mut killed, mut had) = (Daemon::start(&[]), 0, BTreeSet::new());
    for step in 1.. {
        let (guest, child) = with_child(&daemon);
        let killer = Killer::new(guest, Victim::Itself, step);
        commit(&daemon);
        let socket = daemon.vm_folder("a").join("api.sock");
        until("the commit is over", || is_over(&socket));
        let died = killer.end(|| drop(call(&socket, "GET", "/", None)));
        if died.is_some() {
            killed += 1;
            daemon.until_state("a", "failed");
        }
        let has = starts_anew(&daemon);
        assert!(has != child || !child.with_extension("vhdx.commit").exists());
        had.insert(has.file_name().unwrap().to_owned());
        assert_eq!(daemon.call("DELETE", "/vms/a", None).0, 204);
        if died.is_none() {
            assert!(has.ends_with("a.vhdx"));
            break;
        }
    }
    eprintln!("{killed} steps: {had:?}");
    assert!(had.len() == 3, "{had:?}");
}

#[test]
fn a_daemon_that_is_killed_at_any_step_of_a_commit_knows_which_disk_its_guest_has() {
    let (mut daemon, mut killed) = (Daemon::start(&[]), 0);
    for step in 1.. {
        let (_, child) = with_child(&daemon);
        let killer = Killer::new(daemon.pid(), Victim::Itself, step);
        let status = commit(&daemon);
        let socket = daemon.vm_folder("a").join("api.sock");
        let watched = (0..100).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(1));
            daemon.try_call("GET", "/healthz", None).is_none() || has_nothing_pending(&daemon)
        });
        let died = killer.end(|| drop(daemon.try_call("GET", "/healthz", None)));
        if died.is_some() {
            killed += 1;
            daemon.kill_and_restart();
            daemon.until_state("a", "running");
        }
        until("the commit is over", || {
            is_over(&socket) && has_nothing_pending(&daemon)
        });
        let has = starts_anew(&daemon);
        // The commit may have begun before the process was killed, or not.
        assert!(has == child || has.ends_with("a.vhdx"), "{}", has.display());
        assert_eq!(has == child, child.exists());
        assert_eq!(daemon.call("DELETE", "/vms/a", None).0, 204);
        if died.is_none() && watched {
            assert_eq!(status, Some(204));
            assert!(has.ends_with("a.vhdx"));
            break;
        }
    }
    assert!(killed > 2, "{killed}");
}
