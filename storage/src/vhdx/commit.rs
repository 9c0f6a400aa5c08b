//! Making changes durable: the announcement before the first write, the commit of changed metadata, the reuse of freed
//! space, the close.
//!
//! One thread at a time does any of this, under the commit lock. The state lock is taken inside it, for lines, never
//! the other way round.
//!
//! A failed write leaves what it should have changed for the next try. After a failed sync it is not known what is
//! durable, so the file is not touched again: the log in it still leads to a sound state.

use std::io;
use std::sync::atomic::Ordering;

use super::disk::Vhdx;
use super::format::{Guid, LOG_SECTOR};
use super::header::{Header, Headers};
use super::log::writer::{LogWriter, MAX_SECTORS};
use super::region::{self, Region};
use super::space::STEP_BLOCKS;
use super::state::{Commit, Level};
use crate::disk::DiskError;

/// Bytes that can come to be usable.
struct Waiting {
    /// Once the change that freed them is durable.
    uncommitted: u64,
    /// When they have been zeroed.
    free: u64,
    /// When the unmapped blocks that keep them have let go.
    anchored: u64,
}

pub(super) fn io_error(operation: &str) -> impl FnOnce(io::Error) -> DiskError {
    move |source| DiskError::Io {
        operation: operation.into(),
        source,
    }
}

/// A sector as the log takes it: its file offset and its bytes.
pub(super) type LoggedSector<'a> = (u64, &'a [u8; LOG_SECTOR as usize]);

impl Vhdx {
    /// Makes new identifiers of a file that is about to change durable, at least as many as `level` asks for: once an
    /// open, and anew after a close.
    pub(super) fn announce(&self, level: Level) -> Result<(), DiskError> {
        self.announce_as(level, None, None)
    }

    /// As [`Vhdx::announce`]; where a DataWriteGuid is given, the file gets that one, whatever was announced before,
    /// and with it the FileWriteGuid that is given, or a new one.
    pub(super) fn announce_as(
        &self,
        level: Level,
        data_write_guid: Option<Guid>,
        file_write_guid: Option<Guid>,
    ) -> Result<(), DiskError> {
        let mut commit = self.commit.lock();
        self.unless_poisoned()?;
        if let Some(guid) = data_write_guid {
            self.update_header(&mut commit.headers, |header| {
                header.file_write_guid = file_write_guid.unwrap_or_else(Guid::random);
                header.data_write_guid = guid;
            })?;
            commit.announced = Level::Data;
        } else if commit.announced < level {
            self.change_identifiers(&mut commit, level)?;
        }
        self.open_log(&mut commit)
    }

    /// Opens the log of a file that is announced; announces it first where that has not been done.
    pub(super) fn open_log(&self, commit: &mut Commit) -> Result<(), DiskError> {
        if commit.log.is_none() {
            if commit.announced == Level::Untouched {
                // A close has come between a change and its commit.
                self.change_identifiers(commit, Level::Data)?;
            }
            commit.log = Some(self.start_log(commit)?);
        }
        self.state.lock().announced = commit.announced;
        Ok(())
    }

    fn change_identifiers(&self, commit: &mut Commit, level: Level) -> Result<(), DiskError> {
        self.update_header(&mut commit.headers, |header| {
            header.file_write_guid = Guid::random();
            if level == Level::Data {
                header.data_write_guid = Guid::random();
            }
        })?;
        commit.announced = level;
        Ok(())
    }

    fn update_header(
        &self,
        headers: &mut Headers,
        change: impl FnOnce(&mut Header),
    ) -> Result<(), DiskError> {
        headers
            .update(&*self.view.medium, change)
            .inspect_err(|_| self.state.lock().poisoned = true)
    }

    /// Starts a log in steps that each are durable before the next: a log that says nothing, and its identifier in both
    /// headers.
    fn start_log(&self, commit: &mut Commit) -> Result<LogWriter, DiskError> {
        let medium = &*self.view.medium;
        if let Some(copy) = commit.damaged_region_table {
            region::repair(medium, copy).map_err(io_error("repair a region table"))?;
            commit.damaged_region_table = None;
        }
        let header = *commit.headers.current();
        let log = Region {
            offset: header.log_offset,
            length: header.log_length,
        };
        let end = self.state.lock().space.end();
        let mut log = LogWriter::start(medium, log, end).map_err(io_error("start the log"))?;
        self.sync(Some(&mut log))?;
        for _ in 0..2 {
            self.update_header(&mut commit.headers, |header| header.log_guid = log.guid())?;
        }
        Ok(log)
    }

    /// Makes all finished writes durable. A flush that waited for another that began after it was asked for is done by
    /// that.
    pub(super) fn flush_all(&self) -> Result<(), DiskError> {
        // Taken before the wait for the lock: a commit that begins later covers this flush.
        let number = self.flushes.fetch_add(1, Ordering::SeqCst) + 1;
        let mut commit = self.commit.lock();
        if commit.flushed >= number {
            return Ok(());
        }
        let covered = self.flushes.load(Ordering::SeqCst);
        self.commit_under(&mut commit)?;
        commit.flushed = covered;
        Ok(())
    }

    /// Commits without being asked to, when many pages wait.
    pub(super) fn commit_pages(&self) -> Result<(), DiskError> {
        self.commit_under(&mut self.commit.lock())
    }

    pub(super) fn commit_under(&self, commit: &mut Commit) -> Result<(), DiskError> {
        self.unless_poisoned()?;
        if self.state.lock().pages.dirty() == 0 && commit.unapplied.is_empty() {
            self.sync(commit.log.as_mut())?;
        } else {
            self.commit_dirty(commit)?;
        }
        self.scrub(false)
    }

    fn commit_dirty(&self, commit: &mut Commit) -> Result<(), DiskError> {
        self.open_log(commit)?;
        // Taken together: all that these pages name lies before `end`, and data they count on has been written.
        let (taken, number, end, ordered) = {
            let mut state = self.state.lock();
            (
                state.pages.take_dirty(),
                state.space.commit_taken(),
                state.space.end(),
                std::mem::take(&mut state.ordered),
            )
        };
        let sectors: Vec<_> = taken
            .iter()
            .map(|taken| (taken.offset, &*taken.bytes))
            .collect();
        let synced = if ordered {
            self.sync(commit.log.as_mut())
        } else {
            Ok(())
        };
        let logged = synced.and_then(|()| self.log_sectors(commit, &sectors, end));
        let mut state = self.state.lock();
        state.pages.committed(&taken, logged.is_ok());
        if logged.is_err() {
            state.ordered |= ordered;
        } else {
            let epoch = state.in_flight.advance();
            state.space.committed(number, epoch);
        }
        logged
    }

    /// Describes sectors in the log, makes that durable, and writes them in place. What fits an entry becomes durable
    /// as one; of more, what comes first.
    pub(super) fn log_sectors(
        &self,
        commit: &mut Commit,
        sectors: &[LoggedSector<'_>],
        end: u64,
    ) -> Result<(), DiskError> {
        self.open_log(commit)?;
        let Commit { log, unapplied, .. } = commit;
        let Some(log) = log else {
            return Err(DiskError::Poisoned);
        };
        if !unapplied.is_empty() {
            let left: Vec<_> = unapplied
                .iter()
                .map(|(at, bytes)| (*at, &**bytes))
                .collect();
            self.sync(Some(log))?;
            self.apply(log, &left)?;
            unapplied.clear();
        }
        let mut logged = 0;
        self.log_and_apply(log, sectors, end, &mut logged)
            .inspect_err(|_| {
                let left = &sectors[..logged];
                *unapplied = left
                    .iter()
                    .map(|(at, bytes)| (*at, Box::new(**bytes)))
                    .collect();
            })
    }

    fn log_and_apply(
        &self,
        log: &mut LogWriter,
        sectors: &[LoggedSector<'_>],
        end: u64,
        logged: &mut usize,
    ) -> Result<(), DiskError> {
        let medium = &*self.view.medium;
        let mut entries = sectors.chunks(MAX_SECTORS).peekable();
        while let Some(entry) = entries.next() {
            if !log.has_room(entry.len()) {
                self.apply(log, &sectors[..*logged])?;
                self.sync(Some(log))?;
                log.append(medium, &[], end)
                    .map_err(io_error("write the log"))?;
                log.applied();
                self.sync(Some(log))?;
            }
            log.append(medium, entry, end)
                .map_err(io_error("write the log"))?;
            *logged += entry.len();
            // Entries follow each other without waiting as long as there is room for one more.
            if entries.peek().is_none_or(|next| !log.has_room(next.len())) {
                self.sync(Some(log))?;
            }
        }
        self.apply(log, sectors)
    }

    /// Writes sectors in place that the log durably describes.
    fn apply(&self, log: &mut LogWriter, sectors: &[LoggedSector<'_>]) -> Result<(), DiskError> {
        // They count as not durable from the first one on.
        self.state.lock().unsynced = true;
        for (offset, bytes) in sectors {
            self.view
                .medium
                .write_all_at(&bytes[..], *offset)
                .map_err(io_error("write metadata"))?;
        }
        log.applied();
        Ok(())
    }

    /// Zeroes space that is not in use any more; the next sync makes it usable. Without need, only by giving it back to
    /// the host, where that is wanted and the file system can.
    fn scrub(&self, need: bool) -> Result<(), DiskError> {
        let ranges = {
            let mut state = self.state.lock();
            let state = &mut *state;
            let in_flight = &state.in_flight;
            state
                .space
                .start_scrub(|epoch| in_flight.is_over(epoch), need || self.punch_holes)
        };
        let medium = &*self.view.medium;
        let mut scrubbed = 0;
        for (offset, len) in &ranges {
            let punched = || -> io::Result<bool> {
                if self.punch_holes && medium.punch_hole(*offset, *len)? {
                    return Ok(true);
                }
                if need {
                    medium.zero(*offset, *len)?;
                }
                Ok(need)
            };
            if !punched().map_err(io_error("give free space back"))? {
                break;
            }
            scrubbed += 1;
        }
        if scrubbed > 0 {
            self.state.lock().space.scrubbed(&ranges[..scrubbed]);
        }
        Ok(())
    }

    /// Finds `needed` bytes of space for a block: of what is free if there is enough of that, of what unmapped blocks
    /// keep, else by growing the file.
    pub(super) fn grow(&self, needed: u64) -> Result<(), DiskError> {
        let waiting = self.waiting();
        if waiting.free >= needed || waiting.uncommitted >= self.worthwhile() {
            self.reclaim(waiting.uncommitted >= self.worthwhile())?;
        } else if waiting.anchored >= self.worthwhile() {
            self.drop_anchors()?;
            self.reclaim(true)?;
        }
        let _growth = self.growth.lock();
        let tail = {
            let state = self.state.lock();
            if state.space.has(needed) {
                return Ok(());
            }
            state.space.tail()
        };
        let grown = tail
            .grown(&*self.view.medium, needed, self.block_size)
            .map_err(|source| DiskError::Io {
                operation: format!(
                    "extend the file by {needed:#x} bytes from {:#x}",
                    tail.end()
                ),
                source,
            })?;
        self.state.lock().space.adopt(grown);
        Ok(())
    }

    /// Whether space for `needed` bytes may come of what is in the file, rather than of a longer one.
    pub(super) fn can_reclaim(&self, needed: u64) -> bool {
        let waiting = self.waiting();
        waiting.free >= needed
            || waiting.uncommitted >= self.worthwhile()
            || waiting.anchored >= self.worthwhile()
    }

    /// How many bytes have to be free for a commit of their own.
    fn worthwhile(&self) -> u64 {
        STEP_BLOCKS * self.block_size
    }

    fn waiting(&self) -> Waiting {
        let state = self.state.lock();
        let (uncommitted, free) = state.space.reclaimable();
        Waiting {
            uncommitted,
            free,
            anchored: state.space.anchored() * self.block_size,
        }
    }

    /// Makes freed space usable.
    pub(super) fn reclaim(&self, uncommitted: bool) -> Result<(), DiskError> {
        let mut commit = self.commit.lock();
        if uncommitted {
            self.commit_under(&mut commit)?;
        }
        self.unless_poisoned()?;
        self.scrub(true)?;
        self.sync(commit.log.as_mut())
    }

    /// Makes everything that was written durable, and lets log and space know.
    pub(super) fn sync(&self, log: Option<&mut LogWriter>) -> Result<(), DiskError> {
        let round = self.state.lock().space.round();
        if let Err(source) = self.view.medium.sync_data() {
            self.state.lock().poisoned = true;
            return Err(io_error("sync the file")(source));
        }
        if let Some(log) = log {
            log.synced();
        }
        let mut state = self.state.lock();
        state.unsynced = false;
        state.space.synced(round);
        Ok(())
    }

    /// Brings the file to its clean state.
    pub(super) fn close_all(&self) -> Result<(), DiskError> {
        let mut commit = self.commit.lock();
        self.unless_poisoned()?;
        if commit.log.is_none() {
            return Ok(());
        }
        self.commit_under(&mut commit)?;
        // What the commit wrote in place.
        self.sync(commit.log.as_mut())?;
        self.state.lock().announced = Level::Untouched;
        commit.announced = Level::Untouched;
        commit.log = None;
        for _ in 0..2 {
            self.update_header(&mut commit.headers, |header| header.log_guid = Guid::ZERO)?;
        }
        // Only now, as an entry of the log could promise a longer file.
        let growth = self.growth.lock();
        let end = self.state.lock().space.give_up();
        let medium = &*self.view.medium;
        if medium.len().map_err(io_error("read the length"))? > end {
            medium
                .set_len(end)
                .map_err(io_error("cut the file to its end"))?;
        }
        drop(growth);
        Ok(())
    }

    fn unless_poisoned(&self) -> Result<(), DiskError> {
        if self.state.lock().poisoned {
            Err(DiskError::Poisoned)
        } else {
            Ok(())
        }
    }
}
