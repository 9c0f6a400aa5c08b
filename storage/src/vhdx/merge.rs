//! A child merged into its parent, which is then what the child was.
//!
//! The child stays readable, and what it reads stays the same, at every moment: the parent changes only where the child
//! hides it. So that the chain can be opened after a cut, the identifier that the parent is about to get is first
//! recorded in the child, as `parent_linkage2` ([MS-VHDX] 2.6.2.6.3).

use super::bat::{self, BlockState};
use super::commit::io_error;
use super::disk::{Lookup, Vhdx};
use super::format::{Guid, MIB};
use super::locator::ParentLocator;
use super::state::Level;
use crate::disk::{ByteRange, Disk, DiskError, ExtentKind};
use crate::progress::Progress;

/// Bytes that are copied at once.
const STEP: u64 = MIB;

/// What a merge came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// Bytes of data that were copied.
    pub copied: u64,
    /// Bytes that were zeroed in the parent.
    pub cleared: u64,
}

impl Vhdx {
    /// Merges this child into its parent, which has been opened for writing. Both stay open; the child is then
    /// transparent to no more than before, and the parent alone holds the same disk. Cancelled, or cut off, both can be
    /// used as before, and the merge begun anew.
    ///
    /// # Errors
    /// As a write to the parent, and `Cancelled`.
    pub fn merge_into_parent(&self, progress: &dyn Progress) -> Result<Merged, DiskError> {
        let Some(parent) = &self.parent else {
            return Err(DiskError::Unsupported("the disk has no parent".into()));
        };
        if parent.is_read_only() {
            return Err(DiskError::ReadOnly);
        }
        let size = self.geometry().size;
        self.announce_merge(parent)?;
        if parent.geometry().size < size {
            parent.resize(size, false)?;
        }
        let layout = self.state.lock().layout;
        if !self.is_read_only() {
            self.flush()?;
        }
        let mut merged = Merged::default();
        let mut blocks = Vec::new();
        let failed = |e| io_error("read the BAT")(e);
        bat::scan(&self.view, &layout, failed, |index, _| {
            blocks.extend(layout.block(index).filter(|block| *block < layout.blocks));
            // The list is worked off in pieces, so that it stays short.
            if blocks.len() >= 4096 {
                for block in blocks.drain(..) {
                    self.merge_block(parent, block, size, progress, &mut merged)?;
                }
            }
            Ok(())
        })?;
        for block in blocks {
            self.merge_block(parent, block, size, progress, &mut merged)?;
        }
        parent.flush()?;
        progress.advance(size, size);
        Ok(merged)
    }

    /// Records in the child what the parent's identifier is about to be, and then gives it to the parent.
    fn announce_merge(&self, parent: &Self) -> Result<(), DiskError> {
        let before = parent.identifiers().data_write_guid;
        let after = Guid::random();
        if let Some(locator) = self.locator()
            && !self.is_read_only()
        {
            self.set_locator(ParentLocator {
                linkage: before,
                linkage2: Some(after),
                ..locator
            })?;
        }
        parent.announce_as(Level::Data, Some(after), None)
    }

    /// Records in the child that it was made on its parent as that is now.
    ///
    /// # Errors
    /// As a write, and `Unsupported` of a disk without parent.
    pub(super) fn accept_parent(&self) -> Result<(), DiskError> {
        let (Some(parent), Some(locator)) = (&self.parent, self.locator()) else {
            return Err(DiskError::Unsupported("the disk has no parent".into()));
        };
        self.set_locator(ParentLocator {
            linkage: parent.identifiers().data_write_guid,
            linkage2: None,
            ..locator
        })
    }

    fn merge_block(
        &self,
        parent: &Self,
        block: u64,
        size: u64,
        progress: &dyn Progress,
        merged: &mut Merged,
    ) -> Result<(), DiskError> {
        progress.advance(block * self.block_size, size);
        if progress.is_cancelled() {
            return Err(DiskError::Cancelled);
        }
        let start = block * self.block_size;
        let whole = start..(start + self.block_size).min(size);
        let mut pieces = Vec::new();
        self.with_state(|state| {
            Self::look_up(state, block, whole.clone(), |part, found| {
                pieces.push((part, found));
            })
        })?;
        for (part, found) in pieces {
            let Some(range) = ByteRange::new(part.start, part.end - part.start) else {
                continue;
            };
            match found {
                // What a trim leaves has to read as zeros in the parent too.
                Lookup::Zeros(BlockState::Zero | BlockState::Unmapped | BlockState::Undefined) => {
                    parent.write_zeroes(range, true)?;
                    merged.cleared += range.len();
                }
                Lookup::Below
                | Lookup::Zeros(
                    BlockState::NotPresent
                    | BlockState::FullyPresent
                    | BlockState::PartiallyPresent,
                ) => {}
                Lookup::Here(offset) => self.copy_to(parent, range, offset, merged)?,
            }
        }
        Ok(())
    }

    /// Copies data from this file to the parent; holes become zeros without data.
    fn copy_to(
        &self,
        parent: &Self,
        range: ByteRange,
        offset: u64,
        merged: &mut Merged,
    ) -> Result<(), DiskError> {
        let sector = u64::from(self.geometry.logical_sector.bytes());
        let mut buffer = vec![0; STEP as usize];
        let mut at = 0;
        while at < range.len() {
            // Where the hole ends, rounded down to a sector.
            let data = self
                .view
                .next_data(offset + at)
                .map_err(io_error("look for data"))?
                .map_or(range.len(), |data| (data - offset) / sector * sector)
                .clamp(at, range.len());
            if let Some(hole) = ByteRange::new(range.offset() + at, data - at)
                && !hole.is_empty()
            {
                parent.write_zeroes(hole, true)?;
                merged.cleared += hole.len();
            }
            at = data;
            let len = STEP.min(range.len() - at);
            let Some(target) = ByteRange::new(range.offset() + at, len).filter(|t| !t.is_empty())
            else {
                break;
            };
            let part = &mut buffer[..len as usize];
            self.view
                .medium
                .read_exact_at(part, offset + at)
                .map_err(io_error("read a block of the child"))?;
            parent.write_from(target, part)?;
            merged.copied += len;
            at += len;
        }
        Ok(())
    }

    /// Writes bytes to the disk, waiting for them.
    pub(super) fn write_from(&self, range: ByteRange, bytes: &[u8]) -> Result<(), DiskError> {
        let mut extents = Vec::new();
        let id = self.resolve_write(range, &mut extents)?;
        let written = extents.iter().try_for_each(|extent| match extent.kind {
            ExtentKind::Data { file_offset, .. } => {
                let start = (extent.offset - range.offset()) as usize;
                let part = &bytes[start..start + extent.len as usize];
                self.view
                    .medium
                    .write_all_at(part, file_offset)
                    .map_err(io_error("write a block"))
            }
            ExtentKind::Zero | ExtentKind::Unmapped => Ok(()),
        });
        self.finish(id, written.is_ok());
        written
    }
}
