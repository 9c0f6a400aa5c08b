//! The columns of the table of guests: their cells, and how they sort.

use std::cmp::Ordering;

use clap::ValueEnum;

use super::reading::{FileRow, GuestRow, Reading};
use host::printable::printable;

/// A column: what is shown of a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Column {
    /// Name of its REST socket, or of its kernel.
    Name,
    /// Number of its process.
    Pid,
    /// RAM that it is configured with.
    Ram,
    /// Private memory of the process.
    #[default]
    Private,
    /// Shared memory of the process.
    Shared,
    /// Proportional memory of the process.
    Pss,
    /// Private RAM of the guest.
    RamPrivate,
    /// Shared RAM of the guest.
    RamShared,
    /// CPU time of the process.
    Cpu,
    /// CPU time of its merger.
    Merger,
    /// What sharing saves.
    Saved,
    /// Pages that were merged.
    Merged,
}

/// The number of a cell, to sort by. An absent one is less than any other.
#[allow(
    clippy::cast_precision_loss,
    reason = "to compare, and 2^53 KiB are enough"
)]
fn number(value: Option<u64>) -> f64 {
    value.map_or(-1.0, |value| value as f64)
}

#[allow(
    clippy::cast_precision_loss,
    reason = "shown with one digit behind the point"
)]
fn mib(kib: u64) -> String {
    format!("{:.1}", kib as f64 / 1024.0)
}

fn or_none(value: Option<u64>, show: impl FnOnce(u64) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), show)
}

impl Column {
    /// The heading of the column.
    pub(super) fn heading(self) -> &'static str {
        match self {
            Self::Name => "GUEST",
            Self::Pid => "PID",
            Self::Ram => "SIZE",
            Self::Private => "PRIVATE",
            Self::Shared => "SHARED",
            Self::Pss => "PSS",
            Self::RamPrivate => "RAM PRIV",
            Self::RamShared => "RAM SHR",
            Self::Cpu => "CPU%",
            Self::Merger => "MERGER%",
            Self::Saved => "SAVED",
            Self::Merged => "MERGED",
        }
    }

    fn cell(self, guest: &GuestRow) -> String {
        match self {
            Self::Name => printable(&guest.name).into_owned(),
            // The row of sums has no process.
            Self::Pid if guest.pid == 0 => String::new(),
            Self::Pid => guest.pid.to_string(),
            Self::Ram => guest.ram_mib.to_string(),
            Self::Private => mib(guest.private_kib),
            Self::Shared => mib(guest.shared_kib),
            Self::Pss => mib(guest.proportional_kib),
            Self::RamPrivate => or_none(guest.ram_private_kib, mib),
            Self::RamShared => or_none(guest.ram_shared_kib, mib),
            Self::Cpu => format!("{:.1}", guest.cpu_percent),
            Self::Merger => format!("{:.1}", guest.merger_cpu_percent),
            Self::Saved => or_none(guest.saved_bytes, |bytes| mib(bytes >> 10)),
            Self::Merged => or_none(guest.merged_pages, |pages| pages.to_string()),
        }
    }

    fn number(self, guest: &GuestRow) -> f64 {
        match self {
            Self::Name => 0.0,
            Self::Pid => guest.pid.into(),
            Self::Ram => guest.ram_mib.into(),
            Self::Private => number(Some(guest.private_kib)),
            Self::Shared => number(Some(guest.shared_kib)),
            Self::Pss => number(Some(guest.proportional_kib)),
            Self::RamPrivate => number(guest.ram_private_kib),
            Self::RamShared => number(guest.ram_shared_kib),
            Self::Cpu => guest.cpu_percent,
            Self::Merger => guest.merger_cpu_percent,
            Self::Saved => number(guest.saved_bytes),
            Self::Merged => number(guest.merged_pages),
        }
    }

    /// Names and processes are sorted in ascending order, everything else in descending order.
    fn compare(self, a: &GuestRow, b: &GuestRow) -> Ordering {
        match self {
            Self::Name => a.name.cmp(&b.name),
            Self::Pid => a.pid.cmp(&b.pid),
            Self::Ram
            | Self::Private
            | Self::Shared
            | Self::Pss
            | Self::RamPrivate
            | Self::RamShared
            | Self::Cpu
            | Self::Merger
            | Self::Saved
            | Self::Merged => self.number(b).total_cmp(&self.number(a)),
        }
    }

    /// The column that is `right` columns further to the right; the first follows the last.
    pub(super) fn moved(self, right: isize) -> Self {
        let columns = Self::value_variants();
        let at = columns.iter().position(|column| *column == self);
        let count = columns.len().cast_signed();
        let at = at.unwrap_or(0).cast_signed() + right;
        let at = at.rem_euclid(count).cast_unsigned();
        columns.get(at).copied().unwrap_or_default()
    }
}

/// Sorts guests; equal ones by process.
pub(super) fn sort(guests: &mut [GuestRow], by: Column, reverse: bool) {
    guests.sort_by(|a, b| {
        let order = by.compare(a, b);
        let order = if reverse { order.reverse() } else { order };
        order.then(a.pid.cmp(&b.pid))
    });
}

/// Rows of text, below a heading and above the sums.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) heading: Vec<String>,
    pub(super) rows: Vec<Vec<String>>,
    pub(super) totals: Vec<String>,
}

impl Table {
    /// The guests, as they are sorted.
    pub(super) fn of_guests(reading: &Reading) -> Self {
        let columns = Column::value_variants();
        let row = |guest| columns.iter().map(|column| column.cell(guest)).collect();
        Self {
            heading: columns
                .iter()
                .map(|column| column.heading().to_owned())
                .collect(),
            rows: reading.guests.iter().map(row).collect(),
            totals: row(&reading.totals),
        }
    }

    /// The files.
    pub(super) fn of_files(files: &[FileRow]) -> Self {
        let row = |file: &FileRow| {
            vec![
                printable(&file.path).into_owned(),
                file.guests.to_string(),
                mib(file.mapped_bytes >> 10),
            ]
        };
        let bytes: u64 = files.iter().map(|file| file.mapped_bytes).sum();
        Self {
            heading: ["FILE", "GUESTS", "MAPPED"].map(str::to_owned).to_vec(),
            rows: files.iter().map(row).collect(),
            totals: vec![
                format!("{} files", files.len()),
                String::new(),
                mib(bytes >> 10),
            ],
        }
    }

    /// All rows, from top to bottom.
    pub(super) fn into_rows(self) -> Vec<Vec<String>> {
        let mut rows = vec![self.heading];
        rows.extend(self.rows);
        rows.push(self.totals);
        rows
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::reading::totals;
    use super::*;

    pub(crate) fn reading() -> Reading {
        let guest = |name: &str, pid, private_kib, saved_bytes| GuestRow {
            name: name.to_owned(),
            pid,
            ram_mib: 128,
            private_kib,
            saved_bytes,
            cpu_percent: 2.25,
            ..GuestRow::default()
        };
        let guests = vec![
            guest("a", 30, 1024, Some(3 << 20)),
            guest("b\x1b[2J", 10, 1536, None),
            guest("c", 20, 1024, Some(4 << 20)),
        ];
        Reading {
            totals: totals(&guests),
            guests,
            files: vec![FileRow {
                path: "/base.vhdx".to_owned(),
                guests: 3,
                mapped_bytes: 1 << 20,
            }],
        }
    }

    fn sorted(by: Column, reverse: bool) -> Vec<u32> {
        let mut guests = reading().guests;
        sort(&mut guests, by, reverse);
        guests.iter().map(|guest| guest.pid).collect()
    }

    #[test]
    fn the_largest_number_comes_first_and_an_unknown_one_last() {
        assert_eq!(sorted(Column::Private, false), [10, 20, 30]);
        assert_eq!(sorted(Column::Private, true), [20, 30, 10]);
        assert_eq!(sorted(Column::Saved, false), [20, 30, 10]);
        assert_eq!(sorted(Column::Name, false), [30, 10, 20]);
        assert_eq!(sorted(Column::Pid, false), [10, 20, 30]);
        assert_eq!(sorted(Column::Cpu, false), [10, 20, 30], "all alike");
    }

    #[test]
    fn the_first_column_follows_the_last() {
        assert_eq!(Column::Name.moved(-1), Column::Merged);
        assert_eq!(Column::Merged.moved(1), Column::Name);
        assert_eq!(Column::Pid.moved(1), Column::Ram);
    }

    #[test]
    fn names_do_not_move_the_cursor_and_unknown_cells_are_dashes() {
        let table = Table::of_guests(&reading());
        assert_eq!(table.rows[1][..4], ["b\\u001b[2J", "10", "128", "1.5"]);
        assert_eq!(table.rows[1][10..], ["-", "-"]);
        assert_eq!(table.totals[..4], ["3 guests", "", "384", "3.5"]);
        assert_eq!(
            (table.totals[8].as_str(), table.totals[10].as_str()),
            ("6.8", "7.0")
        );
        let files = Table::of_files(&reading().files);
        assert_eq!(files.rows, [["/base.vhdx", "3", "1.0"]]);
    }
}
