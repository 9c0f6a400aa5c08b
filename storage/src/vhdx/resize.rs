//! Another size of the virtual disk, while it is open or not.

use std::sync::atomic::Ordering;

use super::amend::refused;
use super::bat::{BlockState, Entry, Layout, PAGE};
use super::commit::io_error;
use super::disk::Vhdx;
use super::format::{MAX_BAT, MAX_DISK, MIB, VIRTUAL_DISK_SIZE};
use super::pages::page_of;
use super::region::{self, Region};
use super::space::Destination;
use super::state::{Commit, Level, Stop};
use crate::disk::{Disk, DiskError};

/// How much of a table is copied at once.
const COPIED: u64 = MIB;

impl Vhdx {
    /// Gives the disk another size, in bytes. What is added reads as zeros. Where `shrink` is set the end may be cut
    /// off, and what it holds is lost; nobody may use that part meanwhile.
    ///
    /// # Errors
    /// `Size` where the size is none that the disk can have, else as a write; then the disk has one size or the other.
    pub fn resize(&self, size: u64, shrink: bool) -> Result<(), DiskError> {
        if self.is_read_only() {
            return Err(DiskError::ReadOnly);
        }
        let old = self.geometry().size;
        let least = self
            .parent
            .as_ref()
            .map_or(0, |parent| parent.geometry().size);
        let refuse = |reason: String| Err(DiskError::Size { size, reason });
        let sector = u64::from(self.geometry.logical_sector.bytes());
        if size == 0 || size > MAX_DISK || !size.is_multiple_of(sector) {
            return refuse(format!(
                "has to be whole sectors of {sector} bytes, up to 64 TiB"
            ));
        }
        if size < least {
            return refuse(format!("is smaller than that of the parent, {least}"));
        }
        if size < old && !shrink {
            return refuse(format!(
                "would cut off the end of a disk of {old} bytes, which has to be asked for"
            ));
        }
        if size == old {
            return Ok(());
        }
        if size < old {
            self.cut(size, old)?;
        } else {
            self.announce(Level::Data)?;
            self.clear_end(old)?;
        }
        self.announce(Level::Data)?;
        let added = self.while_excluded(|commit| self.change_size(commit, size))?;
        if self.fixed {
            for block in added {
                let offset = self.with_state(|state| {
                    state.ready(Level::Data)?;
                    let entry = state.block(block)?;
                    if entry.state.is_present() {
                        return Ok(None);
                    }
                    state.fill(block, entry)?;
                    Ok(Some(state.block(block)?.offset))
                })?;
                if let Some(offset) = offset {
                    self.view
                        .medium
                        .zero(offset, self.block_size)
                        .map_err(io_error("keep space for a block"))?;
                }
            }
        }
        self.flush()
    }

    /// Empties all blocks past the new end, so that nothing describes their space when the table ends before them.
    fn cut(&self, size: u64, old: u64) -> Result<(), DiskError> {
        for block in size.div_ceil(self.block_size)..old.div_ceil(self.block_size) {
            self.with_state(|state| {
                let entry = state.block(block)?;
                state.unless_excluded(block)?;
                if entry.raw() == 0 {
                    return Ok(());
                }
                state.ready(Level::Data)?;
                if entry.state.is_present() {
                    let to = Destination::Free;
                    state.space.free(entry.offset, self.block_size, to);
                } else {
                    state
                        .space
                        .drop_anchor(block, entry.offset, self.block_size);
                }
                state.set_block(block, Entry::absent(BlockState::NotPresent));
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Makes what the last block holds past the old end zeros, and so what the table holds past its last entry. Neither
    /// has meant anything so far.
    fn clear_end(&self, old: u64) -> Result<(), DiskError> {
        let block = (old - 1) / self.block_size;
        let (inside, end) = (old - block * self.block_size, self.block_size);
        let offset = self.with_state(|state| {
            let entry = state.block(block)?;
            Ok(entry.state.is_present().then_some(entry.offset))
        })?;
        if let Some(offset) = offset
            && inside < end
        {
            self.view
                .medium
                .zero(offset + inside, end - inside)
                .map_err(io_error("write zeros past the end of the disk"))?;
        }
        let layout = self.state.lock().layout;
        let first = layout.entry_offset(layout.index(block) + 1);
        let mut page = page_of(first);
        while page < layout.region.end() {
            let Some(data) = self
                .view
                .next_data(page)
                .map_err(io_error("look for data in the BAT"))?
            else {
                break;
            };
            page = page.max(page_of(data));
            if page >= layout.region.end() {
                break;
            }
            let from = (first.max(page) - page) as usize;
            self.with_state(|state| {
                let bytes = state.pages.bytes(page).ok_or(Stop::Page(page))?;
                // The entry of the last chunk's bitmap is in use.
                let bitmap = layout.has_parent.then(|| layout.bits(block).index);
                let foreign: Vec<u64> = (page..page + PAGE)
                    .step_by(8)
                    .zip(bytes.chunks_exact(8))
                    .filter(|(at, raw)| {
                        *at >= page + from as u64
                            && Some(*at) != bitmap.map(|index| layout.entry_offset(index))
                            && raw.iter().any(|byte| *byte != 0)
                    })
                    .map(|(at, _)| at)
                    .collect();
                if !foreign.is_empty() {
                    state.ready(Level::Data)?;
                }
                for at in foreign {
                    state.pages.set_entry(at, 0);
                }
                Ok(())
            })?;
            page += PAGE;
        }
        Ok(())
    }

    /// Writes the new size down, with a table that is long enough; gives the blocks that are new.
    fn change_size(
        &self,
        commit: &mut Commit,
        size: u64,
    ) -> Result<std::ops::Range<u64>, DiskError> {
        let item = self.item(commit, VIRTUAL_DISK_SIZE, "virtual disk size")?;
        let old = self.state.lock().layout;
        let mut new = old;
        new.blocks = size.div_ceil(self.block_size);
        let bytes = size.to_le_bytes();
        let mut writes: Vec<(u64, &[u8])> = vec![(item.offset, &bytes)];
        let tables;
        let moved = new.table_len() > old.region.length;
        if moved {
            new.region = self.place_table(&old, &new)?;
            tables = region::moved(&*self.view.medium, old.region, new.region).map_err(refused)?;
            writes.extend(tables.iter().map(|(at, bytes)| (*at, &bytes[..])));
        }
        self.amend(commit, &writes)?;
        let mut state = self.state.lock();
        if moved {
            let region = &old.region;
            state
                .space
                .free(region.offset, region.length, Destination::Free);
            for known in &mut commit.regions {
                if known == region {
                    *known = new.region;
                }
            }
            state.pages.forget_clean();
        }
        state.layout = new;
        self.size.store(size, Ordering::Relaxed);
        Ok(old.blocks..new.blocks)
    }

    /// Copies the table to a place where it can be as long as the new layout needs it; durable, and not used yet.
    fn place_table(&self, old: &Layout, new: &Layout) -> Result<Region, DiskError> {
        let length = new.table_len().next_multiple_of(MIB);
        if length > MAX_BAT {
            return Err(DiskError::Unsupported(format!(
                "a BAT of {length:#x} bytes is longer than the format allows"
            )));
        }
        // All requests are excluded, so the file is grown here and not by way of a commit.
        let offset = {
            let _growth = self.growth.lock();
            let tail = {
                let mut state = self.state.lock();
                match state.space.take(length) {
                    Some(offset) => Ok(offset),
                    None => Err(state.space.tail()),
                }
            };
            match tail {
                Ok(offset) => offset,
                Err(tail) => {
                    let grown = tail
                        .grown(&*self.view.medium, length, self.block_size)
                        .map_err(io_error("extend the file"))?;
                    let mut state = self.state.lock();
                    state.space.adopt(grown);
                    state.space.take(length).ok_or(DiskError::Poisoned)?
                }
            }
        };
        let medium = &*self.view.medium;
        let mut at = 0;
        while at < old.region.length {
            let Some(data) = self
                .view
                .next_data(old.region.offset + at)
                .map_err(io_error("look for data in the BAT"))?
            else {
                break;
            };
            at = at.max(data.saturating_sub(old.region.offset) / PAGE * PAGE);
            if at >= old.region.length {
                break;
            }
            let mut bytes = vec![0; COPIED.min(old.region.length - at) as usize];
            self.view
                .read(&mut bytes, old.region.offset + at)
                .and_then(|()| medium.write_all_at(&bytes, offset + at))
                .map_err(io_error("copy the BAT"))?;
            at += bytes.len() as u64;
        }
        medium.sync_data().map_err(io_error("sync the file"))?;
        Ok(Region { offset, length })
    }
}
