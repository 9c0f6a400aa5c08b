//! Figures, and a look at four guests.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::boot::uptime;
use crate::guest::{Guest, Start};
use crate::result::{Failure, Figures};

const GUEST_MIB: u64 = 128;

fn read(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(Failure::io(path.display().to_string()))
}

/// KiB that the VMM alone has, beside guest RAM: `Private_*` of `smaps`, without mappings as large as guest RAM.
fn private_kib(guest: &Guest) -> Result<u64, Failure> {
    let (mut total, mut ram) = (0, false);
    for line in read(&guest.proc().join("smaps"))?.lines() {
        let mut words = line.split_whitespace();
        let (name, value) = (
            words.next().unwrap_or_default(),
            words.next().unwrap_or_default(),
        );
        let kib: u64 = value.parse().unwrap_or(0);
        match name {
            "Size:" => ram = kib == GUEST_MIB << 10,
            "Private_Clean:" | "Private_Dirty:" if !ram => total += kib,
            _ => {}
        }
    }
    Ok(total)
}

/// KiB of guest RAM that the host holds.
fn guest_kib(guest: &Guest) -> Result<u64, Failure> {
    let (mut total, mut ram) = (0, false);
    for line in read(&guest.proc().join("smaps"))?.lines() {
        let mut words = line.split_whitespace();
        let (name, value) = (
            words.next().unwrap_or_default(),
            words.next().unwrap_or_default(),
        );
        let kib: u64 = value.parse().unwrap_or(0);
        match name {
            "Size:" => ram = kib == GUEST_MIB << 10,
            "Rss:" if ram => total += kib,
            _ => {}
        }
    }
    Ok(total)
}

/// Wake-ups so far of the VMM's threads, without vCPUs.
fn wake_ups(guest: &Guest) -> Result<u64, Failure> {
    let mut total = 0;
    let tasks = fs::read_dir(guest.proc().join("task")).map_err(Failure::io("read the threads"))?;
    for task in tasks.filter_map(Result::ok) {
        if read(&task.path().join("comm"))?.starts_with("vcpu") {
            continue;
        }
        let status = read(&task.path().join("status"))?;
        let count = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        total += count
            .and_then(|count| count.trim().parse::<u64>().ok())
            .unwrap_or(0);
    }
    Ok(total)
}

/// Boot times, alone; then memory and wake-ups of two idle guests.
pub fn bench(_: &Path) -> Result<Figures, Failure> {
    let idle = "mount -o ro /dev/vda /mnt; echo IDLE; sleep 100000";
    let start = || {
        Start::new()
            .args(&["--disk", "guest/root.vhdx,ro"])
            .script(idle)
            .spawn()
    };
    let mut figures = Figures::new();
    let (mut uptimes, mut starts) = (Vec::new(), Vec::new());
    // The first boot unpacks the kernel into the cache.
    for _ in 0..4 {
        let guest = start()?;
        let to_init = guest.wait_for("COPPICE-INIT uptime=")?;
        guest.wait_for("IDLE")?;
        uptimes.push(uptime(&guest)?);
        starts.push(to_init.as_secs_f64());
    }
    figures.insert("guest_seconds_at_init".into(), json!(uptimes));
    figures.insert("seconds_from_process_start_to_init".into(), json!(starts));
    let guests = [start()?, start()?];
    for guest in &guests {
        guest.wait_for("IDLE")?;
    }
    std::thread::sleep(Duration::from_secs(5));
    let before = wake_ups(&guests[0])?;
    std::thread::sleep(Duration::from_secs(10));
    figures.insert(
        "vmm_wake_ups_in_10_idle_seconds".into(),
        json!(wake_ups(&guests[0])? - before),
    );
    figures.insert(
        "vmm_private_kib_beside_guest_ram".into(),
        json!(private_kib(&guests[0])?),
    );
    figures.insert(
        "guest_ram_resident_kib".into(),
        json!(guest_kib(&guests[0])?),
    );
    Ok(figures)
}

/// Four guests on one base, each at its own prompt.
pub fn demo(_: &Path) -> Result<Figures, Failure> {
    let script = "mount -o ro /dev/vda /mnt && echo \"GUEST $(uname -r), $(nproc) CPU, $(md5sum /mnt/bin/busybox)\"; sleep 100000";
    let guests: Result<Vec<_>, _> = (0..4)
        .map(|_| {
            Start::new()
                .args(&["--disk", "guest/root.vhdx,ro"])
                .script(script)
                .spawn()
        })
        .collect();
    let guests = guests?;
    let mut figures = Figures::new();
    for (number, guest) in guests.iter().enumerate() {
        guest.wait_for("GUEST ")?;
        let (line, ram, vmm) = (
            guest.line("GUEST ")?,
            guest_kib(guest)?,
            private_kib(guest)?,
        );
        println!("lab: guest {number}: {line}; {ram} KiB of RAM in use, {vmm} KiB beside it");
        figures.insert(format!("guest_{number}"), json!(line));
    }
    Ok(figures)
}
