//! A reading of all guests at one moment.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::error::TopError;
use super::guest::{self, GuestDescription};
use control::api;
use host::procfs::{self, ProcError};

/// A guest at one moment. Figures that are not known are absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct GuestRow {
    /// Its name: that of its REST socket, or of its kernel.
    pub name: String,
    /// Its process; 0 in sums, which have none.
    #[serde(skip_serializing_if = "is_no_process")]
    pub pid: u32,
    /// RAM that it is configured with.
    pub ram_mib: u32,
    /// Private memory of the process.
    pub private_kib: u64,
    /// Memory of the process that others map, too.
    pub shared_kib: u64,
    /// Proportional memory of the process: shared pages are divided by the number of processes that map them.
    pub proportional_kib: u64,
    /// Private RAM of the guest. Absent where the guest has not started, as its process has no RAM then.
    pub ram_private_kib: Option<u64>,
    /// RAM of the guest that others map, too.
    pub ram_shared_kib: Option<u64>,
    /// CPU time in percent of a core, since the reading before, or since its start.
    pub cpu_percent: f64,
    /// The merger's part of it.
    pub merger_cpu_percent: f64,
    /// How much more memory it would take without sharing, by its REST socket.
    pub saved_bytes: Option<u64>,
    /// Pages that were compared and exchanged in total, by its REST socket.
    pub merged_pages: Option<u64>,
}

/// A file that guests map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileRow {
    /// Its path, as the kernel reports it.
    pub path: String,
    /// Guests that map it.
    pub guests: usize,
    /// Bytes that are mapped, summed over the guests.
    pub mapped_bytes: u64,
}

/// All guests at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Reading {
    /// The guests.
    pub guests: Vec<GuestRow>,
    /// Their sums.
    pub totals: GuestRow,
    /// The files that they map; those that most guests map come first.
    pub files: Vec<FileRow>,
}

/// The reading of a process before this one.
struct Previous {
    guest: GuestDescription,
    /// When it was read, since boot, and its CPU times then.
    at: Duration,
    cpu: Duration,
    merger: Duration,
}

/// Reads all guests repeatedly, and keeps what the next reading needs.
#[derive(Default)]
pub(super) struct Reader {
    /// By number and start of the process, because numbers are used again.
    known: BTreeMap<(u32, Duration), Previous>,
    /// Processes that are no guests of this user.
    others: BTreeSet<(u32, Duration)>,
}

#[derive(Deserialize)]
struct Machine {
    mem_size_mib: u32,
}

#[derive(Deserialize)]
struct Sharing {
    saved_bytes: u64,
    merged_pages: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's shape")]
fn is_no_process(pid: &u32) -> bool {
    *pid == 0
}

fn now() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

fn percent(used: Duration, passed: Duration) -> f64 {
    if passed.is_zero() {
        return 0.0;
    }
    100.0 * used.as_secs_f64() / passed.as_secs_f64()
}

fn sum(parts: impl Iterator<Item = Option<u64>>) -> Option<u64> {
    parts.flatten().reduce(|sum, part| sum + part)
}

/// The sums of all columns.
pub(super) fn totals(guests: &[GuestRow]) -> GuestRow {
    let sums = |part: fn(&GuestRow) -> u64| guests.iter().map(part).sum();
    GuestRow {
        name: format!("{} guests", guests.len()),
        pid: 0,
        ram_mib: guests.iter().map(|guest| guest.ram_mib).sum(),
        private_kib: sums(|guest| guest.private_kib),
        shared_kib: sums(|guest| guest.shared_kib),
        proportional_kib: sums(|guest| guest.proportional_kib),
        ram_private_kib: sum(guests.iter().map(|guest| guest.ram_private_kib)),
        ram_shared_kib: sum(guests.iter().map(|guest| guest.ram_shared_kib)),
        cpu_percent: guests.iter().map(|guest| guest.cpu_percent).sum(),
        merger_cpu_percent: guests.iter().map(|guest| guest.merger_cpu_percent).sum(),
        saved_bytes: sum(guests.iter().map(|guest| guest.saved_bytes)),
        merged_pages: sum(guests.iter().map(|guest| guest.merged_pages)),
    }
}

/// Joins the mappings of guests, each given by its `maps`.
pub(super) fn files<'a>(maps: impl IntoIterator<Item = &'a str>) -> Vec<FileRow> {
    let mut files: BTreeMap<_, FileRow> = BTreeMap::new();
    for text in maps {
        let mut seen = BTreeSet::new();
        for file in procfs::mapped_files(text) {
            let row = files.entry(file.identity.clone()).or_insert(FileRow {
                path: file.path,
                guests: 0,
                mapped_bytes: 0,
            });
            row.mapped_bytes += file.bytes;
            if seen.insert(file.identity) {
                row.guests += 1;
            }
        }
    }
    let mut files: Vec<_> = files.into_values().collect();
    files.sort_by(|a, b| {
        let by = |row: &FileRow| (row.guests, row.mapped_bytes);
        by(b).cmp(&by(a)).then_with(|| a.path.cmp(&b.path))
    });
    files
}

impl Reader {
    /// Reads all guests.
    pub(super) fn read(&mut self) -> Result<Reading, TopError> {
        let (mut guests, mut maps) = (Vec::new(), Vec::new());
        let (mut known, mut others) = (BTreeMap::new(), BTreeSet::new());
        for pid in guest::processes().map_err(TopError::Processes)? {
            // Processes end at any time, so one that cannot be read is left out.
            let Ok(start) = procfs::start_of(pid) else {
                continue;
            };
            let key = (pid, start);
            if self.others.contains(&key) {
                others.insert(key);
                continue;
            }
            let before = self.known.remove(&key).or_else(|| {
                Some(Previous {
                    guest: guest::of_process(pid)?,
                    at: start,
                    cpu: Duration::ZERO,
                    merger: Duration::ZERO,
                })
            });
            let Some(before) = before else {
                // A process that was just forked may still execute another program.
                if now().saturating_sub(start) > Duration::from_secs(1) {
                    others.insert(key);
                }
                continue;
            };
            if let Ok((row, text, after)) = examine(pid, before) {
                guests.push(row);
                maps.push(text);
                known.insert(key, after);
            }
        }
        (self.known, self.others) = (known, others);
        Ok(Reading {
            totals: totals(&guests),
            guests,
            files: files(maps.iter().map(String::as_str)),
        })
    }
}

fn examine(pid: u32, before: Previous) -> Result<(GuestRow, String, Previous), ProcError> {
    let guest = before.guest;
    let (mut ram_mib, mut sharing) = (guest.ram_mib, None);
    if let Some(socket) = &guest.socket {
        // A guest that is starting or ending does not respond.
        if let Ok(machine) = api::get::<Machine>(socket, "/machine-config") {
            ram_mib = machine.mem_size_mib;
            sharing = api::get::<Sharing>(socket, "/vm/sharing").ok();
        }
    }
    let whole = procfs::memory(pid)?;
    let mappings = procfs::mappings(pid)?;
    let ram = procfs::guest_ram(&mappings, u64::from(ram_mib) << 20)
        .map(|range| procfs::split(&mappings, &range).0);
    let (cpu, merger) = (procfs::of_process(pid)?, procfs::of_merger(pid)?);
    let at = now();
    let passed = at.saturating_sub(before.at);
    let row = GuestRow {
        name: guest.name.clone(),
        pid,
        ram_mib,
        private_kib: whole.private,
        shared_kib: whole.shared,
        proportional_kib: whole.proportional,
        ram_private_kib: ram.map(|ram| ram.private),
        ram_shared_kib: ram.map(|ram| ram.shared),
        cpu_percent: percent(cpu.saturating_sub(before.cpu), passed),
        merger_cpu_percent: percent(merger.saturating_sub(before.merger), passed),
        saved_bytes: sharing.as_ref().map(|sharing| sharing.saved_bytes),
        merged_pages: sharing.as_ref().map(|sharing| sharing.merged_pages),
    };
    let known = Previous {
        guest,
        at,
        cpu,
        merger,
    };
    Ok((row, procfs::read(pid, "maps")?, known))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_counted_once_a_guest_and_distinguished_by_inode() {
        let line = |at: u64, inode: u64, path: &str| {
            format!("{at:x}-{:x} r--p 0 fe:01 {inode} {path}\n", at + 4096)
        };
        let first = line(0, 1, "/own") + &line(4096, 2, "/base") + &line(8192, 2, "/base");
        let second = line(0, 3, "/own") + &line(4096, 2, "/base");
        let files = files([first.as_str(), &second]);
        let found: Vec<_> = files
            .iter()
            .map(|file| (file.path.as_str(), file.guests, file.mapped_bytes))
            .collect();
        assert_eq!(
            found,
            [("/base", 2, 12288), ("/own", 1, 4096), ("/own", 1, 4096)]
        );
    }

    #[test]
    fn totals_leave_out_what_is_not_known() {
        let guests = [
            GuestRow {
                private_kib: 5,
                saved_bytes: Some(7),
                ..GuestRow::default()
            },
            GuestRow {
                private_kib: 6,
                ..GuestRow::default()
            },
        ];
        let totals = totals(&guests);
        assert_eq!((totals.private_kib, totals.saved_bytes), (11, Some(7)));
        assert_eq!(
            (totals.ram_shared_kib, totals.name.as_str()),
            (None, "2 guests")
        );
    }

    #[test]
    fn cpu_time_is_of_the_time_that_passed() {
        let ms = Duration::from_millis;
        assert!((percent(ms(50), ms(200)) - 25.0).abs() < 1e-9);
        assert!(percent(ms(50), ms(0)).abs() < 1e-9);
    }
}
