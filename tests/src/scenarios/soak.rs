//! Boots many guests, one wave after the other, and counts those that fail, for a mode of sharing.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::guest::{Guest, Start};
use crate::result::{Failure, Figures};

/// How many guests of a wave boot at the same time.
const WAVE: usize = 4;
const WAVES: usize = 12;
/// A wave that takes longer hangs.
const PATIENCE: Duration = Duration::from_mins(3);
/// MD5 of the file that the guests read.
const DATA_MD5: &str = "5190a94c24b537fd1ac2c225956dac1d";
/// The beginning of the scenarios' names; the mode of `--share` follows.
const PREFIX: &str = "soak_";

/// The threads of a VMM: names, states, CPU time in ticks, and where in the kernel they wait.
fn threads(guest: &Guest) -> String {
    let mut text = String::new();
    for task in fs::read_dir(guest.proc().join("task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let (stat, stack) = (read("stat"), read("stack"));
        let fields: Vec<_> = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .collect();
        let [state, user, system] =
            [0, 11, 12].map(|field| fields.get(field).copied().unwrap_or("?"));
        let frames: Vec<_> = stack
            .lines()
            .take(6)
            .filter_map(|line| line.split_whitespace().nth(1))
            .collect();
        let _ = write!(
            text,
            "{} {state} {user}+{system} [{}]; ",
            read("comm").trim(),
            frames.join(" ")
        );
    }
    text
}

/// Runs one wave. Returns how many guests ended by themselves with the right checksum, and adds a text for each other
/// guest.
fn wave(args: &[&str], others: &mut Vec<String>) -> Result<usize, Failure> {
    let script = "mount -t ext4 -o ro /dev/vda /mnt; S=$(md5sum </mnt/data/40M); sleep 1; \
                  T=$(md5sum </mnt/data/40M); echo SUMS $S $T";
    let guests: Result<Vec<Guest>, _> = (0..WAVE)
        .map(|_| {
            Start::new()
                .args(args)
                .args(&["--disk", "guest/bench.vhdx,ro"])
                .script(script)
                .spawn()
        })
        .collect();
    let started = Instant::now();
    let mut well = 0;
    for guest in &mut guests? {
        let console = |guest: &Guest| {
            let text = guest.console();
            let from = text.len().saturating_sub(200);
            text.get(from..)
                .unwrap_or_default()
                .replace(['\r', '\n'], "|")
        };
        match guest.try_exit(PATIENCE.saturating_sub(started.elapsed()))? {
            Some(status) if status.code() == Some(0) => match guest.line("SUMS ") {
                Ok(line) if line.matches(DATA_MD5).count() == 2 => well += 1,
                Ok(line) => others.push(format!("sums {line}")),
                Err(_) => others.push(format!("no sums: {}", console(guest))),
            },
            Some(status) => others.push(format!("{status}: {}", console(guest))),
            None => {
                println!("lab: {}", threads(guest));
                std::thread::sleep(Duration::from_secs(2));
                println!("lab: 2 s later: {}", threads(guest));
                others.push(format!("hung: {}", console(guest)));
            }
        }
    }
    Ok(well)
}

/// Runs all waves. The mode of sharing is in the scenario's name.
pub fn soak(out: &Path) -> Result<Figures, Failure> {
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    let args = ["--share", name.trim_start_matches(PREFIX)];
    let (mut well, mut others) = (0, Vec::new());
    for number in 0..WAVES {
        let before = others.len();
        well += wave(&args, &mut others)?;
        for other in &others[before..] {
            println!("lab: wave {number}: {other}");
        }
        println!("lab: {well} of {} well", (number + 1) * WAVE);
    }
    if others.is_empty() {
        Ok(Figures::from([("guests".into(), json!(well))]))
    } else {
        Failure::claim(format!(
            "{} of {} guests did not do what they were told: {}",
            others.len(),
            WAVES * WAVE,
            others.join("; ")
        ))
    }
}
