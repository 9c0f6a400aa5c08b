//! Where the bytes of an open file are.
//!
//! Threads share the [`State`] under a lock that is held for lines and never over I/O: when a page of the BAT has to be read,
//! the file has to grow or pages have to be committed, the lock is given up, the work done, and the
//! request looked at again.

use std::fs::File;
use std::ops::RangeInclusive;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

use super::bat::{ENTRIES_PER_PAGE, Entry, Layout};
use super::commit::Commit;
use super::pages::{Entries, Pages};
use super::space::Space;
use super::view::View;
use crate::disk::{ByteRange, Disk, DiskError, Extent, ExtentKind, Geometry, WriteTicket};
use crate::raw::zero;

/// Pages of the BAT that may wait for a commit; more are committed before the next allocation.
const MAX_DIRTY: usize = 64;

/// An open VHDX. See the [module](super) for what it promises.
#[derive(Debug)]
pub struct Vhdx {
    pub(super) geometry: Geometry,
    /// The disk is to keep the space of its blocks.
    pub(super) fixed: bool,
    pub(super) view: View,
    pub(super) layout: Layout,
    /// Where the file ends that payload is read from. Blocks of a file that is seen through its log can lie past it, where
    /// replay would extend the file by zeros.
    pub(super) held: u64,
    pub(super) state: Mutex<State>,
    /// Held by who changes the length of the file.
    pub(super) growth: Mutex<()>,
    pub(super) commit: Mutex<Commit>,
    /// Flushes that were asked for.
    pub(super) flushes: AtomicU64,
}

/// What requests share.
#[derive(Debug)]
pub(super) struct State {
    pub pages: Pages,
    pub space: Space,
    /// The headers name a log, and identifiers that were made for the writes since.
    pub announced: bool,
    /// A metadata write has failed.
    pub poisoned: bool,
    /// A commit wrote pages in place that no sync has made durable.
    pub unsynced: bool,
}

/// Why a request cannot be answered yet.
enum Wait {
    Pages,
    Announcement,
    Growth(u64),
    Commit,
}

/// A lock that outlives a panic of its holder: the state is whole between any two lines that change it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vhdx {
    fn check_write(&self, range: ByteRange) -> Result<(), DiskError> {
        if self.geometry.read_only {
            return Err(DiskError::ReadOnly);
        }
        self.geometry.check(range)
    }

    /// The blocks of a range that is not empty.
    fn blocks(&self, range: ByteRange) -> RangeInclusive<u64> {
        range.offset() / self.layout.block_size..=(range.end() - 1) / self.layout.block_size
    }

    /// The pages that hold the entries of a range that is not empty.
    fn pages(&self, range: ByteRange) -> RangeInclusive<u64> {
        let blocks = self.blocks(range);
        self.layout.index(*blocks.start()) / ENTRIES_PER_PAGE
            ..=self.layout.index(*blocks.end()) / ENTRIES_PER_PAGE
    }

    fn entry(&self, state: &mut State, block: u64) -> Result<Result<Entry, DiskError>, Wait> {
        let index = self.layout.index(block);
        let raw = state.pages.get(index).ok_or(Wait::Pages)?;
        Ok(Entry::decode(raw).map_err(|expected| DiskError::Corrupt {
            structure: format!("BAT entry {index}"),
            offset: self.layout.entry_offset(index),
            expected,
        }))
    }

    /// Appends the extents of a range, or says which page is missing; `out` may have grown then.
    fn map(
        &self,
        state: &mut State,
        range: ByteRange,
        out: &mut Vec<Extent>,
    ) -> Result<Result<(), DiskError>, Wait> {
        let block_size = self.layout.block_size;
        let start = out.len();
        for block in self.blocks(range) {
            let entry = match self.entry(state, block)? {
                Ok(entry) => entry,
                Err(corrupt) => return Ok(Err(corrupt)),
            };
            let offset = range.offset().max(block * block_size);
            let len = range.end().min((block + 1) * block_size) - offset;
            match entry {
                Entry::Absent { zero: true } => append(
                    out,
                    start,
                    Extent {
                        offset,
                        len,
                        kind: ExtentKind::Zero,
                    },
                ),
                Entry::Absent { zero: false } => append(
                    out,
                    start,
                    Extent {
                        offset,
                        len,
                        kind: ExtentKind::Unmapped,
                    },
                ),
                Entry::Present { offset: at } => {
                    let file_offset = at + (offset - block * block_size);
                    let held = self.held.saturating_sub(file_offset).min(len);
                    let kind = ExtentKind::Data {
                        file: Arc::clone(self.view.medium.file()),
                        file_offset,
                    };
                    append(
                        out,
                        start,
                        Extent {
                            offset,
                            len: held,
                            kind,
                        },
                    );
                    append(
                        out,
                        start,
                        Extent {
                            offset: offset + held,
                            len: len - held,
                            kind: ExtentKind::Zero,
                        },
                    );
                }
            }
        }
        Ok(Ok(()))
    }

    /// Gives every block of the range space, or says what has to happen first; then nothing has changed.
    fn allocate(&self, state: &mut State, range: ByteRange) -> Result<Result<(), DiskError>, Wait> {
        if !state.announced {
            return Err(Wait::Announcement);
        }
        let mut absent = 0;
        for block in self.blocks(range) {
            match self.entry(state, block)? {
                Ok(Entry::Absent { .. }) => absent += 1,
                Ok(Entry::Present { .. }) => {}
                Err(corrupt) => return Ok(Err(corrupt)),
            }
        }
        if absent == 0 {
            return Ok(Ok(()));
        }
        if state.pages.dirty() >= MAX_DIRTY {
            return Err(Wait::Commit);
        }
        let needed = absent * self.layout.block_size;
        if !state.space.has(needed) {
            return Err(Wait::Growth(needed));
        }
        for block in self.blocks(range) {
            if let Ok(Entry::Absent { .. }) = self.entry(state, block)? {
                // Fresh space reads as zeros, as the block did, so the rest of the block needs no filling, and the
                // entry may become durable before the data is.
                let offset = state.space.take(self.layout.block_size);
                state
                    .pages
                    .set(self.layout.index(block), Entry::present(offset));
            }
        }
        Ok(Ok(()))
    }

    /// Answers a request under the state lock, doing outside it what the request has to wait for.
    fn with_state<T>(
        &self,
        range: ByteRange,
        mut request: impl FnMut(&mut State) -> Result<Result<T, DiskError>, Wait>,
    ) -> Result<T, DiskError> {
        loop {
            let wait = match request(&mut lock(&self.state)) {
                Ok(answer) => return answer,
                Err(wait) => wait,
            };
            match wait {
                Wait::Pages => self.load(&self.pages(range))?,
                Wait::Announcement => self.announce()?,
                Wait::Growth(needed) => self.grow(needed)?,
                Wait::Commit => self.commit_pages()?,
            }
        }
    }

    /// Reads those of the pages that are not here.
    fn load(&self, wanted: &RangeInclusive<u64>) -> Result<(), DiskError> {
        for page in wanted.clone() {
            loop {
                let seen = {
                    let state = lock(&self.state);
                    if state.pages.has(page) {
                        break;
                    }
                    state.pages.evictions()
                };
                let offset = self.layout.page_offset(page);
                let mut entries: Entries = Box::new([U64::ZERO; ENTRIES_PER_PAGE as usize]);
                self.view
                    .read(entries.as_mut_bytes(), offset)
                    .map_err(|source| DiskError::Io {
                        operation: format!("read the BAT at file offset {offset:#x}"),
                        source,
                    })?;
                let mut state = lock(&self.state);
                // While it was read the page may have been loaded, changed, committed and dropped by others.
                if state.pages.evictions() == seen {
                    state.pages.insert(page, entries, wanted);
                    break;
                }
            }
        }
        Ok(())
    }

    fn grow(&self, needed: u64) -> Result<(), DiskError> {
        let _growth = lock(&self.growth);
        let space = lock(&self.state).space;
        if space.has(needed) {
            return Ok(());
        }
        let grown = space
            .grown(&*self.view.medium, needed, self.layout.block_size)
            .map_err(|source| DiskError::Io {
                operation: format!(
                    "extend the file by {needed:#x} bytes from {:#x}",
                    space.end()
                ),
                source,
            })?;
        lock(&self.state).space.adopt(&grown);
        Ok(())
    }

    /// The parts of the range that lie in the file, for a change in place.
    fn stored(&self, range: ByteRange) -> Result<Vec<(u64, u64)>, DiskError> {
        self.check_write(range)?;
        let mut extents = Vec::new();
        self.resolve_read(range, &mut extents)?;
        let stored: Vec<_> = extents
            .into_iter()
            .filter_map(|extent| match extent.kind {
                ExtentKind::Data { file_offset, .. } => Some((file_offset, extent.len)),
                ExtentKind::Zero | ExtentKind::Unmapped => None,
            })
            .collect();
        if !stored.is_empty() {
            self.with_state(range, |state| match (state.poisoned, state.announced) {
                (true, _) => Ok(Err(DiskError::Poisoned)),
                (false, true) => Ok(Ok(())),
                (false, false) => Err(Wait::Announcement),
            })?;
        }
        Ok(stored)
    }
}

/// Appends an extent, if it has bytes, to those from `start` on, joining it to the last where they are one.
fn append(out: &mut Vec<Extent>, start: usize, extent: Extent) {
    if extent.len == 0 {
        return;
    }
    if let Some(last) = out.get_mut(start..).and_then(<[_]>::last_mut) {
        let joins = match (&last.kind, &extent.kind) {
            (
                ExtentKind::Data {
                    file_offset: before,
                    ..
                },
                ExtentKind::Data { file_offset, .. },
            ) => before + last.len == *file_offset,
            (ExtentKind::Zero, ExtentKind::Zero) | (ExtentKind::Unmapped, ExtentKind::Unmapped) => {
                true
            }
            (ExtentKind::Data { .. } | ExtentKind::Zero | ExtentKind::Unmapped, _) => false,
        };
        if joins {
            last.len += extent.len;
            return;
        }
    }
    out.push(extent);
}

impl Disk for Vhdx {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn resolve_read(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<(), DiskError> {
        self.geometry.check(range)?;
        if range.is_empty() {
            return Ok(());
        }
        let start = out.len();
        self.with_state(range, |state| {
            out.truncate(start);
            self.map(state, range, out)
        })
        .inspect_err(|_| out.truncate(start))
    }

    fn resolve_write(
        &self,
        range: ByteRange,
        out: &mut Vec<Extent>,
    ) -> Result<WriteTicket, DiskError> {
        self.check_write(range)?;
        // No write has to be waited for: see `allocate` for why an entry may be committed before its data.
        let ticket = WriteTicket::new(WriteTicket::IN_PLACE);
        if range.is_empty() {
            return Ok(ticket);
        }
        let start = out.len();
        self.with_state(range, |state| {
            out.truncate(start);
            if state.poisoned {
                return Ok(Err(DiskError::Poisoned));
            }
            match self.allocate(state, range)? {
                Ok(()) => self.map(state, range, out),
                Err(e) => Ok(Err(e)),
            }
        })
        .inspect_err(|_| out.truncate(start))?;
        Ok(ticket)
    }

    fn finish_write(&self, _ticket: WriteTicket, _ok: bool) {}

    fn flush_by_sync(&self) -> Option<Arc<File>> {
        let state = lock(&self.state);
        // Pages that a commit has put in place wait for a sync of this disk's own, which the log hears of.
        let settled = !state.poisoned && !state.unsynced && state.pages.is_settled();
        settled.then(|| Arc::clone(self.view.medium.file()))
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.geometry.read_only {
            Ok(())
        } else {
            self.flush_all()
        }
    }

    fn discard(&self, range: ByteRange) -> Result<(), DiskError> {
        if self.fixed {
            return self.check_write(range);
        }
        for (offset, len) in self.stored(range)? {
            // A file system that cannot give space back leaves the bytes as they are, which a discard may.
            self.view
                .medium
                .punch_hole(offset, len)
                .map_err(|source| DiskError::Io {
                    operation: format!("punch a hole at {offset:#x}+{len:#x}"),
                    source,
                })?;
        }
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<(), DiskError> {
        for (offset, len) in self.stored(range)? {
            zero(&*self.view.medium, offset, len, may_unmap && !self.fixed)?;
        }
        Ok(())
    }

    fn close(&self) -> Result<(), DiskError> {
        if self.geometry.read_only {
            Ok(())
        } else {
            self.close_all()
        }
    }
}

impl Drop for Vhdx {
    fn drop(&mut self) {
        match self.close() {
            // Where the disk is poisoned the failure has been told, and the log stays for the next to replay.
            Ok(()) | Err(DiskError::Poisoned) => {}
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(
                    error,
                    "a VHDX could not be closed; its log will be replayed when it is opened next"
                );
            }
        }
    }
}
