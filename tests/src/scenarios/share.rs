//! Guests that share what they read.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::api::expect_ok;
use crate::guest::{Guest, Start};
use crate::result::{Failure, Figures};

const MIB: u64 = 1 << 20;
/// Of the disk that guests read.
const SIZE: u64 = 40 * MIB;
/// For a merger to come to rest.
const PATIENCE: Duration = Duration::from_secs(90);

/// A raw disk of random bytes, and its MD5.
fn disk(out: &Path) -> Result<(PathBuf, String), Failure> {
    let path = out.join("random.raw");
    let mut bytes = vec![0; SIZE as usize];
    rustix::rand::getrandom(&mut bytes[..32], rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Failure::io("getrandom")(error.into()))?;
    // Every word is another: xorshift, begun at random.
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

/// Waits until nothing is left to be compared, and says what is shared then.
fn settled(socket: &Path) -> Result<Value, Failure> {
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

fn start(socket: &Path, disk: &Path, script: &str) -> Result<Guest, Failure> {
    let disk = format!("{},ro,format=raw", disk.display());
    let socket = socket.display().to_string();
    Start::new()
        .args(&["--disk", "guest/root.vhdx,ro", "--disk", &disk])
        .args(&["--api-sock", &socket])
        .script(script)
        .spawn()
}

/// Two guests read a disk; most of what they have of it is the file's own pages, and reads the same before and after.
pub fn reads(out: &Path) -> Result<Figures, Failure> {
    let (disk, sum) = disk(out)?;
    let script = "echo FIRST $(md5sum </dev/vdb) END; read x; echo SECOND $(md5sum </dev/vdb) END; sleep 100000";
    let sockets = [out.join("a.sock"), out.join("b.sock")];
    let mut figures = Figures::new();
    let mut guests = Vec::new();
    for socket in &sockets {
        guests.push(start(socket, &disk, script)?);
    }
    for (number_of, (guest, socket)) in guests.iter_mut().zip(&sockets).enumerate() {
        guest.wait_for(" END")?;
        let report = settled(socket)?;
        println!("lab: guest {number_of}: {report}");
        let expected = SIZE / 4096 * 9 / 10;
        let merged = number(&report, "merged_pages") + number(&report, "placed_pages");
        if merged < expected {
            return Failure::claim(format!(
                "{merged} pages are shared, not {expected}: {report}"
            ));
        }
        guest.type_in("\n")?;
        let again = guest.wait_for("SECOND");
        again?;
        guest.wait_for("SECOND")?;
        std::thread::sleep(Duration::from_millis(200));
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

/// The file under a mapping is cut: who reads the pages again ends with a report that names it, who does not read them goes on, and so does who has
/// another file.
pub fn cut_file(out: &Path) -> Result<Figures, Failure> {
    let (cut, _) = disk(out)?;
    let other = out.join("other.raw");
    fs::copy(&cut, &other).map_err(Failure::io("copy a disk"))?;
    // The disk stays open, so that the guest keeps the pages that it has read.
    let script = "exec 3</dev/vdb; md5sum </dev/vdb; echo READ END; read x; md5sum </dev/vdb; echo AGAIN END; sleep 100000";
    let names = ["a", "b", "c"];
    let sockets = names.map(|name| out.join(format!("{name}.sock")));
    let mut guests = Vec::new();
    for (socket, disk) in sockets.iter().zip([&cut, &cut, &other]) {
        guests.push(start(socket, disk, script)?);
    }
    for (guest, socket) in guests.iter().zip(&sockets) {
        guest.wait_for("READ END")?;
        let report = settled(socket)?;
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
    // Whoever asks what this one shares makes it look at its files.
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
    let (said, file) = (guest.report(), file.display().to_string());
    let named = |line: &&str| {
        line.starts_with("coppice: guest page 0x")
            && line.contains(&file)
            && line.contains(" at offset 0x")
    };
    match said.lines().find(named) {
        Some(line) => println!("lab: {line}"),
        None => return Failure::claim(format!("no report names {file}")),
    }
    Ok(())
}

/// Temporary.
pub fn anatomy(out: &Path) -> Result<Figures, Failure> {
    let socket = out.join("a.sock");
    let script = "mount -t ext4 -o ro /dev/vda /mnt; md5sum /mnt/data/40M; sleep 12; cat /proc/meminfo; cat /proc/slabinfo | awk '{print $3*$4/1024, $1}' | sort -n | tail -25; cat /proc/iomem; cat /proc/kpageflags >/tmp/k; dd if=/tmp/k of=/dev/vdb bs=64k conv=fsync; cat /proc/vmallocinfo | sort -k2 -n | tail -40; dmesg | head -100; echo SETTLED; sleep 10000";
    fs::write(out.join("k.raw"), vec![0u8; 1 << 20]).map_err(Failure::io("k"))?;
    let guest = Start::new()
        .args(&[
            "--disk",
            "guest/bench.vhdx,ro",
            "--disk",
            &format!("{},format=raw", out.join("k.raw").display()),
        ])
        .args(&["--api-sock", &socket.display().to_string()])
        .script(script)
        .spawn()?;
    guest.wait_for("SETTLED")?;
    std::thread::sleep(Duration::from_secs(2));
    println!("lab: {}", sharing(&socket)?);
    fs::copy(guest.proc().join("maps"), out.join("maps")).map_err(Failure::io("maps"))?;
    fs::copy(guest.proc().join("smaps"), out.join("smaps")).map_err(Failure::io("maps"))?;
    let maps = fs::read_to_string(out.join("maps")).map_err(Failure::io("maps"))?;
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for line in maps.lines() {
        let (a, b) = line
            .split(' ')
            .next()
            .unwrap_or("")
            .split_once('-')
            .unwrap_or(("0", "0"));
        let (a, b) = (
            u64::from_str_radix(a, 16).unwrap_or(0),
            u64::from_str_radix(b, 16).unwrap_or(0),
        );
        match runs.last_mut() {
            Some(last) if last.1 == a => last.1 = b,
            _ => runs.push((a, b)),
        }
    }
    println!("lab: runs {runs:x?}");
    for (a, b) in runs {
        if b - a >= 128 << 20 {
            use std::os::unix::fs::FileExt;
            let file =
                fs::File::open(guest.proc().join("pagemap")).map_err(Failure::io("pagemap"))?;
            let mut bytes = vec![0; ((b - a) / 4096 * 8) as usize];
            file.read_exact_at(&mut bytes, a / 4096 * 8)
                .map_err(Failure::io("pagemap"))?;
            fs::write(out.join(format!("pagemap-{a:x}")), bytes).map_err(Failure::io("pagemap"))?;
        }
    }
    drop(guest);
    Ok(Figures::new())
}
