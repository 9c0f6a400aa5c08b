//! Where the memory of an idle clone goes, in its process and in the host's kernel.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::memory::{available, mib_each, newer_mmu};
use super::serve::{Daemon, guest_processes};
use super::snapshot::IDLE_TIME;
use crate::result::{Failure, Figures};

const CLONES: u32 = 24;
const PAGE: u64 = 4096;
/// The wait before clones are examined: the merger compares a clone's pages with the template's for a minute.
const COMPARE_TIME: Duration = Duration::from_secs(70);

fn read(path: impl AsRef<Path>) -> Result<String, Failure> {
    fs::read_to_string(path.as_ref()).map_err(Failure::io(&path.as_ref().display().to_string()))
}

/// KiB of the host's kernel by kind (`/proc/meminfo`), and of its slabs by name (`/proc/slabinfo`: pages that they
/// hold).
fn kernel() -> Result<BTreeMap<String, i64>, Failure> {
    let mut found = BTreeMap::new();
    for line in read("/proc/meminfo")?.lines() {
        if let Some((name, rest)) = line.split_once(':') {
            let kib = rest.split_whitespace().next().and_then(|n| n.parse().ok());
            found.insert(name.to_owned(), kib.unwrap_or(0));
        }
    }
    // Lines are `0xffff-0xffff bytes caller pages=n ...`. One of the pages is a guard page without memory.
    for line in read("/proc/vmallocinfo")?.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let pages = words.iter().find_map(|word| word.strip_prefix("pages="));
        if let ([_, _, caller, ..], Some(pages)) = (&words[..], pages) {
            let caller = caller.split('+').next().unwrap_or_default();
            *found.entry(format!("vmalloc {caller}")).or_insert(0) +=
                pages.parse::<i64>().unwrap_or(0) * 4;
        }
    }
    for task in tasks()? {
        *found.entry(format!("stack of {task}")).or_insert(0) += 16;
    }
    // Lines are `name active_objs num_objs objsize objperslab pagesperslab : tunables ... : slabdata active_slabs
    // num_slabs sharedavail`.
    for line in read("/proc/slabinfo")?.lines().skip(2) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| words.get(at).and_then(|n| n.parse::<i64>().ok());
        if let (Some(name), Some(pages), Some(slabs)) = (words.first(), number(5), number(14)) {
            found.insert(format!("slab {name}"), pages * slabs * 4);
        }
    }
    Ok(found)
}

/// The names of all threads, without numbers.
fn tasks() -> Result<Vec<String>, Failure> {
    let failed = || Failure::io("list processes");
    let mut names = Vec::new();
    for process in fs::read_dir("/proc").map_err(failed())? {
        let process = process.map_err(failed())?;
        let name = process.file_name();
        if name == "self" || name == "thread-self" {
            continue;
        }
        let threads = fs::read_dir(process.path().join("task"));
        // The entry is no process, or the process has just ended.
        for thread in threads.into_iter().flatten().flatten() {
            let name = fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
            names.push(name.trim().replace(|c: char| c.is_ascii_digit(), ""));
        }
    }
    Ok(names)
}

/// The memory of a process: private KiB by the name of the mapping, and a hash of each private page of its RAM by its
/// offset.
#[derive(Default)]
struct Process {
    own: BTreeMap<String, i64>,
    ram: HashMap<u64, u64>,
    as_in_template: usize,
    zeros: usize,
}

fn process(proc: &Path, template: &Path) -> Result<Process, Failure> {
    let failed = || Failure::io("look into a process");
    let mut found = Process::default();
    let mut name = String::new();
    for line in read(proc.join("smaps"))?.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [range, _, _, _, _, ref path @ ..] if range.contains('-') => {
                name = path.join(" ");
                if name.is_empty() {
                    "(anonymous)".clone_into(&mut name);
                }
            }
            ["AnonHugePages:", kib, "kB"] if kib != "0" => {
                *found.own.entry(format!("huge {name}")).or_default() +=
                    kib.parse::<i64>().unwrap_or(0);
            }
            ["Private_Clean:" | "Private_Dirty:", kib, "kB"] => {
                *found.own.entry(name.clone()).or_default() += kib.parse::<i64>().unwrap_or(0);
            }
            _ => {}
        }
    }
    let status = read(proc.join("status"))?;
    for line in status.lines() {
        if let Some((key @ ("VmPTE" | "Threads"), rest)) = line.split_once(':') {
            let number = rest.split_whitespace().next().and_then(|n| n.parse().ok());
            found.own.insert(format!("({key})"), number.unwrap_or(0));
        }
    }
    let base = fs::File::open(template).map_err(failed())?;
    let (maps, mem) = (read(proc.join("maps"))?, fs::File::open(proc.join("mem")));
    let (mem, pagemap) = (
        mem.map_err(failed())?,
        fs::File::open(proc.join("pagemap")).map_err(failed())?,
    );
    for line in maps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [range, _, offset, _, _, path] = words[..] else {
            continue;
        };
        if Path::new(path).file_name() != template.file_name() {
            continue;
        }
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap_or(0);
        let (from, to) = range.split_once('-').unwrap_or(("0", "0"));
        let (from, to, offset) = (hex(from), hex(to), hex(offset));
        for at in (from..to).step_by(4096) {
            let mut entry = [0; 8];
            pagemap
                .read_exact_at(&mut entry, at / PAGE * 8)
                .map_err(failed())?;
            let entry = u64::from_ne_bytes(entry);
            // Pages that are absent or a file's are skipped (pagemap.rst: bits 63 and 61).
            if entry >> 63 == 0 || entry >> 61 & 1 == 1 {
                continue;
            }
            let (mut page, mut was) = ([0; 4096], [0; 4096]);
            mem.read_exact_at(&mut page, at).map_err(failed())?;
            let place = offset + (at - from);
            base.read_exact_at(&mut was, place).map_err(failed())?;
            let mut hasher = DefaultHasher::new();
            page.hash(&mut hasher);
            found.ram.insert(place, hasher.finish());
            found.as_in_template += usize::from(page == was);
            found.zeros += usize::from(page == [0; 4096]);
        }
    }
    Ok(found)
}

/// Explains the memory of a further idle clone of the daemon.
pub fn explain(out: &Path) -> Result<Figures, Failure> {
    explain_with(out, &[])
}

/// As [`explain`], without a jail, as peers have none.
pub fn explain_unjailed(out: &Path) -> Result<Figures, Failure> {
    explain_with(out, &["--jail", "off"])
}

fn explain_with(out: &Path, args: &[&str]) -> Result<Figures, Failure> {
    newer_mmu()?;
    let daemon = Daemon::start(out, &[&["--memory-ratio", "100"], args].concat())?;
    daemon.boot(out, "source")?;
    // The template waits for the work that a kernel does some time after its boot, so that clones need not do it.
    std::thread::sleep(IDLE_TIME);
    daemon.template("t", "source")?;
    let others = guest_processes();
    daemon.clone_of("t", "c0")?;
    std::thread::sleep(IDLE_TIME);
    let (before, had) = (available()?, kernel()?);
    for number in 1..=CLONES {
        daemon.clone_of("t", &format!("c{number}"))?;
    }
    std::thread::sleep(COMPARE_TIME);
    let (after, has) = (available()?, kernel()?);
    let mut text = format!(
        "{:8.1} KiB a further idle clone\n",
        mib_each(before, after, CLONES) * 1024.0
    );
    let mut grown: Vec<(i64, &String)> = has
        .iter()
        .map(|(name, now)| (now - had.get(name).unwrap_or(&0), name))
        .collect();
    grown.sort();
    for (kib, name) in grown.iter().rev().filter(|(kib, _)| kib.abs() >= 12) {
        let each = f64::from(i32::try_from(*kib).unwrap_or(i32::MAX)) / f64::from(CLONES);
        let _ = writeln!(text, "{each:8.1} KiB {name}");
    }
    let memory = daemon.state().join("templates/t/memory");
    let clones = guest_processes().into_iter();
    let processes: Vec<Process> = clones
        .filter(|clone| !others.contains(clone))
        .map(|clone| process(&clone, &memory))
        .collect::<Result<_, _>>()?;
    let mut own: BTreeMap<&str, i64> = BTreeMap::new();
    for process in &processes[1..] {
        for (name, kib) in &process.own {
            *own.entry(name).or_default() += kib;
        }
    }
    for (name, kib) in own {
        let each = f64::from(i32::try_from(kib).unwrap_or(i32::MAX)) / f64::from(CLONES);
        let _ = writeln!(text, "{each:8.1} KiB {name}");
    }
    let _ = writeln!(
        text,
        "of RAM {} pages, {} as in the template, {} zero",
        processes[1].ram.len(),
        processes[1].as_in_template,
        processes[1].zeros
    );
    let mut places: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for process in &processes[1..] {
        for (place, hash) in &process.ram {
            places.entry(*place).or_default().push(*hash);
        }
    }
    for (place, hashes) in &mut places {
        let holders = hashes.len();
        hashes.sort_unstable();
        hashes.dedup();
        let _ = writeln!(text, "{place:#010x} {holders} hold, {} kinds", hashes.len());
    }
    let regions: std::collections::BTreeSet<u64> = places.keys().map(|at| at >> 21).collect();
    let _ = writeln!(text, "{} regions of 2 MiB", regions.len());
    println!("lab: {}", text.lines().next().unwrap_or_default());
    fs::write(out.join("clone.txt"), &text).map_err(Failure::io("write clone.txt"))?;
    let mib = mib_each(before, after, CLONES);
    Ok(Figures::from([("idle_clone_mib".into(), json!(mib))]))
}
