//! A guest, its template and a clone, and their traces on the host: files and processes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::daemon::{Daemon, coppice, until};

/// Makes a disk that a guest in a jail may write to, too.
pub fn make_disk(folder: &Path) -> PathBuf {
    let disk = folder.join("a.vhdx");
    let _ = fs::remove_file(&disk);
    let made = coppice()
        .args(["disk", "create", disk.to_str().unwrap(), "--size", "8M"])
        .output();
    assert!(made.unwrap().status.success());
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o666)).unwrap();
    disk
}

/// The guest `a` runs, with a disk that it may write to; the number of its process.
pub fn source(daemon: &Daemon, mem_size_mib: u32) -> u32 {
    let disk = make_disk(daemon.folder());
    let mut spec = daemon.spec("a");
    spec["config"]["machine-config"]["mem_size_mib"] = json!(mem_size_mib);
    spec["config"]["drives"] =
        json!([{"drive_id": "root", "path_on_host": disk, "is_root_device": false}]);
    let (status, vm) = daemon.post("/vms", &spec);
    assert_eq!((status, &vm["state"]), (201, &json!("running")), "{vm}");
    pid(&vm)
}

pub fn pid(vm: &Value) -> u32 {
    u32::try_from(vm["pid"].as_u64().unwrap()).unwrap()
}

/// The request for a template of it.
pub fn template() -> Value {
    json!({"id": "t", "vm": "a"})
}

/// The request for a clone of that.
pub fn clone() -> Value {
    json!({"id": "b", "template": "t"})
}

pub fn files(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

pub fn ids(list: &Value) -> Vec<&str> {
    let list = list.as_array().unwrap().iter();
    list.map(|one| one["id"].as_str().unwrap()).collect()
}

/// The path of the disk of a guest's drive, as its process reports it.
pub fn disk(daemon: &Daemon, id: &str) -> PathBuf {
    let config = daemon.get(&format!("/vms/{id}/vm/config"));
    let path = config["drives"][0]["path_on_host"].as_str().unwrap();
    daemon.vm_folder(id).join(path)
}

/// Whether no template is being made of a guest.
pub fn has_nothing_pending(daemon: &Daemon, id: &str) -> bool {
    let record = fs::read(daemon.vm_folder(id).join("vm.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    record["pending"]["template"].is_null()
}

/// Checks that the folder of a guest has the daemon's records, sockets, the disks that the guest has, and nothing else.
pub fn nothing_is_left_over(daemon: &Daemon, id: &str, disks: &[&Path]) {
    let known = [
        "vm.json",
        "config.json",
        "pid.json",
        "end.json",
        "shared.json",
        "log",
        "log.pipe",
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
    // A record is written under this name.
    let stays = |left: &[String]| left.iter().any(|name| name != "vm.json.new");
    until(&format!("nothing is left in {}", folder.display()), || {
        let left = left();
        assert!(!stays(&left), "{left:?} is left in {}", folder.display());
        left.is_empty()
    });
}

pub fn no_processes_but(daemon: &Daemon, pids: &[u32]) {
    // A process that waited at its gate for a daemon that was killed ends by itself.
    until("no process is left", || {
        let mut there = daemon.all_processes();
        there.retain(|pid| !pids.contains(pid));
        there.is_empty()
    });
}
