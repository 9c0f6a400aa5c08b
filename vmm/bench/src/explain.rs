//! Explains where the RAM of a guest is, page by page: private to its process, a page of a file that others may map
//! too, or absent. Pages are grouped by what the guest has, or had, at that address.
//!
//! A second table, by `page_use`, groups them by what the guest uses them for.
//!
//! The source is the kernel's `/proc/PID/pagemap`, which distinguishes copied pages of a private mapping from pages
//! that are still the file's.

use std::fmt;

use memshare::PageKind;
use serde::{Deserialize, Serialize};

use super::configuration::Configuration;
use super::kernel_map::Part;
use super::number::float;
use super::page_use::Use;
use super::pagemap::PAGE;
use super::workload::Workload;
use host::text_table;

/// An area of guest RAM, in KiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Area {
    /// What the guest has, or had, there.
    pub name: String,
    /// Private pages of the process.
    pub private_kib: u64,
    /// Pages of a file.
    pub file_kib: u64,
    /// Absent pages: never touched, or given back.
    pub absent_kib: u64,
}

/// The areas of one guest's RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// How it was started.
    pub configuration: Configuration,
    /// What it did.
    pub workload: Workload,
    /// The areas, by their addresses; the rest is last.
    pub areas: Vec<Area>,
    /// What the guest uses its pages for; the use with the most private pages is first. Empty where the guest did not
    /// report that.
    pub uses: Vec<Use>,
}

/// Where the initrd is: at the end of RAM.
pub(super) fn initrd(ram: u64, bytes: u64) -> Part {
    let start = ram.saturating_sub(bytes) / PAGE * PAGE;
    Part {
        name: "initrd".to_owned(),
        range: start..(start + bytes).next_multiple_of(PAGE),
    }
}

/// Counts the pages of guest RAM, which starts at guest address 0, in each of `parts` and in the rest.
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
        let counter = match PageKind::of(*entry) {
            PageKind::Private => &mut area.private_kib,
            PageKind::File => &mut area.file_kib,
            PageKind::Absent => &mut area.absent_kib,
        };
        *counter += PAGE / 1024;
    }
    areas.push(rest);
    areas
}

fn mib(kib: u64) -> String {
    format!("{:.2}", float(kib) / 1024.0)
}

/// A table of MiB: a heading, a row for each name, and their sum. The figures are given in KiB.
fn columns<const N: usize>(title: &str, heads: [&str; N], named: &[(&str, [u64; N])]) -> String {
    let row = |name: &str, kib: [u64; N]| {
        let mut row = vec![name.to_owned()];
        row.extend(kib.map(mib));
        row
    };
    let mut head = vec![title.to_owned()];
    head.extend(heads.map(str::to_owned));
    let mut rows = vec![head];
    let mut sum = [0; N];
    for (name, kib) in named {
        rows.push(row(name, *kib));
        for (sum, kib) in sum.iter_mut().zip(kib) {
            *sum += kib;
        }
    }
    rows.push(row("all", sum));
    text_table::columns(&rows)
}

impl Explanation {
    fn by_place(&self) -> String {
        let named: Vec<_> = self
            .areas
            .iter()
            .map(|area| {
                let (private, file, absent) = (area.private_kib, area.file_kib, area.absent_kib);
                let kib = [private, file, absent, private + file + absent];
                (area.name.as_str(), kib)
            })
            .collect();
        let title = format!(
            "{}, {}: MiB of guest RAM",
            self.configuration, self.workload
        );
        columns(&title, ["private", "of a file", "absent", "all"], &named)
    }

    fn by_use(&self) -> String {
        let named: Vec<_> = self
            .uses
            .iter()
            .map(|row| {
                let (private, file, absent) = (row.private_kib, row.file_kib, row.absent_kib);
                let kib = [private, row.zero_kib, file, absent, private + file + absent];
                (row.name.as_str(), kib)
            })
            .collect();
        let title = format!(
            "{}, {}: MiB by the guest's use",
            self.configuration, self.workload
        );
        let heads = ["private", "of it zero", "of a file", "absent", "all"];
        columns(&title, heads, &named)
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.by_place())?;
        if self.uses.is_empty() {
            write!(
                f,
                "{}, {}: the guest did not say what it uses its pages for",
                self.configuration, self.workload
            )
        } else {
            f.write_str(self.by_use().trim_end())
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::File;
    use std::ops::Range;

    use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};

    use super::super::pagemap::pagemap;
    use super::*;

    const PRESENT: u64 = PageKind::PRESENT;
    const SWAPPED: u64 = PageKind::SWAPPED;
    const FILE: u64 = PageKind::FILE;
    pub(in super::super) const PRIVATE_PAGE: u64 = PRESENT;
    pub(in super::super) const FILE_PAGE: u64 = PRESENT | FILE;

    pub(in super::super) fn part(name: &str, range: Range<u64>) -> Part {
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
    fn an_explanation_is_a_table_by_place_and_one_by_use() {
        let mut explanation = Explanation {
            configuration: Configuration::ShareAll,
            workload: Workload::Read,
            areas: areas(&[PRIVATE_PAGE, 0], &[]),
            uses: vec![
                Use {
                    name: "slab".to_owned(),
                    private_kib: 2048,
                    zero_kib: 512,
                    file_kib: 1024,
                    absent_kib: 0,
                },
                Use {
                    name: "free".to_owned(),
                    private_kib: 0,
                    zero_kib: 0,
                    file_kib: 0,
                    absent_kib: 1024,
                },
            ],
        };
        let text = explanation.to_string();
        let (_, by_use) = text.split_once("\n\n").unwrap();
        assert_eq!(
            by_use,
            "share-all, read: MiB by the guest's use  private  of it zero  of a file  absent   all\n\
             slab                                        2.00        0.50       1.00    0.00  3.00\n\
             free                                        0.00        0.00       0.00    1.00  1.00\n\
             all                                         2.00        0.50       1.00    1.00  4.00"
        );
        explanation.uses.clear();
        assert!(
            explanation
                .to_string()
                .ends_with("did not say what it uses its pages for")
        );
    }

    #[test]
    fn the_initrd_is_in_whole_pages_at_the_end() {
        assert_eq!(initrd(128 << 20, 5000).range, (128 << 20) - 8192..128 << 20);
        assert_eq!(initrd(128 << 20, 4096).range, (128 << 20) - 4096..128 << 20);
    }

    #[test]
    fn the_kernel_distinguishes_a_copied_page_from_the_files() {
        const LEN: usize = 3 * PAGE as usize;
        let file = File::open("/proc/self/exe").unwrap();
        let (access, private) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: these are new mappings at addresses that the kernel chooses, of a file that is longer; they stay
        // until the process ends.
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
        // SAFETY: the bytes are inside the mappings made above, which nobody else knows.
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
