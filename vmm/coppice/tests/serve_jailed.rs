//! `coppice serve` by default, with guests in jails: all tests of the daemon, and tests of what jailed guests see of
//! each other.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]
#![allow(
    clippy::duplicate_mod,
    reason = "each file has its own daemons, as by itself"
)]

#[path = "serve_client.rs"]
mod client;
#[path = "serve_faults.rs"]
mod faults;
#[path = "serve_hostile.rs"]
mod hostile;
#[path = "serve_lifecycle.rs"]
mod lifecycle;
#[path = "serve/lying.rs"]
mod lying;
#[path = "serve/lying_at_large.rs"]
mod lying_at_large;
#[path = "serve_many.rs"]
mod many;
#[path = "serve/planted.rs"]
mod planted;
#[path = "serve/mod.rs"]
mod serve;
#[path = "serve_shortage.rs"]
mod shortage;
#[path = "serve_templates.rs"]
mod templates;
#[path = "serve_waiting.rs"]
mod waiting;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use serve::daemon::{Daemon, until};
use serve::traces::{disk, source};

/// The user that a guest's process runs as, or will run as.
fn uid(daemon: &Daemon, id: &str) -> u32 {
    let vm = daemon.get(&format!("/vms/{id}"));
    let uid = u32::try_from(vm["guest_uid"].as_u64().unwrap()).unwrap();
    if vm["state"] == "running" {
        assert_eq!(daemon.get(&format!("/vms/{id}/vm/jail"))["uid"], uid);
    }
    uid
}

fn pid(vm: &Value) -> u64 {
    vm["pid"].as_u64().unwrap()
}

/// All files below the root folder of a process, as the host sees them, without those in its own folder of `/proc`.
fn reachable(pid: u64) -> Vec<PathBuf> {
    fn walk(root: &Path, folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let inside = Path::new("/").join(entry.path().strip_prefix(root).unwrap());
            let is_process = inside.starts_with("/proc") && !inside.starts_with("/proc/sys");
            found.push(inside);
            if entry.file_type().unwrap().is_dir() && !is_process {
                walk(root, &entry.path(), found);
            }
        }
    }
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let mut found = Vec::new();
    for entry in fs::read_dir(&root).unwrap().flatten() {
        found.push(Path::new("/").join(entry.file_name()));
        if entry.file_type().unwrap().is_dir() {
            walk(&root, &entry.path(), &mut found);
        }
    }
    found
}

fn open_to_all(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn two_guests_of_a_daemon_see_nothing_of_each_other() {
    if !skip::unless_root() {
        return;
    }
    let daemon = Daemon::start(&[]);
    let (a, b) = (daemon.create_running("a"), daemon.create_running("b"));
    for (id, vm, other) in [("a", &a, "b"), ("b", &b, "a")] {
        let report = daemon.get(&format!("/vms/{id}/vm/jail"));
        let layers = report["layers"].as_array().unwrap();
        for layer in [
            "mount_namespace",
            "net_namespace",
            "ipc_namespace",
            "pid_namespace",
            "tree",
            "credentials",
            "capabilities",
            "seccomp",
        ] {
            assert!(layers.contains(&json!(layer)), "{layer}: {report}");
        }
        // Its root folder has its own folder, and no other guest's.
        let found = reachable(pid(vm));
        let own = fs::canonicalize(daemon.vm_folder(id)).unwrap();
        assert!(found.contains(&own.join("api.sock")), "{found:?}");
        let others = fs::canonicalize(daemon.vm_folder(other)).unwrap();
        assert!(!found.iter().any(|path| path.starts_with(&others)));
        let lock = own.ancestors().nth(2).unwrap().join("lock");
        assert!(lock.exists() && !found.contains(&lock));
        // The only process that it sees is itself.
        let processes: Vec<_> = found
            .iter()
            .filter(|path| path.parent() == Some(Path::new("/proc")))
            .collect();
        assert_eq!(processes.len(), 3, "self, 1, sys: {processes:?}");
        let status = fs::read_to_string(format!("/proc/{}/status", pid(vm))).unwrap();
        let numbers = status.lines().find(|line| line.starts_with("NSpid:"));
        let expected = format!("NSpid:\t{}\t1", pid(vm));
        assert_eq!(numbers, Some(&*expected));
    }
    for kind in ["mnt", "net", "ipc", "uts", "pid"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        let (a, b) = (of(&pid(&a).to_string()), of(&pid(&b).to_string()));
        assert!(a != b && a != of("self") && b != of("self"), "{kind}");
    }
    // The PID namespace of a guest has the guest's process, the one that makes an image for it, and no other.
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let own = namespace(&pid(&a).to_string());
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let number = entry.file_name().into_string().unwrap();
        if number.parse::<u64>().is_ok_and(|number| number != pid(&a)) && namespace(&number) == own
        {
            let line = fs::read_to_string(entry.path().join("cmdline")).unwrap();
            assert!(line.contains("warm-when-told"), "{line}");
        }
    }

    // Even without namespaces, a guest's user has no access to another guest, nor to the daemon's records of the guest.
    let uids = [uid(&daemon, "a"), uid(&daemon, "b")];
    assert_ne!(uids[0], uids[1]);
    for folder in ["", "state", "state/vms"] {
        open_to_all(&daemon.folder().join(folder));
    }
    let may = |line: &str, path: &Path| {
        let mut command = Command::new("sh");
        command.args(["-c", line, "sh"]).arg(path);
        let status = command.uid(uids[0]).gid(uids[0]).output().unwrap().status;
        status.success()
    };
    let (own, other) = (daemon.vm_folder("a"), daemon.vm_folder("b"));
    assert!(may("touch \"$1\" && rm \"$1\"", &own.join("file")));
    assert!(may("ls \"$1\"", &own));
    assert!(!may("ls \"$1\"", &other));
    for name in ["vm.json", "pid.json", "config.json", "log", "log.pipe"] {
        assert!(!may("cat \"$1\"", &own.join(name)), "{name}");
        assert!(!may("rm -f \"$1\"", &own.join(name)), "{name}");
        assert!(!may("mv -f \"$1\" \"$1.x\"", &own.join(name)), "{name}");
    }
    assert!(!may("kill -0 $1", Path::new(&pid(&b).to_string())));
    let shown = daemon.cli(&["vm", "show", "a"]).1;
    assert!(
        shown.contains(&format!("uid {}", uids[0])) && shown.contains("pid_namespace"),
        "{shown}"
    );
}

#[test]
fn a_socket_that_a_guest_replaces_leads_to_nobody_else() {
    let daemon = Daemon::start(&[]);
    daemon.create_waiting("a");
    daemon.create_waiting("b");
    let socket = daemon.vm_folder("a").join("api.sock");
    fs::rename(&socket, socket.with_extension("x")).unwrap();
    symlink("../b/api.sock", &socket).unwrap();
    assert_eq!(daemon.call("GET", "/vms/a/machine-config", None).0, 502);
    fs::rename(socket.with_extension("x"), &socket).unwrap();
    assert_eq!(daemon.call("GET", "/vms/a/machine-config", None).0, 200);
}

#[test]
fn a_guest_makes_files_in_its_folder_and_nowhere_else() {
    if !skip::unless_root() {
        return;
    }
    let daemon = Daemon::start(&[]);
    for id in ["a", "b"] {
        daemon.create_running(id);
        daemon.post(&format!("/vms/{id}/pause"), &json!(null));
    }
    let snapshot = |id: &str, folder: &Path| {
        let folder = fs::canonicalize(folder).unwrap();
        let body =
            json!({"snapshot_path": folder.join("state"), "mem_file_path": folder.join("memory")});
        daemon.call("PUT", &format!("/vms/{id}/snapshot/create"), Some(&body))
    };
    let own = daemon.vm_folder("a");
    assert_eq!(snapshot("a", &own), (204, Value::Null));
    assert!(own.join("memory").metadata().unwrap().len() > 0);
    let templates = daemon.folder().join("state/templates");
    for folder in [templates, own, daemon.folder().to_owned()] {
        let (status, answer) = snapshot("b", &folder);
        assert_eq!(status, 400, "{}: {answer}", folder.display());
    }
    for id in ["a", "b"] {
        assert_eq!(
            daemon.post(&format!("/vms/{id}/resume"), &json!(null)).0,
            200
        );
        assert_eq!(daemon.call("DELETE", &format!("/vms/{id}"), None).0, 204);
    }
}

#[test]
fn a_template_is_the_daemons_and_its_clones_are_users_of_their_own() {
    if !skip::unless_root() {
        return;
    }
    let daemon = Daemon::start(&[]);
    daemon.create_running("a");
    let (status, made) = daemon.post("/templates", &json!({"id": "t", "vm": "a"}));
    assert_eq!(status, 201, "{made}");
    let folder = daemon.folder().join("state/templates/t");
    for name in ["", "state", "memory", "template.json"] {
        let metadata = fs::metadata(folder.join(name)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (0, 0), "{name}");
        let mode = metadata.mode() & 0o7777;
        assert!(mode == 0o600 || name.is_empty(), "{name}: {mode:o}");
    }
    let (status, clone) = daemon.post("/vms", &json!({"id": "b", "template": "t"}));
    assert_eq!(
        (status, &clone["state"]),
        (201, &json!("running")),
        "{clone}"
    );
    assert_ne!(uid(&daemon, "a"), uid(&daemon, "b"));
    let seen = reachable(pid(&clone));
    assert!(
        !seen.iter().any(|path| path.ends_with("memory")),
        "{seen:?}"
    );
}

#[test]
fn a_disk_that_is_closed_to_the_guests_user_is_named_with_that_user() {
    if !skip::unless_root() {
        return;
    }
    let daemon = Daemon::start(&[]);
    let disk = daemon.folder().join("disk");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let mut spec = daemon.spec("g");
    spec["config"]["drives"] = json!([{
        "drive_id": "d", "path_on_host": disk, "is_root_device": false, "is_read_only": false, "format": "raw",
    }]);
    let (status, answer) = daemon.post("/vms", &spec);
    let text = answer["fault_message"].as_str().unwrap();
    assert_eq!(status, 422, "{text}");
    let (_, named) = text.split_once("user ").unwrap();
    let (named, rest) = named.split_once(' ').unwrap();
    let expected = format!("may not read and write {}", disk.display());
    assert!(rest.starts_with(&expected), "{text}");
    // A disk of that user can be opened by the guest of that name, however often that is made again.
    let named = named.parse().unwrap();
    chown(&disk, Some(named), None).unwrap();
    for _ in 0..2 {
        assert_eq!(daemon.post("/vms", &spec).1["state"], "running");
        assert_eq!(uid(&daemon, "g"), named);
        assert_eq!(daemon.call("DELETE", "/vms/g", None).0, 204);
    }
    assert_eq!(fs::metadata(&disk).unwrap().uid(), named);
}

#[test]
fn a_guest_that_waits_is_refused_a_closed_disk_with_its_user_and_starts_when_it_is_open() {
    if !skip::unless_root() {
        return;
    }
    let daemon = Daemon::start(&[]);
    let waiting = daemon.create_waiting("g");
    let disk = daemon.folder().join("disk");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let put = |path: &str, body: &Value| daemon.call("PUT", &format!("/vms/g{path}"), Some(body));
    let drive = json!({
        "drive_id": "d", "path_on_host": disk, "is_root_device": false, "format": "raw",
    });
    let source = json!({"kernel_image_path": daemon.kernel()});
    assert_eq!(put("/boot-source", &source).0, 204);
    assert_eq!(put("/drives/d", &drive).0, 204);
    let reported = daemon.get("/vms/g/vm/config");
    let start = json!({"action_type": "InstanceStart"});
    for _ in 0..2 {
        let (status, answer) = put("/actions", &start);
        let text = answer["fault_message"].as_str().unwrap();
        let expected = format!(
            "user {} may not read and write {}",
            waiting["guest_uid"],
            disk.display()
        );
        assert!(status == 422 && text.contains(&expected), "{text}");
        assert!(
            text.contains("chown") && text.contains("--jail off"),
            "{text}"
        );
        assert_eq!(daemon.get("/vms/g")["state"], "not_started");
        assert_eq!(daemon.get("/vms/g/vm/config"), reported);
    }
    chown(&disk, Some(uid(&daemon, "g")), None).unwrap();
    assert_eq!(put("/actions", &start).0, 204);
    let report = daemon.get("/vms/g/vm/jail");
    assert_eq!(
        (&report["jailed"], &report["uid"]),
        (&json!(true), &waiting["guest_uid"])
    );
    assert!(
        report["layers"]
            .as_array()
            .unwrap()
            .contains(&json!("tree"))
    );
    let seen = reachable(pid(&daemon.get("/vms/g")));
    assert!(
        seen.contains(&disk) && !seen.contains(&daemon.socket()),
        "{seen:?}"
    );
}

#[test]
fn a_disk_is_merged_into_a_parent_that_the_jail_may_write_to_and_into_no_other() {
    let mut daemon = Daemon::start(&[]);
    source(&daemon, 16);
    let base = daemon.folder().join("a.vhdx");
    let child = daemon.vm_folder("a").canonicalize().unwrap();
    let child = child.join("child.vhdx");
    let put = |daemon: &Daemon, what: &str, body: &Value| {
        daemon.call("PUT", &format!("/vms/a/drives/root/{what}"), Some(body))
    };
    let snapshot = json!({"path_on_host": child});
    let over = |daemon: &Daemon| {
        until("the commit is over", || {
            let record = fs::read(daemon.vm_folder("a").join("vm.json")).unwrap();
            let record: Value = serde_json::from_slice(&record).unwrap();
            record["pending"]["commits"] == json!({}) && record["disks"]["root"] == json!(base)
        });
        assert_eq!(
            (disk(daemon, "a"), child.exists()),
            (base.clone(), false),
            "{}",
            daemon.get("/vms/a/drives/root/job")
        );
    };
    let again = |daemon: &Daemon| {
        daemon.post("/vms/a/stop", &json!({"timeout_s": 0}));
        assert_eq!(daemon.post("/vms/a/start", &json!(null)).0, 200);
    };
    // The guest may write to the disk that it was started with.
    assert_eq!(put(&daemon, "snapshot", &snapshot).0, 204);
    assert_eq!(put(&daemon, "commit", &json!({})).0, 204);
    over(&daemon);
    // A disk that is only a parent when the guest starts is not writable.
    assert_eq!(put(&daemon, "snapshot", &snapshot).0, 204);
    again(&daemon);
    // Unless it lies in the guest's own folder.
    let second = json!({"path_on_host": child.with_file_name("second.vhdx")});
    assert_eq!(put(&daemon, "snapshot", &second).0, 204);
    again(&daemon);
    assert_eq!(put(&daemon, "commit", &json!({})).0, 204);
    until("the commit is over", || disk(&daemon, "a") == child);
    until("what was merged is gone", || {
        !child.with_file_name("second.vhdx").exists()
    });
    until("its end is noted", || {
        let record = fs::read(daemon.vm_folder("a").join("vm.json")).unwrap();
        let record: Value = serde_json::from_slice(&record).unwrap();
        record["pending"]["commits"] == json!({})
    });
    let (status, answer) = put(&daemon, "commit", &json!({}));
    let text = answer["fault_message"].as_str().unwrap();
    assert_eq!(status, 400, "{text}");
    assert!(
        text.contains(base.to_str().unwrap()) && text.contains("allow=PATH"),
        "{text}"
    );
    assert!(disk(&daemon, "a") == child && daemon.echoes("a"));
    // A file elsewhere that it was not started with cannot be opened.
    let other = daemon.folder().join("other.vhdx");
    fs::copy(&base, &other).unwrap();
    let other = json!({"drive_id": "root", "path_on_host": other});
    let (status, answer) = daemon.call("PATCH", "/vms/a/drives/root", Some(&other));
    let text = answer["fault_message"].as_str().unwrap();
    assert!(
        status == 400 && text.contains("other.vhdx") && text.contains("allow=PATH"),
        "{text}"
    );
    let allow = format!("allow={}", base.display());
    daemon.change_arguments(&["--jail", &allow]);
    daemon.kill_and_restart();
    daemon.until_state("a", "running");
    again(&daemon);
    assert_eq!(put(&daemon, "commit", &json!({})).0, 204);
    over(&daemon);
    again(&daemon);
    assert!(disk(&daemon, "a") == base && daemon.echoes("a"));
}

#[test]
fn no_two_guests_are_the_same_user_also_for_the_next_daemon() {
    if !skip::unless_root() {
        return;
    }
    let mut daemon = Daemon::start(&["--jail", "uids=70001-70002"]);
    let waiting = |id: &str| json!({"id": id, "start": false});
    for id in ["a", "b"] {
        assert_eq!(daemon.post("/vms", &waiting(id)).0, 201);
    }
    daemon.kill_and_restart();
    let mut uids = ["a", "b"].map(|id| uid(&daemon, id));
    uids.sort_unstable();
    assert_eq!(uids, [70001, 70002]);
    let (status, answer) = daemon.post("/vms", &waiting("c"));
    let text = answer["fault_message"].as_str().unwrap();
    assert!(status == 507 && text.contains("70001 to 70002"), "{answer}");
    let free = uid(&daemon, "a");
    assert_eq!(daemon.call("DELETE", "/vms/a", None).0, 204);
    assert_eq!(daemon.post("/vms", &waiting("c")).0, 201);
    assert_eq!(uid(&daemon, "c"), free);
}

#[test]
fn a_guest_of_a_daemon_without_jails_is_jailed_when_it_starts_again() {
    if !skip::unless_root() {
        return;
    }
    let mut daemon = Daemon::start(&["--jail", "off"]);
    daemon.create_running("g");
    assert_eq!(daemon.get("/vms/g/vm/jail")["jailed"], false);
    daemon.change_arguments(&["--jail"]);
    daemon.kill_and_restart();
    assert_eq!(daemon.get("/vms/g/vm/jail")["jailed"], false);
    daemon.post("/vms/g/stop", &json!({"timeout_s": 0}));
    assert_eq!(daemon.post("/vms/g/start", &json!(null)).0, 200);
    let first = uid(&daemon, "g");
    assert!((1_900_000_000..=1_900_065_535).contains(&first));
    daemon.kill_and_restart();
    daemon.create_waiting("h");
    assert_ne!(uid(&daemon, "h"), first);
}

/// A control group for this test, where cgroup v2 can be written to.
struct Group(PathBuf);

impl Group {
    fn new(name: &str) -> Option<Self> {
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
        let root = roots
            .into_iter()
            .find(|root| root.join("cgroup.controllers").exists())?;
        let group = root.join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&group).ok()?;
        Some(Self(group))
    }

    fn guests(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap().flatten();
        let folders = entries.filter(|entry| entry.file_type().unwrap().is_dir());
        let mut names: Vec<_> = folders
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn nothing_is_left_of_deleted_guests_however_often_the_daemon_is_killed() {
    if !skip::unless_root() {
        return;
    }
    let Some(group) = Group::new("coppice-test") else {
        return skip::because("there is no cgroup v2 that can be written to");
    };
    let mounts = || {
        fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .count()
    };
    let before = mounts();
    let name = group.0.file_name().unwrap().to_str().unwrap();
    let mut daemon = Daemon::start(&["--jail", &format!("cgroup={name}")]);
    let vm = daemon.create_running("g");
    let procs = fs::read_to_string(group.0.join("g/cgroup.procs")).unwrap();
    assert_eq!(procs.trim(), pid(&vm).to_string());
    let layers = daemon.get("/vms/g/vm/jail")["layers"].clone();
    assert!(layers.as_array().unwrap().contains(&json!("cgroup")));
    for round in 0..8u64 {
        std::thread::scope(|scope| {
            let socket = daemon.socket();
            let specs = ["x", "y", "g"].map(|id| (id, daemon.spec(id)));
            scope.spawn(move || {
                for (id, spec) in specs {
                    serve::daemon::call(&socket, "POST", "/vms", Some(&spec));
                    if id != "y" {
                        serve::daemon::call(&socket, "DELETE", &format!("/vms/{id}"), None);
                    }
                }
            });
            std::thread::sleep(std::time::Duration::from_millis(20 + round * 23 % 120));
            daemon.kill_and_restart();
        });
        let vms = daemon.get("/vms")["vms"].clone();
        let ids = vms
            .as_array()
            .unwrap()
            .iter()
            .map(|vm| vm["id"].as_str().unwrap().to_owned());
        let mut ids: Vec<_> = ids.collect();
        ids.sort();
        assert_eq!(group.guests(), ids);
    }
    for vm in daemon.get("/vms")["vms"].as_array().unwrap() {
        let path = format!("/vms/{}", vm["id"].as_str().unwrap());
        assert_eq!(daemon.call("DELETE", &path, None).0, 204);
    }
    assert_eq!(group.guests(), [""; 0]);
    assert_eq!(daemon.all_processes(), [0u32; 0]);
    assert_eq!(fs::read_dir(daemon.vm_folder("")).unwrap().count(), 0);
    assert_eq!(mounts(), before);
}
