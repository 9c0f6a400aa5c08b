//! Scenarios of pmem devices: what guests read by DAX, how much memory it takes, and what is on the disks afterwards.

use std::fs;
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use serde_json::json;

use crate::guest::{Guest, Start};
use crate::programs::{fsck_after_replay, md5_of, to_raw};
use crate::result::{Failure, Figures};

const DISK: &str = "disk.vhdx";
const BASE: &str = "base.vhdx";
const WHOLE: &str = "whole.vhdx";

/// A script that waits for the device, and mounts it by DAX; `mode` is ro or rw.
pub(super) fn mounted(mode: &str) -> String {
    format!(
        "for i in $(seq 100); do [ -b /dev/pmem0 ] && break; sleep 0.1; done; \
         mount -t ext4 -o dax,{mode} /dev/pmem0 /mnt || poweroff -f; grep -q 'dax' /proc/mounts || poweroff -f; "
    )
}

fn start(pmem: &str, script: &str) -> Result<Guest, Failure> {
    Start::new().args(&["--pmem", pmem]).script(script).spawn()
}

fn coppice(args: &[&str]) -> Result<(), Failure> {
    let status = Command::new("./coppice")
        .args(args)
        .status()
        .map_err(Failure::io("run coppice"))?;
    if status.success() {
        Ok(())
    } else {
        Failure::claim(format!("coppice {args:?}: {status}"))
    }
}

pub(super) fn digest(path: &str) -> Result<String, Failure> {
    let output = Command::new("md5sum")
        .arg(path)
        .output()
        .map_err(Failure::io("run md5sum"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match text.split(' ').next() {
        Some(digest) if !digest.is_empty() => Ok(digest.to_owned()),
        Some(_) | None => Failure::claim(format!("no digest of {path}")),
    }
}

/// The memory of a VMM that is mapped from a disk's file, in KiB.
#[derive(Clone, Copy, Debug, Default)]
struct Memory {
    resident: u64,
    /// Proportional memory.
    proportional: u64,
    private: u64,
}

impl Memory {
    /// Reads the mappings of the file named `name`.
    fn of(guest: &Guest, name: &str) -> Result<Self, Failure> {
        let smaps = guest.proc().join("smaps");
        let text = fs::read_to_string(&smaps).map_err(Failure::io("read smaps"))?;
        let (mut memory, mut is_of_file) = (Self::default(), false);
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            if !first.ends_with(':') {
                is_of_file = line.ends_with(name);
                continue;
            }
            let kib: u64 = words.next().and_then(|kib| kib.parse().ok()).unwrap_or(0);
            match first {
                "Rss:" if is_of_file => memory.resident += kib,
                "Pss:" if is_of_file => memory.proportional += kib,
                "Private_Clean:" | "Private_Dirty:" if is_of_file => memory.private += kib,
                _ => {}
            }
        }
        Ok(memory)
    }

    fn figures(self) -> serde_json::Value {
        json!({
            "resident_kib": self.resident,
            "proportional_kib": self.proportional,
            "private_kib": self.private,
        })
    }
}

fn words_after(guest: &Guest, prefix: &str) -> Result<String, Failure> {
    let line = guest.line(prefix)?;
    Ok(line.split(' ').next().unwrap_or_default().to_owned())
}

/// Makes `base.vhdx` in a folder: the root file system, and a file of 40 MiB that a guest writes to it. Returns its
/// path and its digest.
fn base_with_file(out: &Path) -> Result<(String, String), Failure> {
    let base = out.join(BASE).display().to_string();
    fs::copy("guest/root.vhdx", &base).map_err(Failure::io("copy root.vhdx"))?;
    let script = "mount /dev/vda /mnt && dd if=/dev/urandom of=/mnt/file bs=64k count=640 2>/dev/null && sync \
                  && echo MD5 $(md5sum /mnt/file) && umount /mnt";
    let mut guest = Start::new()
        .args(&["--disk", &base])
        .script(script)
        .spawn()?;
    guest.expect_exit(0)?;
    let md5 = words_after(&guest, "MD5 ")?;
    Ok((base, md5))
}

/// Two guests read one disk, whose pages are in the host's memory once.
pub fn shared(out: &Path) -> Result<Figures, Failure> {
    let (base, md5) = base_with_file(out)?;
    let script = mounted("ro")
        + "M=$(awk '/^Cached/ {print $2}' /proc/meminfo); echo MD5 $(md5sum /mnt/file); \
           echo GREW $(($(awk '/^Cached/ {print $2}' /proc/meminfo) - M)) END; \
           dd if=/dev/zero of=/dev/pmem0 bs=4k count=1 conv=fsync 2>/dev/null; echo READ; read go; \
           umount /mnt; echo BYE";
    let mut guests = [start(&base, &script)?, start(&base, &script)?];
    let mut figures = Figures::new();
    for guest in &guests {
        guest.wait_for("READ")?;
    }
    for (name, guest) in ["first", "second"].into_iter().zip(&guests) {
        if words_after(guest, "MD5 ")? != md5 {
            return Failure::claim(format!("the {name} guest reads another file"));
        }
        let memory = Memory::of(guest, BASE)?;
        println!("lab: {name} guest: {memory:?}");
        // The guest has read the file of 40 MiB through the mapping, so that its own page cache has no page of it.
        let grew: i64 = words_after(guest, "GREW ")?.parse().unwrap_or(i64::MAX);
        if memory.resident < 40 << 10 || memory.private > 64 || grew > 4 << 10 {
            return Failure::claim(format!(
                "the {name} guest: {memory:?}, its cache +{grew} KiB"
            ));
        }
        figures.insert(format!("{name}_guest"), memory.figures());
        figures.insert(format!("{name}_guest_cache_kib"), json!(grew));
    }
    for guest in &mut guests {
        guest.type_in("\n")?;
        guest.expect_exit(0)?;
        guest.line("BYE")?;
        if guest.report().matches("is dropped").count() != 1 {
            return Failure::claim("a write to the disk was not told once");
        }
    }
    fs::remove_file(&base).map_err(Failure::io("remove the disk"))?;
    Ok(figures)
}

/// A guest writes to its own copy, and neither the next guest nor the file has that.
pub fn copy_on_write(out: &Path) -> Result<Figures, Failure> {
    let disk = out.join(DISK).display().to_string();
    fs::copy("guest/root.vhdx", &disk).map_err(Failure::io("copy root.vhdx"))?;
    let before = digest(&disk)?;
    let script = mounted("rw")
        + "[ -e /mnt/own ] && echo LEFT; dd if=/dev/urandom of=/tmp/own bs=64k count=64 2>/dev/null; \
           cp /tmp/own /mnt/own && sync && umount /mnt && mount -t ext4 -o dax /dev/pmem0 /mnt \
           && cmp /tmp/own /mnt/own && echo SAME; umount /mnt";
    for _ in 0..2 {
        let mut guest = start(&format!("{disk},cow"), &script)?;
        guest.expect_exit(0)?;
        guest.line("SAME")?;
        if guest.line("LEFT").is_ok() {
            return Failure::claim("a guest finds what another has written");
        }
    }
    let after = digest(&disk)?;
    fs::remove_file(&disk).map_err(Failure::io("remove the disk"))?;
    if before == after {
        Ok(Figures::new())
    } else {
        Failure::claim("the file has changed")
    }
}

/// A guest writes to a child and syncs, and its VMM is killed.
pub fn killed(out: &Path) -> Result<Figures, Failure> {
    let base = out.join(BASE).display().to_string();
    let child = out.join(DISK).display().to_string();
    fs::copy("guest/root.vhdx", &base).map_err(Failure::io("copy root.vhdx"))?;
    coppice(&["disk", "create", "--parent", &base, &child])?;
    let before = digest(&base)?;
    let script = mounted("rw")
        + "dd if=/dev/urandom of=/tmp/file bs=64k count=128 2>/dev/null; cp /tmp/file /mnt/file && sync \
           && echo MD5 $(md5sum /mnt/file) END && echo SYNCED; sleep 100000";
    let mut guest = Start::new()
        .args(&["--pmem", &format!("{child},rw")])
        .script(&script)
        .spawn()?;
    guest.wait_for("SYNCED")?;
    guest.signal(Signal::KILL)?;
    guest.wait()?;
    if digest(&base)? != before {
        return Failure::claim("the parent has changed");
    }
    // QEMU reads no differencing VHDX, so the disk is converted into one file, after its log is replayed.
    coppice(&[
        "disk",
        "convert",
        "--from",
        "vhdx",
        "--backing",
        &child,
        &out.join(WHOLE).display().to_string(),
    ])?;
    Ok(Figures::from([(
        "md5".into(),
        json!(words_after(&guest, "MD5 ")?),
    )]))
}

/// The synced data are in the child.
pub fn check_killed(out: &Path, figures: &Figures) -> Result<(), Failure> {
    let raw = to_raw(&out.join(WHOLE))?;
    fsck_after_replay(&raw)?;
    let found = json!(md5_of(&raw, "/file")?);
    if figures.get("md5") == Some(&found) {
        Ok(())
    } else {
        Failure::claim(format!(
            "the guest synced {:?}, the disk holds {found}",
            figures.get("md5")
        ))
    }
}

/// A guest writes to a raw file and ends in order, and the next guest reads it.
pub fn raw(out: &Path) -> Result<Figures, Failure> {
    let disk = out.join("disk.raw").display().to_string();
    fs::copy("guest/root.raw", &disk).map_err(Failure::io("copy root.raw"))?;
    let write = mounted("rw")
        + "dd if=/dev/urandom of=/mnt/file bs=64k count=64 2>/dev/null && umount /mnt \
           && mount -t ext4 -o dax /dev/pmem0 /mnt && echo MD5 $(md5sum /mnt/file); umount /mnt";
    let mut writer = start(&format!("{disk},rw,format=raw"), &write)?;
    writer.expect_exit(0)?;
    let read = mounted("ro") + "echo MD5 $(md5sum /mnt/file); umount /mnt";
    let mut reader = start(&format!("{disk},format=raw"), &read)?;
    reader.expect_exit(0)?;
    let (wrote, found) = (words_after(&writer, "MD5 ")?, words_after(&reader, "MD5 ")?);
    fs::remove_file(&disk).map_err(Failure::io("remove the disk"))?;
    if wrote == found {
        Ok(Figures::new())
    } else {
        Failure::claim(format!("wrote {wrote}, found {found}"))
    }
}

/// The guest mounts its root file system by DAX, as the command line says.
pub fn root(_: &Path) -> Result<Figures, Failure> {
    let mut guest = Start::new()
        .args(&["--pmem", "guest/root.vhdx,cow,root"])
        .spawn()?;
    guest.wait_for("COPPICE-ROOT")?;
    guest.type_in("echo ROOT $(grep ' / ext4' /proc/mounts); touch /x && echo WROTE; exit\n")?;
    guest.expect_exit(0)?;
    let console = guest.console();
    if console.contains("ROOT /dev/pmem0 / ext4 rw") && console.contains("dax") {
        guest.line("WROTE").map(|_| Figures::new())
    } else {
        Failure::claim("the root is not pmem by DAX")
    }
}

/// A script that times two reads of a file, 50 synced writes of 4 KiB, and a write of 8 MiB with its sync, in
/// hundredths of seconds.
const TIMES: &str = "t() { cut -d' ' -f1 /proc/uptime | tr -d .; }; \
    r() { A=$(t); dd if=/mnt/file of=/dev/null bs=64k 2>/dev/null; B=$(t); echo $1 $((B-A)) END; }; r FIRST; r SECOND; \
    w() { A=$(t); for i in $(seq 50); do dd if=/dev/zero of=/mnt/w bs=4k count=1 conv=$2 2>/dev/null; done; B=$(t); \
    echo $1 $((B-A)) END; }; w UNSYNCED notrunc; w SYNCED notrunc,fsync; \
    A=$(t); dd if=/dev/zero of=/mnt/big bs=64k count=128 conv=fsync 2>/dev/null; B=$(t); echo BIG $((B-A)) END; ";
const FREE: &str = "echo FREE $(awk '/^MemFree/ {print $2}' /proc/meminfo) END; ";

fn number(guest: &Guest, prefix: &str) -> Result<i64, Failure> {
    let text = words_after(guest, prefix)?;
    text.parse()
        .map_err(|_| Failure::Claim(format!("{prefix}{text} is no number")))
}

/// Measures a guest that reads and writes as [`TIMES`] does, on a disk of its own, and the memory of two guests that
/// read one file.
fn measured(out: &Path, base: &str, option: &str, mount: &str) -> Result<Figures, Failure> {
    let own = out.join("own.vhdx").display().to_string();
    fs::copy(base, &own).map_err(Failure::io("copy the base"))?;
    let rw = if option == "--pmem" {
        format!("{own},rw")
    } else {
        own.clone()
    };
    let script = mount.replace("MODE", "rw") + TIMES + "umount /mnt";
    let mut guest = Start::new().args(&[option, &rw]).script(&script).spawn()?;
    guest.expect_exit(0)?;
    let mut figures = Figures::new();
    for name in ["FIRST", "SECOND", "UNSYNCED", "SYNCED", "BIG"] {
        let value = number(&guest, &format!("{name} "))?;
        figures.insert(
            format!("{}_centiseconds", name.to_lowercase()),
            json!(value),
        );
    }
    let script = mount.replace("MODE", "ro") + "cat /mnt/file >/dev/null; echo READ; sleep 100000";
    let start = || {
        Start::new()
            .args(&[option, &format!("{base},ro")])
            .script(&script)
            .spawn()
    };
    let guests = [start()?, start()?];
    for guest in &guests {
        guest.wait_for("READ")?;
    }
    for (name, guest) in ["first", "second"].into_iter().zip(&guests) {
        let rollup = fs::read_to_string(guest.proc().join("smaps_rollup"))
            .map_err(Failure::io("read smaps_rollup"))?;
        let private: u64 = rollup
            .lines()
            .filter(|line| line.starts_with("Private_"))
            .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
            .sum();
        figures.insert(format!("private_kib_of_{name}_reader"), json!(private));
    }
    Ok(figures)
}

/// Compares pmem with a drive, on the same disk: times, and memory of guests that have read 40 MiB. Also measures how
/// much RAM of its guest a larger disk takes.
pub fn bench(out: &Path) -> Result<Figures, Failure> {
    let (base, _) = base_with_file(out)?;
    let drive = "mount -t ext4 -o MODE /dev/vda /mnt; ";
    let mut figures = Figures::new();
    for (name, option, mount) in [
        ("drive", "--disk", drive.to_owned()),
        ("pmem", "--pmem", mounted("MODE")),
    ] {
        let measured = measured(out, &base, option, &mount)?;
        println!("lab: {name}: {measured:?}");
        figures.insert(name.into(), json!(measured));
    }
    let free = |size: &str| -> Result<i64, Failure> {
        let disk = out.join(format!("{size}.vhdx")).display().to_string();
        coppice(&["disk", "create", "--size", size, &disk])?;
        let wait = "for i in $(seq 100); do [ -b /dev/pmem0 ] && break; sleep 0.1; done; ";
        let mut guest = start(&disk, &(wait.to_owned() + FREE))?;
        guest.expect_exit(0)?;
        number(&guest, "FREE ")
    };
    let (small, large) = (free("64M")?, free("2112M")?);
    println!("lab: free RAM with 64 MiB {small} KiB, with 2 GiB more {large} KiB");
    figures.insert("kib_of_ram_for_2_gib_of_disk".into(), json!(small - large));
    Ok(figures)
}
