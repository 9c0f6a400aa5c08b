//! VMDK: "Virtual Disk Format 5.0" (VMware, 2011): a descriptor in text that names flat and sparse extents, or one
//! sparse extent that holds its descriptor, with compressed grains where it was made for a stream. Numbers are
//! little-endian.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use flate2::read::ZlibDecoder;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::named::{Chain, NamedFiles};
use super::source::{Source, SourceError};
use crate::blocking::Span;

const SECTOR: u64 = 512;
/// First bytes of a sparse extent (`SPARSE_MAGICNUMBER`).
const MAGIC: &[u8; 4] = b"KDMV";
/// Most bytes of a descriptor that is a file of its own.
const MAX_DESCRIPTOR: u64 = 1 << 20;
/// The grain directory lies at the end of the file (`GD_AT_END`).
const AT_END: u64 = u64::MAX;
/// Grain table entries say which grains are zeros (flag bit 2), grains are compressed (bit 16), and markers are there
/// (bit 17).
const ZERO_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;
/// A grain that reads as zeros, where `ZERO_GRAINS` is set.
const ZERO_GRAIN: u32 = 1;
/// Largest disk that is read: 64 TiB, the largest that a VHDX can be.
const MAX_SECTORS: u64 = (64 << 40) / SECTOR;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSparse {
    magic: [u8; 4],
    version: U32,
    flags: U32,
    capacity: U64,
    grain_size: U64,
    descriptor_offset: U64,
    descriptor_size: U64,
    entries_per_table: U32,
    redundant_directory: U64,
    directory: U64,
    overhead: U64,
    unclean: u8,
    newlines: [u8; 4],
    compression: U16,
    rest: [u8; 433],
}

/// Most grain tables of an extent: those of 64 TiB in grains and tables of the usual size, 64 KiB and 512 entries.
const MAX_TABLES: u64 = 1 << 21;

/// A sparse extent.
struct Sparse {
    file: Arc<File>,
    len: u64,
    /// Bytes of a grain.
    grain: u64,
    per_table: u64,
    zero_grains: bool,
    compressed: bool,
    directory: Vec<U32>,
    /// The grain table that was looked at last, by its sector.
    table: Option<(u32, Vec<U32>)>,
    /// The compressed grain that was unpacked last, by its sector.
    unpacked: Option<(u32, Vec<u8>)>,
}

enum Extent {
    Flat { file: Arc<File>, offset: u64 },
    Zero,
    Sparse(Box<Sparse>),
}

/// An open disk: its extents, each with where it begins and ends, in bytes.
pub(super) struct Vmdk {
    extents: Vec<(u64, u64, Extent)>,
    size: u64,
}

fn corrupt(structure: &'static str, offset: u64, expected: impl Into<String>) -> SourceError {
    SourceError::corrupt(structure, offset, expected)
}

impl Vmdk {
    pub(super) fn open(
        file: Arc<File>,
        chain: &Chain,
        files: &NamedFiles,
    ) -> Result<Self, SourceError> {
        let len = length(&file)?;
        let mut magic = [0; 4];
        file.read_exact_at(&mut magic, 0)
            .map_err(|e| SourceError::io("read the signature", e))?;
        if magic == *MAGIC {
            let (sparse, capacity) = Sparse::open(file)?;
            let size = capacity * SECTOR;
            return Ok(Self {
                extents: vec![(0, size, Extent::Sparse(Box::new(sparse)))],
                size,
            });
        }
        if len > MAX_DESCRIPTOR {
            return Err(corrupt(
                "VMDK descriptor",
                0,
                format!("expected at most 1 MiB of text, found {len:#x} bytes"),
            ));
        }
        let mut text = vec![0; len as usize];
        file.read_exact_at(&mut text, 0)
            .map_err(|e| SourceError::io("read the descriptor", e))?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let mut extents = Vec::new();
        let mut at: u64 = 0;
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            refuse_parent(line)?;
            if !["RW ", "RDONLY ", "NOACCESS "]
                .iter()
                .any(|access| line.starts_with(access))
            {
                continue;
            }
            let (len, extent) = extent((chain, files), (number + 1, line), at)?;
            let end = at + len;
            extents.push((at, end, extent));
            at = end;
        }
        if extents.is_empty() {
            return Err(corrupt(
                "VMDK descriptor",
                0,
                "expected at least one extent, found none",
            ));
        }
        Ok(Self { extents, size: at })
    }

    fn extent(&mut self, offset: u64) -> Result<(u64, u64, &mut Extent), SourceError> {
        self.extents
            .iter_mut()
            .find(|(start, end, _)| (*start..*end).contains(&offset))
            .map(|(start, end, extent)| (*start, *end, extent))
            .ok_or_else(|| SourceError::Unsupported(format!("{offset:#x} is outside the disk")))
    }
}

/// The extent of a line, with its number, of the descriptor that ends a chain, which begins at `at` in the disk; its
/// length in bytes too.
fn extent(
    (chain, files): (&Chain, &NamedFiles),
    (number, line): (usize, &str),
    at: u64,
) -> Result<(u64, Extent), SourceError> {
    let bad = |expected: &str| {
        corrupt(
            "VMDK descriptor",
            0,
            format!("expected {expected} in line {number}, found {line:?}"),
        )
    };
    let (head, name, tail) = match line.split('"').collect::<Vec<_>>()[..] {
        [head, name, tail] => (head, Some(name), tail),
        [head] => (head, None, ""),
        _ => return Err(bad("one name in quotes")),
    };
    let words: Vec<&str> = head.split_whitespace().collect();
    let [_, sectors, kind] = words[..] else {
        return Err(bad("access, size and type of an extent"));
    };
    let sectors: u64 = sectors.parse().map_err(|_| bad("a number of sectors"))?;
    if sectors == 0 || at / SECTOR + sectors.min(MAX_SECTORS + 1) > MAX_SECTORS {
        return Err(bad("sectors of a disk of up to 64 TiB"));
    }
    let open = |name: Option<&str>| -> Result<Arc<File>, SourceError> {
        let name = name.ok_or_else(|| bad("the name of a file"))?;
        Ok(files.open(chain, "extent", name)?.file)
    };
    let len = sectors * SECTOR;
    let extent = match kind {
        "FLAT" | "VMFS" => {
            let file = open(name)?;
            let offset: u64 = match tail.trim() {
                "" => 0,
                text => text
                    .parse::<u64>()
                    .ok()
                    .and_then(|offset| offset.checked_mul(SECTOR))
                    .ok_or_else(|| bad("an offset in sectors"))?,
            };
            if offset
                .checked_add(len)
                .is_none_or(|end| length(&file).map_or(true, |held| end > held))
            {
                return Err(bad("a file that is long enough"));
            }
            Extent::Flat { file, offset }
        }
        "SPARSE" => {
            let (sparse, capacity) = Sparse::open(open(name)?)?;
            if capacity < sectors {
                return Err(bad("a sparse extent that is large enough"));
            }
            Extent::Sparse(Box::new(sparse))
        }
        "ZERO" => Extent::Zero,
        other => {
            return Err(SourceError::Unsupported(format!(
                "is a VMDK with an extent of the type {other:?}; FLAT, VMFS, SPARSE and ZERO can be read"
            )));
        }
    };
    Ok((len, extent))
}

/// Refuses an extent whose own descriptor names a parent, which holds what the extent does not.
fn check_descriptor(file: &File, head: &RawSparse, len: u64) -> Result<(), SourceError> {
    let (start, size) = (
        head.descriptor_offset.get().saturating_mul(SECTOR),
        head.descriptor_size.get().saturating_mul(SECTOR),
    );
    if start == 0 {
        return Ok(());
    }
    if size > MAX_DESCRIPTOR || start.checked_add(size).is_none_or(|end| end > len) {
        return Err(corrupt(
            "VMDK sparse header",
            start,
            format!("expected a descriptor of up to 1 MiB inside the file, found {size:#x} bytes"),
        ));
    }
    let mut text = vec![0; size as usize];
    file.read_exact_at(&mut text, start)
        .map_err(|e| SourceError::io("read the descriptor", e))?;
    String::from_utf8_lossy(&text)
        .lines()
        .try_for_each(refuse_parent)
}

/// Refuses the line of a descriptor that names a parent.
fn refuse_parent(line: &str) -> Result<(), SourceError> {
    let is_parent = line.split_once('=').is_some_and(|(key, value)| {
        key.trim() == "parentCID" && !value.trim().eq_ignore_ascii_case("ffffffff")
    });
    if is_parent {
        return Err(SourceError::Unsupported(
            "is a VMDK with a parent; merge it first".into(),
        ));
    }
    Ok(())
}

fn length(file: &File) -> Result<u64, SourceError> {
    Ok(file
        .metadata()
        .map_err(|e| SourceError::io("read the length", e))?
        .len())
}

impl Sparse {
    /// Opens an extent; gives its size in sectors too.
    fn open(file: Arc<File>) -> Result<(Self, u64), SourceError> {
        let len = length(&file)?;
        let head = |at: u64| -> Result<RawSparse, SourceError> {
            let mut bytes = [0; SECTOR as usize];
            file.read_exact_at(&mut bytes, at)
                .map_err(|e| SourceError::io(format!("read the sparse header at {at:#x}"), e))?;
            RawSparse::read_from_bytes(&bytes)
                .ok()
                .filter(|head| head.magic == *MAGIC)
                .ok_or_else(|| corrupt("VMDK sparse header", at, "expected \"KDMV\""))
        };
        let mut at = 0;
        let mut found = head(at)?;
        if found.directory.get() == AT_END {
            // The footer is followed by one sector that ends the stream.
            at = len.saturating_sub(2 * SECTOR);
            found = head(at)?;
        }
        let bad = |expected: String| corrupt("VMDK sparse header", at, expected);
        let (capacity, grain) = (found.capacity.get(), found.grain_size.get());
        let per_table = u64::from(found.entries_per_table.get());
        if !(1..=3).contains(&found.version.get()) {
            return Err(SourceError::Unsupported(format!(
                "is a sparse VMDK of version {}; 1 to 3 can be read",
                found.version
            )));
        }
        if capacity == 0 || capacity > MAX_SECTORS {
            return Err(bad(format!(
                "expected a disk of up to 64 TiB, found {capacity} sectors"
            )));
        }
        if !grain.is_power_of_two() || !(8..=1 << 14).contains(&grain) {
            return Err(bad(format!(
                "expected grains of 8 to 16384 sectors, a power of two, found {grain}"
            )));
        }
        if !(1..=1 << 16).contains(&per_table) {
            return Err(bad(format!(
                "expected grain tables of up to 65536 entries, found {per_table}"
            )));
        }
        let compressed = found.flags.get() & COMPRESSED != 0;
        if compressed && found.compression.get() != 1 {
            return Err(SourceError::Unsupported(format!(
                "is a VMDK compressed by method {}; only DEFLATE (1) can be read",
                found.compression
            )));
        }
        let tables = capacity.div_ceil(grain).div_ceil(per_table);
        let start = found
            .directory
            .get()
            .checked_mul(SECTOR)
            .filter(|start| start.checked_add(tables * 4).is_some_and(|end| end <= len))
            .ok_or_else(|| bad("expected the grain directory inside the file".into()))?;
        if tables > MAX_TABLES {
            return Err(bad(format!(
                "expected a grain directory of up to {MAX_TABLES} tables, found {tables}"
            )));
        }
        check_descriptor(&file, &found, len)?;
        let directory = entries(&file, start, tables, "the grain directory")?;
        let sparse = Self {
            file,
            len,
            grain: grain * SECTOR,
            per_table,
            zero_grains: found.flags.get() & ZERO_GRAINS != 0,
            compressed,
            directory,
            table: None,
            unpacked: None,
        };
        Ok((sparse, capacity))
    }

    /// The sector at which the grain with this offset lies, if the file has it.
    fn grain_at(&mut self, offset: u64) -> Result<Option<u32>, SourceError> {
        let grain = offset / self.grain;
        let table = self
            .directory
            .get((grain / self.per_table) as usize)
            .map_or(0, |entry| entry.get());
        if table == 0 {
            return Ok(None);
        }
        if self.table.as_ref().is_none_or(|(known, _)| *known != table) {
            let start = u64::from(table) * SECTOR;
            if start + self.per_table * 4 > self.len {
                return Err(corrupt(
                    "VMDK grain directory",
                    start,
                    "expected the grain table inside the file",
                ));
            }
            let read = entries(&self.file, start, self.per_table, "a grain table")?;
            self.table = Some((table, read));
        }
        let entry = self
            .table
            .as_ref()
            .and_then(|(_, table)| table.get((grain % self.per_table) as usize))
            .map_or(0, |entry| entry.get());
        Ok(match entry {
            0 => None,
            ZERO_GRAIN if self.zero_grains => None,
            sector => Some(sector),
        })
    }

    /// Fills a part of one grain.
    fn read(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), SourceError> {
        let Some(sector) = self.grain_at(offset)? else {
            buffer.fill(0);
            return Ok(());
        };
        let (start, inside) = (u64::from(sector) * SECTOR, offset % self.grain);
        if !self.compressed {
            return self
                .file
                .read_exact_at(buffer, start + inside)
                .map_err(|e| SourceError::io(format!("read the grain at {start:#x}"), e));
        }
        if self
            .unpacked
            .as_ref()
            .is_none_or(|(known, _)| *known != sector)
        {
            let bytes = self.unpack(start)?;
            self.unpacked = Some((sector, bytes));
        }
        let from = inside as usize;
        match &self.unpacked {
            Some((_, bytes)) if bytes.len() >= from + buffer.len() => {
                buffer.copy_from_slice(&bytes[from..from + buffer.len()]);
                Ok(())
            }
            Some(_) | None => Err(corrupt(
                "VMDK compressed grain",
                start,
                format!("expected {} bytes", self.grain),
            )),
        }
    }

    /// A grain as it is before its compression; behind its marker, the grain's sector (8 bytes) and its length (4).
    fn unpack(&self, start: u64) -> Result<Vec<u8>, SourceError> {
        let io = |e| SourceError::io(format!("read the grain at {start:#x}"), e);
        let mut marker = [0; 12];
        self.file.read_exact_at(&mut marker, start).map_err(io)?;
        let len = u64::from(u32::from_le_bytes([
            marker[8], marker[9], marker[10], marker[11],
        ]));
        // What cannot be compressed grows by little.
        if len > 2 * self.grain || start + 12 + len > self.len {
            return Err(corrupt(
                "VMDK compressed grain",
                start,
                format!("expected at most {} bytes, found {len}", 2 * self.grain),
            ));
        }
        let mut packed = vec![0; len as usize];
        self.file
            .read_exact_at(&mut packed, start + 12)
            .map_err(io)?;
        let mut bytes = Vec::with_capacity(self.grain as usize);
        ZlibDecoder::new(&packed[..])
            .take(self.grain)
            .read_to_end(&mut bytes)
            .map_err(|e| SourceError::io(format!("unpack the grain at {start:#x}"), e))?;
        // The last grain may end with the disk.
        bytes.resize(self.grain as usize, 0);
        Ok(bytes)
    }
}

/// Reads entries that have been found to lie in the file.
fn entries(file: &File, start: u64, count: u64, what: &str) -> Result<Vec<U32>, SourceError> {
    let mut bytes = vec![0; (count * 4) as usize];
    file.read_exact_at(&mut bytes, start)
        .map_err(|e| SourceError::io(format!("read {what} at {start:#x}"), e))?;
    Ok(bytes
        .chunks_exact(4)
        .filter_map(|entry| U32::read_from_bytes(entry).ok())
        .collect())
}

impl Source for Vmdk {
    fn size(&self) -> u64 {
        self.size
    }

    fn span_at(&mut self, offset: u64) -> Result<Span, SourceError> {
        let (start, end, extent) = self.extent(offset)?;
        match extent {
            Extent::Zero => Ok(Span {
                len: end - offset,
                is_data: false,
            }),
            Extent::Flat { file, offset: from } => {
                super::source::hole_or_data(file, *from + (offset - start), end - offset)
            }
            Extent::Sparse(sparse) => {
                let inside = offset - start;
                let is_data = sparse.grain_at(inside)?.is_some();
                let next = (inside / sparse.grain + 1) * sparse.grain;
                Ok(Span {
                    len: next.min(end - start) - inside,
                    is_data,
                })
            }
        }
    }

    fn read_at(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), SourceError> {
        let (mut at, mut left) = (offset, buffer);
        while !left.is_empty() {
            let (start, end, extent) = self.extent(at)?;
            let mut len = (end - at).min(left.len() as u64);
            if let Extent::Sparse(sparse) = &extent {
                len = len.min(sparse.grain - (at - start) % sparse.grain);
            }
            let (part, rest) = left.split_at_mut(len as usize);
            let filled = match extent {
                Extent::Zero => {
                    part.fill(0);
                    Ok(())
                }
                Extent::Flat { file, offset } => file
                    .read_exact_at(part, *offset + (at - start))
                    .map_err(|e| SourceError::io(format!("read the disk at {at:#x}"), e)),
                Extent::Sparse(sparse) => sparse.read(part, at - start),
            };
            filled?;
            at += len;
            left = rest;
        }
        Ok(())
    }
}
