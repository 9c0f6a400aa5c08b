//! A shorter file: blocks from its end move into free space before them, and the end is cut off. The disk may be in use
//! meanwhile; no reader of it sees a difference.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::bat::{self, BlockState, Entry, bitmap_entry, decode_bitmap};
use super::commit::io_error;
use super::disk::Vhdx;
use super::format::MIB;
use super::pages::page_of;
use super::space::Destination;
use super::state::{Exclusion, Level, State, Stop};
use super::write::MAX_DIRTY;
use crate::disk::DiskError;
use crate::progress::Progress;

/// Bytes that are copied at once.
const STEP: u64 = MIB;
/// Bytes that are moved between two commits.
const BATCH: u64 = 256 * MIB;
/// Blocks that are looked at in a pass: what bounds memory.
const PASS: usize = 65536;
/// Unit in which zeros are looked for, in bytes.
const ZERO_UNIT: usize = 4096;

/// How to compact.
#[derive(Clone, Copy, Debug, Default)]
pub struct CompactOptions {
    /// Read every block, and give back those that hold only zeros.
    pub find_zeros: bool,
}

/// What a compaction came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Length of the file before, in bytes.
    pub before: u64,
    /// And after.
    pub after: u64,
    /// Blocks that were moved, sector bitmaps among them.
    pub moved: u64,
    /// Blocks that were found to be zeros.
    pub zeros: u64,
}

/// A block in the file, by where it lies: its offset and the index of its entry.
type Placed = (u64, u64);

impl Vhdx {
    /// Makes the file as short as moving whole blocks can. Cancelled, it is as sound and as far as it came.
    ///
    /// # Errors
    /// As a write, and `Cancelled`.
    pub fn compact(
        &self,
        options: CompactOptions,
        progress: &dyn Progress,
    ) -> Result<Compacted, DiskError> {
        if self.is_read_only() {
            return Err(DiskError::ReadOnly);
        }
        let len = || self.view.medium.len().map_err(io_error("read the length"));
        let mut done = Compacted {
            before: len()?,
            ..Compacted::default()
        };
        let mut work = Work {
            total: done.before,
            progress,
        };
        let worked = self.compact_blocks(options, &mut work, &mut done);
        // Also what was cancelled is brought to a clean state, and the file cut to what it needs.
        let closed = self.close_all();
        done.after = len()?;
        worked.and(closed).map(|()| done)
    }

    fn compact_blocks(
        &self,
        options: CompactOptions,
        work: &mut Work<'_>,
        done: &mut Compacted,
    ) -> Result<(), DiskError> {
        self.announce(Level::File)?;
        if self.fixed {
            return Ok(());
        }
        if options.find_zeros {
            done.zeros = self.find_zeros(work)?;
        }
        self.drop_anchors()?;
        loop {
            self.free_everything()?;
            let moved = self.move_down(work)?;
            done.moved += moved;
            if moved == 0 {
                return Ok(());
            }
        }
    }

    /// Brings all free space to where it can be used.
    fn free_everything(&self) -> Result<(), DiskError> {
        let waiting = {
            let state = self.state.lock();
            let (uncommitted, free) = state.space.reclaimable();
            uncommitted + free
        };
        if waiting > 0 {
            self.announce(Level::File)?;
            self.reclaim(true)?;
            self.reclaim(true)?;
        }
        Ok(())
    }

    /// The blocks that lie farthest back, the last first.
    fn last_blocks(&self) -> Result<Vec<Placed>, DiskError> {
        let layout = self.state.lock().layout;
        self.commit_pages()?;
        let mut last: BinaryHeap<Reverse<Placed>> = BinaryHeap::new();
        let failed = |e| io_error("read the BAT")(e);
        bat::scan(&self.view, &layout, failed, |index, raw| {
            let offset = if layout.is_bitmap(index) {
                if layout.has_parent {
                    decode_bitmap(raw).ok().flatten()
                } else {
                    None
                }
            } else {
                Entry::decode(raw, layout.has_parent)
                    .ok()
                    .filter(|entry| entry.state.is_present())
                    .map(|entry| entry.offset)
            };
            if let Some(offset) = offset {
                last.push(Reverse((offset, index)));
                if last.len() > PASS {
                    last.pop();
                }
            }
            Ok(())
        })?;
        Ok(last
            .into_sorted_vec()
            .into_iter()
            .map(|Reverse(placed)| placed)
            .collect())
    }

    /// Moves blocks from the end into free space, as far as there is any before them; gives how many.
    fn move_down(&self, work: &mut Work<'_>) -> Result<u64, DiskError> {
        let layout = self.state.lock().layout;
        let (mut moved, mut batch) = (0, 0);
        for (offset, index) in self.last_blocks()? {
            work.check(work.total.saturating_sub(offset))?;
            let block = layout.block(index);
            let len = if block.is_some() {
                self.block_size
            } else {
                MIB
            };
            let Some(to) = self.state.lock().space.take_below(len, offset) else {
                continue;
            };
            let done = match block {
                Some(block) => self.move_block(block, offset, to),
                None => self.move_bitmap(index, offset, to),
            };
            if !matches!(done, Ok(true)) {
                // It may hold bytes now.
                self.state.lock().space.free(to, len, Destination::Free);
            }
            moved += u64::from(done?);
            batch += len;
            if batch >= BATCH || self.state.lock().pages.dirty() >= MAX_DIRTY {
                batch = 0;
                self.commit_pages()?;
            }
        }
        Ok(moved)
    }

    /// Moves a block's data; false where the block is no longer there.
    fn move_block(&self, block: u64, from: u64, to: u64) -> Result<bool, DiskError> {
        // Announced before the exclusion: a request that waits for the announcement would be waited for by the
        // exclusion.
        self.announce(Level::File)?;
        self.exclude(Exclusion::Block(block));
        let moved = self.copy(from, to, self.block_size).and_then(|()| {
            self.with_state_while_excluding(|state| {
                let entry = state.block(block)?;
                if !entry.state.is_present() || entry.offset != from {
                    return Ok(false);
                }
                let entry = Entry {
                    offset: to,
                    ..entry
                };
                state.set_block(block, entry);
                state.ordered = true;
                state.space.free(from, self.block_size, Destination::Free);
                Ok(true)
            })
        });
        self.readmit();
        moved
    }

    /// Moves a sector bitmap; false where it is no longer there. Its pages are metadata, so all requests are excluded.
    fn move_bitmap(&self, index: u64, from: u64, to: u64) -> Result<bool, DiskError> {
        self.announce(Level::File)?;
        self.while_excluded(|commit| {
            self.sync(commit.log.as_mut())?;
            let at = self.state.lock().layout.entry_offset(index);
            if self.with_state_while_excluding(|state| state.bitmap(index))? != Some(from) {
                return Ok(false);
            }
            self.copy(from, to, MIB)?;
            self.sync(commit.log.as_mut())?;
            self.with_state_while_excluding(|state| {
                state.pages.entry(at).ok_or(Stop::Page(page_of(at)))?;
                state.pages.set_entry(at, bitmap_entry(to));
                state.pages.commit_first(page_of(at));
                state.space.free(from, MIB, Destination::Free);
                Ok(())
            })?;
            self.commit_under(commit)?;
            // Pages at the old place mean nothing any more.
            self.state.lock().pages.forget_clean();
            Ok(true)
        })
    }

    /// Copies bytes of the file to where it reads as zeros, keeping holes.
    fn copy(&self, from: u64, to: u64, len: u64) -> Result<(), DiskError> {
        let medium = &*self.view.medium;
        let mut buffer = vec![0; STEP as usize];
        let mut at = 0;
        while at < len {
            let Some(data) = medium
                .next_data(from + at)
                .map_err(io_error("look for data"))?
            else {
                return Ok(());
            };
            at = at.max(data.saturating_sub(from) / ZERO_UNIT as u64 * ZERO_UNIT as u64);
            if at >= len {
                return Ok(());
            }
            let part = &mut buffer[..STEP.min(len - at) as usize];
            medium
                .read_exact_at(part, from + at)
                .map_err(io_error("read a block that is being moved"))?;
            for (number, unit) in part.chunks(ZERO_UNIT).enumerate() {
                if !is_zero(unit) {
                    medium
                        .write_all_at(unit, to + at + (number * ZERO_UNIT) as u64)
                        .map_err(io_error("write a block that is being moved"))?;
                }
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Finds blocks that hold only zeros, and lets their entries say so; gives how many.
    fn find_zeros(&self, work: &mut Work<'_>) -> Result<u64, DiskError> {
        let blocks = self.state.lock().layout.blocks;
        work.total += blocks * self.block_size;
        let mut found = 0;
        for block in 0..blocks {
            work.check(block * self.block_size)?;
            let offset = self.with_state(|state| {
                let entry = state.block(block)?;
                Ok((entry.state == BlockState::FullyPresent).then_some(entry.offset))
            })?;
            let Some(offset) = offset else {
                continue;
            };
            // Looked at twice: the first look, at a block in use, spares nearly all the second.
            if !self.holds_zeros(offset)? {
                continue;
            }
            self.announce(Level::File)?;
            self.exclude(Exclusion::Block(block));
            let cleared = self.holds_zeros(offset).and_then(|zeros| {
                if !zeros {
                    return Ok(false);
                }
                self.with_state_while_excluding(|state| {
                    let entry = state.block(block)?;
                    if entry.state != BlockState::FullyPresent || entry.offset != offset {
                        return Ok(false);
                    }
                    state.set_block(block, Entry::absent(BlockState::Zero));
                    let to = Destination::Free;
                    state.space.free(offset, self.block_size, to);
                    Ok(true)
                })
            });
            self.readmit();
            found += u64::from(cleared?);
        }
        Ok(found)
    }

    fn holds_zeros(&self, offset: u64) -> Result<bool, DiskError> {
        let medium = &*self.view.medium;
        let mut buffer = vec![0; (STEP / 16) as usize];
        let mut at = offset;
        let end = offset + self.block_size;
        while at < end {
            match medium.next_data(at).map_err(io_error("look for data"))? {
                Some(data) if data < end => at = data.max(at),
                Some(_) | None => return Ok(true),
            }
            let part = &mut buffer[..((STEP / 16).min(end - at)) as usize];
            medium
                .read_exact_at(part, at)
                .map_err(io_error("read a block"))?;
            if !is_zero(part) {
                return Ok(false);
            }
            at += part.len() as u64;
        }
        Ok(true)
    }

    /// As [`Vhdx::with_state`], for the thread that excludes requests: it waits for pages alone, as the thread that
    /// commits may be waiting for the end of the exclusion.
    fn with_state_while_excluding<T>(
        &self,
        mut request: impl FnMut(&mut State) -> Result<T, Stop>,
    ) -> Result<T, DiskError> {
        self.with_state(|state| match request(state) {
            Err(Stop::Commit | Stop::Growth(_) | Stop::Announcement(_) | Stop::Excluded) => {
                Err(DiskError::Poisoned.into())
            }
            other => other,
        })
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// The observer of the work, and how much there is to do.
struct Work<'a> {
    total: u64,
    progress: &'a dyn Progress,
}

impl Work<'_> {
    fn check(&self, done: u64) -> Result<(), DiskError> {
        self.progress.advance(done, self.total);
        if self.progress.is_cancelled() {
            return Err(DiskError::Cancelled);
        }
        Ok(())
    }
}
