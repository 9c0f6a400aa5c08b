//! The host's kernel same-page merging (KSM), by which the peer shares memory. It is set for the measurement, and
//! restored.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::error::BenchError;
use super::interrupt::Interrupt;
use host::{procfs, report};

const FOLDER: &str = "/sys/kernel/mm/ksm";
/// The settings for the measurement: they scan much more than the kernel's default of 100 pages every 20 ms, so that
/// all is merged soon. They take about two thirds of a core.
const SETTINGS: [(&str, u64); 3] = [("pages_to_scan", 1000), ("sleep_millisecs", 10), ("run", 1)];
/// A page is merged on the second scan that finds it unchanged.
const SCANS: u64 = 3;
/// The longest wait: pages that change all the time are merged again and again.
const PATIENCE: Duration = Duration::from_mins(5);
const POLL: Duration = Duration::from_millis(500);

/// The page merger of the host's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct KsmFigures {
    /// Pages that it scans before it sleeps.
    pub pages_to_scan: u64,
    /// How long it sleeps, in milliseconds.
    pub sleep_millisecs: u64,
    /// Merged pages in use.
    pub pages_shared: u64,
    /// Pages that were saved by merging.
    pub pages_sharing: u64,
    /// Whether complete scans found nothing more to merge.
    pub settled: bool,
    /// How long that took, since the last guest was idle.
    pub settled_after_seconds: f64,
    /// CPU time of its thread since the host's start.
    pub cpu_seconds: f64,
}

fn read(name: &str) -> Result<u64, BenchError> {
    let path = Path::new(FOLDER).join(name);
    let text =
        fs::read_to_string(&path).map_err(BenchError::io(format!("read {}", path.display())))?;
    text.trim().parse().map_err(|_| BenchError::Malformed {
        path,
        expected: "a number",
    })
}

fn write(name: &str, value: u64) -> Result<(), BenchError> {
    let path = Path::new(FOLDER).join(name);
    fs::write(&path, value.to_string()).map_err(BenchError::io(format!("write {}", path.display())))
}

/// Whether the host has KSM, and this process may configure it.
pub(super) fn can_be_set() -> bool {
    read("run").is_ok_and(|run| write("run", run).is_ok())
}

/// KSM with the settings for the measurement; dropping it restores the settings.
pub(super) struct Ksm {
    before: Vec<(&'static str, u64)>,
    pid: u32,
}

impl Ksm {
    /// Configures and starts KSM.
    pub(super) fn start() -> Result<Self, BenchError> {
        let mut ksm = Self {
            before: Vec::new(),
            pid: pid()?,
        };
        for (name, value) in SETTINGS {
            ksm.before.push((name, read(name)?));
            write(name, value)?;
        }
        Ok(ksm)
    }

    /// Waits until complete scans find nothing more to merge.
    pub(super) fn wait_until_merged(
        &self,
        interrupt: &Interrupt,
    ) -> Result<KsmFigures, BenchError> {
        let started = Instant::now();
        let first = read("full_scans")?;
        let (mut scan, mut merged) = (first, 0);
        loop {
            interrupt.sleep(POLL)?;
            let now = read("full_scans")?;
            if now > scan {
                let shared = read("pages_shared")? + read("pages_sharing")?;
                // Pages that change between scans are still merged: a thousandth of all, or less.
                let is_still = shared <= merged + merged / 1000;
                if now >= first + SCANS && is_still {
                    return self.figures(true, started.elapsed());
                }
                (scan, merged) = (now, shared.max(merged));
            }
            if started.elapsed() > PATIENCE {
                return self.figures(false, started.elapsed());
            }
        }
    }

    /// CPU time of the scanner so far.
    pub(super) fn cpu_time(&self) -> Result<Duration, BenchError> {
        Ok(procfs::of_process(self.pid)?)
    }

    fn figures(&self, settled: bool, after: Duration) -> Result<KsmFigures, BenchError> {
        Ok(KsmFigures {
            pages_to_scan: read("pages_to_scan")?,
            sleep_millisecs: read("sleep_millisecs")?,
            pages_shared: read("pages_shared")?,
            pages_sharing: read("pages_sharing")?,
            settled,
            settled_after_seconds: after.as_secs_f64(),
            cpu_seconds: self.cpu_time()?.as_secs_f64(),
        })
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        for (name, value) in self.before.iter().rev() {
            if let Err(error) = write(name, *value) {
                tracing::warn!(error = %report::chain(&error), "KSM is not as it was before");
            }
        }
    }
}

/// The number of the scanner's process.
fn pid() -> Result<u32, BenchError> {
    let processes = fs::read_dir("/proc").map_err(BenchError::io("read /proc"))?;
    processes
        .filter_map(Result::ok)
        .filter(|process| {
            fs::read_to_string(process.path().join("comm")).is_ok_and(|name| name == "ksmd\n")
        })
        .find_map(|process| process.file_name().to_str()?.parse().ok())
        .ok_or_else(|| BenchError::Refused("this host's kernel has no ksmd".to_owned()))
}
