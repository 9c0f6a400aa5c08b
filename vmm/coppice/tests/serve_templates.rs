//! `coppice serve`: templates and clones.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

#[path = "serve/mod.rs"]
mod serve;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use serve::daemon::{Daemon, PATIENCE, coppice, until};
use serve::kernel;
use serve::traces::{files, make_disk};

/// A guest with a disk that it may write to.
fn source(daemon: &Daemon, id: &str) -> PathBuf {
    let disk = daemon.folder().join(format!("{id}.vhdx"));
    let made = coppice()
        .args(["disk", "create", disk.to_str().unwrap(), "--size", "8M"])
        .status();
    assert!(made.unwrap().success());
    // Also a guest in a jail may use it.
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o666)).unwrap();
    let mut spec = daemon.spec(id);
    spec["config"]["drives"] =
        json!([{"drive_id": "root", "path_on_host": disk, "is_root_device": false}]);
    let (status, vm) = daemon.post("/vms", &spec);
    assert_eq!((status, &vm["state"]), (201, &json!("running")), "{vm}");
    disk
}

fn template(daemon: &Daemon, id: &str, vm: &str) -> Value {
    let (status, template) = daemon.post("/templates", &json!({"id": id, "vm": vm}));
    assert_eq!(status, 201, "{template}");
    template
}

/// The disk of a template that clones have children of.
fn sealed(daemon: &Daemon, id: &str, drive: &str) -> PathBuf {
    let folder = daemon.folder().join("state/templates").join(id);
    folder.canonicalize().unwrap().join(format!("disk-{drive}"))
}

fn inode(path: &Path) -> (u64, u64) {
    let metadata = fs::metadata(path).unwrap();
    (metadata.dev(), metadata.ino())
}

fn clone(daemon: &Daemon, id: &str, template: &str) -> Value {
    let (status, vm) = daemon.post("/vms", &json!({"id": id, "template": template}));
    assert_eq!((status, &vm["state"]), (201, &json!("running")), "{vm}");
    vm
}

#[test]
fn clones_go_on_by_themselves_with_disks_of_their_own_and_so_does_the_source() {
    let mut daemon = Daemon::start(&[]);
    let disk = source(&daemon, "a");
    let made = template(&daemon, "t", "a");
    assert_eq!(made["mem_size_mib"], 16);
    assert_eq!(made["disks"]["root"], json!(sealed(&daemon, "t", "root")));
    assert_ne!(inode(&disk), inode(&sealed(&daemon, "t", "root")));
    assert_eq!(
        daemon.post("/templates", &json!({"id": "t", "vm": "a"})).0,
        409
    );
    for id in ["b", "c"] {
        let vm = clone(&daemon, id, "t");
        assert_eq!(vm["template"], "t");
        assert!(daemon.vm_folder(id).join("disk-root-t.vhdx").exists());
    }
    for id in ["a", "b", "c"] {
        assert!(daemon.echoes(id), "{id}");
    }
    // A second request that is the same finds the same clone; and a clone can wait to be started.
    let again = daemon.post("/vms", &json!({"id": "b", "template": "t"}));
    assert_eq!(again.0, 200);
    let (_, paused) = daemon.post("/vms", &json!({"id": "d", "template": "t", "start": false}));
    assert_eq!(paused["state"], "paused");
    assert_eq!(
        daemon.post("/vms/d/resume", &json!(null)).1["state"],
        "running"
    );
    assert!(daemon.echoes("d"));

    daemon.kill_and_restart();
    assert_eq!(daemon.get("/templates/t")["vm"], "a");
    assert!(daemon.echoes("b"));
    // A clone that has ended boots again, with the disk that it has.
    let (_, stopped) = daemon.post("/vms/b/stop", &json!({"timeout_s": 0}));
    assert_eq!(stopped["state"], "stopped");
    assert_eq!(
        daemon.post("/vms/b/start", &json!(null)).1["state"],
        "running"
    );
    let config = daemon.get("/vms/b/vm/config");
    assert_eq!(
        config["drives"][0]["path_on_host"],
        json!(
            daemon
                .vm_folder("b")
                .canonicalize()
                .unwrap()
                .join("disk-root-t.vhdx")
        )
    );
    // So does the source, which has a child of its disk since.
    daemon.post("/vms/a/stop", &json!({"timeout_s": 0}));
    assert_eq!(
        daemon.post("/vms/a/start", &json!(null)).1["state"],
        "running"
    );
    let config = daemon.get("/vms/a/vm/config");
    let path = config["drives"][0]["path_on_host"].as_str().unwrap();
    assert!(path.ends_with("disk-root-after-t.vhdx"), "{path}");

    assert_eq!(daemon.call("DELETE", "/templates/t", None).0, 409);
    for id in ["a", "b", "c", "d"] {
        assert_eq!(daemon.call("DELETE", &format!("/vms/{id}"), None).0, 204);
    }
    assert_eq!(daemon.call("DELETE", "/templates/t", None).0, 204);
    assert_eq!(daemon.call("GET", "/templates/t", None).0, 404);
    assert_eq!(daemon.processes(), [0u32; 0]);
    for folder in ["state/vms", "state/templates"] {
        assert_eq!(files(&daemon.folder().join(folder)), [""; 0]);
    }
}

#[test]
fn no_clone_commits_its_disk_into_that_of_its_template_and_the_source_commits_into_its_own() {
    let daemon = Daemon::start(&[]);
    let disk = source(&daemon, "a");
    template(&daemon, "t", "a");
    clone(&daemon, "b", "t");
    let kept = sealed(&daemon, "t", "root");
    let before = (fs::read(&kept).unwrap(), fs::read(&disk).unwrap());
    let commit = |id: &str| {
        let path = format!("/vms/{id}/drives/root/commit");
        daemon.call("PUT", &path, Some(&json!({})))
    };
    let (status, why) = commit("b");
    assert_eq!(status, 409, "{why}");
    let text = why["fault_message"].as_str().unwrap();
    assert!(text.contains("that of template t"), "{text}");
    assert!(daemon.echoes("b"));
    assert_eq!(commit("a").0, 204);
    until("the commit is over", || {
        let config = daemon.get("/vms/a/vm/config");
        config["drives"][0]["path_on_host"] == json!(disk)
    });
    assert!(daemon.echoes("a"));
    assert!(fs::read(&kept).unwrap() == before.0 && fs::read(&disk).unwrap() != before.1);
    clone(&daemon, "c", "t");
    assert!(daemon.echoes("c"));
}

/// The inodes of all files below a folder.
fn inodes(folder: &Path) -> BTreeSet<(u64, u64)> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            found.extend(inodes(&entry.path()));
        } else if entry.file_type().unwrap().is_file() {
            found.insert(inode(&entry.path()));
        }
    }
    found
}

#[test]
fn what_clones_have_is_no_file_that_a_guests_process_has_had_and_outlives_the_guest() {
    let daemon = Daemon::start(&[]);
    let disk = source(&daemon, "a");
    let own = daemon.vm_folder("a").canonicalize().unwrap();
    // The first disk is outside of the guest's folder, and the second inside.
    let snapshot = |to: &str| {
        let body = json!({"path_on_host": own.join(to)});
        let (status, answer) = daemon.call("PUT", "/vms/a/drives/root/snapshot", Some(&body));
        assert_eq!(status, 204, "{answer}");
    };
    snapshot("second.vhdx");
    // The guest's process keeps such descriptors, whatever becomes of the files' names, modes and locks.
    let held: Vec<_> = [disk.clone(), own.join("second.vhdx")]
        .into_iter()
        .map(|path| fs::File::options().write(true).open(path).unwrap())
        .collect();
    let made = template(&daemon, "t", "a");
    assert_eq!(made["is_copy"], true);
    let folder = daemon.folder().join("state/templates/t");
    assert_eq!(
        files(&folder),
        [
            "disk-root",
            "disk-root-parent-1",
            "memory",
            "state",
            "template.json"
        ]
    );
    let of_guest = || {
        let mut inodes = inodes(&own);
        inodes.insert(inode(&disk));
        inodes
    };
    assert!(inodes(&folder).is_disjoint(&of_guest()));
    assert!(!own.join("template-t").exists());
    let parts = || {
        let names = files(&folder);
        let read = names
            .iter()
            .map(|name| fs::read(folder.join(name)).unwrap());
        read.collect::<Vec<_>>()
    };
    let before = parts();
    for file in &held {
        file.write_all_at(&vec![0xee; 64 << 10], 0).unwrap();
        let len = file.metadata().unwrap().len();
        file.write_all_at(&vec![0xee; 64 << 10], len - (64 << 10))
            .unwrap();
    }
    assert!(parts() == before);
    clone(&daemon, "b", "t");
    assert_eq!(daemon.call("DELETE", "/vms/a", None).0, 204);
    fs::remove_file(&disk).unwrap();
    clone(&daemon, "c", "t");
    for id in ["b", "c"] {
        assert!(daemon.echoes(id), "{id}");
        daemon.post(&format!("/vms/{id}/stop"), &json!({"timeout_s": 0}));
        let (status, vm) = daemon.post(&format!("/vms/{id}/start"), &json!(null));
        assert_eq!(status, 200, "{vm}");
        assert!(daemon.echoes(id), "{id}");
    }
    assert!(parts() == before);
}

#[test]
fn the_second_template_of_a_guest_stands_on_the_first_which_stays_as_long() {
    let mut daemon = Daemon::start(&[]);
    source(&daemon, "a");
    assert_eq!(template(&daemon, "t", "a")["stands_on"], json!([]));
    let second = template(&daemon, "u", "a");
    assert_eq!(second["stands_on"], json!(["t"]));
    let folder = daemon.folder().join("state/templates/u");
    let expected = ["disk-root", "memory", "state", "template.json"];
    assert_eq!(files(&folder), expected);
    // Two disks below the third, of which each is in one of the templates.
    assert_eq!(template(&daemon, "v", "a")["stands_on"], json!(["u"]));
    let (status, refused) = daemon.call("DELETE", "/templates/t", None);
    assert_eq!(status, 409, "{refused}");
    assert!(refused.to_string().contains("template u"), "{refused}");
    assert_eq!(daemon.call("DELETE", "/vms/a", None).0, 204);
    daemon.kill_and_restart();
    clone(&daemon, "b", "v");
    assert!(daemon.echoes("b"));
    for path in ["/vms/b", "/templates/v", "/templates/u", "/templates/t"] {
        assert_eq!(daemon.call("DELETE", path, None).0, 204, "{path}");
    }
    // Another guest of that name, even one with the same disk, has nothing to do with the first one's templates.
    let disk = daemon.folder().join("a.vhdx");
    fs::remove_file(&disk).unwrap();
    source(&daemon, "a");
    template(&daemon, "t", "a");
    assert_eq!(daemon.call("DELETE", "/vms/a", None).0, 204);
    let mut spec = daemon.spec("a");
    spec["config"]["drives"] =
        json!([{"drive_id": "root", "path_on_host": disk, "is_root_device": false}]);
    assert_eq!(daemon.post("/vms", &spec).0, 201);
    let body =
        json!({"path_on_host": daemon.vm_folder("a").canonicalize().unwrap().join("c.vhdx")});
    let (status, answer) = daemon.call("PUT", "/vms/a/drives/root/snapshot", Some(&body));
    assert_eq!(status, 204, "{answer}");
    assert_eq!(template(&daemon, "w", "a")["stands_on"], json!([]));
    let copy = daemon.folder().join("state/templates/w/disk-root-parent-1");
    assert!(copy.exists());
}

#[test]
fn a_record_or_a_state_that_the_daemon_has_not_written_is_not_cloned() {
    let mut daemon = Daemon::start(&[]);
    source(&daemon, "a");
    let made = template(&daemon, "t", "a");
    let folder = daemon.folder().join("state/templates/t");
    let key = daemon.folder().join("state/key");
    assert_eq!(fs::metadata(&key).unwrap().mode() & 0o7777, 0o600);
    // A whole state, but another one: that of the same guest a moment later.
    template(&daemon, "u", "a");
    let state = fs::read(folder.join("state")).unwrap();
    fs::copy(
        daemon.folder().join("state/templates/u/state"),
        folder.join("state"),
    )
    .unwrap();
    let refused = |daemon: &Daemon, expected: (u16, &str)| {
        let (status, why) = daemon.post("/vms", &json!({"id": "b", "template": "t"}));
        let text = why["fault_message"].as_str().unwrap();
        assert_eq!(status, expected.0, "{text}");
        assert!(text.contains(expected.1), "{text}");
        assert!(!daemon.vm_folder("b").exists());
    };
    let digest = made["state_sha256"].as_str().unwrap();
    refused(&daemon, (422, digest));
    fs::write(folder.join("state"), state).unwrap();
    clone(&daemon, "b", "t");
    assert_eq!(daemon.call("DELETE", "/vms/b", None).0, 204);

    let record = folder.join("template.json");
    let written = fs::read_to_string(&record).unwrap();
    let changed = written.replace(digest, &"0".repeat(64));
    assert_ne!(written, changed);
    fs::write(&record, changed).unwrap();
    daemon.kill_and_restart();
    refused(&daemon, (404, "template"));
    assert_eq!(daemon.get("/templates").as_array().unwrap().len(), 1);
    // With another key no record is known; without one, each is taken for what it says, with its state as it is.
    fs::write(&record, written).unwrap();
    let own = fs::read(&key).unwrap();
    fs::write(&key, [7; 32]).unwrap();
    daemon.kill_and_restart();
    assert_eq!(daemon.get("/templates"), json!([]));
    fs::write(&key, own).unwrap();
    daemon.kill_and_restart();
    clone(&daemon, "b", "t");
    assert!(daemon.echoes("b"));
    fs::remove_file(&key).unwrap();
    daemon.kill_and_restart();
    assert_eq!(daemon.get("/templates").as_array().unwrap().len(), 2);
    clone(&daemon, "c", "t");
    // A key that others may know is none.
    daemon.kill();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let mut serve = coppice();
    serve
        .arg("serve")
        .arg("--socket")
        .arg(daemon.folder().join("s"));
    let ended = serve
        .arg("--state")
        .arg(daemon.folder().join("state"))
        .output();
    let text = String::from_utf8(ended.unwrap().stderr).unwrap();
    assert!(text.contains("state/key: the key has mode 644"), "{text}");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    daemon.restart();
}

#[test]
fn a_guest_goes_on_while_a_large_disk_is_copied_and_shows_how_far_that_is() {
    let daemon = Daemon::start(&[]);
    let file = |name: &str| fs::File::create(daemon.folder().join(name)).unwrap();
    if rustix::fs::ioctl_ficlone(file("to"), file("from")).is_ok() {
        return skip::because("the file system shares blocks, so that nothing is copied");
    }
    let disk = source(&daemon, "a");
    daemon.post("/vms/a/stop", &json!({"timeout_s": 0}));
    // Bytes that the disk does not describe are copied, too.
    let file = fs::File::options().write(true).open(&disk).unwrap();
    let len = file.metadata().unwrap().len();
    let more: u64 = 1 << 30;
    for at in (0..more).step_by(8 << 20) {
        file.write_all_at(&vec![1; 8 << 20], len + at).unwrap();
    }
    drop(file);
    assert_eq!(daemon.post("/vms/a/start", &json!(null)).0, 200);
    let socket = daemon.socket();
    let making = std::thread::spawn(move || {
        let body = json!({"id": "t", "vm": "a"});
        serve::daemon::call(&socket, "POST", "/templates", Some(&body)).unwrap()
    });
    let mut seen = Vec::new();
    while !making.is_finished() {
        let vm = daemon.get("/vms/a");
        if vm["template_job"].is_object() {
            assert_eq!(vm["state"], "running");
            seen.push(vm["template_job"].clone());
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let (status, made) = making.join().unwrap();
    assert_eq!(status, 201, "{made}");
    assert!(daemon.get("/vms/a")["template_job"].is_null());
    let record = fs::read_to_string(daemon.folder().join("state/templates/t/template.json"));
    assert!(record.unwrap().contains("hmac_sha256"));
    let copy = sealed(&daemon, "t", "root");
    assert!(fs::metadata(&copy).unwrap().blocks() * 512 > more);
    for job in &seen {
        assert_eq!(job["id"], "t");
        assert!(job["done"].as_u64() <= job["total"].as_u64(), "{job}");
        assert!(job["total"].as_u64() > Some(more), "{job}");
    }
    let done = |job: &Value| job["done"].as_u64().unwrap();
    assert!(
        seen.iter().any(|job| done(job) > 0) && seen.is_sorted_by_key(done),
        "{seen:?}"
    );
}

#[test]
fn a_clone_becomes_a_template_that_outlives_it() {
    let daemon = Daemon::start(&[]);
    source(&daemon, "a");
    template(&daemon, "t", "a");
    clone(&daemon, "b", "t");
    let forked = template(&daemon, "u", "b");
    assert_eq!(forked["parent"], "t");
    assert!(forked["memory_bytes"].as_u64() <= daemon.get("/templates/t")["memory_bytes"].as_u64());
    clone(&daemon, "c", "u");
    for id in ["a", "b"] {
        assert_eq!(daemon.call("DELETE", &format!("/vms/{id}"), None).0, 204);
    }
    clone(&daemon, "d", "u");
    for id in ["c", "d"] {
        assert!(daemon.echoes(id), "{id}");
    }
    let (status, refused) = daemon.call("DELETE", "/templates/t", None);
    assert_eq!(status, 409, "{refused}");
    assert!(
        refused["fault_message"]
            .as_str()
            .unwrap()
            .contains("template u")
    );
    for path in ["/vms/c", "/vms/d", "/templates/u", "/templates/t"] {
        assert_eq!(daemon.call("DELETE", path, None).0, 204, "{path}");
    }
    assert_eq!(daemon.processes(), [0u32; 0]);
}

#[test]
fn a_template_that_cannot_be_leaves_its_guest_as_it_was() {
    let daemon = Daemon::start(&[]);
    daemon.create_waiting("w");
    let (status, refused) = daemon.post("/templates", &json!({"id": "t", "vm": "w"}));
    assert_eq!(status, 409, "{refused}");
    // A raw disk can have no child.
    let disk = daemon.folder().join("disk.raw");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o666)).unwrap();
    let mut spec = daemon.spec("r");
    spec["config"]["drives"] = json!([{"drive_id": "root", "path_on_host": disk,
        "is_root_device": false, "format": "raw"}]);
    assert_eq!(daemon.post("/vms", &spec).0, 201);
    let (status, refused) = daemon.post("/templates", &json!({"id": "t", "vm": "r"}));
    assert_eq!(status, 400, "{refused}");
    assert!(
        refused["fault_message"].as_str().unwrap().contains("VHDX"),
        "{refused}"
    );
    assert_eq!(daemon.get("/vms/r")["state"], "running");
    assert!(daemon.echoes("r"));
    // Clones would read a disk from the folder of a guest.
    let disk = daemon.vm_folder("w").join("disk.raw");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let mut spec = daemon.spec("s");
    spec["config"]["drives"] = json!([{"drive_id": "root", "path_on_host": disk,
        "is_root_device": false, "format": "raw", "is_read_only": true}]);
    let (status, vm) = daemon.post("/vms", &spec);
    assert_eq!(status, 201, "{vm}");
    let (status, refused) = daemon.post("/templates", &json!({"id": "t", "vm": "s"}));
    assert_eq!(status, 409, "{refused}");
    assert!(refused.to_string().contains("in the folder of a guest"));
    assert!(daemon.echoes("s"));
    assert_eq!(daemon.get("/templates"), json!([]));
    assert_eq!(files(&daemon.folder().join("state/templates")), [""; 0]);
    // A template with another state is not cloned, and nothing of the clone stays.
    source(&daemon, "a");
    template(&daemon, "u", "a");
    let state = daemon.folder().join("state/templates/u/state");
    let mut bytes = fs::read(&state).unwrap();
    let last = bytes.len() - 9;
    bytes[last] ^= 1;
    fs::write(&state, bytes).unwrap();
    let (status, refused) = daemon.post("/vms", &json!({"id": "b", "template": "u"}));
    assert_eq!(status, 422, "{refused}");
    assert!(
        refused["fault_message"]
            .as_str()
            .unwrap()
            .contains("it was changed or replaced"),
        "{refused}"
    );
    assert!(!daemon.vm_folder("b").exists());
}

#[test]
fn the_command_line_makes_templates_and_clones() {
    let daemon = Daemon::start(&[]);
    source(&daemon, "a");
    let (code, text, error) = daemon.cli(&["vm", "template", "create", "t", "a"]);
    assert_eq!(code, 0, "{error}");
    assert!(text.contains("t "), "{text}");
    let (code, text, error) = daemon.cli(&["vm", "create", "--name", "b", "--template", "t"]);
    assert_eq!((code, text.trim()), (0, "b"), "{error}");
    let wrong = daemon.cli(&[
        "vm",
        "create",
        "--name",
        "c",
        "--template",
        "t",
        "--mem",
        "64M",
    ]);
    assert!(
        wrong.0 != 0 && wrong.2.contains("--template"),
        "{}",
        wrong.2
    );
    let (_, text, _) = daemon.cli(&["vm", "template", "list", "--json"]);
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap()[0]["id"], "t");
    assert_eq!(daemon.cli(&["vm", "delete", "b"]).0, 0);
    assert_eq!(daemon.cli(&["vm", "template", "delete", "t"]).0, 0);
}

#[test]
fn a_disk_that_was_given_a_child_is_not_written_to_when_its_guest_starts_anew() {
    let daemon = Daemon::start(&[]);
    source(&daemon, "a");
    let child = daemon.vm_folder("a").join("child.vhdx");
    let body = json!({"path_on_host": child});
    let (status, answer) = daemon.call("PUT", "/vms/a/drives/root/snapshot", Some(&body));
    assert_eq!(status, 204, "{answer}");
    daemon.post("/vms/a/stop", &json!({"timeout_s": 0}));
    let (_, vm) = daemon.post("/vms/a/start", &json!(null));
    assert_eq!(vm["state"], "running");
    let config = daemon.get("/vms/a/vm/config");
    let path = config["drives"][0]["path_on_host"].as_str().unwrap();
    assert!(path.ends_with("a/child.vhdx"), "{path}");
    // Nor is a snapshot loaded that the daemon has not admitted.
    daemon.create_waiting("w");
    let body = json!({"snapshot_path": "s"});
    let (status, answer) = daemon.call("PUT", "/vms/w/snapshot/load", Some(&body));
    assert_eq!(status, 409, "{answer}");
}

/// The guest prints `expected` when `key` is typed.
fn tells(daemon: &Daemon, id: &str, key: u8, expected: u8) {
    let socket = daemon.vm_folder(id).join("console.sock");
    let mut console = UnixStream::connect(socket).unwrap();
    console.set_read_timeout(Some(PATIENCE)).unwrap();
    console.write_all(&[key]).unwrap();
    let mut byte = [0];
    while byte != [expected] {
        assert_eq!(console.read(&mut byte).unwrap(), 1);
    }
}

#[test]
fn clones_and_the_source_go_on_with_children_of_memory_that_is_a_disk_and_that_they_write_to() {
    let mut daemon = Daemon::start(&[]);
    kernel::write_of_pmem(&daemon.folder().join("kernel"));
    let disk = make_disk(daemon.folder());
    let mut spec = daemon.spec("a");
    spec["config"]["pmem"] = json!([{"id": "data", "path_on_host": disk, "mode": "rw"}]);
    let (status, vm) = daemon.post("/vms", &spec);
    assert_eq!((status, &vm["state"]), (201, &json!("running")), "{vm}");
    // The guest does not flush this write.
    tells(&daemon, "a", b'a', b'a');
    let made = template(&daemon, "t", "a");
    let kept = sealed(&daemon, "t", "data");
    assert_eq!(made["disks"]["data"], json!(kept));
    let before = fs::read(&kept).unwrap();
    assert!(fs::read(&disk).unwrap() == before);
    tells(&daemon, "a", b'g', b'a');
    tells(&daemon, "a", b's', b's');
    for (id, key) in [("b", b'b'), ("c", b'c')] {
        clone(&daemon, id, "t");
        tells(&daemon, id, b'g', b'a');
        tells(&daemon, id, key, key);
    }
    // The clones do not see each other's writes, and each boots again with its own.
    daemon.kill_and_restart();
    for (id, key) in [("a", b's'), ("b", b'b'), ("c", b'c')] {
        tells(&daemon, id, b'g', key);
        daemon.post(&format!("/vms/{id}/stop"), &json!({"timeout_s": 0}));
        let (status, vm) = daemon.post(&format!("/vms/{id}/start"), &json!(null));
        assert_eq!(status, 200, "{vm}");
        tells(&daemon, id, b'g', key);
    }
    // A clone becomes a template in its turn.
    template(&daemon, "u", "b");
    clone(&daemon, "d", "u");
    tells(&daemon, "d", b'g', b'b');
    tells(&daemon, "b", b'x', b'x');
    tells(&daemon, "d", b'g', b'b');
    assert!(fs::read(&kept).unwrap() == before);
    for path in [
        "/vms/a",
        "/vms/b",
        "/vms/c",
        "/vms/d",
        "/templates/u",
        "/templates/t",
    ] {
        assert_eq!(daemon.call("DELETE", path, None).0, 204, "{path}");
    }
    for folder in ["state/vms", "state/templates"] {
        assert_eq!(files(&daemon.folder().join(folder)), [""; 0]);
    }
}

#[test]
fn a_guest_that_writes_to_memory_that_can_have_no_child_becomes_no_template_and_goes_on() {
    let daemon = Daemon::start(&[]);
    let disk = daemon.folder().join("disk.raw");
    fs::write(&disk, vec![0; 8 << 20]).unwrap();
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o666)).unwrap();
    let mut spec = daemon.spec("a");
    spec["config"]["pmem"] = json!([{"id": "data", "path_on_host": disk, "mode": "rw"}]);
    let (status, vm) = daemon.post("/vms", &spec);
    assert_eq!((status, &vm["state"]), (201, &json!("running")), "{vm}");
    let (status, why) = daemon.post("/templates", &json!({"id": "t", "vm": "a"}));
    assert_eq!(status, 400, "{why}");
    assert!(
        why.to_string().contains("pmem data: is not a VHDX"),
        "{why}"
    );
    assert!(daemon.echoes("a"));
}

#[test]
fn a_template_can_be_made_again_of_the_same_guest_when_it_was_deleted() {
    let daemon = Daemon::start(&[]);
    source(&daemon, "a");
    for number in ["", "-2"] {
        template(&daemon, "t", "a");
        let config = daemon.get("/vms/a/vm/config");
        let path = config["drives"][0]["path_on_host"].as_str().unwrap();
        let expected = format!("disk-root-after-t{number}.vhdx");
        assert!(path.ends_with(&expected), "{path}");
        clone(&daemon, "b", "t");
        assert!(daemon.echoes("b") && daemon.echoes("a"));
        for path in ["/vms/b", "/templates/t"] {
            assert_eq!(daemon.call("DELETE", path, None).0, 204);
        }
    }
    // A template that this daemon cannot read may have clones, and stays.
    let folder = daemon.folder().join("state/templates/u");
    fs::create_dir(&folder).unwrap();
    fs::write(
        folder.join("template.json"),
        "{\"of\": \"a later version\"}",
    )
    .unwrap();
    let (status, refused) = daemon.post("/templates", &json!({"id": "u", "vm": "a"}));
    assert_eq!(status, 409, "{refused}");
    assert!(folder.join("template.json").exists());
    assert!(daemon.echoes("a"));
}

#[test]
fn a_guest_that_became_a_template_is_saved_as_a_difference_to_its_own_snapshots_alone() {
    let daemon = Daemon::start(&[]);
    let mut spec = daemon.spec("a");
    spec["config"]["machine-config"]["track_dirty_pages"] = json!(true);
    assert_eq!(daemon.post("/vms", &spec).0, 201);
    template(&daemon, "t", "a");
    let own = fs::canonicalize(daemon.vm_folder("a")).unwrap();
    let save = |kind: &str, name: &str| {
        let body = json!({"snapshot_type": kind, "snapshot_path": own.join(format!("{name}-state")),
            "mem_file_path": own.join(name)});
        daemon.call("PUT", "/vms/a/snapshot/create", Some(&body))
    };
    daemon.post("/vms/a/pause", &json!(null));
    // The daemon has removed what it has copied of the guest, so that cannot be the base of a Diff snapshot.
    let (status, refused) = save("Diff", "delta");
    let text = refused["fault_message"].as_str().unwrap();
    assert!(
        status == 400 && text.contains("make a Full one first"),
        "{text}"
    );
    assert_eq!(save("Full", "full"), (204, Value::Null));
    daemon.post("/vms/a/resume", &json!(null));
    template(&daemon, "u", "a");
    daemon.post("/vms/a/pause", &json!(null));
    // A Diff snapshot can neither replace its base, nor be in one file with the state.
    for (name, state) in [("full", "other"), ("both", "both")] {
        let body = json!({"snapshot_type": "Diff", "snapshot_path": own.join(state),
            "mem_file_path": own.join(name)});
        let (status, refused) = daemon.call("PUT", "/vms/a/snapshot/create", Some(&body));
        let text = refused["fault_message"].as_str().unwrap();
        assert!(
            status == 400 && text.contains("name another file"),
            "{text}"
        );
    }
    assert_eq!(save("Diff", "delta"), (204, Value::Null));
    // A Full snapshot in the place of the first is the base of later Diff snapshots.
    assert_eq!(save("Full", "full"), (204, Value::Null));
    assert_eq!(save("Diff", "later"), (204, Value::Null));
    let mut restored = coppice();
    restored
        .args(["run", "--restore"])
        .arg(own.join("later-state"));
    restored.arg("--api-sock").arg(daemon.folder().join("r"));
    let mut child = restored
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    until("it is loaded", || {
        assert_eq!(child.try_wait().unwrap(), None);
        let asked = serve::daemon::call(&daemon.folder().join("r"), "GET", "/", None);
        asked.is_some_and(|(_, info)| info["state"] == "Running")
    });
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(daemon.call("DELETE", "/vms/a", None).0, 204);
}

#[test]
fn a_clone_has_an_identifier_a_socket_and_metadata_of_its_own() {
    let mut daemon = Daemon::start(&[]);
    let mut spec = daemon.spec("a");
    spec["config"]["vsock"] = json!({});
    spec["metadata"] = json!({"role": "source"});
    let (status, source) = daemon.post("/vms", &spec);
    assert_eq!(status, 201, "{source}");
    assert_eq!(source["vsock"]["guest_cid"], 3);
    template(&daemon, "t", "a");
    let mut named = daemon.spec("named");
    named["config"]["vsock"] = json!({"guest_cid": 4});
    assert_eq!(daemon.post("/vms", &named).0, 201);
    let b = clone(&daemon, "b", "t");
    let (status, c) = daemon.post(
        "/vms",
        &json!({"id": "c", "template": "t", "metadata": {"role": "clone"}}),
    );
    assert_eq!(status, 201, "{c}");
    let cids: Vec<_> = [&source, &b, &c]
        .map(|vm| vm["vsock"]["guest_cid"].as_u64().unwrap())
        .to_vec();
    assert_eq!(cids, [3, 5, 6]);
    let mut generations = BTreeSet::new();
    for (id, cid, role) in [
        ("a", 3, json!("source")),
        ("b", 5, Value::Null),
        ("c", 6, json!("clone")),
    ] {
        assert!(daemon.echoes(id), "{id}");
        let config = daemon.get(&format!("/vms/{id}/vm/config"));
        assert_eq!(config["vsock"]["guest_cid"], cid, "{id}");
        let reported = daemon.get(&format!("/vms/{id}/mmds"));
        assert_eq!(reported["role"], role, "{id}");
        assert_eq!(reported["coppice"]["hostname"], id);
        assert_eq!(reported["coppice"]["cid"], cid);
        let generation = reported["coppice"]["generation"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(generations.insert(generation), "{id}");
        // The guest has no driver for the device, so connections are closed.
        let path = daemon.vm_folder(id).join("vsock.sock");
        let mut caller = UnixStream::connect(path).unwrap();
        Write::write_all(&mut caller, b"CONNECT 1\n").unwrap();
        let answer = Read::read(&mut caller, &mut [0; 8]);
        assert_eq!(answer.unwrap(), 0, "{id}");
    }
    // The identity of a guest outlives the daemon, and the guest's process.
    daemon.kill_and_restart();
    assert_eq!(daemon.get("/vms/b")["vsock"]["guest_cid"], 5);
    daemon.post("/vms/b/stop", &json!({"timeout_s": 0}));
    assert!(!daemon.vm_folder("b").join("vsock.sock").exists());
    daemon.post("/vms/b/start", &json!(null));
    let config = daemon.get("/vms/b/vm/config");
    assert_eq!(config["vsock"]["guest_cid"], 5);
    let generation = daemon.get("/vms/b/mmds")["coppice"]["generation"].clone();
    assert!(generations.insert(generation.as_str().unwrap().to_owned()));
    assert_eq!(daemon.get("/vms/named")["vsock"]["guest_cid"], 4);
    // A CID that another guest has is refused, and so is what only the daemon decides.
    let mut other = daemon.spec("x");
    for (vsock, status) in [
        (json!({"guest_cid": 5}), 409),
        (json!({"guest_cid": 2}), 400),
        (json!({"uds_path": "/tmp/v"}), 400),
    ] {
        other["config"]["vsock"] = vsock;
        let (answered, fault) = daemon.post("/vms", &other);
        assert_eq!(answered, status, "{fault}");
    }
    let mut silent = daemon.spec("y");
    silent["metadata"] = json!({"a": 1});
    assert_eq!(daemon.post("/vms", &silent).0, 400);
}
