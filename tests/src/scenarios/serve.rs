//! Scenarios of the daemon and its guests.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::bench;
use super::jail::expect_layers;
use super::memory::{available, mib_each, newer_mmu};
use crate::api::request;
use crate::guest::{KERNEL_CACHE, script_word};
use crate::result::{Failure, Figures};

const PATIENCE: Duration = Duration::from_mins(3);
/// The guests execute the lines that are typed on their consoles.
const SCRIPT: &str = "mount /dev/vda /mnt; echo READY; while read line; do eval \"$line\"; done";

/// A daemon of the lab's host, and its guests.
pub(super) struct Daemon {
    child: Child,
    state: PathBuf,
}

fn call(method: &str, path: &str, body: &Value) -> Result<(u16, Value), Failure> {
    request(Path::new("/tmp/serve.sock"), method, path, body)
}

/// Types a line on the console of a guest of the daemon with this state folder, and waits for `text`.
pub(super) fn console(state: &Path, id: &str, line: &str, text: &str) -> Result<(), Failure> {
    let failed = Failure::io("talk to a console");
    let socket = state.join("vms").join(id).join("console.sock");
    let talk = || {
        let mut console = UnixStream::connect(&socket)?;
        console.set_read_timeout(Some(PATIENCE))?;
        if !line.is_empty() {
            console.write_all(format!("{line}\n").as_bytes())?;
        }
        let (mut seen, mut bytes) = (String::new(), [0; 4096]);
        while !seen.contains(text) {
            let len = match console.read(&mut bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
                read => read?,
            };
            if len == 0 {
                return Ok(Some(seen));
            }
            seen.push_str(&String::from_utf8_lossy(&bytes[..len]));
        }
        Ok::<_, std::io::Error>(None)
    };
    match talk().map_err(failed)? {
        None => Ok(()),
        Some(seen) => Failure::claim(format!("{id} never showed {text:?}: {seen}")),
    }
}

/// Makes a disk for the guest `id`, which any user of the host may write to.
fn own_disk(out: &Path, id: &str) -> Result<Value, Failure> {
    let here = std::env::current_dir().map_err(Failure::io("find the folder"))?;
    let disk = here.join(out).join(format!("{id}.vhdx"));
    fs::copy("guest/root.vhdx", &disk).map_err(Failure::io("copy root.vhdx"))?;
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o666))
        .map_err(Failure::io("give the disk"))?;
    Ok(json!({"drive_id": "disk", "path_on_host": disk, "is_root_device": false}))
}

fn boot_source(script: &str) -> Result<Value, Failure> {
    let here = std::env::current_dir().map_err(Failure::io("find the folder"))?;
    let args = format!(
        "console=ttyS0 reboot=k panic=-1 quiet {}",
        script_word(script)
    );
    Ok(json!({
        "kernel_image_path": here.join("guest/vmlinuz"),
        "initrd_path": here.join("guest/initrd.cpio.gz"), "boot_args": args,
    }))
}

impl Daemon {
    pub(super) fn start(out: &Path, args: &[&str]) -> Result<Self, Failure> {
        // Paths of sockets have to be short. The state is on the disk, as on a server: files in memory would be memory
        // that guests seem to take.
        let state = PathBuf::from("/mnt/serve");
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(out.join("daemon.log"));
        let child = Command::new("./coppice")
            .args(["serve", "--socket", "/tmp/serve.sock", "--state"])
            .arg(&state)
            .args(args)
            .env("XDG_CACHE_HOME", KERNEL_CACHE)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.map_err(Failure::io("make a log"))?)
            .spawn()
            .map_err(Failure::io("start the daemon"))?;
        let daemon = Self { child, state };
        let begun = Instant::now();
        while call("GET", "/healthz", &Value::Null).is_err() {
            if begun.elapsed() > PATIENCE {
                return Failure::claim("the daemon does not answer");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(daemon)
    }

    #[allow(
        clippy::unused_self,
        reason = "there is an answer as long as there is a daemon"
    )]
    pub(super) fn expect(
        &self,
        status: u16,
        method: &str,
        path: &str,
        body: &Value,
    ) -> Result<Value, Failure> {
        match call(method, path, body)? {
            (found, answer) if found == status => Ok(answer),
            (found, answer) => Failure::claim(format!("{method} {path}: {found}: {answer}")),
        }
    }

    /// Boots a guest with a disk of its own.
    pub(super) fn boot(&self, out: &Path, id: &str) -> Result<(), Failure> {
        let more = json!({"drives": [own_disk(out, id)?]});
        self.boot_with(id, SCRIPT, &more)
    }

    /// Boots a guest that runs `script`, with `more` in its configuration.
    pub(super) fn boot_with(&self, id: &str, script: &str, more: &Value) -> Result<(), Failure> {
        let mut config = more.clone();
        config["boot-source"] = boot_source(script)?;
        self.expect(201, "POST", "/vms", &json!({"id": id, "config": config}))?;
        self.console(id, "", "READY")
    }

    /// As [`Daemon::boot`], for a guest that is configured over its own API.
    fn boot_by_own_api(&self, out: &Path, id: &str) -> Result<(), Failure> {
        self.expect(201, "POST", "/vms", &json!({"id": id, "start": false}))?;
        let own = format!("/vms/{id}");
        for (path, body) in [
            ("/boot-source", boot_source(SCRIPT)?),
            ("/drives/disk", own_disk(out, id)?),
            ("/actions", json!({"action_type": "InstanceStart"})),
        ] {
            self.expect(204, "PUT", &format!("{own}{path}"), &body)?;
        }
        self.console(id, "", "READY")
    }

    pub(super) fn template(&self, id: &str, vm: &str) -> Result<(), Failure> {
        let body = json!({"id": id, "vm": vm});
        self.expect(201, "POST", "/templates", &body).map(drop)
    }

    pub(super) fn clone_of(&self, template: &str, id: &str) -> Result<f64, Failure> {
        let begun = Instant::now();
        let vm = self.expect(
            201,
            "POST",
            "/vms",
            &json!({"id": id, "template": template}),
        )?;
        if vm["state"] != "running" {
            return Failure::claim(format!("a clone is {}", vm["state"]));
        }
        Ok(begun.elapsed().as_secs_f64())
    }

    /// Types a line on a guest's console, and waits for `text`.
    pub(super) fn console(&self, id: &str, line: &str, text: &str) -> Result<(), Failure> {
        console(&self.state, id, line, text)
    }

    /// The state folder.
    pub(super) fn state(&self) -> &Path {
        &self.state
    }

    /// The private and the resident memory of the daemon, in KiB.
    fn memory(&self) -> Result<(u64, u64), Failure> {
        let path = format!("/proc/{}/smaps_rollup", self.child.id());
        let text = fs::read_to_string(path).map_err(Failure::io("read smaps_rollup"))?;
        let sum = |names: &[&str]| -> u64 {
            let lines = text.lines().filter_map(|line| line.split_once(':'));
            let lines = lines.filter(|(name, _)| names.contains(name));
            lines
                .filter_map(|(_, rest)| rest.split_whitespace().next()?.parse::<u64>().ok())
                .sum()
        };
        Ok((sum(&["Private_Clean", "Private_Dirty"]), sum(&["Rss"])))
    }

    /// CPU time of the daemon so far, in ticks of 10 ms (`proc(5)`: `utime`, `stime`).
    fn cpu_ticks(&self) -> Result<u64, Failure> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()));
        let stat = stat.map_err(Failure::io("read stat"))?;
        let fields = stat.rsplit(')').next().unwrap_or_default();
        let fields = fields.split_whitespace().skip(11).take(2);
        Ok(fields.filter_map(|field| field.parse::<u64>().ok()).sum())
    }

    fn kill(&mut self) -> Result<(), Failure> {
        self.child.kill().map_err(Failure::io("kill the daemon"))?;
        self.child.wait().map_err(Failure::io("wait"))?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // The daemon may have ended already.
        let _ = self.kill();
        // The guests outlive the daemon, and the daemon of the next scenario would find them.
        for process in guest_processes() {
            let pid = process
                .file_name()
                .and_then(|pid| pid.to_str()?.parse().ok());
            if let Some(pid) = pid.and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        let _ = fs::remove_dir_all(&self.state);
    }
}

/// The folders in `/proc` of processes of the lab's host that are guests.
pub(super) fn guest_processes() -> Vec<PathBuf> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let is_guest = |path: &PathBuf| {
        fs::read(path.join("cmdline"))
            .is_ok_and(|line| line.windows(6).any(|word| word == b"--held"))
    };
    entries.map(|entry| entry.path()).filter(is_guest).collect()
}

pub(super) fn guests() -> usize {
    guest_processes().len()
}

/// A guest is configured over its own API, booted, saved as a template, and cloned. Each guest is in a jail of its own,
/// outlives the daemon, and leaves nothing when it is deleted.
pub fn life(out: &Path) -> Result<Figures, Failure> {
    let mut daemon = Daemon::start(out, &["--memory-ratio", "4"])?;
    daemon.boot_by_own_api(out, "source")?;
    daemon.console("source", "echo base >/mnt/f; sync; echo DO''NE", "DONE")?;
    daemon.template("t", "source")?;
    let mut figures = Figures::new();
    for number in 0..3 {
        let id = format!("clone{number}");
        let took = daemon.clone_of("t", &id)?;
        figures.insert(format!("{id}_seconds"), json!(took));
        daemon.console(
            &id,
            &format!("echo $(cat /mnt/f) {number} >/mnt/f; sync; cat /mnt/f"),
            &format!("base {number}"),
        )?;
    }
    daemon.kill()?;
    let daemon = Daemon::start(out, &["--memory-ratio", "4"])?;
    for number in 0..3 {
        let text = format!("base {number}");
        daemon.console(&format!("clone{number}"), "cat /mnt/f", &text)?;
    }
    daemon.console("source", "echo I''S $(cat /mnt/f).", "IS base.")?;
    for id in ["source", "clone0"] {
        let path = format!("/vms/{id}/vm/jail");
        let report = daemon.expect(200, "GET", &path, &Value::Null)?;
        expect_layers(&report, &["credentials", "pid_namespace", "landlock"])?;
    }
    daemon.template("u", "clone1")?;
    daemon.clone_of("u", "fork")?;
    daemon.console("fork", "cat /mnt/f", "base 1")?;
    for id in ["source", "clone0", "clone1", "clone2", "fork"] {
        daemon.expect(204, "DELETE", &format!("/vms/{id}"), &Value::Null)?;
    }
    for id in ["u", "t"] {
        daemon.expect(204, "DELETE", &format!("/templates/{id}"), &Value::Null)?;
    }
    match guests() {
        0 => Ok(figures),
        left => Failure::claim(format!("{left} processes of guests are left")),
    }
}

/// How many clones are made. With more, the one emulated processor of the lab's host has no time left for their timers.
const MANY: u32 = 200;

/// Makes many idle clones, and measures the memory that each takes, and how long it takes to make one, compared with a
/// load of the same snapshot that compares all checksums.
pub fn many(out: &Path) -> Result<Figures, Failure> {
    newer_mmu()?;
    let daemon = Daemon::start(out, &["--memory-ratio", "100"])?;
    daemon.boot(out, "source")?;
    daemon.template("t", "source")?;
    let mut times = Vec::new();
    let mut before = 0;
    for number in 0..MANY {
        if number == 1 {
            std::thread::sleep(Duration::from_secs(10));
            before = available()?;
        }
        times.push(daemon.clone_of("t", &format!("c{number}"))?);
        if number % 20 == 19 {
            println!(
                "lab: {} clones, one in {:.3} s",
                number + 1,
                times.last().unwrap_or(&0.0)
            );
        }
    }
    std::thread::sleep(Duration::from_secs(20));
    let each = mib_each(before, available()?, MANY - 1);
    let (private, resident) = daemon.memory()?;
    times.sort_by(f64::total_cmp);
    let median = times.get(times.len() / 2).copied().unwrap_or(f64::NAN);
    println!(
        "lab: {each:.3} MiB a clone; daemon {private} KiB private, {resident} KiB resident; a clone takes {median:.3} s"
    );
    // All clones still run.
    for number in 0..MANY {
        daemon.console(&format!("c{number}"), "echo ALI''VE", "ALIVE")?;
    }
    Ok(Figures::from([
        ("mib_a_clone".into(), json!(each)),
        ("daemon_private_kib".into(), json!(private)),
        ("daemon_resident_kib".into(), json!(resident)),
        ("clone_median_seconds".into(), json!(median)),
    ]))
}

/// The number of guests whose state is requested, and of requests a second. Half of the requests are for one guest, and
/// half for all.
const ASKED: u32 = 20;
const REQUESTS_A_SECOND: u32 = 200;
const WINDOW: Duration = Duration::from_secs(20);

/// Measures the CPU time of the daemon for requests for the state of its guests, and the wake-ups of the guests
/// meanwhile.
pub fn status_requests(out: &Path) -> Result<Figures, Failure> {
    let daemon = Daemon::start(out, &["--memory-ratio", "100"])?;
    daemon.boot(out, "source")?;
    daemon.template("t", "source")?;
    for number in 0..ASKED {
        daemon.clone_of("t", &format!("c{number}"))?;
    }
    std::thread::sleep(WINDOW);
    let processes = guest_processes();
    let wake_ups = || -> Result<(u64, u64), Failure> {
        let each = processes.iter().map(|process| bench::wake_ups(process));
        let mut sum = (0, 0);
        for of_one in each {
            let (vcpus, others) = of_one?;
            sum = (sum.0 + vcpus, sum.1 + others);
        }
        Ok(sum)
    };
    let mut figures = Figures::new();
    let mut asked = 0;
    for (name, asks) in [
        ("left_alone", false),
        ("asked", true),
        ("left_again", false),
    ] {
        let (before, begun) = (wake_ups()?, Instant::now());
        let cpu = daemon.cpu_ticks()?;
        if asks {
            while begun.elapsed() < WINDOW {
                let path = match asked % 2 {
                    0 => "/vms".to_owned(),
                    _ => format!("/vms/c{}", asked / 2 % ASKED),
                };
                daemon.expect(200, "GET", &path, &Value::Null)?;
                asked += 1;
                let due = Duration::from_secs(1) * asked / REQUESTS_A_SECOND;
                std::thread::sleep(due.saturating_sub(begun.elapsed()));
            }
        } else {
            std::thread::sleep(WINDOW);
        }
        let after = wake_ups()?;
        let (vcpus, others) = (after.0 - before.0, after.1 - before.1);
        let ticks = daemon.cpu_ticks()? - cpu;
        println!(
            "lab: {name}: vCPUs of {} guests woke up {vcpus} times in {WINDOW:?}, their other threads {others}; the daemon took {ticks} ticks of CPU time",
            processes.len()
        );
        figures.insert(format!("{name}_vcpu_wake_ups"), json!(vcpus));
        figures.insert(format!("{name}_other_wake_ups"), json!(others));
        figures.insert(format!("{name}_daemon_ticks"), json!(ticks));
    }
    println!("lab: {asked} requests in {WINDOW:?}");
    figures.insert("requests".into(), json!(asked));
    Ok(figures)
}

const CYCLES: usize = 1000;

/// Makes, clones and deletes guests many times, and checks that the host is as it was before.
pub fn cycles(out: &Path) -> Result<Figures, Failure> {
    let daemon = Daemon::start(out, &["--memory-ratio", "4"])?;
    daemon.boot(out, "source")?;
    daemon.template("t", "source")?;
    let fds = || {
        let entries = fs::read_dir(format!("/proc/{}/fd", daemon.child.id()));
        entries.map_or(0, Iterator::count)
    };
    let mut first = None;
    let mut last = (0, 0, 0);
    for number in 0..CYCLES {
        daemon.clone_of("t", "c")?;
        daemon.expect(204, "DELETE", "/vms/c", &Value::Null)?;
        if number % 100 == 99 {
            last = (available()?, fds(), daemon.memory()?.0);
            println!(
                "lab: after {}: {last:?} KiB available, descriptors, KiB of the daemon",
                number + 1
            );
            first.get_or_insert(last);
        }
    }
    let first = first.unwrap_or(last);
    let left = fs::read_dir(daemon.state.join("vms")).map_or(0, Iterator::count);
    if guests() != 1 || left != 1 || last.1 > first.1 + 2 || last.0 + (16 << 10) < first.0 {
        return Failure::claim(format!(
            "{} processes, {left} folders; {first:?} became {last:?}",
            guests()
        ));
    }
    Ok(Figures::from([
        (
            "kib_lost".into(),
            json!(first.0.cast_signed() - last.0.cast_signed()),
        ),
        (
            "daemon_kib_more".into(),
            json!(last.2.cast_signed() - first.2.cast_signed()),
        ),
    ]))
}
