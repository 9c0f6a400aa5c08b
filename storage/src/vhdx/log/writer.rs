//! Appending to the log.
//!
//! An entry's space can be used again once its changes are durable in place. The writer does no such I/O itself, so
//! its user says what has happened: entries are appended, a sync makes all durable that was in place before it, and
//! then the entries are applied.

use std::io;

use super::entry::{self, Entry, Sector};
use crate::medium::Medium;
use crate::vhdx::format::{Guid, LOG_SECTOR};
use crate::vhdx::region::Region;

/// Most sectors of an entry that the writer makes: what descriptors the first sector holds.
pub(in crate::vhdx) const MAX_SECTORS: usize = 126;

/// The writing end of an open log.
#[derive(Debug)]
pub(in crate::vhdx) struct LogWriter {
    log: Region,
    guid: Guid,
    /// Where the next entry goes.
    position: u64,
    sequence: u64,
    /// Bytes of entries whose changes are in place, but perhaps not durable.
    in_place: u64,
    /// Bytes of entries, after those, whose changes are not in place.
    pending: u64,
    /// Bytes from the tail of the last entry to its end. They stay until the next entry is durable, since a cut that
    /// tears the next one falls back to the last, and that one is valid only with all entries from its tail on.
    last_run: u64,
    /// What the file is never shorter than while the log is open.
    file_length: u64,
}

impl LogWriter {
    /// A new log, of a new identifier, for a file that is `file_length` bytes long and stays at least that, with one
    /// entry that changes nothing: a log that a header names has to hold a valid sequence from the start. The caller
    /// makes it durable before a header names it.
    pub(in crate::vhdx) fn start(
        medium: &dyn Medium,
        log: Region,
        file_length: u64,
    ) -> io::Result<Self> {
        let mut writer = Self {
            log,
            guid: Guid::random(),
            position: 0,
            sequence: 1,
            in_place: 0,
            pending: 0,
            last_run: 0,
            file_length,
        };
        writer.append(medium, &[], file_length)?;
        writer.applied();
        Ok(writer)
    }

    /// The identifier that the header has to name.
    pub(in crate::vhdx) fn guid(&self) -> Guid {
        self.guid
    }

    /// Whether an entry of this many sectors can be appended now. There is always room for an empty one, and after a
    /// sync, an empty entry and another sync there is room for [`MAX_SECTORS`].
    pub(in crate::vhdx) fn has_room(&self, sectors: usize) -> bool {
        let spare = if sectors == 0 { 0 } else { entry::length(0) };
        entry::length(sectors as u64) + spare + self.last_run <= self.log.length
    }

    /// Appends an entry that describes the sectors, each with its file offset. There has to be room.
    /// All that is allocated ends at `last`; replay extends the file to there if a cut took that away.
    pub(in crate::vhdx) fn append(
        &mut self,
        medium: &dyn Medium,
        sectors: &[(u64, &[u8; LOG_SECTOR as usize])],
        last: u64,
    ) -> io::Result<()> {
        let length = entry::length(sectors.len() as u64);
        let live = self.in_place + self.pending;
        let head = Entry {
            position: self.position,
            length,
            tail: (self.position + self.log.length - live) % self.log.length,
            sequence: self.sequence,
            descriptors: sectors.len() as u64,
            flushed_file_offset: self.file_length,
            last_file_offset: last,
        };
        let sectors: Vec<Sector<'_>> = sectors
            .iter()
            .map(|(file_offset, bytes)| Sector {
                file_offset: *file_offset,
                bytes,
            })
            .collect();
        let bytes = entry::encode(&head, self.guid, &sectors);
        let before_the_end = (self.log.length - self.position).min(length) as usize;
        medium.write_all_at(&bytes[..before_the_end], self.log.offset + self.position)?;
        if before_the_end < bytes.len() {
            medium.write_all_at(&bytes[before_the_end..], self.log.offset)?;
        }
        self.position = (self.position + length) % self.log.length;
        // A file that lives to 2^64 entries does not exist.
        self.sequence += 1;
        self.pending += length;
        self.last_run = live + length;
        Ok(())
    }

    /// All changes that were in place are durable: a sync that began after they were made has returned.
    pub(in crate::vhdx) fn synced(&mut self) {
        self.in_place = 0;
    }

    /// All entries have been applied in place.
    pub(in crate::vhdx) fn applied(&mut self) {
        self.in_place += self.pending;
        self.pending = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::sequence;
    use super::*;
    use crate::vhdx::format::MIB;
    use crate::vhdx::view::View;

    const LOG: Region = Region {
        offset: MIB,
        length: MIB,
    };
    const LENGTH: u64 = 4 * MIB;

    fn replayed(medium: &Arc<std::fs::File>, writer: &LogWriter) -> View {
        let len = Medium::len(medium).unwrap();
        let mut view = View::new(Box::new(Arc::clone(medium)), len);
        let replay = sequence::read(
            &|buffer, offset| medium.read_exact_at(buffer, offset),
            LOG,
            writer.guid(),
            len,
        )
        .unwrap();
        view.lay_over(&replay.patches, replay.len);
        view
    }

    #[test]
    fn what_was_appended_is_read_back_at_every_turn_of_the_ring() {
        let medium = Arc::new(tempfile::tempfile().unwrap());
        medium.set_len(4 * MIB).unwrap();
        let mut writer = LogWriter::start(&medium, LOG, LENGTH).unwrap();
        // 40 sectors a turn do not divide the ring, so entries cross its end at changing places.
        for turn in 1..200_u8 {
            let pages: Vec<[u8; 4096]> = (0..39)
                .map(|page| [turn.wrapping_mul(3) ^ page; 4096])
                .collect();
            let sectors: Vec<_> = pages
                .iter()
                .zip(0..)
                .map(|(page, n)| (2 * MIB + n * LOG_SECTOR, page))
                .collect();
            assert!(writer.has_room(sectors.len()));
            writer.append(&medium, &sectors, LENGTH).unwrap();
            writer.synced();
            let view = replayed(&medium, &writer);
            for (page, (offset, _)) in pages.iter().zip(&sectors) {
                let mut found = [0; 4096];
                view.read(&mut found, *offset).unwrap();
                assert_eq!(&found, page, "turn {turn}");
            }
            writer.applied();
        }
    }

    #[test]
    fn what_the_last_entry_needs_is_kept_until_an_empty_entry_takes_its_place() {
        let medium = Arc::new(tempfile::tempfile().unwrap());
        medium.set_len(4 * MIB).unwrap();
        let mut writer = LogWriter::start(&medium, LOG, LENGTH).unwrap();
        let page = [1; 4096];
        let sectors = vec![(2 * MIB, &page); MAX_SECTORS];
        for _ in 0..2 {
            writer.append(&medium, &sectors, LENGTH).unwrap();
            writer.applied();
        }
        // One sector of the start, twice 127, and the ring has 256: room for the empty entry alone, however much is
        // durable.
        writer.synced();
        assert!(writer.has_room(0) && !writer.has_room(1));
        writer.append(&medium, &[], LENGTH).unwrap();
        writer.applied();
        assert!(writer.has_room(MAX_SECTORS));
    }
}
