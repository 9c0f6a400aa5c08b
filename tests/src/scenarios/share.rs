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

/// Temporary.
pub fn anatomy(out: &Path) -> Result<Figures, Failure> {
    let socket = out.join("a.sock");
    let script = "mount -t ext4 -o ro /dev/vda /mnt; md5sum /mnt/data/40M; cat /proc/meminfo | head -3; cat /sys/bus/virtio/devices/*/device /sys/bus/virtio/devices/*/features; cat /sys/bus/virtio/devices/*/status; cat /sys/module/page_reporting/parameters/*; cat /proc/interrupts; echo SETTLED; sleep 10; cat /proc/meminfo | head -3; cat /proc/interrupts; for p in /proc/[0-9]*; do cat $p/comm $p/wchan; echo; done; dmesg | tail -30; sleep 10000";
    let guest = Start::new()
        .args(&["--disk", "guest/bench.vhdx,ro"])
        .args(&["--api-sock", &socket.display().to_string()])
        .script(script)
        .spawn()?;
    guest.wait_for("SETTLED")?;
    for _ in 0..20 {
        println!("lab: {}", sharing(&socket)?);
        std::thread::sleep(Duration::from_secs(1));
    }
    std::thread::sleep(Duration::from_secs(5));
    println!("{}", guest.console());
    Ok(Figures::new())
}
