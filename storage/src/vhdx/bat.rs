//! The block allocation table ([MS-VHDX] 2.5).
//!
//! The table has an entry for every payload block and, after each chunk of them, one for the sector bitmap of that chunk.
//! Files without parent have the bitmap entries too and do not use them, so the index of a block's entry is not the
//! block's number, from the second chunk on.

use std::collections::HashMap;

use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

use super::format::{MIB, SECTORS_PER_BITMAP};
use super::metadata::Metadata;
use super::region::Region;
use super::view::View;
use crate::open::Refusal;

/// Entries of a page, the unit in which the table is cached, logged and written.
pub(super) const ENTRIES_PER_PAGE: u64 = 512;
/// Bytes of a page.
pub(super) const PAGE: u64 = ENTRIES_PER_PAGE * ENTRY;
const ENTRY: u64 = size_of::<U64>() as u64;
/// Entries that the check at open looks at together.
const SCAN_ENTRIES: u64 = 16 * ENTRIES_PER_PAGE;

/// The state of a payload block (2.5.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockState {
    /// Never written: reads as the parent does, as zeros without one.
    NotPresent,
    /// Content of no interest to anyone. Reads as zeros here, so that nothing from outside the disk shows.
    Undefined,
    /// Zeros, whatever the parent holds.
    Zero,
    /// Given back by a trim. Reads as zeros. May still name the space it had.
    Unmapped,
    /// In the file.
    FullyPresent,
    /// In the file where the sector bitmap says so, otherwise in the parent. Children only.
    PartiallyPresent,
}

/// An entry for a payload block, in a file without parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Reads as zeros, without space in the file.
    Absent {
        /// Whether the entry says that it is zeros, rather than nothing.
        zero: bool,
    },
    /// The block lies in the file.
    Present {
        /// Where, in bytes.
        offset: u64,
    },
}

impl Entry {
    /// Takes an entry apart; the error says what was expected. Bits that are reserved are not looked at.
    pub(super) fn decode(raw: u64) -> Result<Self, String> {
        let state = match raw & 7 {
            0 => BlockState::NotPresent,
            1 => BlockState::Undefined,
            2 => BlockState::Zero,
            3 => BlockState::Unmapped,
            6 => BlockState::FullyPresent,
            7 => BlockState::PartiallyPresent,
            reserved => {
                return Err(format!(
                    "expected a block state of the specification, found {reserved}"
                ));
            }
        };
        match state {
            BlockState::NotPresent | BlockState::Undefined | BlockState::Unmapped => {
                Ok(Self::Absent { zero: false })
            }
            BlockState::Zero => Ok(Self::Absent { zero: true }),
            BlockState::FullyPresent => {
                let offset = file_offset(raw);
                if offset < MIB {
                    return Err(
                        "expected a present block to lie after the first MiB, found offset 0"
                            .into(),
                    );
                }
                Ok(Self::Present { offset })
            }
            BlockState::PartiallyPresent => Err(
                "expected no partially present block, as the file has no parent, found one".into(),
            ),
        }
    }

    /// The entry of a block that lies at `offset`, a multiple of 1 MiB.
    pub(super) fn present(offset: u64) -> u64 {
        offset | 6
    }
}

fn file_offset(raw: u64) -> u64 {
    // The upper 44 bits count MiB.
    raw & !(MIB - 1)
}

/// Where the entries of a disk lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// The region of the table.
    pub region: Region,
    /// Bytes of a payload block.
    pub block_size: u64,
    /// Payload blocks of the disk.
    pub blocks: u64,
    chunk_ratio: u64,
}

impl Layout {
    /// The layout of a disk with the metadata given.
    pub(super) fn new(metadata: &Metadata, region: Region) -> Result<Self, Refusal> {
        let mut layout = Self::of(metadata);
        layout.region = region;
        let needed = layout.entries() * ENTRY;
        if needed > region.length {
            return Err(Refusal::corrupt(
                "BAT region",
                region.offset,
                format!(
                    "expected at least {needed:#x} bytes for the disk's blocks, found {:#x}",
                    region.length
                ),
            ));
        }
        Ok(layout)
    }

    /// The layout of a file that is about to be created; its region has yet to be placed.
    pub(super) fn of(metadata: &Metadata) -> Self {
        let block_size = u64::from(metadata.block_size);
        Self {
            region: Region {
                offset: 0,
                length: 0,
            },
            block_size,
            blocks: metadata.size.div_ceil(block_size),
            chunk_ratio: SECTORS_PER_BITMAP * u64::from(metadata.logical_sector.bytes())
                / block_size,
        }
    }

    /// Entries of a file without parent (2.5): the last chunk's bitmap entry is left out.
    pub(super) fn entries(&self) -> u64 {
        self.index(self.blocks.saturating_sub(1)) + 1
    }

    /// The index of a payload block's entry.
    pub(super) fn index(&self, block: u64) -> u64 {
        block + block / self.chunk_ratio
    }

    /// Whether the entry of this index is for a sector bitmap.
    fn is_bitmap(&self, index: u64) -> bool {
        index % (self.chunk_ratio + 1) == self.chunk_ratio
    }

    /// Where an entry lies in the file.
    pub(super) fn entry_offset(&self, index: u64) -> u64 {
        self.region.offset + index * ENTRY
    }

    /// Where a page lies in the file.
    pub(super) fn page_offset(&self, page: u64) -> u64 {
        self.region.offset + page * PAGE
    }
}

/// Reads the whole table once and checks what no lookup could: that blocks lie in the file, outside all regions, and no
/// two in one place. Holes in the file are skipped. Gives the end of the last block, or of the last region.
pub(super) fn check(view: &View, layout: &Layout, regions: &[Region]) -> Result<u64, Refusal> {
    let mut end = regions
        .iter()
        .map(|region| region.end())
        .fold(MIB, u64::max);
    let mut claims = Claims::default();
    for region in regions {
        claims.claim(region.offset, region.length);
    }
    let mut buffer = vec![U64::ZERO; SCAN_ENTRIES as usize];
    let mut index = 0;
    while index < layout.entries() {
        let Some(data) = view
            .next_data(layout.entry_offset(index))
            .map_err(|e| Refusal::io("look for data in the BAT", e))?
        else {
            break;
        };
        index = index.max(data.saturating_sub(layout.region.offset) / ENTRY);
        let count = SCAN_ENTRIES.min(layout.entries().saturating_sub(index));
        let chunk = &mut buffer[..count as usize];
        view.read(chunk.as_mut_bytes(), layout.entry_offset(index))
            .map_err(|e| Refusal::io("read the BAT", e))?;
        for (raw, index) in chunk.iter().map(|raw| raw.get()).zip(index..) {
            if raw == 0 {
                continue;
            }
            let corrupt = |expected| {
                Refusal::corrupt(
                    format!("BAT entry {index}"),
                    layout.entry_offset(index),
                    expected,
                )
            };
            let len = if layout.is_bitmap(index) {
                MIB
            } else {
                layout.block_size
            };
            let block_end = file_offset(raw)
                .checked_add(len)
                .filter(|end| *end <= view.len());
            let present = !layout.is_bitmap(index)
                && matches!(Entry::decode(raw).map_err(corrupt)?, Entry::Present { .. });
            match block_end {
                Some(block_end) => {
                    if present && !claims.claim(file_offset(raw), len) {
                        return Err(corrupt(format!(
                            "expected a place of its own for the block, found {:#x}+{len:#x}, which something else has",
                            file_offset(raw)
                        )));
                    }
                    // Also of blocks that are not present but remember their space.
                    end = end.max(block_end);
                }
                None if present => {
                    return Err(corrupt(format!(
                        "expected the block inside the file of {:#x} bytes, found {:#x}+{len:#x}",
                        view.len(),
                        file_offset(raw)
                    )));
                }
                None => {}
            }
        }
        index += count;
    }
    Ok(end)
}

/// Which MiB of the file are taken: a bit each, in words that exist where a bit is set.
#[derive(Default)]
struct Claims(HashMap<u64, u64>);

impl Claims {
    /// Takes a range; false where a part of it was taken.
    fn claim(&mut self, offset: u64, len: u64) -> bool {
        let mut free = true;
        let (mut unit, end) = (offset / MIB, (offset + len) / MIB);
        while unit < end {
            let (word, first) = (unit / 64, unit % 64);
            let count = (64 - first).min(end - unit);
            let mask = (u64::MAX >> (64 - count)) << first;
            let taken = self.0.entry(word).or_default();
            free &= *taken & mask == 0;
            *taken |= mask;
            unit += count;
        }
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::SectorSize;
    use crate::vhdx::format::{Guid, TIB};

    fn layout(size: u64, block_size: u32, logical_sector: SectorSize) -> Layout {
        Layout::of(&Metadata {
            block_size,
            fixed: false,
            size,
            id: Guid::ZERO,
            logical_sector,
            physical_sector: SectorSize::B4096,
        })
    }

    #[test]
    fn a_bitmap_entry_follows_every_chunk_but_the_last() {
        // Blocks of 2 MiB with sectors of 512 bytes: chunks of 4 GiB, 2048 blocks.
        let layout = layout(8 << 30, 2 << 20, SectorSize::B512);
        assert_eq!(layout.entries(), 4097);
        assert_eq!(
            (layout.index(2047), layout.index(2048), layout.index(4095)),
            (2047, 2049, 4096)
        );
        assert!(layout.is_bitmap(2048) && !layout.is_bitmap(2047) && !layout.is_bitmap(2049));
    }

    #[test]
    fn no_block_has_a_bitmap_entry_and_indices_rise() {
        for (block, sector) in [
            (1, SectorSize::B512),
            (2, SectorSize::B512),
            (256, SectorSize::B512),
            (1, SectorSize::B4096),
            (256, SectorSize::B4096),
        ] {
            let layout = layout(64 << 30, block << 20, sector);
            let indices: Vec<u64> = (0..layout.blocks)
                .map(|block| layout.index(block))
                .collect();
            assert!(indices.is_sorted_by(|a, b| a < b));
            assert!(indices.iter().all(|index| !layout.is_bitmap(*index)));
        }
    }

    #[test]
    fn the_table_of_the_largest_disk_stays_under_the_cap() {
        let layout = layout(64 * TIB, 1 << 20, SectorSize::B512);
        assert!(layout.entries() * ENTRY <= crate::vhdx::format::MAX_BAT);
    }

    #[test]
    fn every_state_decodes_as_the_specification_says() {
        let expected = [
            Some(Entry::Absent { zero: false }),
            Some(Entry::Absent { zero: false }),
            Some(Entry::Absent { zero: true }),
            Some(Entry::Absent { zero: false }),
            None,
            None,
            Some(Entry::Present { offset: 5 * MIB }),
            None,
        ];
        for (state, expected) in (0..).zip(expected) {
            assert_eq!(
                Entry::decode((5 * MIB) | state).ok(),
                expected,
                "state {state}"
            );
        }
        assert!(Entry::decode(6).is_err());
        assert_eq!(
            Entry::decode(Entry::present(7 * MIB)),
            Ok(Entry::Present { offset: 7 * MIB })
        );
    }

    #[test]
    fn claims_see_every_overlap() {
        let mut claims = Claims::default();
        assert!(claims.claim(0, 3 * MIB));
        assert!(claims.claim(60 * MIB, 256 * MIB));
        assert!(claims.claim(3 * MIB, 57 * MIB));
        assert!(!claims.claim(315 * MIB, 2 * MIB));
        assert!(!claims.claim(2 * MIB, MIB));
    }
}
