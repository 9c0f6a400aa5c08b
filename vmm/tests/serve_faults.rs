//! `coppice serve`: templates and clones whose making is cut short, by a kill at any step, a full disk, or want of memory.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

#[path = "serve/mod.rs"]
mod serve;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use serve::daemon::{Daemon, call, coppice, until};
use serve::steps::{Killer, Victim};

/// A guest that runs, with a disk that it may write to.
fn source(daemon: &Daemon) -> u32 {
    let disk = daemon.folder().join("a.vhdx");
    let _ = fs::remove_file(&disk);
    let made = coppice()
        .args(["disk", "create", disk.to_str().unwrap(), "--size", "8M"])
        .output();
    assert!(made.unwrap().status.success());
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o666)).unwrap();
    let mut spec = daemon.spec("a");
    spec["config"]["drives"] =
        json!([{"drive_id": "root", "path_on_host": disk, "is_root_device": false}]);
    let (status, vm) = daemon.post("/vms", &spec);
    assert_eq!((status, &vm["state"]), (201, &json!("running")), "{vm}");
    pid(&vm)
}

fn pid(vm: &Value) -> u32 {
    u32::try_from(vm["pid"].as_u64().unwrap()).unwrap()
}

fn template() -> Value {
    json!({"id": "t", "vm": "a"})
}

fn clone() -> Value {
    json!({"id": "b", "template": "t"})
}

fn files(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn ids(list: &Value) -> Vec<&str> {
    let list = list.as_array().unwrap().iter();
    list.map(|one| one["id"].as_str().unwrap()).collect()
}

/// Where the disk of a guest's drive is, as its process says.
fn disk(daemon: &Daemon, id: &str) -> PathBuf {
    let config = daemon.get(&format!("/vms/{id}/vm/config"));
    let path = config["drives"][0]["path_on_host"].as_str().unwrap();
    daemon.vm_folder(id).join(path)
}

/// Whether nothing is under way with a guest.
fn is_settled(daemon: &Daemon, id: &str) -> bool {
    let record = fs::read(daemon.vm_folder(id).join("vm.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    record["pending"]["template"].is_null()
}

/// In the folder of a guest there are the daemon's records, sockets, and those of its disks that it has.
fn nothing_is_left_over(daemon: &Daemon, id: &str, disks: &[&Path]) {
    let known = [
        "vm.json",
        "config.json",
        "pid.json",
        "end.json",
        "log",
        "api.sock",
        "console.sock",
    ];
    let folder = daemon.vm_folder(id);
    let left = || {
        let mut names = files(&folder);
        names.retain(|name| {
            !known.contains(&&**name) && !disks.iter().any(|disk| disk.ends_with(name))
        });
        names
    };
    // A record may be being written just now.
    let stays = |left: &[String]| left.iter().any(|name| name != "vm.json.new");
    until(&format!("nothing is left in {}", folder.display()), || {
        let left = left();
        assert!(!stays(&left), "{left:?} is left in {}", folder.display());
        left.is_empty()
    });
}

fn no_processes_but(daemon: &Daemon, pids: &[u32]) {
    // One that was held by a daemon that was killed ends by itself.
    until("no process is left", || {
        let mut there = daemon.all_processes();
        there.retain(|pid| !pids.contains(pid));
        there.is_empty()
    });
}

/// A template is whole, or is not there and can be made; clones of it run, and its guest starts anew without a write to its disks. Both are deleted.
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
    // The disk is the guest's own where it was given a child before.
    parts.retain(|name| name != "disk-root");
    assert_eq!(parts, ["memory", "state", "template.json"]);
    let sealed = daemon.get("/templates/t")["disks"]["root"].clone();
    let sealed = PathBuf::from(sealed.as_str().unwrap());
    let before = fs::metadata(&sealed).unwrap().modified().unwrap();
    // One at a time, as each takes a processor.
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

/// The numbers of steps to kill at. The tests of jailed guests look at fewer.
fn steps() -> impl Iterator<Item = usize> {
    let stride = if env!("CARGO_CRATE_NAME") == "serve_jailed" {
        4
    } else {
        1
    };
    (1..).step_by(stride)
}

/// Whether anything is asked for, so that whoever is watched does something.
fn stir(daemon: &Daemon) {
    for path in ["/healthz", "/vms/a/"] {
        let _ = daemon.try_call("GET", path, None);
    }
}

fn mounts() -> usize {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.lines().count()
}

/// That a test has not gone by without what it is about.
fn were_killed_at(killed: &[&str], wanted: &[&str]) {
    eprintln!("{} steps: {killed:?}", killed.len());
    let there: BTreeSet<_> = killed.iter().collect();
    for step in wanted {
        assert!(there.contains(step), "never at {step}: {there:?}");
    }
}

#[test]
fn a_daemon_that_is_killed_at_any_step_of_a_template_leaves_it_whole_or_not_at_all() {
    let (mut daemon, mut killed, before) = (Daemon::start(&[]), Vec::new(), mounts());
    for step in steps() {
        let guest = source(&daemon);
        let killer = Killer::new(daemon.pid(), Victim::Itself, step);
        let answer = daemon.try_call("POST", "/templates", Some(&template()));
        let at = killer.end(|| stir(&daemon));
        if let Some(at) = at {
            killed.push(at);
            daemon.kill_and_restart();
        }
        daemon.until_state("a", "running");
        until("what was begun is ended", || is_settled(&daemon, "a"));
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
        let guest = source(&daemon);
        let killer = Killer::new(guest, Victim::Itself, step);
        let (status, answer) = daemon.post("/templates", &template());
        let at = killer.end(|| stir(&daemon));
        if let Some(at) = at {
            killed.push(at);
            let vm = daemon.until_state("a", "failed");
            assert_eq!(vm["end"]["kind"], "killed", "{vm}");
            until("what was begun is ended", || is_settled(&daemon, "a"));
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
    let guest = source(&daemon);
    assert_eq!(daemon.post("/templates", &template()).0, 201);
    for step in steps() {
        let killer = Killer::new(daemon.pid(), Victim::Itself, step);
        let answer = daemon.try_call("POST", "/vms", Some(&clone()));
        let at = killer.end(|| stir(&daemon));
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
    let (daemon, mut killed, before) = (Daemon::start(&[]), Vec::new(), mounts());
    let guest = source(&daemon);
    assert_eq!(daemon.post("/templates", &template()).0, 201);
    for step in steps() {
        let killer = Killer::new(daemon.pid(), Victim::Child, step);
        let (status, answer) = daemon.post("/vms", &clone());
        let at = killer.end(|| stir(&daemon));
        killed.extend(at);
        match status {
            // Killed when it had begun, if at all.
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
        no_processes_but(&daemon, &[guest]);
        if at.is_none() {
            assert_eq!(status, 201);
            break;
        }
    }
    were_killed_at(&killed, &["execute", "create a file", "bind", "sync"]);
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
        let died = killer.end(|| stir(&daemon));
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
        source(&daemon);
        let child = daemon
            .vm_folder("a")
            .canonicalize()
            .unwrap()
            .join("child.vhdx");
        let body = json!({"path_on_host": child});
        let killer = Killer::new(daemon.pid(), Victim::Itself, step);
        let answer = daemon.try_call("PUT", "/vms/a/drives/root/snapshot", Some(&body));
        let died = killer.end(|| stir(&daemon));
        if let Some(died) = died {
            killed.push(died);
            daemon.kill();
            // The guest's end is seen by nobody either, in every other round.
            if step % 2 == 0 {
                for pid in daemon.processes() {
                    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
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
    assert_eq!(given.len(), 2, "with and without a child");
}

/// A state folder on a small disk of its own, in a mount namespace of the daemon's own.
struct Small {
    daemon: std::process::Child,
    folder: tempfile::TempDir,
}

impl Small {
    /// None where this host has no such namespaces for tests.
    fn start() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("state")).unwrap();
        serve::kernel::write(&folder.path().join("kernel"));
        let line = format!(
            "mount -t tmpfs -o size=2m none {0}/state && exec {1} serve --socket {0}/s --state {0}/state",
            folder.path().display(),
            env!("CARGO_BIN_EXE_coppice"),
        );
        let mut unshare = Command::new("unshare");
        unshare.args(["--map-root-user", "--mount", "sh", "-c", &line]);
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let mut daemon = unshare.stderr(log).spawn().unwrap();
        let socket = folder.path().join("s");
        until("the daemon answers, or namespaces are not allowed", || {
            call(&socket, "GET", "/healthz", None).is_some() || daemon.try_wait().unwrap().is_some()
        });
        let is_there = daemon.try_wait().unwrap().is_none();
        is_there.then_some(Self { daemon, folder })
    }

    fn call(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        call(&self.folder.path().join("s"), method, path, body).unwrap()
    }

    /// The state folder, as the daemon sees it.
    fn state(&self) -> PathBuf {
        let inside = self.folder.path().join("state");
        let inside = inside.strip_prefix("/").unwrap();
        PathBuf::from(format!("/proc/{}/root", self.daemon.id())).join(inside)
    }

    /// Has the disk be full, but for some pages; all of it is free again when what is returned is dropped.
    fn fill(&self, pages: usize) -> Filled {
        let path = self.state().join("filler");
        let mut file = fs::File::create(&path).unwrap();
        while std::io::Write::write(&mut file, &[1; 4096]).is_ok() {}
        let len = file.metadata().unwrap().len();
        file.set_len(len.saturating_sub(pages as u64 * 4096))
            .unwrap();
        Filled(path)
    }

    fn echoes(&self, id: &str) -> bool {
        let folder = self.state().join("vms").join(id);
        serve::daemon::echoes(&folder.join("console.sock"))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        for id in ["a", "b"] {
            let _ = call(
                &self.folder.path().join("s"),
                "DELETE",
                &format!("/vms/{id}"),
                None,
            );
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

struct Filled(PathBuf);

impl Drop for Filled {
    fn drop(&mut self) {
        fs::remove_file(&self.0).unwrap();
    }
}

/// Whether a refusal says that the disk is full, and which file that was about.
fn tells_of_a_full_disk(small: &Small, refusal: &(u16, Value)) {
    let (status, answer) = refusal;
    let text = answer["fault_message"].as_str().unwrap();
    let state = small.folder.path().join("state");
    assert!(
        matches!(status, 400 | 422 | 503 | 507)
            && text.contains("No space left")
            && text.contains(state.to_str().unwrap()),
        "{status} {text}"
    );
}

#[test]
fn a_full_disk_refuses_snapshots_templates_and_clones_and_harms_none() {
    let Some(small) = Small::start() else {
        eprintln!("not shown: this takes namespaces");
        return;
    };
    let disk = small.folder.path().join("a.vhdx");
    let made = coppice()
        .args(["disk", "create", disk.to_str().unwrap(), "--size", "8M"])
        .output();
    assert!(made.unwrap().status.success());
    let spec = json!({"id": "a", "config": {
        "boot-source": {"kernel_image_path": small.folder.path().join("kernel")},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 16},
        "sharing": {"mode": "off"},
        "drives": [{"drive_id": "root", "path_on_host": disk, "is_root_device": false}],
    }});
    assert_eq!(small.call("POST", "/vms", Some(&spec)).0, 201);
    let folder = small.state().join("vms/a");
    // With more room each time, it is another step that there is none for.
    let until_there_is_room = |what: &str, ask: &dyn Fn() -> (u16, Value), check: &dyn Fn()| {
        let mut refusals = BTreeSet::new();
        for pages in (0..).step_by(3) {
            let filled = small.fill(pages);
            let answer = ask();
            drop(filled);
            if matches!(answer.0, 201 | 204) {
                break;
            }
            tells_of_a_full_disk(&small, &answer);
            refusals.insert(answer.1["fault_message"].as_str().unwrap().to_owned());
            check();
        }
        eprintln!("{what}: {refusals:#?}");
        assert!(refusals.len() > 1, "{what}");
    };
    let without_disks = || {
        let mut names = files(&folder);
        names.retain(|name| !name.starts_with("disk-root-after-t"));
        names
    };
    let before = without_disks();

    // By the guest's own API: an older snapshot stays whole.
    let (state, memory) = (small.state().join("state"), small.state().join("memory"));
    let inside = |name: &str| small.folder.path().join("state").join(name);
    let snapshot = json!({"snapshot_path": inside("state"), "mem_file_path": inside("memory")});
    let pause = json!({"state": "Paused"});
    assert_eq!(small.call("PATCH", "/vms/a/vm", Some(&pause)).0, 204);
    let save = || small.call("PUT", "/vms/a/snapshot/create", Some(&snapshot));
    assert_eq!(save().0, 204);
    let whole = || (fs::read(&state).unwrap(), fs::read(&memory).unwrap());
    let (first, there) = (whole(), files(&small.state()));
    until_there_is_room("a snapshot", &save, &|| {
        assert!(whole() == first);
        assert_eq!(files(&small.state()), there);
    });
    fs::remove_file(&state).unwrap();
    fs::remove_file(&memory).unwrap();
    let resume = json!({"state": "Resumed"});
    assert_eq!(small.call("PATCH", "/vms/a/vm", Some(&resume)).0, 204);

    until_there_is_room(
        "a template",
        &|| small.call("POST", "/templates", Some(&template())),
        &|| {
            assert_eq!(small.call("GET", "/vms/a", None).1["state"], "running");
            assert!(small.echoes("a"));
            assert_eq!(without_disks(), before);
            assert_eq!(files(&small.state().join("templates")), [""; 0]);
        },
    );
    until_there_is_room(
        "a clone",
        &|| small.call("POST", "/vms", Some(&clone())),
        &|| assert_eq!(files(&small.state().join("vms")), ["a"]),
    );
    assert!(small.echoes("a"));
    // As long as its disk is full a guest may find no room for what is in no page yet; there is room now.
    let (status, answer) = small.call("DELETE", "/vms/b", None);
    assert_eq!(status, 204, "{answer}");
    assert_eq!(small.call("POST", "/vms", Some(&clone())).0, 201);
    assert!(small.echoes("b"));
}

#[test]
fn a_guest_without_memory_is_no_template_and_no_clone_and_leaves_nothing() {
    let daemon = Daemon::start(&[]);
    let disk = daemon.folder().join("a.vhdx");
    let made = coppice()
        .args(["disk", "create", disk.to_str().unwrap(), "--size", "8M"])
        .output();
    assert!(made.unwrap().status.success());
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o666)).unwrap();
    let mut spec = daemon.spec("a");
    spec["config"]["machine-config"]["mem_size_mib"] = json!(512);
    spec["config"]["drives"] =
        json!([{"drive_id": "root", "path_on_host": disk, "is_root_device": false}]);
    let (_, vm) = daemon.post("/vms", &spec);
    let limit = |pid: u32, bytes: &str| {
        let mut prlimit = Command::new("prlimit");
        prlimit.args([format!("--pid={pid}"), format!("--as={bytes}:unlimited")]);
        // A process that has ended has no limits.
        prlimit.output().unwrap().status.success()
    };
    let (mut guest, mut refusals) = (pid(&vm), 0);
    // With more memory each time, it is something else that there is none for.
    for more in [0, 128, 256, 512, 1024, 2048, 4096, 8192, 1 << 20] {
        let statm = fs::read_to_string(format!("/proc/{guest}/statm")).unwrap();
        let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
        limit(guest, &(pages * 4096 + (more << 10)).to_string());
        let (status, answer) = daemon.post("/templates", &template());
        eprintln!("{more} KiB: {status} {answer}");
        if status == 201 {
            limit(guest, "unlimited");
            break;
        }
        assert!(matches!(status, 400 | 502), "{answer}");
        refusals += 1;
        let text = answer["fault_message"].as_str().unwrap();
        assert!(status == 502 || text.contains("memory"), "{text}");
        // Where the process cannot even say no, it has ended, and is told to have.
        limit(guest, "unlimited");
        let mut vm = Value::Null;
        until("what was begun is ended", || {
            vm = daemon.get("/vms/a");
            is_settled(&daemon, "a") && daemon.processes().is_empty() == (vm["state"] == "failed")
        });
        let own = daemon.vm_folder("a").join("disk-root-after-t.vhdx");
        nothing_is_left_over(&daemon, "a", &[&own]);
        assert_eq!(daemon.get("/templates"), json!([]));
        if vm["state"] == "failed" {
            assert_eq!(vm["end"]["kind"], "killed", "{vm}");
            let (status, vm) = daemon.post("/vms/a/start", &json!(null));
            assert_eq!(status, 200, "{vm}");
            guest = pid(&vm);
        }
        assert!(daemon.echoes("a"));
    }
    assert!(refusals > 1);
    assert_eq!(ids(&daemon.get("/templates")), ["t"]);

    // Guests inherit the limit.
    assert!(limit(daemon.pid(), "200000000"));
    for _ in 0..3 {
        let (status, answer) = daemon.post("/vms", &clone());
        let text = answer["fault_message"].as_str().unwrap();
        assert!(status == 422 && text.contains("memory"), "{status} {text}");
        assert_eq!(files(&daemon.vm_folder("")), ["a"]);
    }
    no_processes_but(&daemon, &[pid(&daemon.get("/vms/a"))]);
    assert!(limit(daemon.pid(), "unlimited"));
    let (status, vm) = daemon.post("/vms", &clone());
    assert_eq!((status, &vm["state"]), (201, &json!("running")), "{vm}");
    assert!(daemon.echoes("b"));
}
