//! Making changes durable: the announcement before the first write, the commit of allocations, the close.
//!
//! One thread at a time does any of this, under the commit lock. The state lock is taken inside it, for lines, never the other
//! way round.

use std::sync::atomic::Ordering;

use super::disk::{Vhdx, lock};
use super::format::Guid;
use super::header::Headers;
use super::log::writer::{LogWriter, MAX_SECTORS};
use super::pages::Taken;
use super::region::{self, Region};
use crate::disk::DiskError;

/// What the commit lock guards.
#[derive(Debug)]
pub(super) struct Commit {
    pub headers: Headers,
    /// The log that the headers name, from the announcement until the close.
    pub log: Option<LogWriter>,
    /// The copy of the region table that the announcement has to repair.
    pub damaged_region_table: Option<usize>,
    /// The highest number of a flush that is done.
    pub flushed: u64,
}

fn io_error(operation: &str) -> impl FnOnce(std::io::Error) -> DiskError {
    move |source| DiskError::Io {
        operation: operation.into(),
        source,
    }
}

impl Vhdx {
    /// Makes the identifiers of a file that is about to change durable, once an open, and anew after a close.
    pub(super) fn announce(&self) -> Result<(), DiskError> {
        let mut commit = lock(&self.commit);
        self.or_poison(|| self.announced(&mut commit).map(drop))
    }

    /// The open log of an announced file; announces it first where that has not been done.
    fn announced<'a>(&self, commit: &'a mut Commit) -> Result<&'a mut LogWriter, DiskError> {
        let Commit {
            headers,
            log,
            damaged_region_table,
            flushed: _,
        } = commit;
        match log {
            Some(log) => Ok(log),
            None => Ok(log.insert(self.start_log(headers, damaged_region_table)?)),
        }
    }

    /// Announces the file in steps that each are durable before the next: new identifiers, a log that says nothing, and the
    /// log's identifier in both headers.
    fn start_log(
        &self,
        headers: &mut Headers,
        damaged_region_table: &mut Option<usize>,
    ) -> Result<LogWriter, DiskError> {
        let medium = &*self.view.medium;
        headers.update(medium, |header| {
            header.file_write_guid = Guid::random();
            header.data_write_guid = Guid::random();
        })?;
        if let Some(copy) = damaged_region_table.take() {
            region::repair(medium, copy).map_err(io_error("repair a region table"))?;
        }
        let region = Region {
            offset: headers.current().log_offset,
            length: headers.current().log_length,
        };
        let end = lock(&self.state).space.end();
        let mut log = LogWriter::start(medium, region, end).map_err(io_error("start the log"))?;
        self.sync(Some(&mut log))?;
        for _ in 0..2 {
            headers.update(medium, |header| header.log_guid = log.guid())?;
        }
        lock(&self.state).announced = true;
        Ok(log)
    }

    /// Makes all finished writes durable. A flush that waited for another that began after it was asked for is done by that.
    pub(super) fn flush_all(&self) -> Result<(), DiskError> {
        // Taken before the wait for the lock: a commit that begins later covers this flush.
        let number = self.flushes.fetch_add(1, Ordering::SeqCst) + 1;
        let mut commit = lock(&self.commit);
        if commit.flushed >= number {
            return Ok(());
        }
        let covered = self.flushes.load(Ordering::SeqCst);
        self.or_poison(|| self.commit_under(&mut commit))?;
        commit.flushed = covered;
        Ok(())
    }

    /// Commits without being asked to, when many pages wait.
    pub(super) fn commit_pages(&self) -> Result<(), DiskError> {
        let mut commit = lock(&self.commit);
        self.or_poison(|| self.commit_under(&mut commit))
    }

    fn commit_under(&self, commit: &mut Commit) -> Result<(), DiskError> {
        if lock(&self.state).pages.dirty() == 0 {
            return self.sync(commit.log.as_mut());
        }
        // A close may have come between an allocation and this.
        let log = self.announced(commit)?;
        // Taken together: all that these pages name lies before `end`.
        let (taken, end) = {
            let mut state = lock(&self.state);
            (state.pages.take_dirty(), state.space.end())
        };
        for pages in taken.chunks(MAX_SECTORS) {
            self.commit_entry(log, pages, end)?;
        }
        lock(&self.state).pages.committed(&taken);
        Ok(())
    }

    /// Commits as many pages as an entry of the log describes.
    fn commit_entry(
        &self,
        log: &mut LogWriter,
        pages: &[Taken],
        end: u64,
    ) -> Result<(), DiskError> {
        let medium = &*self.view.medium;
        if !log.has_room(pages.len()) {
            self.sync(Some(log))?;
            log.append(medium, &[], end)
                .map_err(io_error("write the log"))?;
            log.applied();
            self.sync(Some(log))?;
        }
        let sectors: Vec<_> = pages
            .iter()
            .map(|taken| (self.layout.page_offset(taken.page), &*taken.bytes))
            .collect();
        log.append(medium, &sectors, end)
            .map_err(io_error("write the log"))?;
        self.sync(Some(log))?;
        for (offset, bytes) in sectors {
            medium
                .write_all_at(bytes, offset)
                .map_err(io_error("write the BAT"))?;
        }
        log.applied();
        lock(&self.state).unsynced = true;
        Ok(())
    }

    /// Makes everything that was written durable, and lets the log know.
    fn sync(&self, log: Option<&mut LogWriter>) -> Result<(), DiskError> {
        self.view
            .medium
            .sync_data()
            .map_err(io_error("sync the file"))?;
        if let Some(log) = log {
            log.synced();
        }
        lock(&self.state).unsynced = false;
        Ok(())
    }

    /// Brings the file to its clean state.
    pub(super) fn close_all(&self) -> Result<(), DiskError> {
        let mut commit = lock(&self.commit);
        if commit.log.is_none() {
            return Ok(());
        }
        self.or_poison(|| {
            self.commit_under(&mut commit)?;
            // What the commit wrote in place.
            self.sync(commit.log.as_mut())?;
            lock(&self.state).announced = false;
            commit.log = None;
            for _ in 0..2 {
                commit
                    .headers
                    .update(&*self.view.medium, |header| header.log_guid = Guid::ZERO)?;
            }
            Ok(())
        })?;
        // Only now, as an entry of the log could promise a longer file.
        let growth = lock(&self.growth);
        let surplus = lock(&self.state).space.give_up();
        if let Some(len) = surplus {
            self.view
                .medium
                .set_len(len)
                .map_err(io_error("cut the file to its end"))?;
        }
        drop(growth);
        Ok(())
    }

    /// Does work on the metadata. Once it fails nobody knows what the file says, so it is not touched again: the log in it
    /// still leads to a sound state.
    fn or_poison(&self, work: impl FnOnce() -> Result<(), DiskError>) -> Result<(), DiskError> {
        if lock(&self.state).poisoned {
            return Err(DiskError::Poisoned);
        }
        work().inspect_err(|_| lock(&self.state).poisoned = true)
    }
}
