//! Figures, beside a peer's, and a look at four guests.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::boot::{unpacked, uptime};
use crate::guest::{Guest, Start};
use crate::result::{Failure, Figures};

const GUEST_KIB: u64 = 128 << 10;
/// Boots of each VMM, one after the other.
const BOOTS: usize = 5;
const IDLE: &str = "mount -o ro /dev/vda /mnt; echo IDLE; sleep 100000";
/// For a guest to come to rest after its boot.
const SETTLE: Duration = Duration::from_secs(5);
/// For which wake-ups are counted.
const OBSERVE: Duration = Duration::from_secs(10);

fn read(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(Failure::io(path.display().to_string()))
}

/// What a VMM's process holds, in KiB.
#[derive(Default)]
struct Memory {
    /// Of guest RAM, in the host's memory.
    ram: u64,
    /// Private to the process, beside guest RAM.
    beside: u64,
}

impl Memory {
    /// From `smaps`, where guest RAM is the one mapping of its size.
    fn of(guest: &Guest) -> Result<Self, Failure> {
        let (mut memory, mut in_ram, mut rams) = (Self::default(), false, 0);
        for line in read(&guest.proc().join("smaps"))?.lines() {
            let mut words = line.split_whitespace();
            let (name, value) = (words.next(), words.next());
            let kib: u64 = value.and_then(|value| value.parse().ok()).unwrap_or(0);
            match name.unwrap_or_default() {
                "Size:" => {
                    in_ram = kib == GUEST_KIB;
                    rams += u64::from(in_ram);
                }
                "Rss:" if in_ram => memory.ram += kib,
                "Private_Clean:" | "Private_Dirty:" if !in_ram => memory.beside += kib,
                _ => {}
            }
        }
        if rams == 1 {
            Ok(memory)
        } else {
            Failure::claim(format!("{rams} mappings have the size of guest RAM"))
        }
    }
}

/// Wake-ups so far of the VMM's threads: of vCPUs, and of all others.
fn wake_ups(guest: &Guest) -> Result<(u64, u64), Failure> {
    let (mut vcpus, mut others) = (0, 0);
    let tasks = fs::read_dir(guest.proc().join("task")).map_err(Failure::io("read the threads"))?;
    for task in tasks.filter_map(Result::ok) {
        let name = read(&task.path().join("comm"))?;
        let status = read(&task.path().join("status"))?;
        let count = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        let count: u64 = count
            .and_then(|count| count.trim().parse().ok())
            .unwrap_or(0);
        // Coppice's names, and QEMU's.
        if name.starts_with("vcpu") || name.starts_with("CPU ") {
            vcpus += count;
        } else {
            others += count;
        }
    }
    Ok((vcpus, others))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A VMM under measurement.
struct Candidate {
    name: &'static str,
    start: fn() -> Result<Guest, Failure>,
    uptimes: Vec<f64>,
    starts: Vec<f64>,
}

impl Candidate {
    fn boot(&mut self) -> Result<(), Failure> {
        let guest = (self.start)()?;
        let to_init = guest.wait_for("COPPICE-INIT uptime=")?;
        guest.wait_for("IDLE")?;
        self.uptimes.push(uptime(&guest)?);
        self.starts.push(to_init.as_secs_f64());
        Ok(())
    }

    fn rest(self, out: &Path) -> Result<Figures, Failure> {
        // Two, so that pages of the program count as what they are: shared.
        let (guest, other) = ((self.start)()?, (self.start)()?);
        guest.wait_for("IDLE")?;
        other.wait_for("IDLE")?;
        std::thread::sleep(SETTLE);
        let before = wake_ups(&guest)?;
        std::thread::sleep(OBSERVE);
        let after = wake_ups(&guest)?;
        let memory = Memory::of(&guest)?;
        let smaps = out.join(format!("{}.smaps", self.name));
        fs::write(smaps, read(&guest.proc().join("smaps"))?).map_err(Failure::io("keep smaps"))?;
        Ok(Figures::from([
            ("guest_seconds_at_init".into(), json!(median(self.uptimes))),
            (
                "seconds_from_process_start_to_init".into(),
                json!(median(self.starts)),
            ),
            ("private_kib_beside_guest_ram".into(), json!(memory.beside)),
            ("guest_ram_resident_kib".into(), json!(memory.ram)),
            (
                "vcpu_wake_ups_in_10_idle_seconds".into(),
                json!(after.0 - before.0),
            ),
            (
                "other_wake_ups_in_10_idle_seconds".into(),
                json!(after.1 - before.1),
            ),
        ]))
    }
}

fn coppice() -> Result<Guest, Failure> {
    let start = Start::new().args(&["--disk", "guest/root.vhdx,ro"]);
    start.script(IDLE).spawn()
}

fn peer() -> Result<Guest, Failure> {
    Start::peer(&unpacked()?).script(IDLE).spawn()
}

/// Boot times, each VMM alone and in turns; then memory and wake-ups of idle guests.
pub fn bench(out: &Path) -> Result<Figures, Failure> {
    let candidate = |name, start| Candidate {
        name,
        start,
        uptimes: Vec::new(),
        starts: Vec::new(),
    };
    let mut candidates = [
        candidate("coppice", coppice),
        candidate("qemu_microvm", peer),
    ];
    // The first boot unpacks the kernel into the cache, for both.
    coppice()?.wait_for("IDLE")?;
    for _ in 0..BOOTS {
        for candidate in &mut candidates {
            candidate.boot()?;
        }
    }
    let mut figures = Figures::new();
    for candidate in candidates {
        let (name, measured) = (candidate.name, candidate.rest(out)?);
        for (what, value) in &measured {
            println!("lab: {name}: {what} {value}");
        }
        figures.insert(name.into(), json!(measured));
    }
    Ok(figures)
}

/// Four guests on one base, each at its own prompt.
pub fn demo(_: &Path) -> Result<Figures, Failure> {
    let script = "mount -o ro /dev/vda /mnt && echo \"GUEST $(uname -r), $(nproc) CPU, $(md5sum /mnt/bin/busybox)\"; echo SHOWN; sleep 100000";
    let start = || {
        Start::new()
            .args(&["--disk", "guest/root.vhdx,ro"])
            .script(script)
            .spawn()
    };
    let guests: Vec<_> = (0..4).map(|_| start()).collect::<Result<_, _>>()?;
    let mut figures = Figures::new();
    for (number, guest) in guests.iter().enumerate() {
        guest.wait_for("SHOWN")?;
        let (line, memory) = (guest.line("GUEST ")?, Memory::of(guest)?);
        let (ram, beside) = (memory.ram, memory.beside);
        println!("lab: guest {number}: {line}; {ram} KiB of RAM in use, {beside} KiB beside it");
        figures.insert(format!("guest_{number}"), json!(line));
    }
    Ok(figures)
}
