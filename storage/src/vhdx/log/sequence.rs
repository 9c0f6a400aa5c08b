//! Finding the active sequence of a log, and what it changes ([MS-VHDX] 2.3.2, 2.3.3).

use std::collections::HashMap;

use super::entry::{Entry, Ring};
use crate::refusal::Refusal;
use crate::vhdx::format::{
    DESCRIPTOR_SIGNATURE, Guid, HEADER_OFFSETS, LOG_SECTOR, MAX_FILE, RawDescriptor,
};
use crate::vhdx::region::Region;
use crate::vhdx::view::Patch;

/// Most changes of a log that are replayed: each is kept in memory. A log of 1 MiB, as every program makes them, holds
/// 255 sectors; this many are 256 MiB of them.
const MAX_PATCHES: u64 = 65536;

/// What replaying a log means.
#[derive(Debug)]
pub(in crate::vhdx) struct Replay {
    /// The changes, in order.
    pub patches: Vec<Patch>,
    /// Length that the file has at least afterwards.
    pub len: u64,
}

/// Reads the log `guid` and works out what its replay would change. `read` fills a buffer from a file offset.
pub(in crate::vhdx) fn read(
    read: &dyn Fn(&mut [u8], u64) -> std::io::Result<()>,
    log: Region,
    guid: Guid,
    file_len: u64,
) -> Result<Replay, Refusal> {
    let ring = Ring { read, log };
    let failed = |e| Refusal::io("read the log", e);
    let active = active(&valid_entries(&ring, guid).map_err(failed)?, log).ok_or_else(|| {
        Refusal::corrupt(
            "log",
            log.offset,
            format!("expected a valid sequence of entries of the log {guid}, found none"),
        )
    })?;
    let (flushed, last) = active.last().map_or((0, 0), |head| {
        (head.flushed_file_offset, head.last_file_offset)
    });
    if file_len < flushed {
        return Err(Refusal::corrupt(
            "log",
            log.offset,
            format!(
                "expected a file of at least {flushed:#x} bytes, found {file_len:#x}: it was truncated"
            ),
        ));
    }
    if last > MAX_FILE {
        return Err(Refusal::corrupt(
            "log",
            log.offset,
            format!(
                "expected files of at most {MAX_FILE:#x} bytes, found that this one should have {last:#x}"
            ),
        ));
    }
    let len = last.max(file_len);
    let changes: u64 = active.iter().map(|entry| entry.descriptors).sum();
    if changes > MAX_PATCHES {
        return Err(Refusal::Unsupported(format!(
            "the log describes {changes} changes; up to {MAX_PATCHES} are replayed"
        )));
    }
    let mut patches = Vec::new();
    for entry in &active {
        let mut data =
            entry.position + super::entry::descriptor_sectors(entry.descriptors) * LOG_SECTOR;
        for descriptor in ring.descriptors(entry).map_err(failed)? {
            let patch = if descriptor.signature == *DESCRIPTOR_SIGNATURE {
                let logged_at = ring.file_offset(data);
                data += LOG_SECTOR;
                Patch::Data {
                    offset: descriptor.file_offset.get(),
                    leading: descriptor.leading,
                    trailing: descriptor.trailing,
                    logged_at,
                }
            } else {
                Patch::Zero {
                    offset: descriptor.file_offset.get(),
                    len: u64::from_le_bytes(descriptor.leading),
                }
            };
            check(&descriptor, &patch, log, len).map_err(|expected| {
                Refusal::corrupt("log descriptor", ring.file_offset(entry.position), expected)
            })?;
            patches.push(patch);
        }
    }
    Ok(Replay { patches, len })
}

/// Whether a descriptor stays where the log may write: in whole sectors, after the headers, outside the log.
fn check(descriptor: &RawDescriptor, patch: &Patch, log: Region, len: u64) -> Result<(), String> {
    let offset = descriptor.file_offset.get();
    let length = match patch {
        Patch::Zero { len, .. } => *len,
        Patch::Data { .. } => LOG_SECTOR,
    };
    let found = format!("found {offset:#x}+{length:#x}");
    if !offset.is_multiple_of(LOG_SECTOR) || !length.is_multiple_of(LOG_SECTOR) {
        return Err(format!("expected whole sectors of 4 KiB; {found}"));
    }
    let Some(end) = offset.checked_add(length).filter(|end| *end <= len) else {
        return Err(format!(
            "expected a change inside the file of {len:#x} bytes; {found}"
        ));
    };
    if offset < HEADER_OFFSETS[1] + LOG_SECTOR || (offset < log.end() && log.offset < end) {
        return Err(format!("expected no change of headers or log; {found}"));
    }
    Ok(())
}

/// All valid entries, in order of their position.
fn valid_entries(ring: &Ring<'_>, guid: Guid) -> std::io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut position = 0;
    while position < ring.log.length {
        match ring.entry(position, guid)? {
            Some(entry) => {
                entries.push(entry);
                // No other entry starts inside this one: its sectors have signatures of their own.
                position += entry.length;
            }
            None => position += LOG_SECTOR,
        }
    }
    Ok(entries)
}

/// The entries to replay: of all runs of adjacent entries with rising numbers whose last one's tail is one of them, the
/// one with the highest number, from that tail on.
fn active(entries: &[Entry], log: Region) -> Option<Vec<Entry>> {
    let by_position: HashMap<u64, usize> = entries
        .iter()
        .enumerate()
        .map(|(index, entry)| (entry.position, index))
        .collect();
    newest(entries, log, &|position| {
        by_position.get(&position).copied()
    })
}

/// As [`active`]; `at` gives the number of the entry at a position. Each entry is gone on from once, and those of the
/// run that is found once more: a log can have as many entries without a successor as it has sectors, all of which name
/// the tail of one long run.
fn newest(entries: &[Entry], log: Region, at: &dyn Fn(u64) -> Option<usize>) -> Option<Vec<Entry>> {
    let next: Vec<Option<usize>> = entries
        .iter()
        .map(|entry| {
            at((entry.position + entry.length) % log.length).filter(|next| {
                let sequence = entries.get(*next).map(|next| next.sequence);
                sequence.is_some() && sequence == entry.sequence.checked_add(1)
            })
        })
        .collect();
    // Where the run of each entry ends. Its successor has a higher number, and so is known before it.
    let mut falling: Vec<usize> = (0..entries.len()).collect();
    falling.sort_unstable_by_key(|index| std::cmp::Reverse(entries[*index].sequence));
    let mut heads: Vec<usize> = (0..entries.len()).collect();
    for index in falling {
        if let Some(next) = next[index] {
            heads[index] = heads[next];
        }
    }
    let mut best: Option<(usize, usize)> = None;
    for (head, entry) in entries.iter().enumerate() {
        let is_better = best.is_none_or(|(best, _)| entries[best].sequence < entry.sequence);
        if next[head].is_none()
            && is_better
            && let Some(tail) = at(entry.tail)
            && heads.get(tail) == Some(&head)
        {
            best = Some((head, tail));
        }
    }
    let (_, tail) = best?;
    let run = std::iter::successors(Some(tail), |index| next[*index]);
    Some(run.map(|index| entries[index]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhdx::format::MIB;

    const LOG: Region = Region {
        offset: MIB,
        length: MIB,
    };

    fn entry(position: u64, sectors: u64, sequence: u64, tail: u64) -> Entry {
        Entry {
            position: position * LOG_SECTOR,
            length: sectors * LOG_SECTOR,
            tail: tail * LOG_SECTOR,
            sequence,
            descriptors: 0,
            flushed_file_offset: 0,
            last_file_offset: 0,
        }
    }

    fn sequences(entries: &[Entry]) -> Option<Vec<u64>> {
        active(entries, LOG).map(|run| run.iter().map(|entry| entry.sequence).collect())
    }

    #[test]
    fn the_run_with_the_highest_number_is_replayed_from_its_tail() {
        type Case<'a> = (&'a str, &'a [Entry], Option<Vec<u64>>);
        let table: [Case<'_>; 7] = [
            ("nothing", &[], None),
            ("one", &[entry(0, 1, 9, 0)], Some(vec![9])),
            (
                "from the tail",
                &[entry(0, 2, 1, 0), entry(2, 2, 2, 2), entry(4, 2, 3, 2)],
                Some(vec![2, 3]),
            ),
            (
                "a gap in numbers",
                &[entry(0, 2, 1, 0), entry(2, 2, 3, 2)],
                Some(vec![3]),
            ),
            (
                "older run behind",
                &[entry(0, 2, 7, 0), entry(2, 2, 3, 2)],
                Some(vec![7]),
            ),
            (
                "around the end",
                &[entry(0, 2, 5, 250), entry(250, 6, 4, 250)],
                Some(vec![4, 5]),
            ),
            (
                "tail outside",
                &[entry(0, 2, 1, 0), entry(4, 2, 9, 2)],
                Some(vec![1]),
            ),
        ];
        for (name, entries, expected) in table {
            assert_eq!(sequences(entries), expected, "{name}");
        }
    }

    #[test]
    fn every_entry_is_visited_once_whatever_their_tails_say() {
        // A run over half of the ring, and in the other half entries that end nothing and all name its tail: the higher
        // the number, the later it is looked at.
        const ENTRIES: u64 = 4096;
        let log = Region {
            offset: MIB,
            length: 2 * ENTRIES * LOG_SECTOR,
        };
        let run = (0..ENTRIES).map(|n| entry(n, 1, n + 1, 0));
        let others = (0..ENTRIES).map(|n| entry(ENTRIES + n, 1, 3 * ENTRIES + 2 * n, 0));
        let entries: Vec<Entry> = run.chain(others).collect();
        let looked = std::cell::Cell::new(0_u64);
        let found = newest(&entries, log, &|position| {
            looked.set(looked.get() + 1);
            let index = (position / LOG_SECTOR) as usize;
            (index < entries.len()).then_some(index)
        });
        assert_eq!(found.unwrap(), entries[..ENTRIES as usize]);
        // Its successor and its tail.
        assert!(looked.get() <= 2 * entries.len() as u64, "{}", looked.get());
    }

    #[test]
    fn a_log_of_more_changes_than_are_kept_is_refused_before_they_are_read() {
        use crate::vhdx::log::entry::{descriptor_sectors, length};
        // Ranges of zeros need no sector of data: one entry can describe any number.
        let descriptors = MAX_PATCHES + 1;
        let bytes = descriptor_sectors(descriptors) * LOG_SECTOR;
        assert!(bytes < length(descriptors));
        let log = Region {
            offset: MIB,
            length: bytes.next_multiple_of(MIB),
        };
        let guid = Guid::random();
        let ring = zeroing(guid, descriptors, bytes);
        let reads = std::cell::Cell::new(0_u64);
        let read_ring = |buffer: &mut [u8], offset: u64| {
            reads.set(reads.get() + 1);
            let start = (offset - log.offset) as usize;
            buffer.fill(0);
            if let Some(bytes) = ring.get(start..start + buffer.len()) {
                buffer.copy_from_slice(bytes);
            }
            Ok(())
        };
        let refused = read(&read_ring, log, guid, 64 * MIB).unwrap_err();
        assert!(refused.to_string().contains("65537 changes"), "{refused}");
        // Each sector was read once, to find the entry.
        assert!(reads.get() <= log.length / LOG_SECTOR, "{}", reads.get());
    }

    /// An entry that describes the same range of zeros again and again.
    fn zeroing(guid: Guid, descriptors: u64, bytes: u64) -> Vec<u8> {
        use zerocopy::IntoBytes;

        use crate::vhdx::format::{LOG_ENTRY_SIGNATURE, RawLogEntry, ZERO_SIGNATURE, checksum};
        let head = RawLogEntry {
            signature: *LOG_ENTRY_SIGNATURE,
            checksum: 0.into(),
            entry_length: (bytes as u32).into(),
            tail: 0.into(),
            sequence: 1.into(),
            descriptor_count: (descriptors as u32).into(),
            reserved: 0.into(),
            log_guid: guid,
            flushed_file_offset: (64 * MIB).into(),
            last_file_offset: (64 * MIB).into(),
        };
        let descriptor = RawDescriptor {
            signature: *ZERO_SIGNATURE,
            trailing: [0; 4],
            leading: LOG_SECTOR.to_le_bytes(),
            file_offset: (32 * MIB).into(),
            sequence: 1.into(),
        };
        let mut entry = head.as_bytes().to_vec();
        for _ in 0..descriptors {
            entry.extend_from_slice(descriptor.as_bytes());
        }
        entry.resize(bytes as usize, 0);
        let sum = checksum(&entry).to_le_bytes();
        entry[4..8].copy_from_slice(&sum);
        entry
    }
}
