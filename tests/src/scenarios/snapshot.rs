//! Scenarios of snapshots: guests are saved, and go on in other processes, once or many times.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::memory::{available, mib_each};
use super::pmem;
use crate::api::{expect_ok, request};
use crate::guest::{Guest, Start};
use crate::page_server::Handler;
use crate::result::{Failure, Figures};

const MOUNT: &str = "mount /dev/vda /mnt; ";
/// A script that stores data in memory and on the disk, and then executes the lines that are typed on the console.
const SCRIPT: &str = "dd if=/dev/urandom of=/tmp/memory bs=64k count=64 2>/dev/null; \
    cp /tmp/memory /mnt/file; sync; echo SUM $(md5sum </tmp/memory) END; echo READY; \
    while read line; do eval \"$line\"; done";
/// A script that prints lines in the background.
const TICKS: &str = "( i=0; while true; do i=$((i+1)); echo TICK $i; sleep 0.2; done ) &";

pub(super) struct Vm {
    pub(super) guest: Guest,
    socket: PathBuf,
}

impl Vm {
    pub(super) fn put(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        expect_ok(&self.socket, "PUT", path, body)
    }

    pub(super) fn pause(&self) -> Result<(), Failure> {
        expect_ok(&self.socket, "PATCH", "/vm", &json!({"state": "Paused"}))?;
        Ok(())
    }

    fn resume(&self) -> Result<(), Failure> {
        expect_ok(&self.socket, "PATCH", "/vm", &json!({"state": "Resumed"}))?;
        Ok(())
    }

    fn refused(&self, path: &str, body: &Value, why: &str) -> Result<(), Failure> {
        let (status, answer) = request(&self.socket, "PUT", path, body)?;
        let message = answer["fault_message"].as_str().unwrap_or_default();
        println!("lab: {path}: {message}");
        if status == 400 && message.contains(why) {
            Ok(())
        } else {
            Failure::claim(format!("{path} answers {status} {answer}, not {why:?}"))
        }
    }

    /// Runs a line in the guest, and waits for `text`.
    pub(super) fn run_line(&mut self, line: &str, text: &str) -> Result<(), Failure> {
        self.guest.type_in(&format!("{line}\n"))?;
        self.guest.wait_from_now(text)?;
        Ok(())
    }

    pub(super) fn stop(mut self) -> Result<(), Failure> {
        self.guest.signal(Signal::TERM)?;
        self.guest.expect_exit(143)
    }
}

/// The number of the last complete tick on the console.
fn last_tick(console: &str) -> u64 {
    let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let ticks = whole.lines().filter_map(|line| line.strip_prefix("TICK "));
    ticks.rev().find_map(|n| n.trim().parse().ok()).unwrap_or(0)
}

pub(super) fn booted(out: &Path, args: &[&str]) -> Result<Vm, Failure> {
    let disk = out.join("disk.vhdx");
    fs::copy("guest/root.vhdx", &disk).map_err(Failure::io("copy root.vhdx"))?;
    let (disk, socket) = (disk.display().to_string(), out.join("source.sock"));
    let guest = Start::new()
        .args(&["--disk", &disk, "--api-sock", &socket.display().to_string()])
        .args(args)
        .script(&(MOUNT.to_owned() + SCRIPT))
        .spawn()?;
    guest.wait_for("READY")?;
    Ok(Vm { guest, socket })
}

/// Starts a process that waits for a snapshot.
pub(super) fn empty(out: &Path, name: &str) -> Result<Vm, Failure> {
    let socket = out.join(format!("{name}.sock"));
    let text = socket.display().to_string();
    let guest = Start::bare(&["--api-sock", &text, "--log", "info"]).spawn()?;
    let started = Instant::now();
    while request(&socket, "GET", "/", &Value::Null).is_err() {
        if started.elapsed() > Duration::from_secs(20) {
            return Failure::claim("the REST socket does not answer");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(Vm { guest, socket })
}

pub(super) fn files(out: &Path, name: &str) -> (PathBuf, PathBuf) {
    (
        out.join(format!("{name}.state")),
        out.join(format!("{name}.memory")),
    )
}

pub(super) fn create(vm: &Vm, out: &Path, name: &str, kind: &str) -> Result<(), Failure> {
    let (state, memory) = files(out, name);
    vm.put(
        "/snapshot/create",
        &json!({"snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory}),
    )?;
    Ok(())
}

pub(super) fn load_body(out: &Path, name: &str) -> Value {
    let (state, memory) = files(out, name);
    json!({
        "snapshot_path": state,
        "mem_backend": {"backend_path": memory, "backend_type": "File"},
        "resume_vm": true,
    })
}

/// Checks that the guest's memory and disk have the same data as before.
fn expect_sum(vm: &mut Vm, mark: &str, sum: &str) -> Result<(), Failure> {
    // The console echoes the typed line, so the line must not contain the text that is awaited.
    let sums = "$(md5sum </tmp/memory) $(md5sum </mnt/file)";
    vm.run_line(
        &format!("echo {mark} {sums}; echo O''VER{mark}"),
        &format!("OVER{mark}"),
    )?;
    let line = vm.guest.line(&format!("{mark} "))?;
    let expected = format!("{sum} {sum}");
    if line == expected {
        Ok(())
    } else {
        Failure::claim(format!("the guest has {line}, not {expected}"))
    }
}

/// Half of the generation ID in the guest's memory, and how often its event device has been notified. They are read
/// directly, because the lab's kernel has no driver for the ID.
fn generation(vm: &mut Vm, mark: &str) -> Result<(String, u64), Failure> {
    let count = "$(awk '/Ged/{print $2+$3}' /proc/interrupts)";
    vm.run_line(
        &format!("echo GENERATION{mark} $(devmem 0xff000 64) {count}; echo O''VERGENERATION{mark}"),
        &format!("OVERGENERATION{mark}"),
    )?;
    let line = vm.guest.line(&format!("GENERATION{mark} "))?;
    let parts = line
        .split_once(' ')
        .and_then(|(id, count)| Some((id, count.parse().ok()?)));
    match parts {
        Some((id, count)) if id.len() > 4 => Ok((id.to_owned(), count)),
        Some(_) | None => Failure::claim(format!("generation {line:?}")),
    }
}

/// A guest is saved, loaded, saved as a difference, and loaded again. Memory, disk, clock and console go on each time,
/// and wrong files are refused.
pub fn goes_on(out: &Path) -> Result<Figures, Failure> {
    let mut figures = Figures::new();
    let mut source = booted(out, &["--cpus", "2", "--balloon"])?;
    let sum = source.guest.line("SUM ")?;
    let sum = sum.trim_end_matches(" END").to_owned();
    source.run_line(TICKS, "TICK 3")?;
    let (before, notified) = generation(&mut source, "SOURCE")?;
    if notified != 0 {
        return Failure::claim("a guest that has just booted is told of another generation");
    }
    let (state, memory) = files(out, "full");
    let body = json!({"snapshot_path": state, "mem_file_path": memory});
    source.refused("/snapshot/create", &body, "pause it")?;
    source.pause()?;
    let begun = Instant::now();
    create(&source, out, "full", "Full")?;
    figures.insert(
        "create_seconds".into(),
        json!(begun.elapsed().as_secs_f64()),
    );
    let diff = json!({"snapshot_type": "Diff", "snapshot_path": out.join("x"), "mem_file_path": out.join("y")});
    source.refused("/snapshot/create", &diff, "track_dirty_pages")?;
    let ticks = last_tick(&source.guest.console());

    // The load is refused while the disk is in use, and after the disk has changed.
    let waiting = empty(out, "waiting")?;
    waiting.refused("/snapshot/load", &load_body(out, "full"), "in use")?;
    source.stop()?;

    let mut second = waiting;
    let begun = Instant::now();
    second.put("/snapshot/load", &load_body(out, "full"))?;
    figures.insert("load_seconds".into(), json!(begun.elapsed().as_secs_f64()));
    second.guest.wait_from_now(&format!("TICK {}", ticks + 3))?;
    expect_sum(&mut second, "SECOND", &sum)?;
    let (now, notified) = generation(&mut second, "SECOND")?;
    if now == before || notified != 1 {
        return Failure::claim(format!(
            "the generation was {before} and is {now}; notified {notified} times"
        ));
    }
    second.run_line(
        "date +%s >/mnt/new; cp /mnt/new /tmp/new; sync; echo WRIT''TEN",
        "WRITTEN",
    )?;
    second.pause()?;
    create(&second, out, "diff", "Diff")?;
    let ticks = last_tick(&second.guest.console());
    second.stop()?;

    let changed = empty(out, "changed")?;
    changed.refused("/snapshot/load", &load_body(out, "full"), "its disk was")?;
    let mut third = changed;
    third.put("/snapshot/load", &load_body(out, "diff"))?;
    third.guest.wait_from_now(&format!("TICK {}", ticks + 3))?;
    expect_sum(&mut third, "THIRD", &sum)?;
    third.run_line("cmp /tmp/new /mnt/new && echo SA''ME", "SAME")?;
    third.stop()?;
    for name in ["full", "diff"] {
        let (state, memory) = files(out, name);
        let blocks = fs::metadata(&memory).map_err(Failure::io("stat"))?;
        let blocks = std::os::unix::fs::MetadataExt::blocks(&blocks) * 512;
        figures.insert(format!("{name}_memory_bytes"), json!(blocks));
        let len = fs::metadata(&state).map_err(Failure::io("stat"))?.len();
        figures.insert(format!("{name}_state_bytes"), json!(len));
    }

    // One bit of the memory file is flipped.
    let (_, memory) = files(out, "diff");
    let file = fs::File::options().read(true).write(true).open(&memory);
    let file = file.map_err(Failure::io("open the memory"))?;
    let mut byte = [0];
    let at = (0..128 << 8)
        .map(|page| page << 12)
        .find(|at| file.read_exact_at(&mut byte, *at).is_ok() && byte[0] != 0);
    let at = at.unwrap_or(0);
    file.write_all_at(&[byte[0] ^ 4], at)
        .map_err(Failure::io("flip a bit"))?;
    drop(file);
    let flipped = empty(out, "flipped")?;
    flipped.refused("/snapshot/load", &load_body(out, "diff"), "damaged")?;
    flipped.stop()?;
    for name in ["full", "diff"] {
        fs::remove_file(files(out, name).1).map_err(Failure::io("remove"))?;
    }
    Ok(figures)
}

/// A guest with a pmem device in mode `cow` is saved, and its own pages are in every guest that is loaded, while the
/// disk stays as it is.
pub fn with_own_copy(out: &Path) -> Result<Figures, Failure> {
    let disk = out.join("disk.vhdx").display().to_string();
    fs::copy("guest/root.vhdx", &disk).map_err(Failure::io("copy root.vhdx"))?;
    let digest = pmem::digest(&disk)?;
    let socket = out.join("source.sock");
    let guest = Start::new()
        .args(&["--pmem", &format!("{disk},cow")])
        .args(&["--api-sock", &socket.display().to_string()])
        .script(&(pmem::mounted("rw") + SCRIPT))
        .spawn()?;
    guest.wait_for("READY")?;
    let sum = guest.line("SUM ")?;
    let sum = sum.trim_end_matches(" END").to_owned();
    let source = Vm { guest, socket };
    source.pause()?;
    create(&source, out, "full", "Full")?;
    source.stop()?;

    // After a new mount, the files are read from the device.
    let anew = "umount /mnt && mount -t ext4 -o dax /dev/pmem0 /mnt && grep -q dax /proc/mounts && echo AN''EW";
    let load = |name: &str, snapshot: &str| -> Result<Vm, Failure> {
        let mut vm = empty(out, name)?;
        vm.put("/snapshot/load", &load_body(out, snapshot))?;
        vm.run_line(anew, "ANEW")?;
        expect_sum(&mut vm, &name.to_uppercase(), &sum)?;
        Ok(vm)
    };
    let (mut one, mut other) = (load("one", "full")?, load("other", "full")?);
    one.run_line("echo 1 >/mnt/own; sync; echo ONE$(cat /mnt/own)", "ONE1")?;
    other.run_line("cat /mnt/own || echo NO''NE", "NONE")?;
    one.pause()?;
    create(&one, out, "diff", "Diff")?;
    one.stop()?;
    let mut again = load("again", "diff")?;
    again.run_line("echo AGAIN$(cat /mnt/own)", "AGAIN1")?;
    again.stop()?;
    other.run_line("cat /mnt/own || echo NO''NE", "NONE")?;
    other.stop()?;
    for name in ["full", "diff"] {
        fs::remove_file(files(out, name).1).map_err(Failure::io("remove"))?;
    }
    if pmem::digest(&disk)? == digest {
        Ok(Figures::new())
    } else {
        Failure::claim("the disk has changed")
    }
}

/// A page-fault handler provides the pages of a saved guest when they are touched. The guest has the same data as
/// before, and ends with a report when the handler ends.
pub fn served(out: &Path) -> Result<Figures, Failure> {
    let mut source = booted(out, &[])?;
    let sum = source.guest.line("SUM ")?;
    let sum = sum.trim_end_matches(" END").to_owned();
    source.run_line(TICKS, "TICK 3")?;
    source.pause()?;
    create(&source, out, "full", "Full")?;
    let ticks = last_tick(&source.guest.console());
    source.stop()?;
    let (state, memory) = files(out, "full");
    let socket = out.join("uffd.sock");
    let mut handler = Handler::start(&socket, &memory);
    let mut guest = empty(out, "served")?;
    let body = json!({
        "snapshot_path": state, "resume_vm": true,
        "mem_backend": {"backend_type": "Uffd", "backend_path": socket},
    });
    guest.put("/snapshot/load", &body)?;
    guest.guest.wait_from_now(&format!("TICK {}", ticks + 3))?;
    expect_sum(&mut guest, "SERVED", &sum)?;
    guest.run_line(
        "dd if=/dev/zero of=/tmp/new bs=64k count=64 2>/dev/null; cat /tmp/new | wc -c",
        "4194304",
    )?;
    let given = handler.seen(|seen| seen.given.len());
    println!("lab: {given} pages given");
    // The guest has read 4 MiB of its 128 MiB, so that at least these pages were provided, and not all.
    if !(1024..128 << 8).contains(&given) {
        return Failure::claim(format!("{given} pages were given"));
    }
    handler.stop_answering();
    guest.guest.type_in("cat /dev/vda | md5sum\n")?;
    handler.stop();
    guest.guest.expect_exit(1)?;
    let report = guest.guest.report();
    if !report.contains("has closed its connection: the guest ends") {
        return Failure::claim(format!("the guest ended otherwise: {report}"));
    }
    fs::remove_file(memory).map_err(Failure::io("remove"))?;
    Ok(Figures::from([("pages_given".into(), json!(given))]))
}

const CLONES: u32 = 6;
/// How long the host's kernel gets to free what starting a process took.
pub(super) const IDLE_TIME: Duration = Duration::from_secs(15);

/// One snapshot is loaded by many guests, each with a disk of its own, and their memory is measured.
pub fn clones(out: &Path) -> Result<Figures, Failure> {
    let mut figures = Figures::new();
    let (base, base_sum) = super::share::disk(out)?;
    let base_disk = format!("{},ro,format=raw", base.display());
    let mut source = booted(out, &["--disk", &base_disk])?;
    let sum = source.guest.line("SUM ")?;
    let sum = sum.trim_end_matches(" END").to_owned();
    // The template waits for the work that a kernel does some time after its boot, so that clones need not do it.
    std::thread::sleep(IDLE_TIME);
    source.pause()?;
    create(&source, out, "template", "Full")?;
    // The source writes to a child from now on, so that the template's disk stays as it is.
    source.put(
        "/drives/disk0/snapshot",
        &json!({"path_on_host": out.join("source.vhdx")}),
    )?;
    source.resume()?;
    let mut clones: Vec<Vm> = Vec::new();
    let mut before = available()?;
    for number in 0..CLONES {
        let begun = Instant::now();
        let clone = empty(out, &format!("clone{number}"))?;
        let ready = begun.elapsed().as_secs_f64();
        let mut body = load_body(out, "template");
        body["verify_memory"] = json!(false);
        body["drives"] = json!([{"drive_id": "disk0", "clone": true,
                                 "path_on_host": out.join(format!("clone{number}.vhdx"))}]);
        let asked = Instant::now();
        clone.put("/snapshot/load", &body)?;
        let loaded = asked.elapsed().as_secs_f64();
        println!("lab: clone {number}: process {ready:.3} s, load {loaded:.3} s");
        figures.insert(format!("clone{number}_load_seconds"), json!(loaded));
        figures.insert(format!("clone{number}_process_seconds"), json!(ready));
        clones.push(clone);
        if number == 0 {
            std::thread::sleep(IDLE_TIME);
            before = available()?;
        }
    }
    std::thread::sleep(IDLE_TIME);
    let each = mib_each(before, available()?, CLONES - 1);
    println!("lab: {each:.2} MiB a further idle clone");
    let smaps = fs::read_to_string(clones[0].guest.proc().join("smaps"));
    fs::write(out.join("smaps.txt"), smaps.unwrap_or_default())
        .map_err(Failure::io("keep smaps"))?;
    figures.insert("idle_clone_mib".into(), json!(each));
    let mut generations = BTreeSet::new();
    for (number, clone) in clones.iter_mut().enumerate() {
        expect_sum(clone, &format!("CLONE{number}"), &sum)?;
        clone.run_line(
            &format!("echo {number} >/mnt/own; sync; echo OWN$(cat /mnt/own)"),
            &format!("OWN{number}"),
        )?;
        let (now, notified) = generation(clone, "CLONE")?;
        if !generations.insert(now.clone()) || notified != 1 {
            return Failure::claim(format!("generation {now}; notified {notified} times"));
        }
    }
    source.run_line("cat /mnt/own || echo NO''NE", "NONE")?;
    let before = available()?;
    for clone in &mut clones {
        clone.run_line("echo BASE $(md5sum </dev/vdb); echo O''VERBASE", "OVERBASE")?;
        if clone.guest.line("BASE ")? != format!("{base_sum} -") {
            return Failure::claim("a clone has read other bytes than the disk has");
        }
    }
    std::thread::sleep(IDLE_TIME);
    let read = mib_each(before, available()?, CLONES);
    println!("lab: {read:.2} MiB a clone more once each has read 40 MiB of a disk");
    figures.insert("more_after_reading_mib".into(), json!(read));
    let smaps = fs::read_to_string(clones[0].guest.proc().join("smaps_rollup"));
    println!("lab: clone 0: {}", smaps.unwrap_or_default());
    // A clone is saved and cloned, too.
    let mut first = clones.remove(0);
    first.pause()?;
    create(&first, out, "fork", "Diff")?;
    first.put(
        "/drives/disk0/snapshot",
        &json!({"path_on_host": out.join("first.vhdx")}),
    )?;
    first.resume()?;
    let mut fork = empty(out, "fork")?;
    let mut body = load_body(out, "fork");
    body["drives"] =
        json!([{"drive_id": "disk0", "clone": true, "path_on_host": out.join("fork-disk.vhdx")}]);
    fork.put("/snapshot/load", &body)?;
    expect_sum(&mut fork, "FORK", &sum)?;
    fork.run_line("echo FORKOWN$(cat /mnt/own)", "FORKOWN0")?;
    first.run_line(
        "echo >/mnt/own 7; sync; echo FIRSTOWN$(cat /mnt/own)",
        "FIRSTOWN7",
    )?;
    fork.run_line("echo STILL$(cat /mnt/own)", "STILL0")?;
    for vm in clones.into_iter().chain([first, fork, source]) {
        vm.stop()?;
    }
    for file in [files(out, "template").1, files(out, "fork").1, base] {
        fs::remove_file(file).map_err(Failure::io("remove"))?;
    }
    Ok(figures)
}
