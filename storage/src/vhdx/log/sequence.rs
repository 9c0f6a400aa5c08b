//! Finding the active sequence of a log, and what it changes ([MS-VHDX] 2.3.2, 2.3.3).

use std::collections::HashMap;

use super::entry::{Entry, Ring};
use crate::refusal::Refusal;
use crate::vhdx::format::{
    DESCRIPTOR_SIGNATURE, Guid, HEADER_OFFSETS, LOG_SECTOR, MAX_FILE, RawDescriptor,
};
use crate::vhdx::region::Region;
use crate::vhdx::view::Patch;

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
    let by_position: HashMap<u64, &Entry> = entries
        .iter()
        .map(|entry| (entry.position, entry))
        .collect();
    let mut best: Option<Vec<Entry>> = None;
    let next = |entry: &Entry| {
        by_position
            .get(&((entry.position + entry.length) % log.length))
            .copied()
            .filter(|next| Some(next.sequence) == entry.sequence.checked_add(1))
    };
    // A run is followed from its tail: the head is where it ends, and each run has one head.
    for head in entries.iter().filter(|entry| next(entry).is_none()) {
        if best
            .as_ref()
            .and_then(|best| best.last())
            .is_some_and(|best| best.sequence >= head.sequence)
        {
            continue;
        }
        let mut run = Vec::new();
        let mut at = by_position.get(&head.tail).copied();
        while let Some(entry) = at {
            run.push(*entry);
            at = next(entry);
        }
        if run.last() == Some(head) {
            best = Some(run);
        }
    }
    best
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
}
