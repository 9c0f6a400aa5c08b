//! The part of the lab that runs on this machine: it builds the lab's disk, boots the lab's host, and checks the
//! results.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use report::chain;

use crate::peer;
use crate::programs::{TARGET, command, workspace};
use crate::result::{Failure, Figures, Outcome, Plan};
use crate::scenarios::{self, Kind, Machine, Scenario};

/// The room on the lab disk beside the files that are put on it, in bytes.
const SPARE: u64 = 768 << 20;
/// A host is stuck if it does not name another scenario for so long. It is longer than the agent's own limit.
const STALL: Duration = Duration::from_mins(6);
/// How many hosts may be booted one after the other for the same scenarios. A scenario that fails is not run again. One
/// whose emulated host crashes or hangs is run again, together with those after it. Every lost host is reported.
const HOSTS: usize = 3;
/// How many hosts may run at the same time.
const LANES: usize = 2;

/// Runs the scenarios whose names start with one of `names`; true where all passed.
pub fn run(
    names: &[String],
    json: Option<&Path>,
    folder: Option<PathBuf>,
    verbose: bool,
) -> Result<bool, Failure> {
    let chosen = choose(names)?;
    let (root, started) = (workspace(), Instant::now());
    build(&root)?;
    if chosen
        .iter()
        .any(|scenario| scenario.machine == Machine::Systemd)
    {
        command(Command::new(root.join("resources/deb.sh")))?;
    }
    command(Command::new(root.join("resources/guest/build.sh")))?;
    command(Command::new(root.join("resources/emulator.sh")))?;
    let lab = folder.unwrap_or_else(|| root.join("target/lab"));
    fs::create_dir_all(&lab).map_err(Failure::io(lab.display().to_string()))?;
    let lock = File::create(lab.join("lock")).map_err(Failure::io("make the lab's lock"))?;
    lock.lock().map_err(Failure::io("lock the lab"))?;
    eprintln!("lab: ready after {:.0} s", started.elapsed().as_secs_f64());
    let host_of = |scenario: &Scenario| (scenario.memory, scenario.machine);
    let hosts: BTreeSet<_> = chosen.iter().copied().map(host_of).collect();
    let lanes = lanes(&chosen);
    let mut outcomes = Vec::new();
    for host in hosts {
        let same: Vec<_> = chosen
            .iter()
            .copied()
            .filter(|scenario| host_of(scenario) == host)
            .collect();
        std::thread::scope(|scope| {
            let running: Vec<_> = (0..lanes)
                .map(|lane| {
                    let (root, lab) = (&root, &lab);
                    let own = same.iter().copied().skip(lane).step_by(lanes).collect();
                    scope.spawn(move || run_hosts(root, lab, lane, host, own))
                })
                .collect();
            for lane in running {
                outcomes.extend(lane.join().unwrap_or_default());
            }
        });
    }
    // A lane that has failed has no results for the rest of its scenarios.
    for scenario in &chosen {
        if !outcomes.iter().any(|outcome| outcome.name == scenario.name) {
            outcomes.push(judge(scenario, &lab.join("out")));
        }
    }
    for outcome in &outcomes {
        let verdict = if outcome.failure.is_none() {
            "PASS"
        } else {
            "FAIL"
        };
        println!(
            "{verdict} [{:7.2}s] {} {}",
            outcome.seconds,
            outcome.name,
            figures(outcome)
        );
        if let Some(why) = &outcome.failure {
            println!("    {why}");
        }
        if outcome.failure.is_some() || verbose {
            println!("{}", outcome.log);
        }
    }
    if let Some(path) = json {
        fs::write(path, serde_json::to_vec_pretty(&outcomes)?)
            .map_err(Failure::io(path.display().to_string()))?;
    }
    let failed = outcomes
        .iter()
        .filter(|outcome| outcome.failure.is_some())
        .count();
    println!(
        "lab: {} passed, {failed} failed, {:.0} s",
        outcomes.len() - failed,
        started.elapsed().as_secs_f64()
    );
    Ok(failed == 0)
}

/// How many hosts run at the same time, each with one processor. A measurement has the machine for itself.
fn lanes(chosen: &[&Scenario]) -> usize {
    let tests_alone = chosen.iter().all(|scenario| scenario.kind == Kind::Test);
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    if tests_alone {
        processors.min(LANES).min(chosen.len()).max(1)
    } else {
        1
    }
}

/// Boots hosts of one size until all scenarios have run, or too many hosts were lost.
fn run_hosts(
    root: &Path,
    lab: &Path,
    lane: usize,
    (memory, machine): (u32, Machine),
    mut left: Vec<&'static Scenario>,
) -> Vec<Outcome> {
    let (mut outcomes, out) = (Vec::new(), lab.join("out"));
    let own = lab.join(format!("host{}", lane + 1));
    for host in 1..=HOSTS {
        if left.is_empty() {
            break;
        }
        let ended = run_host(root, &own, &out, (memory, machine), &left);
        let (done, lost): (Vec<_>, Vec<_>) = left
            .into_iter()
            .partition(|scenario| out.join(scenario.name).join("outcome.json").exists());
        outcomes.extend(done.into_iter().map(|scenario| judge(scenario, &out)));
        left = lost;
        let Some(stuck) = left.first() else { break };
        let why = ended
            .err()
            .map_or("it ended".to_owned(), |failure| chain(&failure).to_string());
        println!(
            "lab: host {host} of {HOSTS} was lost in {}: {why}",
            stuck.name
        );
    }
    outcomes.extend(left.into_iter().map(|scenario| judge(scenario, &out)));
    outcomes
}

/// Boots a host with `memory` MiB for `scenarios`, and copies their files from its disk.
fn run_host(
    root: &Path,
    own: &Path,
    out: &Path,
    (memory, machine): (u32, Machine),
    scenarios: &[&Scenario],
) -> Result<(), Failure> {
    fs::create_dir_all(own).map_err(Failure::io(own.display().to_string()))?;
    for scenario in scenarios {
        // An earlier run or a lost host may have left files.
        let _ = fs::remove_dir_all(out.join(scenario.name));
    }
    let disk = make_disk(root, own, scenarios)?;
    let booted = boot(root, &disk, memory, machine);
    // The results of a lost host may be only in the journal of the file system.
    let _ = Command::new("e2fsck").arg("-p").arg(&disk).output();
    fs::create_dir_all(out).map_err(Failure::io(out.display().to_string()))?;
    for scenario in scenarios {
        let request = format!("rdump /out/{} {}", scenario.name, out.display());
        command(Command::new("debugfs").args(["-R", &request]).arg(&disk))?;
    }
    booted
}

fn figures(outcome: &Outcome) -> String {
    if outcome.figures.is_empty() {
        String::new()
    } else {
        serde_json::json!(outcome.figures).to_string()
    }
}

fn choose(names: &[String]) -> Result<Vec<&'static Scenario>, Failure> {
    if names.is_empty() {
        return Ok(scenarios::ALL
            .iter()
            .filter(|scenario| scenario.kind == Kind::Test)
            .collect());
    }
    for name in names {
        if !scenarios::ALL
            .iter()
            .any(|scenario| scenario.name.starts_with(name.as_str()))
        {
            return Failure::claim(format!(
                "there is no scenario {name}; `lab list` names them"
            ));
        }
    }
    // A complete name selects that scenario alone, even if other names begin with it.
    let is_whole = |name: &String| scenarios::ALL.iter().any(|scenario| scenario.name == name);
    let wanted = |scenario: &&Scenario| {
        names.iter().any(|name| {
            scenario.name == name || !is_whole(name) && scenario.name.starts_with(name.as_str())
        })
    };
    Ok(scenarios::ALL.iter().filter(wanted).collect())
}

/// Builds static binaries, as the lab's host has no libraries.
fn build(root: &Path) -> Result<(), Failure> {
    let mut cargo = Command::new("cargo");
    cargo
        .current_dir(root)
        .env("RUSTFLAGS", "-C target-feature=+crt-static");
    cargo.args([
        "build",
        "--release",
        "--target",
        TARGET,
        "-p",
        "coppice",
        "-p",
        "lab",
    ]);
    command(cargo)
}

fn make_disk(root: &Path, lab: &Path, chosen: &[&Scenario]) -> Result<PathBuf, Failure> {
    let tree = lab.join("disk");
    let _ = fs::remove_dir_all(&tree);
    let io = |what: &Path| Failure::io(what.display().to_string());
    for folder in ["guest", "out", "cache"] {
        let folder = tree.join(folder);
        fs::create_dir_all(&folder).map_err(io(&folder))?;
    }
    let binaries = root.join("target").join(TARGET).join("release");
    let guest = root.join("target/guest");
    let mut files: Vec<(PathBuf, String)> = ["coppice", "coppice-tools", "lab"]
        .iter()
        .map(|name| (binaries.join(name), (*name).to_owned()))
        .collect();
    let mut names = vec![
        "vmlinuz",
        "initrd.cpio.gz",
        "root.vhdx",
        "root.raw",
        "bench.vhdx",
    ];
    let is_chosen = |name: &str| {
        chosen
            .iter()
            .any(|scenario| scenario.name.starts_with(name))
    };
    if ["density", "no_write_is_lost", "first_write_bench"]
        .into_iter()
        .any(is_chosen)
    {
        names.push("full.vhdx");
    }
    for name in names {
        files.push((guest.join(name), format!("guest/{name}")));
    }
    if ["bench", "density", "restore_bench"]
        .into_iter()
        .any(is_chosen)
    {
        files.extend(peer::files()?);
    }
    if chosen
        .iter()
        .any(|scenario| scenario.machine == Machine::Systemd)
    {
        files.push((root.join("target/coppice.deb"), "coppice.deb".to_owned()));
    }
    if is_chosen("guests_of_a_daemons_network") {
        files.extend(peer::nft()?);
        let modules = guest.join("modules");
        for entry in fs::read_dir(&modules).map_err(io(&modules))? {
            let entry = entry.map_err(io(&modules))?;
            let name = entry.file_name().display().to_string();
            files.push((entry.path(), format!("guest/modules/{name}")));
        }
    }
    if is_chosen("disk_bench") {
        files.push((fio_disk(lab)?, "guest/fio.raw".to_owned()));
    }
    let mut size = SPARE;
    for (from, to) in files {
        let to = tree.join(to);
        fs::create_dir_all(to.parent().unwrap_or(&tree)).map_err(io(&to))?;
        size += fs::copy(&from, to).map_err(io(&from))?;
    }
    let plan = Plan {
        scenarios: chosen
            .iter()
            .map(|scenario| scenario.name.to_owned())
            .collect(),
    };
    fs::write(tree.join("plan.json"), serde_json::to_vec(&plan)?).map_err(io(&tree))?;
    let disk = lab.join("lab.ext4");
    let _ = fs::remove_file(&disk);
    let mut mke2fs = Command::new("mke2fs");
    mke2fs
        .args(["-q", "-t", "ext4", "-d"])
        .arg(&tree)
        .arg(&disk)
        .arg(format!("{}K", size >> 10));
    command(mke2fs)?;
    Ok(disk)
}

/// Makes a disk for a guest, with fio on it.
fn fio_disk(lab: &Path) -> Result<PathBuf, Failure> {
    let tree = lab.join("fio");
    let _ = fs::remove_dir_all(&tree);
    let io = |what: &Path| Failure::io(what.display().to_string());
    let mut size = SPARE;
    for (from, to) in peer::fio()? {
        let to = tree.join(to);
        fs::create_dir_all(to.parent().unwrap_or(&tree)).map_err(io(&to))?;
        size += fs::copy(&from, to).map_err(io(&from))?;
    }
    let disk = lab.join("fio.ext4");
    let _ = fs::remove_file(&disk);
    let mut mke2fs = Command::new("mke2fs");
    mke2fs
        .args(["-q", "-t", "ext4", "-d"])
        .arg(&tree)
        .arg(&disk)
        .arg(format!("{}K", size >> 10));
    command(mke2fs)?;
    Ok(disk)
}

/// Boots the lab's host with `memory` MiB, and waits for its end.
fn boot(root: &Path, disk: &Path, memory: u32, machine: Machine) -> Result<(), Failure> {
    let guest = root.join("target/guest");
    let emulator = root.join("target/emulator");
    // The emulator brings its libraries, because this machine's may be older.
    let mut qemu = Command::new(emulator.join("lib/ld-linux-x86-64.so.2"));
    qemu.arg("--library-path").arg(emulator.join("lib"));
    qemu.arg(emulator.join("qemu"));
    for firmware in ["share/qemu", "share/seabios"] {
        qemu.arg("-L").arg(emulator.join(firmware));
    }
    // With more processors, threads of the emulator sometimes invalidate each other's translations of nested guests'
    // memory wrongly.
    qemu.args([
        "-accel",
        "tcg,thread=multi",
        "-smp",
        "1",
        "-m",
        &memory.to_string(),
        "-nographic",
        "-nic",
        "none",
        "-no-reboot",
    ]);
    // TCG has no intercept for a guest that sets XCR0, so that a guest with XSAVE reports errors: the lab's guests have
    // no XSAVE.
    qemu.args(["-cpu", "EPYC,+svm,+npt,-xsave,-avx,-avx2,-f16c,-fma"]);
    qemu.arg("-kernel").arg(guest.join("vmlinuz"));
    qemu.arg("-initrd").arg(guest.join("host-initrd.cpio.gz"));
    qemu.args(["-append", "console=ttyS0 quiet panic=-1"]);
    qemu.args([
        "-drive",
        &format!("file={},if=virtio,format=raw,cache=unsafe", disk.display()),
    ]);
    if machine == Machine::Systemd {
        let root = guest.join("machine.raw");
        // With snapshot=on, changes of this disk are dropped at the end.
        let drive = format!("file={},if=virtio,format=raw,snapshot=on", root.display());
        qemu.args(["-drive", &drive]);
    }
    let log_path = disk.with_file_name("host.log");
    let log = File::create(&log_path).map_err(Failure::io(log_path.display().to_string()))?;
    let mut child = qemu
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log.try_clone().map_err(Failure::io("log"))?)
        .spawn()
        .map_err(Failure::io("start the emulator (make emulator fetches it)"))?;
    let stdout = child.stdout.take();
    let progress = Arc::new(Mutex::new(Instant::now()));
    let seen = progress.clone();
    let reader = std::thread::spawn(move || {
        let mut log = log;
        for line in stdout
            .into_iter()
            .flat_map(|stdout| BufReader::new(stdout).split(b'\n'))
            .map_while(Result::ok)
        {
            let line = String::from_utf8_lossy(&line).into_owned();
            if let Some(at) = line.find("lab: ") {
                eprintln!("{}", line[at..].trim_end());
                *seen.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
            }
            let _ = std::io::Write::write_all(&mut log, (line + "\n").as_bytes());
        }
    });
    let stalled = || {
        progress
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .elapsed()
            > STALL
    };
    let ended = loop {
        match child.try_wait().map_err(Failure::io("wait for QEMU"))? {
            Some(status) => break Some(status),
            None if stalled() => break None,
            None => std::thread::sleep(Duration::from_millis(100)),
        }
    };
    if ended.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let _ = reader.join();
    match ended {
        Some(status) if status.success() => Ok(()),
        Some(status) => Failure::claim(format!("QEMU: {status}; see {}", log_path.display())),
        None => Failure::claim(format!(
            "the lab's host stood still for {STALL:?}; see {}",
            log_path.display()
        )),
    }
}

/// The agent's result, after this machine's own check.
fn judge(scenario: &Scenario, out: &Path) -> Outcome {
    let folder = out.join(scenario.name);
    let outcome = fs::read(folder.join("outcome.json"))
        .map_err(Failure::io("the scenario left no result"))
        .and_then(|bytes| Ok(serde_json::from_slice::<Outcome>(&bytes)?));
    let mut outcome = outcome.unwrap_or_else(|failure| Outcome {
        name: scenario.name.to_owned(),
        seconds: 0.0,
        failure: Some(chain(&failure).to_string()),
        figures: Figures::new(),
        log: String::new(),
    });
    if outcome.failure.is_none()
        && let Some(check) = scenario.check
        && let Err(failure) = check(&folder, &outcome.figures)
    {
        outcome.failure = Some(chain(&failure).to_string());
    }
    outcome
}
