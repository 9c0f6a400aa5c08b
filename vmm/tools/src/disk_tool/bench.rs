//! `coppice disk bench`: compares the disk engine on a VHDX with the same engine on a raw file, and both with peers.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use storage::io::{DiskQueue, EngineKind, OwnedBuffer, Request};
use storage::vhdx::{ChildOptions, CreateOptions, Vhdx};
use storage::{ByteRange, Disk, Format, OpenOptions, Progress};

use super::error::ToolError;
use super::outcome::{Outcome, Output};
use super::size::{block_size, human};
use super::watch::Watch;
use config::Bytes;
use host::report::chain;

/// Layers of the chain whose reads are compared with those of a single file.
const LAYERS: u32 = 8;

/// `coppice disk bench`.
#[derive(Debug, Args)]
pub struct Bench {
    /// Make the scratch files in this folder, and remove them at the end.
    #[arg(default_value = ".")]
    folder: PathBuf,
    /// Size of the part of the disk that is used.
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    size: Bytes,
    /// Size of a payload block of the VHDX.
    #[arg(long, value_name = "SIZE", default_value = "2M")]
    block_size: Bytes,
    /// How long each measurement takes, in milliseconds; allocating ones end where the space does.
    #[arg(long, value_name = "MS", default_value = "500")]
    time: u64,
    /// Measure sparse allocating writes of qemu-img bench too: its vhdx and qcow2, and raw files.
    #[arg(long)]
    peer: bool,
    #[command(flatten)]
    pub(super) output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Read,
    Overwrite,
    Allocate,
    Trim,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Overwrite => "overwrite",
            Self::Allocate => "allocate",
            Self::Trim => "trim",
        }
    }
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
struct Case {
    operation: Operation,
    /// Bytes of a request.
    len: u64,
    depth: usize,
    random: bool,
}

/// The result of a measurement.
#[derive(Clone, Copy, Debug, Default)]
struct Measured {
    /// Requests a second.
    rate: f64,
    p50: Duration,
    p99: Duration,
}

/// A generator of pseudo-random numbers for offsets (xorshift). Every disk gets the same offsets.
struct RandomOffsets(u64);

impl RandomOffsets {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

impl Bench {
    pub(super) fn run(&self, watch: &Watch) -> Result<Outcome, ToolError> {
        let scratch = tempfile::Builder::new()
            .prefix(".coppice-bench-")
            .tempdir_in(&self.folder)
            .map_err(ToolError::io(format!(
                "make a scratch folder in {}",
                self.folder.display()
            )))?;
        // This is measured first, before the process has freed memory that it could use again.
        let (opens, opens_table) = opens(scratch.path())?;
        let mut rows = Vec::new();
        let mut text = format!(
            "{:<10} {:>6} {:>5} {:<10} {:>12} {:>12} {:>6} {:>10} {:>10}\n",
            "operation", "bytes", "depth", "order", "raw IOPS", "VHDX IOPS", "ratio", "p50", "p99"
        );
        let cases = cases();
        for (number, case) in (0..).zip(&cases) {
            watch.advance(number, cases.len() as u64);
            let raw = self.measure(scratch.path(), Format::Raw, 1, *case, watch)?;
            let vhdx = self.measure(scratch.path(), Format::Vhdx, 1, *case, watch)?;
            let ratio = vhdx.rate / raw.rate;
            let _ = writeln!(
                text,
                "{:<10} {:>6} {:>5} {:<10} {:>12.0} {:>12.0} {:>6.2} {:>10} {:>10}",
                case.operation.name(),
                human(case.len).replace("iB", "").replace(' ', ""),
                case.depth,
                if case.random { "random" } else { "sequential" },
                raw.rate,
                vhdx.rate,
                ratio,
                latency(vhdx.p50),
                latency(vhdx.p99)
            );
            let mut row = json!({
                "operation": case.operation.name(),
                "bytes": case.len,
                "depth": case.depth,
                "order": if case.random { "random" } else { "sequential" },
                "raw_iops": raw.rate,
                "vhdx_iops": vhdx.rate,
                "ratio": ratio,
                "vhdx_p50_us": vhdx.p50.as_secs_f64() * 1e6,
                "vhdx_p99_us": vhdx.p99.as_secs_f64() * 1e6,
            });
            if case.operation == Operation::Read {
                let chain = self.measure(scratch.path(), Format::Vhdx, LAYERS, *case, watch)?;
                let _ = writeln!(
                    text,
                    "{:>46} {LAYERS} layers {:>12.0} {:>6.2} of one",
                    "",
                    chain.rate,
                    chain.rate / vhdx.rate
                );
                row["chain_iops"] = chain.rate.into();
                row["chain_ratio"] = (chain.rate / vhdx.rate).into();
            }
            rows.push(row);
        }
        let mut json = json!({"folder": self.folder, "size": self.size.0, "cases": rows});
        json["open"] = opens;
        text += &opens_table;
        if self.peer {
            let (peers, table) = peers(scratch.path(), watch)?;
            json["sparse_allocation"] = peers;
            text += &table;
        }
        Ok(Outcome::new(json, text))
    }

    /// Makes a disk, fills it unless the case allocates its blocks, and measures.
    fn measure(
        &self,
        folder: &Path,
        format: Format,
        layers: u32,
        case: Case,
        watch: &Watch,
    ) -> Result<Measured, ToolError> {
        let path = folder.join("disk");
        let mut files = vec![path.clone()];
        let size = self.size.0;
        let failed = || ToolError::disk(&path, watch);
        match format {
            Format::Raw => {
                let file = std::fs::File::create(&path)
                    .map_err(ToolError::io(format!("make {}", path.display())))?;
                file.set_len(size)
                    .map_err(ToolError::io(format!("make {}", path.display())))?;
            }
            Format::Vhdx => {
                let options = CreateOptions {
                    block_size: block_size(self.block_size)?,
                    ..CreateOptions::new(size)
                };
                Vhdx::create(&path, &options)?;
            }
        }
        let open = |path: &Path, read_only| {
            storage::open(
                path,
                &OpenOptions {
                    format: Some(format),
                    read_only,
                    ..OpenOptions::default()
                },
            )
        };
        if case.operation != Operation::Allocate {
            let disk = open(&path, false)?;
            fill(&*disk, watch).map_err(failed())?;
            disk.close().map_err(failed())?;
        }
        for layer in 1..layers {
            let child = folder.join(format!("layer{layer}"));
            let below = files.last().unwrap_or(&path).clone();
            Vhdx::create_child(&child, &below, &ChildOptions::default())?;
            files.push(child);
        }
        let top = files.last().unwrap_or(&path).clone();
        let disk = open(&top, case.operation == Operation::Read)?;
        let measured = self.drive(&disk, case, watch);
        drop(disk);
        for file in files {
            std::fs::remove_file(&file)
                .map_err(ToolError::io(format!("remove {}", file.display())))?;
        }
        measured
    }

    fn drive(
        &self,
        disk: &Arc<dyn Disk>,
        case: Case,
        watch: &Watch,
    ) -> Result<Measured, ToolError> {
        let failed =
            |error: storage::io::IoError| ToolError::Refused(format!("bench: {}", chain(&error)));
        let mut queue = DiskQueue::new(Arc::clone(disk), EngineKind::Auto)
            .map_err(ToolError::io("start the engine"))?;
        let slots = self.size.0 / case.len;
        let mut offsets = RandomOffsets(0x9E37_79B9_7F4A_7C15);
        let mut number = 0;
        let mut idle: Vec<OwnedBuffer> = (0..case.depth)
            .map(|_| OwnedBuffer::new(vec![0x5A; case.len as usize]))
            .collect();
        let mut latencies = Vec::new();
        let started = Instant::now();
        let limit = Duration::from_millis(self.time);
        let allocates = matches!(case.operation, Operation::Allocate | Operation::Trim);
        let mut done = 0_u64;
        let mut in_flight = 0;
        loop {
            let ended = started.elapsed() >= limit || (allocates && number >= slots);
            if ended && in_flight == 0 {
                break;
            }
            let begun = Instant::now();
            while !ended
                && (!allocates || number < slots)
                && let Some(buffer) = idle.pop()
            {
                let slot = if case.random {
                    offsets.next() % slots
                } else {
                    number % slots
                };
                number += 1;
                let Some(range) = ByteRange::new(slot * case.len, case.len) else {
                    break;
                };
                let (request, buffer) = match case.operation {
                    Operation::Read => (Request::Read(range), buffer),
                    Operation::Overwrite | Operation::Allocate => (Request::Write(range), buffer),
                    Operation::Trim => (Request::Discard(vec![range]), buffer),
                };
                queue.submit(request, buffer);
                in_flight += 1;
            }
            queue.kick();
            let before = done;
            while done == before {
                while let Some(completion) = queue.completion() {
                    completion.result.map_err(failed)?;
                    idle.push(completion.buffer);
                    in_flight -= 1;
                    done += 1;
                }
                if done == before {
                    queue.wait();
                }
            }
            if case.depth == 1 {
                latencies.push(begun.elapsed());
            }
            if watch.is_cancelled() {
                return Err(ToolError::Cancelled(watch.signal()));
            }
        }
        let elapsed = started.elapsed().as_secs_f64();
        latencies.sort_unstable();
        let at = |share: usize| {
            latencies
                .get((latencies.len() * share / 100).min(latencies.len().saturating_sub(1)))
                .copied()
                .unwrap_or_default()
        };
        #[allow(clippy::cast_precision_loss, reason = "a rate of a second is no count")]
        let rate = done as f64 / elapsed;
        Ok(Measured {
            rate,
            p50: at(50),
            p99: at(99),
        })
    }
}

/// Measures the time to open disks, and the memory of open ones.
fn opens(folder: &Path) -> Result<(serde_json::Value, String), ToolError> {
    const MANY: u64 = 64;
    let failed = || ToolError::io("read /proc/self/statm");
    let path = folder.join("large");
    Vhdx::create(&path, &CreateOptions::new(64 << 40))?;
    let before = resident().map_err(failed())?;
    let started = Instant::now();
    let disk = storage::open(&path, &OpenOptions::default())?;
    let took = started.elapsed();
    let large = resident().map_err(failed())?.saturating_sub(before);
    drop(disk);
    let before = resident().map_err(failed())?;
    let mut disks = Vec::new();
    for number in 0..MANY {
        let path = folder.join(format!("small{number}"));
        Vhdx::create(&path, &CreateOptions::new(10 << 30))?;
        let disk = storage::open(&path, &OpenOptions::default())?;
        // The disks are in use: some of their blocks were written, so that metadata pages are in memory.
        for block in 0..16 {
            storage::blocking::write_at(&*disk, &[1; 4096], block * (640 << 20)).map_err(
                |error| ToolError::Disk {
                    path: path.clone(),
                    error,
                },
            )?;
        }
        disks.push(disk);
    }
    let each = resident().map_err(failed())?.saturating_sub(before) / MANY;
    let millis = took.as_secs_f64() * 1e3;
    Ok((
        json!({"ms_64_tib": millis, "bytes_64_tib": large, "bytes_10_gib": each}),
        format!(
            "\nopen of an empty disk of 64 TiB: {millis:.2} ms, {} of memory\nan open disk of 10 GiB, written here and there: {} of memory\n",
            human(large),
            human(each)
        ),
    ))
}

/// The resident memory of the process, in bytes.
fn resident() -> std::io::Result<u64> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = text
        .split_whitespace()
        .nth(1)
        .and_then(|pages| pages.parse().ok())
        .unwrap_or_default();
    Ok(pages * rustix::param::page_size() as u64)
}

/// Measures writes of 4 KiB to every MiB of an empty disk with blocks of 1 MiB, flushed at the end, with the peers and
/// with Coppice.
fn peers(folder: &Path, watch: &Watch) -> Result<(serde_json::Value, String), ToolError> {
    const COUNT: u64 = 1000;
    const STEP: u64 = 1 << 20;
    let size = (COUNT + 24) * STEP;
    let mut json = serde_json::Map::new();
    let mut text = format!("\n{COUNT} writes of 4 KiB, one every MiB, into an empty disk:\n");
    let mut tell = |name: &str, each: Duration| {
        let _ = writeln!(text, "{name:<12} {each:>10.1?} each");
        json.insert(
            format!("{name}_us").replace(' ', "_"),
            (each.as_secs_f64() * 1e6).into(),
        );
    };
    let path = folder.join("sparse");
    let options = CreateOptions {
        block_size: 1 << 20,
        ..CreateOptions::new(size)
    };
    Vhdx::create(&path, &options)?;
    let disk = storage::open(&path, &OpenOptions::default())?;
    let mut queue = DiskQueue::new(Arc::clone(&disk), EngineKind::Auto)
        .map_err(ToolError::io("start the engine"))?;
    let started = Instant::now();
    // As many requests are in flight as with qemu-img bench: 64.
    for at in 0..COUNT {
        if let Some(range) = ByteRange::new(at * STEP, 4096) {
            queue.submit(Request::Write(range), OwnedBuffer::new(vec![0x5A; 4096]));
        }
        if at % 64 == 63 || at == COUNT - 1 {
            queue.drain();
            while let Some(completion) = queue.completion() {
                completion
                    .result
                    .map_err(|error| ToolError::Refused(format!("bench: {}", chain(&error))))?;
            }
        }
    }
    disk.flush().map_err(ToolError::disk(&path, watch))?;
    tell("coppice vhdx", started.elapsed() / COUNT as u32);
    for (name, format, options) in [
        ("qemu vhdx", "vhdx", "block_size=1048576"),
        ("qemu qcow2", "qcow2", "cluster_size=65536"),
        ("qemu raw", "raw", ""),
    ] {
        let path = folder.join(format);
        let mut create = std::process::Command::new("qemu-img");
        create.args(["create", "-q", "-f", format]);
        if !options.is_empty() {
            create.args(["-o", options]);
        }
        create.arg(&path).arg(size.to_string());
        qemu(&mut create)?;
        let started = Instant::now();
        let mut bench = std::process::Command::new("qemu-img");
        bench
            .args(["bench", "-q", "-w", "-f", format, "-t", "writeback"])
            .args(["-c", &COUNT.to_string(), "-s", "4096", "-S"])
            .args([&STEP.to_string(), "-d", "64"])
            .arg(&path);
        qemu(&mut bench)?;
        tell(name, started.elapsed() / COUNT as u32);
    }
    Ok((json.into(), text))
}

fn qemu(command: &mut std::process::Command) -> Result<(), ToolError> {
    let output = command.output().map_err(ToolError::io(
        "run qemu-img, of Debian's package qemu-utils",
    ))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(ToolError::Refused(format!(
            "qemu-img: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )))
    }
}

/// A latency as text. It is only measured with one request in flight.
fn latency(time: Duration) -> String {
    if time.is_zero() {
        "-".into()
    } else {
        format!("{time:.1?}")
    }
}

fn fill(disk: &dyn Disk, watch: &Watch) -> Result<(), storage::DiskError> {
    let bytes = vec![0xA5; 1 << 20];
    let size = disk.geometry().size;
    let mut at = 0;
    while at < size {
        if watch.is_cancelled() {
            return Err(storage::DiskError::Cancelled);
        }
        let len = (size - at).min(bytes.len() as u64);
        storage::blocking::write_at(disk, &bytes[..len as usize], at)?;
        at += len;
    }
    disk.flush()
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for operation in [
        Operation::Read,
        Operation::Overwrite,
        Operation::Allocate,
        Operation::Trim,
    ] {
        for len in [4 << 10, 64 << 10] {
            for depth in [1, 32] {
                for random in [false, true] {
                    // Space is allocated or given back once, so that a random order would repeat offsets.
                    if random && matches!(operation, Operation::Allocate | Operation::Trim) {
                        continue;
                    }
                    cases.push(Case {
                        operation,
                        len,
                        depth,
                        random,
                    });
                }
            }
        }
    }
    cases
}
