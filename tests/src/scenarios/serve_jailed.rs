//! The scenario of a daemon that jails each of its guests.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::jail::expect_layers;
use super::serve::{Daemon, guests};
use crate::result::{Failure, Figures};

const HIERARCHY: &str = "/sys/fs/cgroup";
/// The control group below which each guest has its own.
const GROUP: &str = "lab";
/// The memory limit of a guest's group in bytes: 128 MiB of RAM, 1/16 of that, and 64 MiB.
const MEMORY: u64 = 200 << 20;

fn command(name: &str, args: &[&str]) -> Result<(), Failure> {
    let status = Command::new(name).args(args).status();
    match status.map_err(Failure::io(name))? {
        status if status.success() => Ok(()),
        status => Failure::claim(format!("{name} {args:?}: {status}")),
    }
}

fn mounts() -> Result<usize, Failure> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(Failure::io("read mounts"))?;
    Ok(mounts.lines().count())
}

fn group(id: &str) -> PathBuf {
    Path::new(HIERARCHY).join(GROUP).join(id)
}

fn read(path: &Path) -> Result<String, Failure> {
    let text = fs::read_to_string(path).map_err(Failure::io(path.display().to_string()))?;
    Ok(text.trim().to_owned())
}

/// Reads the number behind a name, in a file of lines with a name and a number.
fn number(path: &Path, name: &str) -> Result<u64, Failure> {
    let text = read(path)?;
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    let found = lines.find_map(|(found, number)| (found == name).then(|| number.parse().ok())?);
    found.ok_or_else(|| Failure::Claim(format!("{} has no {name}", path.display())))
}

/// Returns the user of a guest's process, and checks it, the layers and the limits by the process's report and by the
/// host's files.
fn jail_of(daemon: &Daemon, id: &str) -> Result<u64, Failure> {
    let report = daemon.expect(200, "GET", &format!("/vms/{id}/vm/jail"), &Value::Null)?;
    expect_layers(
        &report,
        &["credentials", "pid_namespace", "cgroup", "landlock"],
    )?;
    let vm = daemon.expect(200, "GET", &format!("/vms/{id}"), &Value::Null)?;
    let pid = vm["pid"].to_string();
    let status = read(&Path::new("/proc").join(&pid).join("status"))?;
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let uid = uids.and_then(|uids| uids.split_whitespace().next()?.parse().ok());
    let uid = uid.unwrap_or(0);
    if uid == 0 || report["uid"] != json!(uid) {
        return Failure::claim(format!("{id} is user {uid} and says {report}"));
    }
    let group = group(id);
    let limits = [
        ("memory.max", MEMORY.to_string()),
        ("cpu.max", "50000 100000".to_owned()),
        ("pids.max", "32".to_owned()),
    ];
    for (file, expected) in limits {
        let found = read(&group.join(file))?;
        if found != expected {
            return Failure::claim(format!("{id}: {file} is {found}, not {expected}"));
        }
    }
    let members = read(&group.join("cgroup.procs"))?;
    if !members.lines().any(|member| member == pid) {
        return Failure::claim(format!("{id}, {pid}, is not in its group: {members}"));
    }
    Ok(uid)
}

/// Has a guest use all of a processor, and much of its memory and of the host's page cache. It gets as much as its
/// group may have, and goes on.
fn use_up_limits(daemon: &Daemon, id: &str) -> Result<Figures, Failure> {
    let (cpu, memory) = (group(id).join("cpu.stat"), group(id).join("memory.events"));
    let before = number(&cpu, "nr_throttled")?;
    // 48 MiB of the guest's memory, and 64 MiB of the disk in the host's cache.
    let load = "dd if=/dev/zero of=/tmp/fill bs=1M count=48 2>/dev/null; \
        dd if=/dev/vda of=/dev/null bs=1M 2>/dev/null; \
        i=0; while [ $i -lt 5000 ]; do i=$((i+1)); done; rm /tmp/fill; echo LOA''DED";
    daemon.console(id, load, "LOADED")?;
    let throttled = number(&cpu, "nr_throttled")?.saturating_sub(before);
    let kills = number(&memory, "oom_kill")?;
    let peak = read(&group(id).join("memory.peak"))?;
    let peak: u64 = peak.parse().unwrap_or(u64::MAX);
    let summary = format!("throttled {throttled} times, {peak} bytes at most, {kills} kills");
    println!("lab: {id}: {summary}");
    if throttled == 0 || kills > 0 || peak > MEMORY {
        return Failure::claim(summary);
    }
    Ok(Figures::from([
        ("throttled".into(), json!(throttled)),
        ("peak_bytes".into(), json!(peak)),
    ]))
}

fn live(out: &Path) -> Result<Figures, Failure> {
    let jail = format!("cgroup={GROUP},cpu=50,pids=32");
    let daemon = Daemon::start(out, &["--memory-ratio", "4", "--jail", &jail])?;
    let before = mounts()?;
    daemon.boot(out, "source")?;
    daemon.console("source", "echo base >/mnt/f; sync; echo DO''NE", "DONE")?;
    daemon.template("t", "source")?;
    let ids = ["source", "clone0", "clone1"];
    let mut users = BTreeSet::new();
    for id in ids {
        if id != "source" {
            daemon.clone_of("t", id)?;
        }
        users.insert(jail_of(&daemon, id)?);
        let line = format!("echo $(cat /mnt/f) {id} >/mnt/f; sync; cat /mnt/f");
        daemon.console(id, &line, &format!("base {id}"))?;
    }
    if users.len() != ids.len() {
        return Failure::claim(format!("{ids:?} are the users {users:?}"));
    }
    let figures = use_up_limits(&daemon, "clone0")?;
    for path in ["/vms/source", "/vms/clone0", "/vms/clone1", "/templates/t"] {
        daemon.expect(204, "DELETE", path, &Value::Null)?;
    }
    let groups = fs::read_dir(Path::new(HIERARCHY).join(GROUP)).map_err(Failure::io("list"))?;
    let groups = groups.flatten().filter(|entry| entry.path().is_dir());
    let folders = ["vms", "templates"]
        .map(|name| fs::read_dir(daemon.state().join(name)).map_or(usize::MAX, Iterator::count));
    let left = (guests(), groups.count(), folders, mounts()? - before);
    if left != (0, 0, [0, 0], 0) {
        let what = "processes, control groups, folders and mounts";
        return Failure::claim(format!("{left:?} {what} are left"));
    }
    Ok(figures)
}

/// A guest is booted, saved as a template, and cloned. Each guest is a user of its own, in a group with limits that
/// hold, and leaves nothing when it is deleted.
pub fn life(out: &Path) -> Result<Figures, Failure> {
    command("mount", &["-t", "cgroup2", "cgroup2", HIERARCHY])?;
    let lived = live(out);
    // The lab's host is left as it was, for the next scenario.
    let _ = fs::remove_dir(Path::new(HIERARCHY).join(GROUP));
    let unmounted = command("umount", &[HIERARCHY]);
    let figures = lived?;
    unmounted?;
    Ok(figures)
}
