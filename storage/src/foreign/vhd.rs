//! VHD: "Virtual Hard Disk Image Format Specification" 1.0 (Microsoft, 2006), fixed and dynamic. Numbers are
//! big-endian.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::source::{Source, SourceError};
use crate::blocking::Span;

/// First bytes of a footer ("Hard Disk Footer Format").
const COOKIE: &[u8; 8] = b"conectix";
/// Bytes of a footer.
pub(super) const FOOTER: u64 = 512;
const DYNAMIC_COOKIE: &[u8; 8] = b"cxsparse";
const SECTOR: u64 = 512;
/// Largest disk of the format: 2040 GiB.
const MAX_SIZE: u64 = 2040 << 30;
/// Block sizes that are read: smaller ones, which nobody makes, would make a table of gigabytes out of a header.
const BLOCK_SIZES: std::ops::RangeInclusive<u64> = 512 << 10..=256 << 20;
/// A block that is not in the file ("Block Allocation Table").
const UNUSED: u32 = u32::MAX;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFooter {
    cookie: [u8; 8],
    features: U32,
    version: U32,
    data_offset: U64,
    created: U32,
    application: [u8; 12],
    original_size: U64,
    current_size: U64,
    geometry: [u8; 4],
    kind: U32,
    checksum: U32,
    rest: [u8; 444],
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawDynamic {
    cookie: [u8; 8],
    data_offset: U64,
    table_offset: U64,
    version: U32,
    entries: U32,
    block_size: U32,
    checksum: U32,
    rest: [u8; 984],
}

/// Where the bytes are.
enum Layout {
    Fixed,
    Dynamic { block_size: u64, table: Vec<U32> },
}

/// An open disk.
pub(super) struct Vhd {
    file: Arc<File>,
    len: u64,
    size: u64,
    layout: Layout,
}

/// One's complement of the sum of all bytes, the field itself left out.
fn checksum(bytes: &[u8], field: usize) -> u32 {
    let sum = bytes
        .iter()
        .enumerate()
        .filter(|(at, _)| !(field..field + 4).contains(at))
        .fold(0_u32, |sum, (_, byte)| sum.wrapping_add((*byte).into()));
    !sum
}

impl Vhd {
    pub(super) fn open(file: Arc<File>) -> Result<Self, SourceError> {
        let len = file
            .metadata()
            .map_err(|e| SourceError::io("read the length", e))?
            .len();
        let read = |buffer: &mut [u8], offset: u64, what: &str| {
            file.read_exact_at(buffer, offset)
                .map_err(|e| SourceError::io(format!("read {what} at {offset:#x}"), e))
        };
        // The copy at the start of a dynamic disk stands in for a footer that was lost.
        let mut footer = None;
        for offset in [len.saturating_sub(FOOTER), 0] {
            let mut bytes = [0; FOOTER as usize];
            if len < FOOTER || read(&mut bytes, offset, "the footer").is_err() {
                continue;
            }
            if let Ok(found) = RawFooter::read_from_bytes(&bytes)
                && found.cookie == *COOKIE
                && found.checksum.get() == checksum(&bytes, 64)
            {
                footer = Some((found, offset));
                break;
            }
        }
        let Some((footer, at)) = footer else {
            return Err(SourceError::corrupt(
                "VHD footer",
                len.saturating_sub(FOOTER),
                "expected \"conectix\" and a matching checksum, here or at the start of the file",
            ));
        };
        let size = footer.current_size.get();
        if size == 0 || size > MAX_SIZE || !size.is_multiple_of(SECTOR) {
            return Err(SourceError::corrupt(
                "VHD footer",
                at,
                format!("expected a size in whole sectors, up to 2040 GiB, found {size:#x}"),
            ));
        }
        let layout = match footer.kind.get() {
            2 if size.checked_add(FOOTER).is_some_and(|end| end <= len) => Layout::Fixed,
            2 => {
                return Err(SourceError::corrupt(
                    "VHD footer",
                    at,
                    format!("expected a fixed disk of {size:#x} bytes to fit the file of {len:#x}"),
                ));
            }
            3 => dynamic(&footer, size, len, &read)?,
            4 => {
                return Err(SourceError::Unsupported(
                    "is a differencing VHD; convert it where its parent is, or merge it first"
                        .into(),
                ));
            }
            other => {
                return Err(SourceError::corrupt(
                    "VHD footer",
                    at,
                    format!("expected a disk type of 2, 3 or 4, found {other}"),
                ));
            }
        };
        Ok(Self {
            file,
            len,
            size,
            layout,
        })
    }

    /// Where the data of a block lies, if the file has it.
    fn block(
        &self,
        block_size: u64,
        table: &[U32],
        block: u64,
    ) -> Result<Option<u64>, SourceError> {
        let sector = usize::try_from(block)
            .ok()
            .and_then(|block| table.get(block))
            .map_or(UNUSED, |entry| entry.get());
        if sector == UNUSED {
            return Ok(None);
        }
        // A bitmap of the block's sectors precedes the data, in whole sectors.
        let bitmap = (block_size / SECTOR).div_ceil(8).next_multiple_of(SECTOR);
        let offset = u64::from(sector) * SECTOR + bitmap;
        // The last block may be cut where the disk ends.
        let needed = block_size.min(self.size - block * block_size);
        if offset + needed > self.len {
            return Err(SourceError::corrupt(
                "VHD block allocation table",
                offset,
                format!(
                    "expected block {block} inside the file of {:#x} bytes",
                    self.len
                ),
            ));
        }
        Ok(Some(offset))
    }
}

/// Fills a buffer from an offset of what is named.
type Read<'a> = &'a dyn Fn(&mut [u8], u64, &str) -> Result<(), SourceError>;

fn dynamic(footer: &RawFooter, size: u64, len: u64, read: Read<'_>) -> Result<Layout, SourceError> {
    let at = footer.data_offset.get();
    let corrupt = |expected: String| SourceError::corrupt("VHD dynamic disk header", at, expected);
    let mut bytes = [0; size_of::<RawDynamic>()];
    if at
        .checked_add(bytes.len() as u64)
        .is_none_or(|end| end > len)
    {
        return Err(corrupt(format!(
            "expected it inside the file of {len:#x} bytes"
        )));
    }
    read(&mut bytes, at, "the dynamic disk header")?;
    let head =
        RawDynamic::read_from_bytes(&bytes).map_err(|_| corrupt("expected 1024 bytes".into()))?;
    if head.cookie != *DYNAMIC_COOKIE || head.checksum.get() != checksum(&bytes, 36) {
        return Err(corrupt(
            "expected \"cxsparse\" and a matching checksum".into(),
        ));
    }
    let block_size = u64::from(head.block_size.get());
    if !block_size.is_power_of_two() || !BLOCK_SIZES.contains(&block_size) {
        return Err(corrupt(format!(
            "expected a block size that is a power of two from 512 KiB to 256 MiB, found {block_size:#x}"
        )));
    }
    let needed = size.div_ceil(block_size);
    if u64::from(head.entries.get()) < needed {
        return Err(corrupt(format!(
            "expected at least {needed} entries of the block allocation table, found {}",
            head.entries
        )));
    }
    let table_at = head.table_offset.get();
    if table_at.checked_add(needed * 4).is_none_or(|end| end > len) {
        return Err(corrupt(format!(
            "expected the block allocation table inside the file of {len:#x} bytes, found it at {table_at:#x}"
        )));
    }
    // No longer than the file.
    let mut bytes = vec![0; (needed * 4) as usize];
    read(&mut bytes, table_at, "the block allocation table")?;
    let table = <[U32]>::ref_from_bytes(&bytes)
        .map_err(|_| corrupt("expected whole entries".into()))?
        .to_vec();
    Ok(Layout::Dynamic { block_size, table })
}

impl Source for Vhd {
    fn size(&self) -> u64 {
        self.size
    }

    fn span_at(&mut self, offset: u64) -> Result<Span, SourceError> {
        match &self.layout {
            Layout::Fixed => super::source::hole_or_data(&self.file, offset, self.size - offset),
            Layout::Dynamic { block_size, table } => {
                let block = offset / block_size;
                let is_data = self.block(*block_size, table, block)?.is_some();
                let end = ((block + 1) * block_size).min(self.size);
                Ok(Span {
                    len: end - offset,
                    is_data,
                })
            }
        }
    }

    fn read_at(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), SourceError> {
        let failed = |e| SourceError::io(format!("read the disk at {offset:#x}"), e);
        match &self.layout {
            Layout::Fixed => self.file.read_exact_at(buffer, offset).map_err(failed),
            Layout::Dynamic { block_size, table } => {
                let (mut at, mut left) = (offset, buffer);
                while !left.is_empty() {
                    let inside = at % block_size;
                    let (part, rest) =
                        left.split_at_mut((block_size - inside).min(left.len() as u64) as usize);
                    match self.block(*block_size, table, at / block_size)? {
                        Some(start) => self
                            .file
                            .read_exact_at(part, start + inside)
                            .map_err(failed)?,
                        None => part.fill(0),
                    }
                    at += part.len() as u64;
                    left = rest;
                }
                Ok(())
            }
        }
    }
}
