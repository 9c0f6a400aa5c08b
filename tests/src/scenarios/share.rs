//! Scenarios of guests that share the pages that they read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::bench::median;
use super::memory::available;
use crate::api::expect_ok;
use crate::guest::{Guest, Start};
use crate::result::{Failure, Figures};

const MIB: u64 = 1 << 20;
/// The size of the disk that guests read.
const SIZE: u64 = 40 * MIB;
/// The pages that a guest writes to for the first time, and their bytes.
const PAGES_WRITTEN: u32 = 8192;
const WRITTEN: u64 = PAGES_WRITTEN as u64 * 4096;
/// How long a merger may take until it has compared all candidates.
const PATIENCE: Duration = Duration::from_secs(90);

/// Makes a raw disk of random bytes; returns its path and its MD5.
pub fn disk(out: &Path) -> Result<(PathBuf, String), Failure> {
    let path = out.join("random.raw");
    let mut bytes = vec![0; SIZE as usize];
    rustix::rand::getrandom(&mut bytes[..32], rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Failure::io("getrandom")(error.into()))?;
    // All words differ: they are a sequence of xorshift with a random beginning.
    let mut word = u64::from_le_bytes(*bytes.first_chunk().unwrap_or(&[1; 8])) | 1;
    for chunk in bytes.as_chunks_mut::<8>().0 {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        *chunk = word.to_le_bytes();
    }
    fs::write(&path, bytes).map_err(Failure::io("write a disk"))?;
    let output = Command::new("md5sum")
        .arg(&path)
        .output()
        .map_err(Failure::io("md5sum"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let sum = text.split(' ').next().unwrap_or_default().to_owned();
    Ok((path, sum))
}

fn sharing(socket: &Path) -> Result<Value, Failure> {
    expect_ok(socket, "GET", "/vm/sharing", &Value::Null)
}

fn number(report: &Value, field: &str) -> u64 {
    report[field].as_u64().unwrap_or(0)
}

/// Waits until no candidate is left to be compared, and returns the report of sharing then.
fn wait_until_merged(socket: &Path) -> Result<Value, Failure> {
    let started = Instant::now();
    loop {
        let report = sharing(socket)?;
        if number(&report, "candidate_pages") == 0 {
            return Ok(report);
        }
        if started.elapsed() > PATIENCE {
            return Failure::claim(format!("the merger does not come to rest: {report}"));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn start(socket: &Path, disk: &Path, script: &str, more: &[&str]) -> Result<Guest, Failure> {
    let disk = format!("{},ro,format=raw", disk.display());
    let socket = socket.display().to_string();
    Start::new()
        .args(&["--disk", "guest/root.vhdx,ro", "--disk", &disk])
        .args(&["--api-sock", &socket])
        .args(more)
        .script(script)
        .spawn()
}

/// Two guests read a disk. Most pages that they have of it become pages of the file, and read the same before and
/// after.
pub fn reads(out: &Path) -> Result<Figures, Failure> {
    reads_with(out, &[])
}

/// As [`reads`], for jailed guests.
pub fn reads_jailed(out: &Path) -> Result<Figures, Failure> {
    reads_with(out, &["--jail"])
}

fn reads_with(out: &Path, more: &[&str]) -> Result<Figures, Failure> {
    let (disk, sum) = disk(out)?;
    let script = "echo FIRST $(md5sum </dev/vdb) END; read x; echo SECOND $(md5sum </dev/vdb) END; echo OVER; sleep 100000";
    let sockets = [out.join("a.sock"), out.join("b.sock")];
    let mut figures = Figures::new();
    let mut guests = Vec::new();
    for socket in &sockets {
        guests.push(start(socket, &disk, script, more)?);
    }
    for (number_of, (guest, socket)) in guests.iter_mut().zip(&sockets).enumerate() {
        guest.wait_for(" END")?;
        let report = wait_until_merged(socket)?;
        println!("lab: guest {number_of}: {report}");
        let expected = SIZE / 4096 * 9 / 10;
        let merged = number(&report, "merged_pages") + number(&report, "placed_pages");
        if merged < expected {
            return Failure::claim(format!(
                "{merged} pages are shared, not {expected}: {report}"
            ));
        }
        guest.type_in("\n")?;
        guest.wait_for("OVER")?;
        let expected = format!("{sum} - END");
        let (first, second) = (guest.line("FIRST ")?, guest.line("SECOND ")?);
        if first != expected || second != expected {
            return Failure::claim(format!(
                "the disk holds {expected}, the guest read {first} and {second}"
            ));
        }
        figures.insert(format!("guest_{number_of}"), json!(report));
    }
    fs::remove_file(&disk).map_err(Failure::io("remove the disk"))?;
    Ok(figures)
}

/// Makes a disk for `stress.py`: each word of a page is the page's number.
fn numbered_disk(out: &Path) -> Result<PathBuf, Failure> {
    let path = out.join("numbered.raw");
    let mut bytes = Vec::with_capacity(SIZE as usize);
    for page in 0..SIZE / 4096 {
        for _ in 0..4096 / 8 {
            bytes.extend(page.to_le_bytes());
        }
    }
    fs::write(&path, bytes).map_err(Failure::io("write a disk"))?;
    Ok(path)
}

/// Guests write to pages before, while and after they are merged, each from two processes; no write is lost, and no
/// guest crashes.
pub fn stress(out: &Path) -> Result<Figures, Failure> {
    const GUESTS: usize = 3;
    let disk = numbered_disk(out)?;
    let disk = format!("{},ro,format=raw", disk.display());
    let script = "mount -t ext4 -o ro /dev/vda /mnt; mount -t devtmpfs dev /mnt/dev; cd /mnt; p() { chroot /mnt /usr/bin/python3 /stress.py /dev/vdb 25; }; \
        p & p; wait; i=0; while [ $i -lt 3 ]; do echo 3 >/proc/sys/vm/drop_caches; cat /dev/vdb >/dev/null; i=$((i+1)); done; echo STRESSED; read x";
    let sockets: Vec<_> = (0..GUESTS)
        .map(|number| out.join(format!("{number}.sock")))
        .collect();
    let mut guests = Vec::new();
    for socket in &sockets {
        let socket = socket.display().to_string();
        let start = Start::new()
            .args(&["--mem", "192M", "--share-cpu", "50"])
            .args(&["--disk", "guest/full.vhdx,ro", "--disk", &disk])
            .args(&["--api-sock", &socket]);
        guests.push(start.script(script).spawn()?);
    }
    let mut figures = Figures::new();
    let mut merged = 0;
    for (number_of, (guest, socket)) in guests.iter_mut().zip(&sockets).enumerate() {
        guest.wait_for("STRESSED")?;
        let report = sharing(socket)?;
        guest.type_in("\n")?;
        let console = guest.console();
        if console.contains("LOST") || console.matches(" rounds, ").count() != 2 {
            return Failure::claim("a write was lost, or a process was");
        }
        merged += number(&report, "merged_pages");
        figures.insert(format!("guest_{number_of}"), json!(report));
    }
    for guest in &mut guests {
        guest.expect_exit(0)?;
    }
    if merged < 1000 {
        return Failure::claim(format!(
            "only {merged} pages were merged while guests wrote to them"
        ));
    }
    Ok(figures)
}

/// Guests that without sharing would need all of the host's memory run at the same time, and each has what it has read
/// and written.
pub fn many(_: &Path) -> Result<Figures, Failure> {
    const GUESTS: usize = 64;
    /// How many guests boot at the same time.
    const WAVE: usize = 2;
    let mut guests: Vec<Guest> = Vec::new();
    let before = available()?;
    for first in (0..GUESTS).step_by(WAVE) {
        for guest in first..GUESTS.min(first + WAVE) {
            let script = format!(
                "mount -t ext4 -o ro /dev/vda /mnt; \
                 yes guest{guest} | head -c 1048576 >/tmp/own; S=$(cat /tmp/own /mnt/data/40M | md5sum); echo READY $S; \
                 read x; T=$(cat /tmp/own /mnt/data/40M | md5sum); echo AGAIN $T; echo OVER; sleep 100000"
            );
            let start = Start::new().args(&["--share", "all", "--disk", "guest/bench.vhdx,ro"]);
            guests.push(start.script(&script).spawn()?);
        }
        for guest in &guests[first..] {
            guest.wait_for("READY ")?;
        }
        println!("lab: {} guests", guests.len());
    }
    std::thread::sleep(Duration::from_secs(20));
    let after = available()?;
    let mut sums = BTreeSet::new();
    for guest in &mut guests {
        guest.type_in("\n")?;
        guest.wait_from_now("OVER")?;
        let (first, second) = (guest.line("READY ")?, guest.line("AGAIN ")?);
        if first != second {
            return Failure::claim(format!("a guest had {first}, and now {second}"));
        }
        sums.insert(first);
    }
    if sums.len() != GUESTS {
        return Failure::claim(format!(
            "{} different checksums of {GUESTS} guests",
            sums.len()
        ));
    }
    Ok(Figures::from([
        ("guests".into(), json!(GUESTS)),
        (
            "kib_a_guest".into(),
            json!((before - after) / GUESTS as u64),
        ),
        ("available_kib_left".into(), json!(after)),
    ]))
}

/// A file that is mapped into guests is cut. A guest that reads the lost pages ends with a report that names the file.
/// A guest that does not read them goes on, and so does a guest that has another file.
pub fn cut_file(out: &Path) -> Result<Figures, Failure> {
    let (cut, _) = disk(out)?;
    let other = out.join("other.raw");
    fs::copy(&cut, &other).map_err(Failure::io("copy a disk"))?;
    // The disk stays open in the guest, so that the guest keeps the pages that it has read. If it has dropped one, it
    // gets an I/O error there, and goes on to the next.
    let script = "exec 3</dev/vdb; md5sum </dev/vdb; echo READ END; read x; dd if=/dev/vdb of=/dev/null bs=4k conv=noerror; \
                  echo AGAIN END; sleep 100000";
    let names = ["a", "b", "c"];
    let sockets = names.map(|name| out.join(format!("{name}.sock")));
    let mut guests = Vec::new();
    for (socket, disk) in sockets.iter().zip([&cut, &cut, &other]) {
        guests.push(start(socket, disk, script, &[])?);
    }
    for (guest, socket) in guests.iter().zip(&sockets) {
        guest.wait_for("READ END")?;
        let report = wait_until_merged(socket)?;
        if number(&report, "merged_pages") < SIZE / 4096 / 2 {
            return Failure::claim(format!("the guest shares too little: {report}"));
        }
    }
    fs::File::options()
        .write(true)
        .open(&cut)
        .and_then(|file| file.set_len(0))
        .map_err(Failure::io("cut the disk"))?;
    let [reader, idle, elsewhere] = &mut guests[..] else {
        return Failure::claim("three guests were started");
    };
    reader.type_in("\n")?;
    expect_report(reader, &cut)?;
    let report = sharing(&sockets[2])?;
    if number(&report, "changed_files") != 0 {
        return Failure::claim(format!("another guest's file has not changed: {report}"));
    }
    elsewhere.type_in("\n")?;
    elsewhere.wait_for("AGAIN END")?;
    // The request for the report of sharing has the process check its files.
    let asked = sharing(&sockets[1]);
    println!("lab: the guest that has not read: {asked:?}");
    expect_report(idle, &cut)?;
    elsewhere.signal(rustix::process::Signal::TERM)?;
    elsewhere.expect_exit(143)?;
    for disk in [cut, other] {
        fs::remove_file(disk).map_err(Failure::io("remove a disk"))?;
    }
    Ok(Figures::new())
}

fn expect_report(guest: &mut Guest, file: &Path) -> Result<(), Failure> {
    guest.expect_exit(1)?;
    let (report, file) = (guest.report(), file.display().to_string());
    let named = |line: &&str| {
        line.starts_with("coppice: guest page 0x")
            && line.contains(&file)
            && line.contains(" at offset 0x")
    };
    match report.lines().find(named) {
        Some(line) => println!("lab: {line}"),
        None => return Failure::claim(format!("no report names {file}")),
    }
    Ok(())
}

/// The reads of a disk that are measured, one after the other: into untouched memory; from the guest's page cache, ten
/// times; the same after its pages have become the file's; and, after the page cache was dropped, into memory that
/// partly consists of the file's pages.
const READS: [&str; 4] = ["cold", "warm", "shared", "refilled"];

/// The two numbers of the console's line that starts with `prefix`.
fn two_numbers(guest: &Guest, prefix: &str) -> Result<[f64; 2], Failure> {
    let line = guest.line(prefix)?;
    let numbers: Vec<f64> = line
        .split(' ')
        .filter_map(|word| word.parse().ok())
        .collect();
    match numbers[..] {
        [first, second] => Ok([first, second]),
        _ => Failure::claim(format!("no times: {line}")),
    }
}

/// Measures how long a guest takes to read a disk that is in the host's page cache, for each mode of sharing in turns.
pub fn read_bench(out: &Path) -> Result<Figures, Failure> {
    const ROUNDS: usize = 5;
    const OFF: &str = "off";
    let (disk, _) = disk(out)?;
    let disk = format!("{},ro,format=raw", disk.display());
    let ways: [(&str, &[&str]); 4] = [
        (OFF, &["--share", "off"]),
        ("read", &["--share", "read"]),
        ("all", &["--share", "all"]),
        ("placed", &["--share", "read", "--share-place", "64"]),
    ];
    let script = "r() { a=$(cut -d' ' -f1 /proc/uptime); for i in $(seq $2); do cat /dev/vdb >/dev/null; done; echo TIME $1 $a $(cut -d' ' -f1 /proc/uptime) END; }; \
                  exec 3</dev/vdb; sleep 3; r cold 1; r warm 10; sleep 8; r shared 10; echo 3 >/proc/sys/vm/drop_caches; r refilled 1; \
                  echo OVER; sleep 100000";
    let mut seconds = BTreeMap::<(&str, &str), Vec<f64>>::new();
    for _ in 0..ROUNDS {
        for (name, arguments) in ways {
            let start = Start::new().args(&["--disk", "guest/root.vhdx,ro", "--disk", &disk]);
            let guest = start.args(arguments).script(script).spawn()?;
            guest.wait_for("OVER")?;
            let mut figures = String::new();
            for read in READS {
                let [from, to] = two_numbers(&guest, &format!("TIME {read} "))?;
                seconds.entry((name, read)).or_default().push(to - from);
                let _ = write!(figures, " {read} {:.2} s", to - from);
            }
            println!("lab: {name}:{figures}");
        }
    }
    let mut figures = Figures::new();
    for (&(name, read), values) in &seconds {
        let off = seconds.get(&(OFF, read)).into_iter().flatten();
        // Ratios are of pairs of reads, because the machine's speed drifts.
        let ratios = values.iter().zip(off).map(|(own, off)| own / off);
        let (ratio, own) = (median(ratios.collect()), median(values.clone()));
        println!("lab: {name}, {read}: {own:.3} s, {ratio:.3} of {OFF}");
        figures.insert(format!("{name}_{read}_seconds"), json!(own));
        figures.insert(format!("{name}_{read}_to_off"), json!(ratio));
    }
    Ok(figures)
}

/// Measures how long a guest takes to write for the first time to pages that were merged with a file, and to pages of a
/// snapshot's memory file, which only the host's kernel maps and copies. The time of writes to the guest's own pages is
/// subtracted, as that is the time of the guest's program.
pub fn first_write_bench(out: &Path) -> Result<Figures, Failure> {
    const ROUNDS: usize = 3;
    let (disk, _) = disk(out)?;
    let disk = format!("{},ro,format=raw", disk.display());
    // The allocator puts a header of 16 bytes before a large object.
    let program = format!(
        "import os,time\n\
         m=memoryview(bytearray({WRITTEN}+4096))[4080:][:{WRITTEN}]\n\
         os.preadv(os.open('/dev/vdb',os.O_RDONLY|os.O_DIRECT),[m],0)\n\
         print('FILLED',flush=True)\n\
         input()\n\
         def w():\n\
         \x20t=time.monotonic()\n\
         \x20for i in range(0,{WRITTEN},4096):m[i]=1\n\
         \x20return time.monotonic()-t\n\
         a=w()\n\
         print('TOOK',a,min(w() for _ in range(3)),flush=True)\n\
         print('OVER',flush=True)\n"
    );
    let script = format!(
        "mount -t ext4 -o ro /dev/vda /mnt; mount -t devtmpfs dev /mnt/dev; \
         chroot /mnt /usr/bin/python3 -c \"$(printf %b {program:?})\"; sleep 100000"
    );
    let mut seconds = BTreeMap::<&str, Vec<f64>>::new();
    for round in 0..ROUNDS {
        for name in ["merged", "loaded"] {
            let share = if name == "merged" { "read" } else { "off" };
            let socket = out.join(format!("{name}-{round}.sock"));
            let text = socket.display().to_string();
            let start = Start::new()
                .args(&["--mem", "192M", "--share", share, "--api-sock", &text])
                .args(&["--disk", "guest/full.vhdx,ro", "--disk", &disk]);
            let mut guest = start.script(&script).spawn()?;
            guest.wait_for("FILLED")?;
            if name == "merged" {
                let report = wait_until_merged(&socket)?;
                let merged = number(&report, "merged_pages");
                if merged < u64::from(PAGES_WRITTEN) * 9 / 10 {
                    return Failure::claim(format!("{merged} pages are merged: {report}"));
                }
            } else {
                expect_ok(&socket, "PATCH", "/vm", &json!({"state": "Paused"}))?;
                let (state, memory) = (out.join("state"), out.join("memory"));
                let files = json!({"snapshot_path": state, "mem_file_path": memory});
                expect_ok(&socket, "PUT", "/snapshot/create", &files)?;
                drop(guest);
                guest = Start::bare(&["--restore", &state.display().to_string()]).spawn()?;
            }
            guest.type_in("\n")?;
            guest.wait_for("OVER")?;
            let [first, again] = two_numbers(&guest, "TOOK ")?;
            println!("lab: {name}: {first:.3} s, again {again:.3} s");
            seconds.entry(name).or_default().push(first - again);
        }
    }
    let mut figures = Figures::new();
    for (name, values) in seconds {
        let micros = median(values) * 1e6 / f64::from(PAGES_WRITTEN);
        println!("lab: {name}: {micros:.1} us a page");
        figures.insert(format!("{name}_us_a_page"), json!(micros));
    }
    Ok(figures)
}
