//! What the requests to an open file share, and why one of them has to wait.
//!
//! [`State`] is under a lock that is held for lines and never over I/O. [`Commit`] is under another, which is taken
//! first and held over the I/O that makes changes durable.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::bat::{Entry, Layout, decode_bitmap};
use super::bitmap;
use super::header::Headers;
use super::in_flight::RequestsInFlight;
use super::locator::ParentLocator;
use super::log::writer::LogWriter;
use super::pages::{Bytes, Pages, page_of};
use super::region::Region;
use super::space::Space;
use crate::disk::{DiskError, Extent};

/// What the identifiers of an open file have announced to the next reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    /// Nothing: the file is as it was.
    Untouched,
    /// A new FileWriteGuid: the file changes, but no reader of the disk sees it.
    File,
    /// A new DataWriteGuid too: what a reader sees changes.
    Data,
}

/// What requests share.
#[derive(Debug)]
pub(super) struct State {
    pub layout: Layout,
    pub locator: Option<ParentLocator>,
    pub pages: Pages,
    pub space: Space,
    pub in_flight: RequestsInFlight,
    /// Writes in flight that change metadata when they are over, by the number of the request.
    pub writes: HashMap<u64, (u64, Vec<Change>)>,
    /// What the parents hold of blocks that were asked for; nothing where that is not worth to be kept.
    pub below: HashMap<u64, Arc<[Extent]>>,
    pub next_write: u64,
    /// What the headers have announced, with a log to go with it.
    pub announced: Level,
    /// A sync has failed: what is durable is not known.
    pub poisoned: bool,
    /// A commit wrote pages in place that no sync has made durable.
    pub unsynced: bool,
    /// Pages that wait for a commit describe data which has to be durable before they are.
    pub ordered: bool,
    /// What no request may begin to change for now.
    pub excluded: Option<Exclusion>,
}

/// What requests may not change while the file is rearranged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exclusion {
    /// A block, and its data: it is being moved.
    Block(u64),
    /// All entries.
    Everything,
}

/// Why a request cannot be answered yet, or at all.
#[derive(Debug)]
pub(super) enum Stop {
    /// The page at this file offset has to be read.
    Page(u64),
    Announcement(Level),
    /// The file needs so many bytes more.
    Growth(u64),
    Commit,
    /// The exclusion has to end.
    Excluded,
    Failed(DiskError),
}

impl From<DiskError> for Stop {
    fn from(error: DiskError) -> Self {
        Self::Failed(error)
    }
}

/// Sectors that a write in flight brings into a partially present block: a reader sees them when it is over, and not
/// before, as until then the parent's data is what they hold.
#[derive(Debug)]
pub(super) struct Change {
    pub block: u64,
    pub part: Range<u64>,
    /// What is kept in memory for it: the page of the block's entry, and those of its bits.
    pub pinned: Vec<u64>,
}

/// What the commit lock guards.
#[derive(Debug)]
pub(super) struct Commit {
    pub headers: Headers,
    /// The regions of the file, the log among them.
    pub regions: Vec<Region>,
    /// Where the metadata lie.
    pub metadata: Region,
    /// What the headers announce.
    pub announced: Level,
    /// The log that the headers name, from the announcement until the close.
    pub log: Option<LogWriter>,
    /// The copy of the region table that the announcement has to repair.
    pub damaged_region_table: Option<usize>,
    /// The highest number of a flush that is done.
    pub flushed: u64,
    /// Sectors that the log describes and that could not be written in place: the next commit begins with them.
    pub unapplied: Vec<(u64, Bytes)>,
}

impl State {
    /// Whether no request may begin to change any of these blocks.
    pub(super) fn excludes(&self, blocks: &Range<u64>) -> bool {
        match self.excluded {
            None => false,
            Some(Exclusion::Block(excluded)) => blocks.contains(&excluded),
            Some(Exclusion::Everything) => true,
        }
    }

    /// Lets a request change a block unless it is excluded. A request that has changed another block already must not
    /// ask: it is one of those that the exclusion waits for.
    pub(super) fn unless_excluded(&self, block: u64) -> Result<(), Stop> {
        if self.excludes(&(block..block + 1)) {
            Err(Stop::Excluded)
        } else {
            Ok(())
        }
    }

    /// The entry of a payload block.
    pub(super) fn block(&mut self, block: u64) -> Result<Entry, Stop> {
        let index = self.layout.index(block);
        let offset = self.layout.entry_offset(index);
        let raw = self
            .pages
            .entry(offset)
            .ok_or(Stop::Page(page_of(offset)))?;
        Entry::decode(raw, self.layout.has_parent)
            .map_err(|expected| corrupt_entry(index, offset, expected).into())
    }

    /// Changes the entry of a payload block, whose page is here.
    pub(super) fn set_block(&mut self, block: u64, entry: Entry) {
        let offset = self.layout.entry_offset(self.layout.index(block));
        self.pages.set_entry(offset, entry.raw());
    }

    /// Where the sector bitmap lies whose entry has this index, if there is one.
    pub(super) fn bitmap(&mut self, index: u64) -> Result<Option<u64>, Stop> {
        let offset = self.layout.entry_offset(index);
        let raw = self
            .pages
            .entry(offset)
            .ok_or(Stop::Page(page_of(offset)))?;
        decode_bitmap(raw).map_err(|expected| corrupt_entry(index, offset, expected).into())
    }

    /// The pages with the bits of a part of a partially present block. They need not be here.
    pub(super) fn bits(
        &mut self,
        block: u64,
        part: &Range<u64>,
    ) -> Result<impl Iterator<Item = (u64, Range<usize>)> + Clone + use<>, Stop> {
        let at = self.layout.bits(block);
        let bitmap = self.bitmap(at.index)?.ok_or_else(|| {
            let offset = self.layout.entry_offset(at.index);
            corrupt_entry(
                at.index,
                offset,
                "expected a sector bitmap, found none".into(),
            )
        })?;
        let base = block * self.layout.block_size;
        let first = at.first + (part.start - base) / self.layout.sector;
        let end = at.first + (part.end - base).div_ceil(self.layout.sector);
        Ok(bitmap::pages(bitmap, first..end))
    }
}

fn corrupt_entry(index: u64, offset: u64, expected: String) -> DiskError {
    DiskError::Corrupt {
        structure: format!("BAT entry {index}"),
        offset,
        expected,
    }
}
