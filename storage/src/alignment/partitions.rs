//! Partition tables: GPT (UEFI 2.10, 5.3) and that of the master boot record (UEFI 2.10, 5.2) with its chain of logical
//! partitions.

use super::file_system;
use super::window::{Window, le32, le64};
use crate::disk::ByteRange;

/// Most entries of a GPT that are looked at; it has 128.
const MAX_ENTRIES: u64 = 256;
/// Most logical partitions that are looked at.
const MAX_LOGICAL: usize = 64;
/// First entry of a master boot record, of four.
const MBR_ENTRIES: usize = 446;
const MBR_ENTRY: usize = 16;

/// A partition that lies inside the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Partition {
    /// As Linux numbers it.
    pub number: u32,
    pub range: ByteRange,
}

/// The partitions of a disk with sectors of this many bytes; none where it has no table.
pub(super) fn list<E>(bytes: &mut Window<'_, E>, sector: u64) -> Result<Vec<Partition>, E> {
    if let Some(found) = gpt(bytes, sector)? {
        return Ok(found);
    }
    // Both end their first sector as a master boot record does, and have other things where its entries are; an ISO
    // 9660 image can have a table that describes the image itself.
    if file_system::has_boot_sector(bytes)? || file_system::is_iso(bytes, 0)? {
        return Ok(Vec::new());
    }
    mbr(bytes, sector)
}

/// A range of sectors, if the disk has them.
fn inside<E>(bytes: &Window<'_, E>, sector: u64, first: u64, count: u64) -> Option<ByteRange> {
    let range = ByteRange::new(first.checked_mul(sector)?, count.checked_mul(sector)?)?;
    (first > 0 && count > 0 && range.end() <= bytes.size).then_some(range)
}

fn gpt<E>(bytes: &mut Window<'_, E>, sector: u64) -> Result<Option<Vec<Partition>>, E> {
    let Some(head) = bytes.at::<92>(sector)? else {
        return Ok(None);
    };
    if !head.starts_with(b"EFI PART") {
        return Ok(None);
    }
    let (table, count, size) = (le64(&head, 72), le32(&head, 80), le32(&head, 84));
    let mut found = Vec::new();
    if !(128..=4096).contains(&size) || !size.is_multiple_of(8) {
        return Ok(Some(found));
    }
    for (entry, number) in (0..count.min(MAX_ENTRIES)).zip(1..) {
        let at = table
            .checked_mul(sector)
            .and_then(|at| at.checked_add(entry * size));
        let Some(entry) = at.map(|at| bytes.at::<48>(at)).transpose()?.flatten() else {
            break;
        };
        let (first, last) = (le64(&entry, 32), le64(&entry, 40));
        let is_used = entry[..16].iter().any(|byte| *byte != 0);
        let count = last.checked_sub(first).and_then(|len| len.checked_add(1));
        let range = count
            .filter(|_| is_used)
            .and_then(|count| inside(bytes, sector, first, count));
        found.extend(range.map(|range| Partition { number, range }));
    }
    Ok(Some(found))
}

/// An entry of a master boot record.
#[derive(Clone, Copy)]
struct Entry {
    kind: u8,
    first: u64,
    count: u64,
}

impl Entry {
    fn is_extended(self) -> bool {
        matches!(self.kind, 0x05 | 0x0F | 0x85)
    }
}

/// The entries of the record at an offset; `None` where there is no record.
fn entries<E>(bytes: &mut Window<'_, E>, offset: u64) -> Result<Option<[Entry; 4]>, E> {
    let Some(record) = bytes.at::<512>(offset)? else {
        return Ok(None);
    };
    let entry = |number| {
        let entry = &record[MBR_ENTRIES + number * MBR_ENTRY..][..MBR_ENTRY];
        Entry {
            kind: entry[4],
            first: le32(entry, 8),
            count: le32(entry, 12),
        }
    };
    // A status is 0x80 or nothing; boot code that ends like a record has anything there.
    let is_record = record[510..] == [0x55, 0xAA]
        && (0..4).all(|number| matches!(record[MBR_ENTRIES + number * MBR_ENTRY], 0 | 0x80));
    Ok(is_record.then(|| [0, 1, 2, 3].map(entry)))
}

fn mbr<E>(bytes: &mut Window<'_, E>, sector: u64) -> Result<Vec<Partition>, E> {
    let mut found = Vec::new();
    let Some(primary) = entries(bytes, 0)? else {
        return Ok(found);
    };
    let mut extended = None;
    for (entry, number) in primary.into_iter().zip(1..) {
        let Some(range) =
            inside(bytes, sector, entry.first, entry.count).filter(|_| entry.kind != 0)
        else {
            continue;
        };
        if entry.is_extended() {
            extended = extended.or(Some(entry.first));
        } else {
            found.push(Partition { number, range });
        }
    }
    if let Some(base) = extended {
        logical(bytes, sector, base, &mut found)?;
    }
    Ok(found)
}

/// The logical partitions of the extended one that begins at this sector: each has a record before it, which names the
/// next.
fn logical<E>(
    bytes: &mut Window<'_, E>,
    sector: u64,
    base: u64,
    found: &mut Vec<Partition>,
) -> Result<(), E> {
    let mut at = base;
    for number in (5..).take(MAX_LOGICAL) {
        let record = at.checked_mul(sector);
        let Some([own, next, ..]) = record.map(|at| entries(bytes, at)).transpose()?.flatten()
        else {
            break;
        };
        let range = at
            .checked_add(own.first)
            .and_then(|first| inside(bytes, sector, first, own.count))
            .filter(|_| own.kind != 0);
        found.extend(range.map(|range| Partition { number, range }));
        // A chain that does not lead on is a circle, or ends.
        match base.checked_add(next.first) {
            Some(next_at) if next.is_extended() && next_at > at => at = next_at,
            Some(_) | None => break,
        }
    }
    Ok(())
}
