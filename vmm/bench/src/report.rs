//! The result of a benchmark. As JSON this is `result.json`; memory is in KiB throughout.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::configuration::Configuration;
use super::error::BenchError;
use super::extrapolate::{Extrapolation, HOSTS, Line};
use super::host::{Host, HostMemory};
use super::ksm::KsmFigures;
use super::number::float;
use super::workload::Workload;

/// The result of a benchmark.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The version of Coppice.
    pub coppice: String,
    /// The host that was measured on.
    pub host: Host,
    /// A run for each configuration and each workload.
    pub runs: Vec<Run>,
}

/// A run: guests of one configuration with one workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// How guests were started.
    pub configuration: Configuration,
    /// What they did.
    pub workload: Workload,
    /// RAM of a guest.
    pub guest_kib: u64,
    /// Whether they were started all at once.
    pub parallel: bool,
    /// How long they idled before each reading, in seconds.
    pub settle_seconds: f64,
    /// The host without guests, and after the start of each guest; where all are started at once, without guests and
    /// with all of them.
    pub points: Vec<Point>,
    /// (available and at hand before - the same after) / guests.
    pub host_kib_per_guest: f64,
    /// What each further guest takes; absent where the points do not show that.
    pub line: Option<Line>,
    /// How many guests larger hosts hold, by the line.
    pub extrapolation: Vec<Extrapolation>,
    /// Each guest, read when all were idle.
    pub guests: Vec<GuestFigures>,
    /// CPU time when all were idle, second by second.
    pub cpu: Vec<Second>,
    /// The page merger of the host's kernel, where it ran.
    pub ksm: Option<KsmFigures>,
}

/// The host with some guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// Guests.
    pub guests: usize,
    /// The host's memory.
    #[serde(flatten)]
    pub memory: HostMemory,
}

/// One guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestFigures {
    /// Process start to `/init`.
    pub init_seconds: f64,
    /// The guest's own time at `/init`.
    pub uptime_at_init_seconds: f64,
    /// Process start to the end of its work.
    pub idle_seconds: f64,
    /// The checksum that it printed, which was as expected.
    pub checksum: String,
    /// Private memory of the process.
    pub private_kib: u64,
    /// Shared memory of the process.
    pub shared_kib: u64,
    /// Proportional memory of the process.
    pub pss_kib: u64,
    /// Private guest RAM.
    pub ram_private_kib: u64,
    /// Shared guest RAM.
    pub ram_shared_kib: u64,
    /// Anonymous guest RAM.
    pub ram_anonymous_kib: u64,
    /// The number of mappings of guest RAM.
    pub ram_mappings: usize,
    /// Private memory of the process without guest RAM.
    pub vmm_private_kib: u64,
    /// Shared memory of the process without guest RAM.
    pub vmm_shared_kib: u64,
    /// Page tables of the process.
    pub page_tables_kib: u64,
    /// CPU time of the merger since its start.
    pub merger_cpu_seconds: f64,
}

/// CPU time in one second, of all guests together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Second {
    /// Seconds since the first reading.
    pub at: f64,
    /// Their processes.
    pub guests_cpu_seconds: f64,
    /// Their mergers.
    pub merger_cpu_seconds: f64,
    /// The page merger of the host's kernel.
    pub ksmd_cpu_seconds: f64,
}

impl Run {
    /// Computes the figures that follow from the points.
    pub(super) fn conclude(&mut self) {
        let used = self.used();
        self.host_kib_per_guest = used
            .last()
            .map_or(0.0, |(count, used)| used / count.max(1.0));
        // The first guest also takes the fixed part, which the line leaves out of the slope.
        let further: Vec<_> = used
            .into_iter()
            .filter(|(count, _)| *count >= 1.0)
            .collect();
        self.line = Line::through(&further);
        self.extrapolation = self
            .line
            .iter()
            .flat_map(|line| {
                HOSTS.map(|host_gib| Extrapolation {
                    host_gib,
                    guests: line.guests(host_gib),
                })
            })
            .collect();
    }

    /// By how much a figure of the host grew with each guest, in KiB.
    pub(super) fn per_guest(&self, figure: impl Fn(&HostMemory) -> u64) -> f64 {
        let (Some(first), Some(last)) = (self.points.first(), self.points.last()) else {
            return 0.0;
        };
        let guests = float(last.guests.max(1) as u64);
        (float(figure(&last.memory)) - float(figure(&first.memory))) / guests
    }

    /// How much of the host's memory the guests took at each point, in KiB.
    pub(super) fn used(&self) -> Vec<(f64, f64)> {
        let before = self.points.first().map_or(0, |point| point.memory.unused());
        self.points
            .iter()
            .map(|point| {
                let used = float(before) - float(point.memory.unused());
                (float(point.guests as u64), used)
            })
            .collect()
    }

    /// A CPU time as a part of one core.
    pub(super) fn cpu_share(&self, figure: impl Fn(&Second) -> f64) -> f64 {
        let window = self.cpu.last().map_or(0.0, |last| last.at);
        if window > 0.0 {
            self.cpu.iter().map(figure).sum::<f64>() / window
        } else {
            0.0
        }
    }

    /// The name of the run: configuration and workload.
    pub(super) fn name(&self) -> String {
        format!("{}, {}", self.configuration, self.workload)
    }
}

impl Report {
    /// Reads what an earlier benchmark left.
    pub(super) fn from_file(path: &Path) -> Result<Self, BenchError> {
        let text = fs::read(path).map_err(BenchError::io(format!("read {}", path.display())))?;
        serde_json::from_slice(&text).map_err(|error| BenchError::Json {
            path: path.to_owned(),
            error,
        })
    }

    /// Leaves it for later.
    pub(super) fn to_file(&self, path: &Path) -> Result<(), BenchError> {
        let json = serde_json::to_vec_pretty(self).map_err(|error| BenchError::Json {
            path: path.to_owned(),
            error,
        })?;
        fs::write(path, json).map_err(BenchError::io(format!("write {}", path.display())))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A run whose guests take `each` KiB, after `first` that all of them share.
    pub(crate) fn run(configuration: Configuration, first: u64, each: u64) -> Run {
        let before = HostMemory {
            available: 4 << 20,
            page_tables: 500,
            ..HostMemory::default()
        };
        let points = (0..=6).map(|guests: u64| Point {
            guests: guests as usize,
            memory: HostMemory {
                available: before.available - each * guests - if guests > 0 { first } else { 0 },
                page_tables: 500 + 300 * guests,
                ..before
            },
        });
        let guest = GuestFigures {
            init_seconds: 3.5,
            uptime_at_init_seconds: 2.25,
            idle_seconds: 7.5,
            checksum: "abc".to_owned(),
            private_kib: each,
            shared_kib: first,
            pss_kib: each + first / 6,
            ram_private_kib: each - 400,
            ram_shared_kib: first,
            ram_anonymous_kib: each - 400,
            ram_mappings: 3,
            vmm_private_kib: 400,
            vmm_shared_kib: 900,
            page_tables_kib: 300,
            merger_cpu_seconds: 0.25,
        };
        let second = |at| Second {
            at,
            guests_cpu_seconds: 0.06,
            merger_cpu_seconds: 0.0,
            ksmd_cpu_seconds: 0.0,
        };
        let mut run = Run {
            configuration,
            workload: Workload::Read,
            guest_kib: 128 << 10,
            parallel: false,
            settle_seconds: 2.0,
            points: points.collect(),
            host_kib_per_guest: 0.0,
            line: None,
            extrapolation: Vec::new(),
            guests: vec![guest; 6],
            cpu: vec![second(1.0), second(2.0)],
            ksm: None,
        };
        run.conclude();
        run
    }

    pub(crate) fn report() -> Report {
        Report {
            coppice: "0.1.0".to_owned(),
            host: Host {
                kernel: "6.1".to_owned(),
                cpus: 2,
                memory_kib: 4 << 20,
                huge_pages: "[always] madvise never".to_owned(),
                caches_dropped: true,
            },
            runs: vec![
                run(Configuration::ShareOff, 45 << 10, 26 << 10),
                run(Configuration::QemuMicrovm, 9 << 10, 110 << 10),
            ],
        }
    }

    #[test]
    fn what_is_left_as_json_is_read_as_it_was() {
        let file = tempfile::NamedTempFile::new().unwrap();
        report().to_file(file.path()).unwrap();
        assert_eq!(Report::from_file(file.path()).unwrap(), report());
        fs::write(file.path(), "{}").unwrap();
        let error = Report::from_file(file.path()).unwrap_err();
        assert!(matches!(error, BenchError::Json { .. }), "{error}");
    }

    #[test]
    fn figures_are_what_was_lost_divided_by_guests() {
        let run = run(Configuration::ShareOff, 6000, 1000);
        assert!((run.host_kib_per_guest - 2000.0).abs() < 1e-6);
        assert!((run.per_guest(|memory| memory.page_tables) - 300.0).abs() < 1e-6);
        assert!((run.cpu_share(|second| second.guests_cpu_seconds) - 0.06).abs() < 1e-6);
        let used = run.used();
        assert_eq!((used[0], used[6]), ((0.0, 0.0), (6.0, 12_000.0)));
    }
}
