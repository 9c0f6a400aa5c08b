//! Figures of Coppice and a peer, and the demo with four guests.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use super::boot::{unpacked, uptime};
use crate::guest::{Guest, Start};
use crate::result::{Failure, Figures};

const GUEST_KIB: u64 = 128 << 10;
/// How often each VMM boots.
const BOOTS: usize = 5;
const IDLE: &str = "mount -o ro /dev/vda /mnt; echo IDLE; sleep 100000";
/// How long a guest idles after its boot, before it is measured.
const IDLE_TIME: Duration = Duration::from_secs(5);
/// How long wake-ups are counted.
const OBSERVE: Duration = Duration::from_secs(10);

fn read(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(Failure::io(path.display().to_string()))
}

/// The memory of a VMM's process, in KiB.
#[derive(Default)]
struct Memory {
    /// Resident guest RAM.
    ram: u64,
    /// Private memory beside guest RAM.
    beside: u64,
}

/// A mapping of `smaps`.
#[derive(Default)]
struct Mapping {
    start: u64,
    end: u64,
    rss: u64,
    private: u64,
}

fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next().unwrap_or_default(), words.next());
        let kib: u64 = value.and_then(|value| value.parse().ok()).unwrap_or(0);
        let address = |text| u64::from_str_radix(text, 16).ok();
        let range = name
            .split_once('-')
            .and_then(|(start, end)| Some((address(start)?, address(end)?)));
        match (range, mappings.last_mut()) {
            (Some((start, end)), _) => mappings.push(Mapping {
                start,
                end,
                ..Mapping::default()
            }),
            (None, Some(last)) => match name {
                "Rss:" => last.rss += kib,
                "Private_Clean:" | "Private_Dirty:" => last.private += kib,
                _ => {}
            },
            (None, None) => {}
        }
    }
    mappings
}

impl Memory {
    /// Reads `smaps`. Guest RAM is a run of adjacent mappings of its size, because sharing cuts it in pieces. Of
    /// several such runs it is the one that is used most: an allocator may have reserved as much.
    fn of(guest: &Guest) -> Result<Self, Failure> {
        let mappings = mappings(&read(&guest.proc().join("smaps"))?);
        let all: u64 = mappings.iter().map(|mapping| mapping.private).sum();
        let rss = |run: &[Mapping]| run.iter().map(|mapping| mapping.rss).sum::<u64>();
        let ram = mappings
            .chunk_by(|a, b| a.end == b.start)
            .filter(|run| {
                let len: u64 = run.iter().map(|mapping| mapping.end - mapping.start).sum();
                len >> 10 >= GUEST_KIB
            })
            .max_by_key(|run| rss(run));
        let Some(ram) = ram else {
            return Failure::claim("no run of mappings is as long as guest RAM");
        };
        let private: u64 = ram.iter().map(|mapping| mapping.private).sum();
        Ok(Self {
            ram: rss(ram),
            beside: all - private,
        })
    }
}

/// Wake-ups so far of the threads of a VMM, by its folder in `/proc`: of vCPUs, and of all other threads.
pub fn wake_ups(process: &Path) -> Result<(u64, u64), Failure> {
    let (mut vcpus, mut others) = (0, 0);
    let tasks = fs::read_dir(process.join("task")).map_err(Failure::io("read the threads"))?;
    for task in tasks.filter_map(Result::ok) {
        let name = read(&task.path().join("comm"))?;
        let status = read(&task.path().join("status"))?;
        let count = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        let count: u64 = count
            .and_then(|count| count.trim().parse().ok())
            .unwrap_or(0);
        // These are the names of vCPU threads of Coppice and of QEMU.
        if name.starts_with("vcpu") || name.starts_with("CPU ") {
            vcpus += count;
        } else {
            others += count;
        }
    }
    Ok((vcpus, others))
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A VMM that is measured.
struct Candidate {
    name: &'static str,
    start: fn() -> Result<Guest, Failure>,
    uptimes: Vec<f64>,
    starts: Vec<f64>,
}

impl Candidate {
    const fn new(name: &'static str, start: fn() -> Result<Guest, Failure>) -> Self {
        Self {
            name,
            start,
            uptimes: Vec::new(),
            starts: Vec::new(),
        }
    }

    fn boot(&mut self) -> Result<(), Failure> {
        let guest = (self.start)()?;
        let to_init = guest.wait_for("COPPICE-INIT uptime=")?;
        guest.wait_for("IDLE")?;
        self.uptimes.push(uptime(&guest)?);
        self.starts.push(to_init.as_secs_f64());
        Ok(())
    }

    fn measure_idle(self, out: &Path) -> Result<Figures, Failure> {
        // Two guests run, so that pages of the program count as shared.
        let (guest, other) = ((self.start)()?, (self.start)()?);
        guest.wait_for("IDLE")?;
        other.wait_for("IDLE")?;
        std::thread::sleep(IDLE_TIME);
        let before = wake_ups(&guest.proc())?;
        std::thread::sleep(OBSERVE);
        let after = wake_ups(&guest.proc())?;
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

fn shared(mode: &str) -> Result<Guest, Failure> {
    let start = Start::new().args(&["--share", mode, "--disk", "guest/root.vhdx,ro"]);
    start.script(IDLE).spawn()
}

fn peer() -> Result<Guest, Failure> {
    Start::peer(&unpacked()?, "guest/root.vhdx,format=vhdx")
        .script(IDLE)
        .spawn()
}

/// Measures boot times, each VMM alone and in turns, and then memory and wake-ups of idle guests.
pub fn bench(out: &Path) -> Result<Figures, Failure> {
    let mut candidates = [
        Candidate::new("coppice", coppice),
        Candidate::new("coppice_share_off", || shared("off")),
        Candidate::new("qemu_microvm", peer),
    ];
    in_turns(&mut candidates)?;
    let mut figures = Figures::new();
    for candidate in candidates {
        let (name, measured) = (candidate.name, candidate.measure_idle(out)?);
        for (what, value) in &measured {
            println!("lab: {name}: {what} {value}");
        }
        figures.insert(name.into(), json!(measured));
    }
    Ok(figures)
}

/// Measures the boot times of each mode of sharing, alone and in turns, as ratios to those of a guest that shares
/// nothing.
pub fn boots(_: &Path) -> Result<Figures, Failure> {
    let mut candidates = [
        Candidate::new("off", || shared("off")),
        Candidate::new("boot", || shared("boot")),
        Candidate::new("read", || shared("read")),
        Candidate::new("all", || shared("all")),
    ];
    in_turns(&mut candidates)?;
    let [off, others @ ..] = candidates;
    let mut figures = Figures::new();
    for other in others {
        // Ratios are of pairs of boots, because the machine's speed drifts.
        let ratios = off
            .starts
            .iter()
            .zip(&other.starts)
            .map(|(off, other)| other / off);
        let ratio = median(ratios.collect());
        let name = other.name;
        println!(
            "lab: share {name}: {:.2?} s to /init, off {:.2?}; ratio {ratio:.3}",
            other.starts, off.starts
        );
        figures.insert(format!("share_{name}_to_off"), json!(ratio));
    }
    Ok(figures)
}

fn in_turns(candidates: &mut [Candidate]) -> Result<(), Failure> {
    // A first boot, which is not measured, unpacks the kernel into the cache, and has its reference image made.
    coppice()?.wait_for("IDLE")?;
    let warmed = Command::new("./coppice")
        .args(["image", "warm", "--kernel", "guest/vmlinuz"])
        .status()
        .map_err(Failure::io("run coppice image warm"))?;
    if !warmed.success() {
        return Failure::claim("coppice image warm fails");
    }
    for _ in 0..BOOTS {
        for candidate in &mut *candidates {
            candidate.boot()?;
        }
    }
    Ok(())
}

/// Runs fio in a guest, in turns on a VHDX and on a raw disk with the same content, through the same virtio-blk.
pub fn disks(out: &Path) -> Result<Figures, Failure> {
    const MIB: usize = 1 << 20;
    const SIZE: usize = 64;
    let (raw, vhdx) = (out.join("disk.raw"), out.join("disk.vhdx"));
    fs::write(&raw, vec![0x5A; SIZE * MIB]).map_err(Failure::io("write a raw disk"))?;
    let converted = Command::new("./coppice")
        .args(["disk", "convert"])
        .args([&raw, &vhdx])
        .status()
        .map_err(Failure::io("run coppice disk"))?;
    if !converted.success() {
        return Failure::claim("coppice disk convert fails");
    }
    let cases = [
        ("read_4k_qd1", "randread 4k 1"),
        ("read_4k_qd32", "randread 4k 32"),
        ("write_4k_qd32", "randwrite 4k 32"),
        ("read_64k_qd32", "read 64k 32"),
        ("write_64k_qd32", "write 64k 32"),
    ];
    // The 8th and the 49th field of fio's terse output are the rates of reads and writes.
    let mut script = "mount -o ro /dev/vda /mnt; L=/mnt/lib; f() { for r in 0 1 2; do for d in vdb vdc; do \
        echo FIO $1 $d $r $($L/ld-linux-x86-64.so.2 --library-path $L /mnt/fio --name=x --filename=/dev/$d --direct=1 \
        --ioengine=libaio --runtime=3 --time_based --rw=$2 --bs=$3 --iodepth=$4 --minimal | cut -d';' -f8,49) END; done; done; }"
        .to_owned();
    for (name, options) in cases {
        script.push_str("\nf ");
        script.push_str(name);
        script.push(' ');
        script.push_str(options);
    }
    let mut guest = Start::new()
        .args(&["--mem", "256M", "--disk", "guest/fio.raw,ro,format=raw"])
        .args(&["--disk", &vhdx.to_string_lossy()])
        .args(&["--disk", &format!("{},format=raw", raw.display())])
        .script(&script)
        .spawn()?;
    guest.expect_exit(0)?;
    let mut figures = Figures::new();
    for (name, _) in cases {
        let rate = |disk: &str| -> Result<f64, Failure> {
            let mut rates = Vec::new();
            for round in 0..3 {
                let line = guest.line(&format!("FIO {name} {disk} {round} "))?;
                let rate = line
                    .trim_end_matches(" END")
                    .split(';')
                    .filter_map(|text| text.trim().parse::<f64>().ok())
                    .fold(0.0, f64::max);
                rates.push(rate);
            }
            Ok(median(rates))
        };
        let (vhdx, raw) = (rate("vdb")?, rate("vdc")?);
        println!(
            "lab: fio {name}: VHDX {vhdx:.0} IOPS, raw {raw:.0}, ratio {:.2}",
            vhdx / raw
        );
        figures.insert(
            name.into(),
            json!({"vhdx_iops": vhdx, "raw_iops": raw, "ratio": vhdx / raw}),
        );
    }
    Ok(figures)
}

/// Boots four guests from one base disk, each to a prompt.
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
