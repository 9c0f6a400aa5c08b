//! Where the RAM of a guest is, page by page: private to its process, a page of a file that others may map too, or nowhere; by what the guest
//! has, or had, at that address.
//!
//! The kernel's `/proc/PID/pagemap` says it, which tells copied pages of a private mapping from those that are still the file's.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::kernel_map::Part;
use super::report::float;
use super::{BenchError, Configuration, Workload};
use crate::text_table::columns;

const PAGE: u64 = 4096;
/// `pagemap` has 64 bits for each page (Linux, Documentation/admin-guide/mm/pagemap.rst).
const ENTRY: u64 = 8;
const PRESENT: u64 = 1 << 63;
/// Swapped out: private all the same.
const SWAPPED: u64 = 1 << 62;
/// Of a file.
const FILE: u64 = 1 << 61;

/// An area of guest RAM, in KiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Area {
    /// What lies, or lay, there.
    pub name: String,
    /// Pages of this process.
    pub private_kib: u64,
    /// Pages of a file.
    pub file_kib: u64,
    /// Neither: never touched, or given back.
    pub absent_kib: u64,
}

/// The areas of one guest's RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// How it was started.
    pub configuration: Configuration,
    /// What it did.
    pub workload: Workload,
    /// The areas, in the order in which they begin; the rest last.
    pub areas: Vec<Area>,
}

/// Where the initrd was put: as high as it goes.
pub(super) fn initrd(ram: u64, bytes: u64) -> Part {
    let start = ram.saturating_sub(bytes) / PAGE * PAGE;
    Part {
        name: "initrd".to_owned(),
        range: start..(start + bytes).next_multiple_of(PAGE),
    }
}

/// The entries of `/proc/PID/pagemap` for a range of addresses.
pub(super) fn pagemap(pid: u32, range: &Range<u64>) -> Result<Vec<u64>, BenchError> {
    let path = format!("/proc/{pid}/pagemap");
    let pages = (range.end - range.start) / PAGE;
    let mut bytes = vec![0; (pages * ENTRY) as usize];
    File::open(&path)
        .and_then(|file| file.read_exact_at(&mut bytes, range.start / PAGE * ENTRY))
        .map_err(BenchError::io(format!("read {path}")))?;
    let (entries, _) = bytes.as_chunks();
    Ok(entries
        .iter()
        .map(|entry| u64::from_ne_bytes(*entry))
        .collect())
}

/// Sorts the pages of guest RAM, which starts at guest address 0, into `parts` and the rest.
pub(super) fn areas(entries: &[u64], parts: &[Part]) -> Vec<Area> {
    let area = |name: &str| Area {
        name: name.to_owned(),
        private_kib: 0,
        file_kib: 0,
        absent_kib: 0,
    };
    let mut areas: Vec<Area> = Vec::new();
    for part in parts {
        if areas.iter().all(|area| area.name != part.name) {
            areas.push(area(&part.name));
        }
    }
    let mut rest = area("rest of RAM");
    for (number, entry) in (0..).zip(entries) {
        let address = number * PAGE;
        let part = parts.iter().find(|part| part.range.contains(&address));
        let area = part
            .and_then(|part| areas.iter_mut().find(|area| area.name == part.name))
            .unwrap_or(&mut rest);
        let counter = if entry & PRESENT != 0 && entry & FILE != 0 {
            &mut area.file_kib
        } else if entry & (PRESENT | SWAPPED) != 0 {
            &mut area.private_kib
        } else {
            &mut area.absent_kib
        };
        *counter += PAGE / 1024;
    }
    areas.push(rest);
    areas
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |kib: u64| format!("{:.2}", float(kib) / 1024.0);
        let row = |name: &str, private, file, absent| {
            vec![
                name.to_owned(),
                mib(private),
                mib(file),
                mib(absent),
                mib(private + file + absent),
            ]
        };
        let head = format!(
            "{}, {}: MiB of guest RAM",
            self.configuration, self.workload
        );
        let mut rows = vec![
            [head.as_str(), "private", "of a file", "absent", "all"]
                .map(str::to_owned)
                .to_vec(),
        ];
        let mut sum = [0; 3];
        for area in &self.areas {
            rows.push(row(
                &area.name,
                area.private_kib,
                area.file_kib,
                area.absent_kib,
            ));
            for (sum, part) in
                sum.iter_mut()
                    .zip([area.private_kib, area.file_kib, area.absent_kib])
            {
                *sum += part;
            }
        }
        rows.push(row("all", sum[0], sum[1], sum[2]));
        f.write_str(columns(&rows).trim_end())
    }
}

#[cfg(test)]
mod tests {
    use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};

    use super::*;

    fn part(name: &str, range: Range<u64>) -> Part {
        Part {
            name: name.to_owned(),
            range,
        }
    }

    #[test]
    fn pages_are_counted_where_they_lie_and_parts_of_one_name_together() {
        let parts = [
            part("text", PAGE..2 * PAGE),
            part("data", 2 * PAGE..3 * PAGE),
            part("text", 3 * PAGE..4 * PAGE),
        ];
        let entries = [0, PRESENT | FILE, PRESENT, PRESENT, SWAPPED];
        let areas = areas(&entries, &parts);
        let figures: Vec<_> = areas
            .iter()
            .map(|area| {
                (
                    area.name.as_str(),
                    area.private_kib,
                    area.file_kib,
                    area.absent_kib,
                )
            })
            .collect();
        assert_eq!(
            figures,
            [
                ("text", 4, 4, 0),
                ("data", 4, 0, 0),
                ("rest of RAM", 4, 0, 4)
            ]
        );
    }

    #[test]
    fn the_initrd_is_in_whole_pages_at_the_end() {
        assert_eq!(initrd(128 << 20, 5000).range, (128 << 20) - 8192..128 << 20);
        assert_eq!(initrd(128 << 20, 4096).range, (128 << 20) - 4096..128 << 20);
    }

    #[test]
    fn the_kernel_tells_a_copied_page_from_the_file_s() {
        const LEN: usize = 3 * PAGE as usize;
        let file = File::open("/proc/self/exe").unwrap();
        let (access, private) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: new mappings, wherever the kernel has room, of a file that is longer; they stay until the process ends.
        let (of_file, anonymous) = unsafe {
            (
                mmap(std::ptr::null_mut(), LEN, access, private, &file, 0)
                    .unwrap()
                    .cast::<u8>(),
                mmap_anonymous(std::ptr::null_mut(), LEN, access, private)
                    .unwrap()
                    .cast::<u8>(),
            )
        };
        // SAFETY: inside the mappings made above, which nobody else knows.
        unsafe {
            of_file.write_volatile(1);
            of_file.add(PAGE as usize).read_volatile();
            anonymous.add(PAGE as usize).write_volatile(1);
        }
        let kinds = |start: *mut u8| {
            let range = start as u64..start as u64 + LEN as u64;
            let entries = pagemap(std::process::id(), &range).unwrap();
            entries
                .iter()
                .map(|entry| (entry & PRESENT != 0, entry & FILE != 0))
                .collect::<Vec<_>>()
        };
        assert_eq!(kinds(of_file)[..2], [(true, false), (true, true)]);
        assert!(kinds(anonymous)[1] == (true, false) && !kinds(anonymous)[0].0);
    }
}
