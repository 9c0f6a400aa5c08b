//! `coppice serve`: templates, clones and snapshots for which there is no room on the disk, or no memory.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

#[path = "serve/mod.rs"]
mod serve;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};

use serde_json::{Value, json};
use serve::daemon::{Daemon, call, until};
use serve::traces::{
    clone, files, has_nothing_pending, ids, make_disk, no_processes_but, nothing_is_left_over, pid,
    source, template,
};

/// A state folder on a small disk of its own, in a mount namespace of the daemon's own.
struct Small {
    daemon: Child,
    folder: tempfile::TempDir,
}

impl Small {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("state")).unwrap();
        serve::kernel::write(&folder.path().join("kernel"));
        let saved = folder.path().join("state/saved");
        let jail = match env!("CARGO_CRATE_NAME") {
            "serve_jailed" => format!("allow={}", saved.display()),
            _ => "off".to_owned(),
        };
        let line = format!(
            "mount -t tmpfs -o size=2m none {0}/state && mkdir {0}/state/saved && \
            exec {1} serve --socket {0}/s --state {0}/state --jail {jail}",
            folder.path().display(),
            env!("CARGO_BIN_EXE_coppice"),
        );
        let mut unshare = Command::new("unshare");
        unshare.args(["--map-root-user", "--mount", "sh", "-c", &line]);
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let mut daemon = unshare.stderr(log).spawn().unwrap();
        let socket = folder.path().join("s");
        until("the daemon answers", || {
            let log = || fs::read_to_string(folder.path().join("log"));
            assert_eq!(
                daemon.try_wait().unwrap(),
                None,
                "the daemon ended: {:?}",
                log()
            );
            call(&socket, "GET", "/healthz", None).is_some()
        });
        Self { daemon, folder }
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

/// Whether the text of a refusal names the full disk and the file.
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
    if !skip::unless_own_mounts() {
        return;
    }
    let small = Small::start();
    let disk = make_disk(small.folder.path());
    let spec = json!({"id": "a", "config": {
        "boot-source": {"kernel_image_path": small.folder.path().join("kernel")},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 16},
        "sharing": {"mode": "off"},
        "drives": [{"drive_id": "root", "path_on_host": disk, "is_root_device": false}],
    }});
    assert_eq!(small.call("POST", "/vms", Some(&spec)).0, 201);
    let folder = small.state().join("vms/a");
    // With more room each time, another step is the first that there is no room for.
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

    // By the guest's own API, an older snapshot stays whole.
    let saved = small.state().join("saved");
    let (state, memory) = (saved.join("state"), saved.join("memory"));
    let inside = |name: &str| small.folder.path().join("state/saved").join(name);
    let snapshot = json!({"snapshot_path": inside("state"), "mem_file_path": inside("memory")});
    let pause = json!({"state": "Paused"});
    assert_eq!(small.call("PATCH", "/vms/a/vm", Some(&pause)).0, 204);
    let save = || small.call("PUT", "/vms/a/snapshot/create", Some(&snapshot));
    assert_eq!(save().0, 204);
    let whole = || (fs::read(&state).unwrap(), fs::read(&memory).unwrap());
    let (first, there) = (whole(), files(&saved));
    until_there_is_room("a snapshot", &save, &|| {
        assert!(whole() == first);
        assert_eq!(files(&saved), there);
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
    let mut guest = source(&daemon, 512);
    let limit = |pid: u32, bytes: &str| {
        let mut prlimit = Command::new("prlimit");
        prlimit.args([format!("--pid={pid}"), format!("--as={bytes}:unlimited")]);
        // A process that has ended has no limits.
        let output = prlimit.output().unwrap();
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        output.status.success()
    };
    let mut refusals = 0usize;
    // With more memory each time, another allocation is the first that fails.
    for more in [0, 128, 256, 512, 1024, 2048, 4096, 8192, 1 << 20] {
        let statm = fs::read_to_string(format!("/proc/{guest}/statm")).unwrap();
        let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
        if !limit(guest, &(pages * 4096 + (more << 10)).to_string()) {
            skip::because("the first part: the limits of another user's process cannot be set");
            assert_eq!(daemon.post("/templates", &template()).0, 201);
            refusals = usize::MAX;
            break;
        }
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
        // Where the process cannot even refuse, it ends, and the guest's state says so.
        limit(guest, "unlimited");
        let mut vm = Value::Null;
        until("what was begun is ended", || {
            vm = daemon.get("/vms/a");
            has_nothing_pending(&daemon, "a")
                && daemon.processes().is_empty() == (vm["state"] == "failed")
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
    let limit_all = |bytes: &str| {
        assert!(limit(daemon.pid(), bytes) && limit(daemon.zygote(), bytes));
    };
    limit_all("200000000");
    for _ in 0..3 {
        let (status, answer) = daemon.post("/vms", &clone());
        let text = answer["fault_message"].as_str().unwrap();
        assert!(status == 422 && text.contains("memory"), "{status} {text}");
        assert_eq!(files(&daemon.vm_folder("")), ["a"]);
    }
    no_processes_but(&daemon, &[pid(&daemon.get("/vms/a"))]);
    limit_all("unlimited");
    let (status, vm) = daemon.post("/vms", &clone());
    assert_eq!((status, &vm["state"]), (201, &json!("running")), "{vm}");
    assert!(daemon.echoes("b"));
}
