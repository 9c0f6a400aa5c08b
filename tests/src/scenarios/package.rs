//! The scenario of the package: an operator installs it on a Debian with systemd, and uses the service.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::jail::expect_layers;
use super::serve::console;
use crate::api::request;
use crate::guest::script_word;
use crate::result::{Failure, Figures};

const PATIENCE: Duration = Duration::from_mins(1);
const SOCKET: &str = "/run/coppice/coppice.sock";
const STATE: &str = "/var/lib/coppice";
/// The folder of the operator's disks and kernels.
const FILES: &str = "/srv/guests";
/// The control group of the guests' unit.
const GUESTS: &str = "/sys/fs/cgroup/system.slice/coppice-guests.service/guests";
/// The folder of the operator's changes of the unit.
const DROP_IN: &str = "/etc/systemd/system/coppice.service.d";
/// The command line of the unit, for drop-ins.
const SERVE: &str =
    "/usr/bin/coppice serve --socket /run/coppice/coppice.sock --state /var/lib/coppice";
/// The memory limit of a guest's group in bytes: 128 MiB of RAM, 1/16 of that, and 64 MiB.
const MEMORY: &str = "209715200";
/// `systemd-analyze security` of systemd 252 rates the unit 5.4 of 10, mostly for rights that a daemon of root's with
/// guests needs. The number rises if a setting is removed.
const EXPOSURE: &str = "--threshold=55";
/// The guests execute the lines that are typed on their consoles.
const SCRIPT: &str = "mount /dev/vda /mnt; echo READY; while read line; do eval \"$line\"; done";

fn run(program: &str, args: &[&str]) -> Result<Output, Failure> {
    let output = Command::new(program).args(args).output();
    output.map_err(Failure::io(program))
}

/// Runs a command that has to succeed, and returns its output.
fn run_ok(program: &str, args: &[&str]) -> Result<String, Failure> {
    let output = run(program, args)?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    if output.status.success() {
        Ok(text.trim().to_owned())
    } else {
        Failure::claim(format!("{program} {args:?}: {}: {text}", output.status))
    }
}

/// Runs a command that has to fail, and returns its output.
fn run_refused(program: &str, args: &[&str]) -> Result<String, Failure> {
    let output = run(program, args)?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    if output.status.success() {
        Failure::claim(format!("{program} {args:?} succeeded: {text}"))
    } else {
        Ok(text)
    }
}

fn expect(status: u16, method: &str, path: &str, body: &Value) -> Result<Value, Failure> {
    match request(Path::new(SOCKET), method, path, body)? {
        (found, answer) if found == status => Ok(answer),
        (found, answer) => Failure::claim(format!("{method} {path}: {found}: {answer}")),
    }
}

fn expect_equal<T: PartialEq + std::fmt::Debug>(
    what: &str,
    found: &T,
    expected: &T,
) -> Result<(), Failure> {
    if found == expected {
        Ok(())
    } else {
        Failure::claim(format!("{what} is {found:?}, not {expected:?}"))
    }
}

fn read(path: impl AsRef<Path>) -> Result<String, Failure> {
    let path = path.as_ref();
    let text = fs::read_to_string(path).map_err(Failure::io(path.display().to_string()))?;
    Ok(text.trim().to_owned())
}

/// Checks owner and mode of a file.
fn expect_owner(path: &str, uid: u32, mode: u32) -> Result<(), Failure> {
    let metadata = fs::metadata(path).map_err(Failure::io(path))?;
    expect_equal(
        path,
        &(metadata.uid(), metadata.permissions().mode() & 0o7777),
        &(uid, mode),
    )
}

fn wait_until(what: &str, mut holds: impl FnMut() -> Result<bool, Failure>) -> Result<(), Failure> {
    let begun = Instant::now();
    while !holds()? {
        if begun.elapsed() > PATIENCE {
            return Failure::claim(format!("never: {what}"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn main_pid() -> Result<String, Failure> {
    run_ok("systemctl", &["show", "-P", "MainPID", "coppice.service"])
}

fn arguments<'a>(
    name: &'a str,
    disk: &'a str,
    cmdline: &'a str,
    restart: &'a str,
) -> [&'a str; 14] {
    [
        "vm",
        "create",
        "--name",
        name,
        "--kernel",
        "image:debian",
        "--initrd",
        "image:initrd",
        "--disk",
        disk,
        "--cmdline",
        cmdline,
        "--restart",
        restart,
    ]
}

/// Makes a guest with the operator's own disk, by the command line. The first attempt is refused, and the refusal names
/// the user that the disk has to be given to.
fn create(name: &str, jailed: bool, restart: &str) -> Result<(), Failure> {
    println!("lab: {name} is created");
    let disk = format!("{FILES}/{name}.vhdx");
    fs::copy("guest/root.vhdx", &disk).map_err(Failure::io(disk.as_str()))?;
    let cmdline = format!(
        "console=ttyS0 reboot=k panic=-1 quiet {}",
        script_word(SCRIPT)
    );
    let arguments = arguments(name, &disk, &cmdline, restart);
    if jailed {
        let why = run_refused("coppice", &arguments)?;
        let user = why
            .split("user ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next()?.parse().ok());
        let Some(user) = user.filter(|_| why.contains(&disk)) else {
            return Failure::claim(format!(
                "a refusal does not say who may not open what: {why}"
            ));
        };
        chown(&disk, Some(user), Some(user)).map_err(Failure::io(disk.as_str()))?;
    }
    run_ok("coppice", &arguments)?;
    console(Path::new(STATE), name, "", "READY")
}

/// Checks that the guest runs in the same process, and responds.
fn expect_running(name: &str, pid: &Value) -> Result<(), Failure> {
    let vm = expect(200, "GET", &format!("/vms/{name}"), &Value::Null)?;
    expect_equal(name, &(&vm["state"], &vm["pid"]), &(&json!("running"), pid))?;
    console(Path::new(STATE), name, "echo STI''LL", "STILL")
}

/// Checks that the guest's process is confined as the unit says, by its own report and by the host's files.
fn expect_confined(name: &str) -> Result<Value, Failure> {
    let report = expect(200, "GET", &format!("/vms/{name}/vm/jail"), &Value::Null)?;
    expect_layers(
        &report,
        &["credentials", "pid_namespace", "cgroup", "landlock"],
    )?;
    let pid = expect(200, "GET", &format!("/vms/{name}"), &Value::Null)?["pid"].clone();
    let number = pid.to_string();
    let group = Path::new(GUESTS).join(name);
    expect_equal(
        "memory.max",
        &read(group.join("memory.max"))?.as_str(),
        &MEMORY,
    )?;
    let members = read(group.join("cgroup.procs"))?;
    if !members.lines().any(|member| member == number) {
        return Failure::claim(format!("{name}, {pid}, is not in its group: {members}"));
    }
    let daemon = main_pid()?;
    let own = read(format!("/proc/{daemon}/cgroup"))?;
    expect_equal(
        "the daemon's group",
        &own.as_str(),
        &"0::/system.slice/coppice.service",
    )?;
    // The kernel kills a guest before the daemon when memory is short (oom_score_adj).
    for (pid, score) in [(daemon, "-900"), (number, "0")] {
        expect_equal(
            "oom_score_adj",
            &read(format!("/proc/{pid}/oom_score_adj"))?.as_str(),
            &score,
        )?;
    }
    Ok(pid)
}

/// Checks that the service is installed, and that systemd finds no error in its units.
fn expect_installed() -> Result<(), Failure> {
    for (verb, expected) in [("is-active", "active"), ("is-enabled", "enabled")] {
        expect_equal(
            verb,
            &run_ok("systemctl", &[verb, "coppice.service"])?.as_str(),
            &expected,
        )?;
    }
    expect_owner(SOCKET, 0, 0o600)?;
    expect_owner("/run/coppice", 0, 0o755)?;
    expect_owner(STATE, 0, 0o700)?;
    expect_owner("/usr/bin/coppice", 0, 0o755)?;
    expect_owner("/usr/lib/systemd/system/coppice.service", 0, 0o644)?;
    expect_equal(
        "dpkg -V",
        &run_ok("dpkg", &["-V", "coppice"])?.as_str(),
        &"",
    )?;
    let verify = [
        "verify",
        "--man=no",
        "coppice.service",
        "coppice-guests.service",
    ];
    expect_equal(
        "systemd-analyze verify",
        &run_ok("systemd-analyze", &verify)?.as_str(),
        &"",
    )?;
    let unit = "/usr/lib/systemd/system/coppice.service";
    let security = ["security", "--no-pager", "--offline=true", EXPOSURE, unit];
    run_ok("systemd-analyze", &security).map(drop)
}

fn add_images() -> Result<(), Failure> {
    fs::create_dir_all(FILES).map_err(Failure::io(FILES))?;
    for (name, kind, file) in [
        ("debian", "kernel", "vmlinuz"),
        ("initrd", "initrd", "initrd.cpio.gz"),
    ] {
        let path = format!("{FILES}/{file}");
        fs::copy(format!("guest/{file}"), &path).map_err(Failure::io(path.as_str()))?;
        let body = json!({"path": path, "kind": kind});
        let added = request(Path::new(SOCKET), "PUT", &format!("/images/{name}"), &body)?;
        if !(200..300).contains(&added.0) {
            return Failure::claim(format!("image {name}: {added:?}"));
        }
    }
    Ok(())
}

/// Restarts, kills, stops, starts and upgrades the service, and checks that its guest goes on.
fn restart_and_upgrade(name: &str, pid: &Value) -> Result<(), Failure> {
    let events: [(&str, &[&[&str]]); 4] = [
        ("restart", &[&["systemctl", "restart", "coppice"]]),
        (
            "kill",
            &[&[
                "systemctl",
                "kill",
                "--kill-whom=main",
                "--signal=KILL",
                "coppice",
            ]],
        ),
        (
            "stop and start",
            &[
                &["systemctl", "stop", "coppice"],
                &["systemctl", "start", "coppice"],
            ],
        ),
        ("upgrade", &[&["dpkg", "-i", "coppice.deb"]]),
    ];
    for (event, commands) in events {
        println!("lab: {event}");
        let before = main_pid()?;
        for command in commands {
            run_ok(command[0], &command[1..])?;
        }
        wait_until("another daemon is there", || {
            let state = run_ok(
                "systemctl",
                &["show", "-P", "ActiveState", "coppice.service"],
            )?;
            Ok(state == "active" && main_pid()? != before)
        })?;
        expect_running(name, pid)?;
    }
    Ok(())
}

/// Runs the service with other options of `coppice serve`, as `docs/guide/install.md` describes.
fn serve_with(options: &str) -> Result<(), Failure> {
    println!("lab: the service with {options:?}");
    let path = PathBuf::from(DROP_IN).join("override.conf");
    let text = format!("[Service]\nExecStart=\nExecStart={SERVE} {options}\n");
    fs::create_dir_all(DROP_IN)
        .and_then(|()| fs::write(path, text))
        .map_err(Failure::io(DROP_IN))?;
    run_ok("systemctl", &["daemon-reload"])?;
    run_ok("systemctl", &["restart", "coppice"]).map(drop)
}

/// A guest that needs more memory than its group may have is killed, with a reason that a person can act on, and
/// another guest goes on.
fn exhaust_memory(name: &str, other: (&str, &Value)) -> Result<Value, Failure> {
    create(name, true, "never")?;
    console(
        Path::new(STATE),
        name,
        "dd if=/dev/urandom of=/tmp/fill bs=1M count=40; echo FIL''LED",
        "FILLED",
    )?;
    let limit = Path::new(GUESTS).join(name).join("memory.max");
    let kill = fs::OpenOptions::new().write(true).open(&limit);
    kill.and_then(|mut file| file.write_all(b"32M"))
        .map_err(Failure::io("write memory.max"))?;
    let path = format!("/vms/{name}");
    wait_until("the guest has failed", || {
        Ok(expect(200, "GET", &path, &Value::Null)?["state"] == "failed")
    })?;
    let vm = expect(200, "GET", &path, &Value::Null)?;
    println!("lab: {name}: {}", vm["end"]);
    let reason = vm["end"].to_string();
    let expected = ["killed", "its control group", "memory.max: 33554432", name];
    if !expected.iter().all(|text| reason.contains(text)) {
        return Failure::claim(format!(
            "a guest that had no memory left has ended so: {vm}"
        ));
    }
    expect_running(other.0, other.1)?;
    Ok(vm["end"].clone())
}

/// A guest that may not have the threads that it needs does not start, with a reason that a person can act on, and
/// another guest goes on.
fn exhaust_threads(name: &str, other: (&str, &Value)) -> Result<String, Failure> {
    serve_with("--jail cgroup=system.slice/coppice-guests.service/guests,pids=3")?;
    let disk = "/lab/guest/root.vhdx,ro";
    let why = run_refused("coppice", &arguments(name, disk, "console=ttyS0", "never"))?;
    println!("lab: {name}: {why}");
    if ![
        "cannot make the thread that shares memory",
        name,
        "pids.max: 3",
    ]
    .iter()
    .all(|text| why.contains(text))
    {
        return Failure::claim(format!(
            "a guest that had no threads left was refused so: {why}"
        ));
    }
    expect_running(other.0, other.1)?;
    Ok(why)
}

/// The files and control groups of Coppice that are on the machine, except for files of the operator and of the lab.
fn leftovers() -> Result<Vec<String>, Failure> {
    let files = run_ok(
        "find",
        &[
            "/",
            "-xdev",
            "(",
            "-path",
            FILES,
            "-o",
            "-path",
            DROP_IN,
            ")",
            "-prune",
            "-o",
            "-iname",
            "*coppice*",
            "-print",
        ],
    )?;
    let run = run_ok(
        "find",
        &[
            "/run",
            "/sys/fs/cgroup",
            "-name",
            "*coppice*",
            "-not",
            "-path",
            "/run/systemd/*",
        ],
    )?;
    let processes = processes_named("coppice");
    Ok(files
        .lines()
        .chain(run.lines())
        .map(str::to_owned)
        .chain(processes)
        .collect())
}

/// The processes of a name.
fn processes_named(name: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| read(path.join("comm")).is_ok_and(|comm| comm == name))
        .map(|path| {
            format!(
                "{}: {}",
                path.display(),
                read(path.join("cgroup")).unwrap_or_default()
            )
        })
        .collect()
}

/// Kills the process that keeps the guests' group, and checks that the guests and the unit go on.
fn kill_group_keeper(name: &str, pid: &Value) -> Result<(), Failure> {
    println!("lab: the keeper is killed");
    let processes = Path::new(GUESTS)
        .with_file_name("keeper")
        .join("cgroup.procs");
    let keeper = read(&processes)?.parse().ok().and_then(Pid::from_raw);
    let Some(keeper) = keeper else {
        return Failure::claim("not one process keeps the guests' group");
    };
    kill_process(keeper, Signal::KILL).map_err(|error| Failure::io("kill")(error.into()))?;
    wait_until("the keeper is gone", || Ok(read(&processes)?.is_empty()))?;
    run_ok("systemctl", &["is-active", "coppice-guests.service"])?;
    expect_running(name, pid)
}

/// Stops and starts the units as a host does that shuts down and starts. A guest with the restart policy `always` runs
/// again by itself, and another one when it is started.
fn shut_down_and_start(other: &str) -> Result<(), Failure> {
    println!("lab: shutdown and start");
    let name = "tenant";
    create(name, true, "always")?;
    run_ok("systemctl", &["stop", "coppice-guests"])?;
    expect_equal("processes", &processes_named("coppice"), &Vec::new())?;
    run_ok("systemctl", &["start", "coppice"])?;
    let state = |name: &str| -> Result<Value, Failure> {
        let vm = expect(200, "GET", &format!("/vms/{name}"), &Value::Null)?;
        Ok(vm["state"].clone())
    };
    wait_until("the guest runs again", || Ok(state(name)? == "running"))?;
    console(Path::new(STATE), name, "", "READY")?;
    expect_confined(name)?;
    expect_equal("another guest", &state(other)?, &json!("stopped"))?;
    run_ok("coppice", &["vm", "delete", name])?;
    run_ok("coppice", &["vm", "start", other])?;
    console(Path::new(STATE), other, "", "READY")
}

/// Removes the package, after which its guests have closed their disks and ended, and the state is kept for the next
/// installation. Then purges it.
fn remove_and_purge(name: &str) -> Result<(), Failure> {
    println!("lab: remove");
    console(
        Path::new(STATE),
        name,
        "echo kept >/mnt/f; sync; echo DO''NE",
        "DONE",
    )?;
    run_ok("dpkg", &["-r", "coppice"])?;
    expect_equal("processes", &processes_named("coppice"), &Vec::new())?;
    let group = Path::new(GUESTS)
        .parent()
        .and_then(Path::to_str)
        .unwrap_or(GUESTS);
    for gone in ["/usr/bin/coppice", "/run/coppice", group] {
        expect_equal(gone, &Path::new(gone).exists(), &false)?;
    }
    println!("lab: install again");
    run_ok("dpkg", &["-i", "coppice.deb"])?;
    expect_installed()?;
    let vm = expect(200, "GET", &format!("/vms/{name}"), &Value::Null)?;
    expect_equal(
        "a guest of the removed package",
        &vm["state"],
        &json!("stopped"),
    )?;
    run_ok("coppice", &["vm", "start", name])?;
    console(Path::new(STATE), name, "", "READY")?;
    console(Path::new(STATE), name, "cat /mnt/f", "kept")?;
    run_ok("coppice", &["vm", "delete", name])?;
    expect_equal(
        "groups of guests",
        &Path::new(GUESTS).join(name).exists(),
        &false,
    )?;
    println!("lab: purge");
    run_ok("dpkg", &["-P", "coppice"])?;
    expect_equal("what is left", &leftovers()?, &Vec::new())
}

fn live() -> Result<Figures, Failure> {
    println!("lab: install");
    let installed = run_ok("dpkg", &["-i", "coppice.deb"])?;
    println!("lab: {installed}");
    expect_installed()?;
    add_images()?;
    create("web", true, "never")?;
    let pid = expect_confined("web")?;
    restart_and_upgrade("web", &pid)?;
    let memory = exhaust_memory("greedy", ("web", &pid))?;
    let threads = exhaust_threads("crowded", ("web", &pid))?;
    // A guest without a jail is in the daemon's own group, in which systemd also starts the next daemon.
    serve_with("--jail off")?;
    create("free", false, "never")?;
    let free = expect(200, "GET", "/vms/free", &Value::Null)?["pid"].clone();
    expect_equal(
        "the group of a guest without a jail",
        &read(format!("/proc/{free}/cgroup"))?.as_str(),
        &"0::/system.slice/coppice.service",
    )?;
    fs::remove_dir_all(DROP_IN).map_err(Failure::io(DROP_IN))?;
    run_ok("systemctl", &["daemon-reload"])?;
    run_ok("systemctl", &["restart", "coppice"])?;
    expect_running("free", &free)?;
    expect_running("web", &pid)?;
    run_ok("coppice", &["vm", "delete", "free", "greedy"])?;
    kill_group_keeper("web", &pid)?;
    shut_down_and_start("web")?;
    remove_and_purge("web")?;
    Ok(Figures::from([
        ("out_of_memory".into(), memory),
        ("out_of_threads".into(), json!(threads)),
    ]))
}

/// The package is installed, used, restarted, upgraded, removed and purged, as an operator does.
pub fn life(out: &Path) -> Result<Figures, Failure> {
    let lived = live();
    let journal = run("journalctl", &["--no-pager", "-o", "short-monotonic"])?;
    fs::write(out.join("journal"), journal.stdout).map_err(Failure::io("write the journal"))?;
    lived
}
