//! The block allocation table ([MS-VHDX] 2.5).
//!
//! The table has an entry for every payload block and, after each chunk of them, one for the sector bitmap of that
//! chunk. Files without parent have the bitmap entries too and do not use them, so the index of a block's entry is not
//! the block's number, from the second chunk on.

use std::collections::BTreeMap;
use std::io;

use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

use super::format::{MIB, SECTORS_PER_BITMAP};
use super::metadata::Metadata;
use super::region::Region;
use super::view::View;
use crate::disk::ByteRange;
use crate::refusal::Refusal;

/// Entries of a page, the unit in which the table is cached, logged and written.
pub(super) const ENTRIES_PER_PAGE: u64 = 512;
/// Bytes of a page.
pub(super) const PAGE: u64 = ENTRIES_PER_PAGE * ENTRY;
pub(super) const ENTRY: u64 = size_of::<U64>() as u64;
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

impl BlockState {
    /// Whether the block has bytes in the file.
    pub(super) fn is_present(self) -> bool {
        match self {
            Self::FullyPresent | Self::PartiallyPresent => true,
            Self::NotPresent | Self::Undefined | Self::Zero | Self::Unmapped => false,
        }
    }

    fn number(self) -> u64 {
        match self {
            Self::NotPresent => 0,
            Self::Undefined => 1,
            Self::Zero => 2,
            Self::Unmapped => 3,
            Self::FullyPresent => 6,
            Self::PartiallyPresent => 7,
        }
    }
}

/// An entry for a payload block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// What the block is.
    pub state: BlockState,
    /// Where it lies, in bytes. Of an unmapped block: the space it had and may take back, zero where it has none. Of
    /// other absent blocks the field means nothing and is zero here.
    pub offset: u64,
}

impl Entry {
    /// An entry that names no space.
    pub(super) fn absent(state: BlockState) -> Self {
        Self { state, offset: 0 }
    }

    /// Takes an entry apart; the error says what was expected. Bits that are reserved are not looked at.
    pub(super) fn decode(raw: u64, has_parent: bool) -> Result<Self, String> {
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
            BlockState::NotPresent | BlockState::Undefined | BlockState::Zero => {
                Ok(Self::absent(state))
            }
            BlockState::Unmapped => Ok(Self {
                state,
                offset: file_offset(raw),
            }),
            BlockState::PartiallyPresent if !has_parent => Err(
                "expected no partially present block, as the file has no parent, found one".into(),
            ),
            BlockState::FullyPresent | BlockState::PartiallyPresent => {
                present_offset(raw).map(|offset| Self { state, offset })
            }
        }
    }

    /// The entry as it lies in the table.
    pub(super) fn raw(self) -> u64 {
        self.offset | self.state.number()
    }
}

/// Where a chunk's sector bitmap lies, if it has one (2.5.1.2).
pub(super) fn decode_bitmap(raw: u64) -> Result<Option<u64>, String> {
    match raw & 7 {
        0 => Ok(None),
        6 => present_offset(raw).map(Some),
        other => Err(format!(
            "expected a sector bitmap that is not present (0) or present (6), found state {other}"
        )),
    }
}

/// The entry of a sector bitmap that lies at `offset`, a multiple of 1 MiB.
pub(super) fn bitmap_entry(offset: u64) -> u64 {
    offset | BlockState::FullyPresent.number()
}

fn present_offset(raw: u64) -> Result<u64, String> {
    let offset = file_offset(raw);
    if offset < MIB {
        return Err("expected a present block to lie after the first MiB, found offset 0".into());
    }
    Ok(offset)
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
    /// Bytes of a logical sector, of which a sector bitmap has a bit each.
    pub sector: u64,
    /// Whether the file has a parent, and so may have sector bitmaps.
    pub has_parent: bool,
    chunk_ratio: u64,
}

/// Where the bits of a payload block lie in the sector bitmap of its chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct BitsAt {
    /// Index of the BAT entry of that bitmap.
    pub index: u64,
    /// The block's first bit.
    pub first: u64,
    /// How many bits it has.
    pub count: u64,
}

impl Layout {
    /// The layout of a disk with the metadata given.
    pub(super) fn new(metadata: &Metadata, region: Region) -> Result<Self, Refusal> {
        let mut layout = Self::of(metadata);
        layout.region = region;
        let needed = layout.table_len();
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
        let sector = u64::from(metadata.logical_sector.bytes());
        Self {
            region: Region {
                offset: 0,
                length: 0,
            },
            block_size,
            blocks: metadata.size.div_ceil(block_size),
            sector,
            has_parent: metadata.parent.is_some(),
            chunk_ratio: SECTORS_PER_BITMAP * sector / block_size,
        }
    }

    /// Entries of the table (2.5). Without a parent the last chunk's bitmap entry is left out.
    pub(super) fn entries(&self) -> u64 {
        if self.has_parent {
            self.blocks.div_ceil(self.chunk_ratio) * (self.chunk_ratio + 1)
        } else {
            self.index(self.blocks.saturating_sub(1)) + 1
        }
    }

    /// Bytes that the entries take.
    pub(super) fn table_len(&self) -> u64 {
        self.entries() * ENTRY
    }

    /// The index of a payload block's entry.
    pub(super) fn index(&self, block: u64) -> u64 {
        block + block / self.chunk_ratio
    }

    /// The payload block whose entry has this index; `None` for the entry of a sector bitmap.
    pub(super) fn block(&self, index: u64) -> Option<u64> {
        (!self.is_bitmap(index)).then(|| index - index / (self.chunk_ratio + 1))
    }

    /// Where the presence of a block's sectors is written down.
    pub(super) fn bits(&self, block: u64) -> BitsAt {
        let chunk = block / self.chunk_ratio;
        let count = self.block_size / self.sector;
        BitsAt {
            index: chunk * (self.chunk_ratio + 1) + self.chunk_ratio,
            first: block % self.chunk_ratio * count,
            count,
        }
    }

    /// Whether the entry of this index is for a sector bitmap.
    pub(super) fn is_bitmap(&self, index: u64) -> bool {
        index % (self.chunk_ratio + 1) == self.chunk_ratio
    }

    /// The ranges of a disk of `size` bytes that are the blocks of these entries, in order and joined where they touch.
    /// Entries of sector bitmaps count for nothing, as what hangs on them are entries of blocks.
    pub(super) fn ranges(&self, mut indices: Vec<u64>, size: u64) -> Vec<ByteRange> {
        indices.sort_unstable();
        indices.dedup();
        let mut ranges: Vec<ByteRange> = Vec::new();
        for block in indices.into_iter().filter_map(|index| self.block(index)) {
            let start = block * self.block_size;
            let end = (start + self.block_size).min(size);
            let joined = ranges.pop_if(|last| last.end() == start);
            let start = joined.map_or(start, ByteRange::offset);
            ranges.extend(ByteRange::new(start, end.saturating_sub(start)));
        }
        ranges
    }

    /// Where an entry lies in the file.
    pub(super) fn entry_offset(&self, index: u64) -> u64 {
        self.region.offset + index * ENTRY
    }
}

/// Calls `visit` with index and value of every entry that is not zero. Holes in the file are skipped.
pub(super) fn scan<E>(
    view: &View,
    layout: &Layout,
    failed: impl Fn(io::Error) -> E,
    mut visit: impl FnMut(u64, u64) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![U64::ZERO; SCAN_ENTRIES as usize];
    let mut index = 0;
    while index < layout.entries() {
        let Some(data) = view
            .next_data(layout.entry_offset(index))
            .map_err(&failed)?
        else {
            break;
        };
        index = index.max(data.saturating_sub(layout.region.offset) / ENTRY);
        let count = SCAN_ENTRIES.min(layout.entries().saturating_sub(index));
        let chunk = &mut buffer[..count as usize];
        view.read(chunk.as_mut_bytes(), layout.entry_offset(index))
            .map_err(&failed)?;
        for (raw, index) in chunk.iter().map(|raw| raw.get()).zip(index..) {
            if raw != 0 {
                visit(index, raw)?;
            }
        }
        index += count;
    }
    Ok(())
}

/// What the check of a table found.
#[derive(Debug)]
pub(super) struct Found {
    /// The end of the last block, or of the last region.
    pub end: u64,
    /// The parts of the file before `end` that nothing describes: offset and length.
    pub free: Vec<(u64, u64)>,
    /// The space that unmapped blocks have to themselves: its offset and the block.
    pub anchors: Vec<(u64, u64)>,
    /// Where the sector bitmaps lie.
    pub bitmaps: Vec<Region>,
}

/// Most soft anchors that are remembered: a bound on memory, not on the disk.
pub(super) const MAX_ANCHORS: usize = 1024;

/// Reads the whole table once and checks what no lookup could: that blocks lie in the file, outside all regions, and no
/// two in one place, and that partially present ones have a sector bitmap.
pub(super) fn check(view: &View, layout: &Layout, regions: &[Region]) -> Result<Found, Refusal> {
    check_with(view, layout, regions, &mut |index, expected| {
        Err(Refusal::corrupt(
            format!("BAT entry {index}"),
            layout.entry_offset(index),
            expected,
        ))
    })
}

/// Called with the index of a bad entry, and what was expected there.
pub(super) type Bad<'a> = &'a mut dyn FnMut(u64, String) -> Result<(), Refusal>;

/// As [`check`]; `bad` is called with each bad entry, which is passed over where that returns without an error.
pub(super) fn check_with(
    view: &View,
    layout: &Layout,
    regions: &[Region],
    bad: Bad<'_>,
) -> Result<Found, Refusal> {
    let mut claims = Claims::default();
    for region in regions {
        claims.claim(region.offset, region.length);
    }
    let mut has_anchors = false;
    // Blocks of a chunk whose bitmap entry, which follows theirs, has not come.
    let mut partial: Vec<u64> = Vec::new();
    let mut chunk = None;
    let mut lost: Vec<u64> = Vec::new();
    let mut bitmaps = Vec::new();
    let failed = |e| Refusal::io("read the BAT", e);
    scan(view, layout, failed, |index, raw| {
        let is_bitmap = layout.is_bitmap(index);
        if is_bitmap && !layout.has_parent {
            return Ok(());
        }
        let decoded = if is_bitmap {
            decode_bitmap(raw).map(|bitmap| bitmap.map(|offset| (offset, MIB)))
        } else {
            Entry::decode(raw, layout.has_parent).map(|entry| {
                has_anchors |= entry.state == BlockState::Unmapped && entry.offset != 0;
                let bitmap = layout.block(index).map(|block| layout.bits(block).index);
                if entry.state == BlockState::PartiallyPresent {
                    if chunk != bitmap {
                        lost.append(&mut partial);
                    }
                    chunk = bitmap;
                    partial.push(index);
                }
                entry
                    .state
                    .is_present()
                    .then_some((entry.offset, layout.block_size))
            })
        };
        let (offset, len) = match decoded {
            Ok(Some(claimed)) => claimed,
            Ok(None) => return Ok(()),
            Err(expected) => return bad(index, expected),
        };
        if offset.checked_add(len).is_none_or(|end| end > view.len()) {
            return bad(
                index,
                format!(
                    "expected the block inside the file of {:#x} bytes, found {offset:#x}+{len:#x}",
                    view.len()
                ),
            );
        }
        if !claims.claim_free(offset, len) {
            return bad(
                index,
                format!(
                    "expected a place of its own for the block, found {offset:#x}+{len:#x}, which something else has"
                ),
            );
        }
        if is_bitmap {
            bitmaps.push(Region {
                offset,
                length: MIB,
            });
            if chunk == Some(index) {
                partial.clear();
            }
        }
        Ok(())
    })?;
    lost.append(&mut partial);
    for index in lost {
        bad(index, NO_BITMAP.into())?;
    }
    let anchors = if has_anchors {
        find_anchors(view, layout, &mut claims)?
    } else {
        Vec::new()
    };
    let (end, free) = claims.gaps();
    Ok(Found {
        end,
        free,
        anchors,
        bitmaps,
    })
}

const NO_BITMAP: &str =
    "expected a sector bitmap for the chunk of this partially present block, found none";

/// The space that unmapped blocks name and nothing else has; it counts as taken from then on, whether remembered or
/// not.
fn find_anchors(
    view: &View,
    layout: &Layout,
    claims: &mut Claims,
) -> Result<Vec<(u64, u64)>, Refusal> {
    let mut anchors = Vec::new();
    scan(
        view,
        layout,
        |e| Refusal::io("read the BAT", e),
        |index, raw| {
            let Some(block) = layout.block(index) else {
                return Ok(());
            };
            let Ok(Entry {
                state: BlockState::Unmapped,
                offset,
            }) = Entry::decode(raw, layout.has_parent)
            else {
                return Ok(());
            };
            let inside = offset
                .checked_add(layout.block_size)
                .is_some_and(|end| end <= view.len());
            if offset >= MIB
                && inside
                && claims.is_free(offset, layout.block_size)
                && claims.claim(offset, layout.block_size)
                && anchors.len() < MAX_ANCHORS
            {
                anchors.push((offset, block));
            }
            Ok(())
        },
    )?;
    Ok(anchors)
}

/// Which MiB of the file are taken: a bit each, in words that exist where a bit is set.
#[derive(Default)]
struct Claims(BTreeMap<u64, u64>);

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

    /// Takes a range if no part of it is taken.
    fn claim_free(&mut self, offset: u64, len: u64) -> bool {
        self.is_free(offset, len) && self.claim(offset, len)
    }

    /// Whether nothing has any part of the range.
    fn is_free(&self, offset: u64, len: u64) -> bool {
        let (first, end) = (offset / MIB, (offset + len) / MIB);
        !self
            .0
            .range(first / 64..end.div_ceil(64))
            .any(|(word, taken)| {
                let low = first.saturating_sub(word * 64).min(64);
                let high = (end - word * 64).min(64);
                (low..high).any(|unit| taken & (1 << unit) != 0)
            })
    }

    /// The end of what is taken, and the gaps before it after the first MiB: offset and length in bytes.
    fn gaps(&self) -> (u64, Vec<(u64, u64)>) {
        let mut gaps = Vec::new();
        let mut at = 1;
        for (word, taken) in &self.0 {
            for unit in (0..64).filter(|unit| taken & (1 << unit) != 0) {
                let unit = word * 64 + unit;
                if unit > at {
                    gaps.push((at * MIB, (unit - at) * MIB));
                }
                at = at.max(unit + 1);
            }
        }
        (at * MIB, gaps)
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
            parent: None,
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
        use BlockState::{FullyPresent, NotPresent, PartiallyPresent, Undefined, Unmapped, Zero};
        let states = [
            Some((NotPresent, 0)),
            Some((Undefined, 0)),
            Some((Zero, 0)),
            Some((Unmapped, 5 * MIB)),
            None,
            None,
            Some((FullyPresent, 5 * MIB)),
            Some((PartiallyPresent, 5 * MIB)),
        ];
        for (number, expected) in (0..).zip(states) {
            let expected = expected.map(|(state, offset)| Entry { state, offset });
            let raw = (5 * MIB) | number;
            assert_eq!(Entry::decode(raw, true).ok(), expected, "state {number}");
            if let Some(entry) = expected.filter(|entry| entry.offset != 0) {
                assert_eq!(entry.raw(), raw);
            }
        }
        assert!(Entry::decode((5 * MIB) | 7, false).is_err());
        assert!(Entry::decode(6, true).is_err());
        assert_eq!(decode_bitmap(0), Ok(None));
        assert_eq!(decode_bitmap(bitmap_entry(7 * MIB)), Ok(Some(7 * MIB)));
        assert!(decode_bitmap((7 * MIB) | 7).is_err());
    }

    #[test]
    fn blocks_and_indices_are_each_others_inverse() {
        let mut layout = layout(64 << 30, 256 << 20, SectorSize::B512);
        layout.has_parent = true;
        assert_eq!(layout.entries(), 16 * 17);
        for block in 0..layout.blocks {
            assert_eq!(layout.block(layout.index(block)), Some(block));
            let bits = layout.bits(block);
            assert!(layout.is_bitmap(bits.index) && layout.block(bits.index).is_none());
            assert!(bits.first + bits.count <= SECTORS_PER_BITMAP);
        }
    }

    #[test]
    fn ranges_are_joined_over_bitmap_entries_and_end_with_the_disk() {
        let size = (8 << 30) + 512;
        let layout = layout(size, 2 << 20, SectorSize::B512);
        // Entry 2048 is that of a bitmap.
        let ranges = layout.ranges(vec![4098, 2048, 7, 2049, 2047, 7], size);
        let range = |offset, len| ByteRange::new(offset, len).unwrap();
        assert_eq!(
            ranges,
            [
                range(14 << 20, 2 << 20),
                range((4 << 30) - (2 << 20), 4 << 20),
                range(8 << 30, 512)
            ]
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

    #[test]
    fn gaps_are_what_nothing_has() {
        let mut claims = Claims::default();
        claims.claim(MIB, 3 * MIB);
        claims.claim(10 * MIB, 100 * MIB);
        claims.claim(200 * MIB, MIB);
        assert_eq!(
            claims.gaps(),
            (201 * MIB, vec![(4 * MIB, 6 * MIB), (110 * MIB, 90 * MIB)])
        );
        assert!(claims.is_free(4 * MIB, 6 * MIB) && claims.is_free(110 * MIB, 90 * MIB));
        assert!(!claims.is_free(4 * MIB, 7 * MIB) && !claims.is_free(109 * MIB, 2 * MIB));
        assert!(claims.is_free(201 * MIB, 64 * MIB));
    }
}
