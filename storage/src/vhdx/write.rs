//! What changes a block: writes, trims, zeros. Each function takes every state; the [module](super) has the table.

use std::ops::Range;

use super::bat::{BlockState, Entry, bitmap_entry};
use super::bitmap;
use super::disk::{Vhdx, append_data};
use super::format::MIB;
use super::pages::page_of;
use super::space::Destination;
use super::state::{Change, Level, State, Stop};
use crate::disk::{ByteRange, Disk, DiskError, Extent, ExtentKind};
use crate::medium;

/// Pages of metadata that may wait for a commit; more are committed before the next change.
pub(super) const MAX_DIRTY: usize = 64;

impl State {
    /// Sees to it that a change may be made: announced, and not too many waiting.
    pub(super) fn ready(&self, level: Level) -> Result<(), Stop> {
        if self.poisoned {
            return Err(DiskError::Poisoned.into());
        }
        if self.announced < level {
            return Err(Stop::Announcement(level));
        }
        if self.pages.dirty() >= MAX_DIRTY {
            return Err(Stop::Commit);
        }
        Ok(())
    }

    /// Space for a block that durably reads as zeros.
    pub(super) fn allocate(&mut self, len: u64) -> Result<u64, Stop> {
        self.space.take(len).ok_or(Stop::Growth(len))
    }

    /// Gives an absent block, which reads as zeros and not as its parent, its space.
    pub(super) fn fill(&mut self, block: u64, entry: Entry) -> Result<(), Stop> {
        let size = self.layout.block_size;
        let offset = if let Some(own) = self.space.take_anchor(block, entry.offset) {
            own
        } else {
            let offset = self.allocate(size)?;
            self.space.drop_anchor(block, entry.offset, size);
            offset
        };
        // Space for blocks reads as zeros, as the block did, so the rest of it needs no filling, and the entry may
        // become durable before the data is.
        let state = BlockState::FullyPresent;
        self.set_block(block, Entry { state, offset });
        Ok(())
    }

    /// Makes a block that its parent holds partially present, with no sector in it yet: a reader sees no difference.
    fn cover(&mut self, block: u64) -> Result<(), Stop> {
        let at = self.layout.bits(block);
        if self.bitmap(at.index)?.is_none() {
            let offset = self.allocate(MIB)?;
            // Pages that were read when something else was here.
            self.pages.forget(offset..offset + MIB);
            let entry = self.layout.entry_offset(at.index);
            self.pages.set_entry(entry, bitmap_entry(offset));
            self.pages.commit_first(page_of(entry));
        }
        let base = block * self.layout.block_size;
        let whole = base..base + self.layout.block_size;
        let bits = self.bits(block, &whole)?;
        for (page, _) in bits.clone() {
            self.pages.bytes(page).ok_or(Stop::Page(page))?;
        }
        let offset = self.allocate(self.layout.block_size)?;
        for (page, bits) in bits {
            // What is left of an earlier life of the block.
            if let Some(bytes) = self.pages.bytes(page)
                && !bitmap::is_clear(bytes, &bits)
            {
                self.pages
                    .change(page, |bytes| bitmap::fill(bytes, &bits, false));
            }
        }
        let state = BlockState::PartiallyPresent;
        self.set_block(block, Entry { state, offset });
        Ok(())
    }

    /// Makes an absent block say that it is zeros.
    fn clear(&mut self, block: u64, entry: Entry) {
        let size = self.layout.block_size;
        self.space.drop_anchor(block, entry.offset, size);
        self.set_block(block, Entry::absent(BlockState::Zero));
    }

    /// Keeps what the end of a write to a partially present block will change; `None` where it will change nothing.
    fn pin(&mut self, block: u64, part: &Range<u64>) -> Result<Option<Change>, Stop> {
        let mut is_full = true;
        let mut pinned = Vec::new();
        for (page, bits) in self.bits(block, part)? {
            let bytes = self.pages.bytes(page).ok_or(Stop::Page(page))?;
            is_full &= bitmap::is_full(bytes, &bits);
            pinned.push(page);
        }
        if is_full {
            return Ok(None);
        }
        pinned.push(page_of(self.layout.entry_offset(self.layout.index(block))));
        pinned.push(page_of(
            self.layout.entry_offset(self.layout.bits(block).index),
        ));
        for page in &pinned {
            self.pages.pin(*page);
        }
        Ok(Some(Change {
            block,
            part: part.clone(),
            pinned,
        }))
    }

    /// The sectors of a write that is over are in the file; a block that has all is fully present. All pages are here.
    fn bring(&mut self, change: &Change) -> Result<(), Stop> {
        let block = change.block;
        let entry = self.block(block)?;
        // A trim may have come in between, and then there is nothing to bring.
        if entry.state != BlockState::PartiallyPresent {
            return Ok(());
        }
        for (page, bits) in self.bits(block, &change.part)? {
            self.pages
                .change(page, |bytes| bitmap::fill(bytes, &bits, true));
        }
        self.ordered = true;
        let base = block * self.layout.block_size;
        let whole = base..base + self.layout.block_size;
        for (page, bits) in self.bits(block, &whole)? {
            // A page that is not here is not asked for: a block with all bits set is as good.
            match self.pages.bytes(page) {
                Some(bytes) if bitmap::is_full(bytes, &bits) => {}
                Some(_) | None => return Ok(()),
            }
        }
        let (state, offset) = (BlockState::FullyPresent, entry.offset);
        self.set_block(block, Entry { state, offset });
        Ok(())
    }
}

impl Vhdx {
    /// Gives a part of a block space, and appends the extent; what the end of the write changes is added to `changes`.
    pub(super) fn place(
        &self,
        block: u64,
        part: &Range<u64>,
        out: &mut Vec<Extent>,
        start: usize,
        changes: &mut Vec<Change>,
    ) -> Result<(), Stop> {
        let (offset, change) = self.with_pages(|state| {
            let entry = state.block(block)?;
            if entry.state == BlockState::FullyPresent && state.announced == Level::Data {
                return if state.poisoned {
                    Err(DiskError::Poisoned.into())
                } else {
                    Ok((entry.offset, None))
                };
            }
            state.ready(Level::Data)?;
            match entry.state {
                BlockState::FullyPresent | BlockState::PartiallyPresent => {}
                BlockState::NotPresent if state.layout.has_parent => state.cover(block)?,
                BlockState::NotPresent
                | BlockState::Undefined
                | BlockState::Zero
                | BlockState::Unmapped => state.fill(block, entry)?,
            }
            let entry = state.block(block)?;
            let change = match entry.state {
                BlockState::PartiallyPresent => state.pin(block, part)?,
                BlockState::FullyPresent
                | BlockState::NotPresent
                | BlockState::Undefined
                | BlockState::Zero
                | BlockState::Unmapped => None,
            };
            Ok((entry.offset, change))
        })?;
        changes.extend(change);
        let file_offset = offset + (part.start - block * self.block_size);
        let len = part.end - part.start;
        let file = self.view.medium.file();
        append_data(out, start, file, part.start, len, file_offset);
        Ok(())
    }

    /// Ends writes that change metadata.
    pub(super) fn finish_changes(&self, changes: Vec<Change>, ok: bool) {
        if changes.is_empty() {
            return;
        }
        let mut state = self.state.lock();
        for change in changes {
            if ok && let Err(stop) = state.bring(&change) {
                // The pages are pinned and were looked at when the write began.
                tracing::error!(?stop, block = change.block, "a write could not be recorded");
                state.poisoned = true;
            }
            for page in change.pinned {
                state.pages.unpin(page);
            }
        }
    }

    /// Whether a part of a block is all of it that the disk has.
    fn is_whole(&self, block: u64, part: &Range<u64>, size: u64) -> bool {
        part.start == block * self.block_size
            && (part.end == (block + 1) * self.block_size || part.end == size)
    }

    /// Forgets the content of a range: blocks inside it are unmapped, parts of others lose their space in the file.
    pub(super) fn trim(&self, range: ByteRange) -> Result<(), DiskError> {
        self.check_write(range)?;
        if self.fixed {
            return Ok(());
        }
        let size = self.geometry().size;
        for (block, part) in self.parts(range) {
            if self.is_whole(block, &part, size) {
                self.with_state(|state| self.unmap(state, block))?;
            } else {
                self.in_place(&part, |offset, len| {
                    // A file system that cannot give space back leaves the bytes as they are, which a trim may.
                    self.view.medium.punch_hole(offset, len).map(drop)
                })?;
            }
        }
        Ok(())
    }

    fn unmap(&self, state: &mut State, block: u64) -> Result<(), Stop> {
        let entry = state.block(block)?;
        state.unless_excluded(block)?;
        match entry.state {
            BlockState::NotPresent if state.layout.has_parent => {
                state.ready(Level::Data)?;
                state.set_block(block, Entry::absent(BlockState::Unmapped));
            }
            BlockState::NotPresent
            | BlockState::Undefined
            | BlockState::Zero
            | BlockState::Unmapped => {}
            BlockState::FullyPresent | BlockState::PartiallyPresent => {
                state.ready(Level::Data)?;
                let mut unmapped = Entry::absent(BlockState::Unmapped);
                if state.space.has_room_for_anchor() {
                    unmapped.offset = entry.offset;
                    state.space.anchor(block, entry.offset, self.block_size);
                } else {
                    let to = Destination::Free;
                    state.space.free(entry.offset, self.block_size, to);
                }
                state.set_block(block, unmapped);
            }
        }
        Ok(())
    }

    /// Makes a range read as zeros: blocks inside it say so and have no space where that may be given back; other
    /// parts are zeroed in the file, where they do not read as zeros already.
    pub(super) fn zero(&self, range: ByteRange, may_unmap: bool) -> Result<(), DiskError> {
        self.check_write(range)?;
        let may_unmap = may_unmap && !self.fixed;
        let size = self.geometry().size;
        for (block, part) in self.parts(range) {
            let whole = self.is_whole(block, &part, size);
            let done = self.with_state(|state| Self::zero_entry(state, block, whole, may_unmap))?;
            if !done {
                self.zero_part(&part, may_unmap)?;
            }
        }
        Ok(())
    }

    /// Zeroes a part of a block by its entry alone; false where that cannot be.
    fn zero_entry(
        state: &mut State,
        block: u64,
        whole: bool,
        may_unmap: bool,
    ) -> Result<bool, Stop> {
        let entry = state.block(block)?;
        state.unless_excluded(block)?;
        match entry.state {
            BlockState::Zero => {}
            BlockState::NotPresent if !state.layout.has_parent => {}
            // Other readers may take these two for anything, where zeros were asked for; here they are zeros already,
            // so the rest of the block does not change.
            BlockState::Undefined | BlockState::Unmapped => {
                state.ready(Level::Data)?;
                state.clear(block, entry);
            }
            BlockState::NotPresent if whole => {
                state.ready(Level::Data)?;
                state.clear(block, entry);
            }
            BlockState::FullyPresent | BlockState::PartiallyPresent if whole && may_unmap => {
                state.ready(Level::Data)?;
                let size = state.layout.block_size;
                state.space.free(entry.offset, size, Destination::Free);
                state.set_block(block, Entry::absent(BlockState::Zero));
            }
            BlockState::NotPresent | BlockState::FullyPresent | BlockState::PartiallyPresent => {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Zeroes a part of a block in the file, as a write would.
    fn zero_part(&self, part: &Range<u64>, may_unmap: bool) -> Result<(), DiskError> {
        let Some(range) = ByteRange::new(part.start, part.end - part.start) else {
            return Ok(());
        };
        let mut extents = Vec::new();
        let id = self.resolve_write(range, &mut extents)?;
        let zeroed = extents.iter().try_for_each(|extent| match extent.kind {
            ExtentKind::Data { file_offset, .. } => {
                medium::make_zero(&*self.view.medium, file_offset, extent.len, may_unmap)
            }
            ExtentKind::Zero | ExtentKind::Unmapped => Ok(()),
        });
        self.finish(id, zeroed.is_ok());
        zeroed
    }

    /// Does work on what a part of a block has in the file of this layer: offset and length.
    fn in_place(
        &self,
        part: &Range<u64>,
        mut work: impl FnMut(u64, u64) -> std::io::Result<()>,
    ) -> Result<(), DiskError> {
        let Some(range) = ByteRange::new(part.start, part.end - part.start) else {
            return Ok(());
        };
        let mut extents = Vec::new();
        let id = self.resolve_read(range, &mut extents)?;
        let own = self.view.medium.file();
        let worked = extents.iter().try_for_each(|extent| match &extent.kind {
            ExtentKind::Data { file, file_offset } if std::sync::Arc::ptr_eq(file, own) => {
                self.with_state(|state| state.ready(Level::Data))?;
                work(*file_offset, extent.len).map_err(|source| DiskError::Io {
                    operation: format!("punch a hole at {file_offset:#x}+{:#x}", extent.len),
                    source,
                })
            }
            ExtentKind::Data { .. } | ExtentKind::Zero | ExtentKind::Unmapped => Ok(()),
        });
        self.finish(id, true);
        worked
    }

    /// Makes unmapped blocks forget the space they had, so that it can be used by others. No reader sees a difference.
    pub(super) fn drop_anchors(&self) -> Result<(), DiskError> {
        let anchors = self.state.lock().space.anchors();
        for (block, offset) in anchors {
            self.with_state(|state| {
                let entry = state.block(block)?;
                state.unless_excluded(block)?;
                if entry.state == BlockState::Unmapped && entry.offset == offset {
                    state.ready(Level::File)?;
                    state.space.drop_anchor(block, offset, self.block_size);
                    state.set_block(block, Entry::absent(BlockState::Unmapped));
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}
