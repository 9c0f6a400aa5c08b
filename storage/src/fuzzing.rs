//! What the fuzzers in `fuzz/` reach the VHDX engine through: files in memory, put together from a sound one and what a
//! fuzzer changes in it, with checksums made to match, so that it gets past them.
//!
//! What must hold: nothing panics or hangs, memory stays bounded, what opens for reading holds the same when it is
//! opened for writing and its log is replayed, and a close changes nothing that a reader sees.

#![allow(
    clippy::missing_panics_doc,
    reason = "a fuzzer ends where a property fails"
)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, OnceLock};

use arbitrary::Arbitrary;
use parking_lot::Mutex;
use zerocopy::{FromBytes, IntoBytes};

use crate::disk::{ByteRange, Disk, Extent, ExtentKind, SectorSize};
use crate::lock::OpenMode;
use crate::medium::Medium;
use crate::vhdx::fuzz_seam::{
    Guid, HEADER_OFFSETS, REGION_TABLE_LEN, REGION_TABLE_OFFSETS, RawDescriptor, RawHeader,
    RawLogEntry, checksum,
};
use crate::vhdx::{ChildOptions, CreateOptions, Vhdx};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Pages that a file can have: 32 MiB.
const MAX_PAGES: usize = 8192;
/// Longest file.
const MAX_LEN: u64 = 1 << 46;
/// Where things lie in a file that is made here.
const LOG: u64 = MIB;
const METADATA: u64 = 2 * MIB;
const BAT: u64 = 3 * MIB;

/// A file in memory: the pages that are not zeros, and its length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Contents {
    pages: BTreeMap<u64, Box<[u8]>>,
    len: u64,
}

impl Contents {
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset
            .checked_add(buffer.len() as u64)
            .filter(|end| *end <= self.len)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.fill(0);
        for (page, bytes) in self.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let (from, to) = ((page * PAGE).max(offset), ((page + 1) * PAGE).min(end));
            buffer[(from - offset) as usize..(to - offset) as usize].copy_from_slice(
                &bytes[(from - page * PAGE) as usize..(to - page * PAGE) as usize],
            );
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let end = offset
            .checked_add(bytes.len() as u64)
            .filter(|end| *end <= MAX_LEN)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        self.len = self.len.max(end);
        let mut at = offset;
        while at < end {
            let page = at / PAGE;
            let to = ((page + 1) * PAGE).min(end);
            if self.pages.len() >= MAX_PAGES && !self.pages.contains_key(&page) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let held = self
                .pages
                .entry(page)
                .or_insert_with(|| vec![0; PAGE as usize].into());
            held[(at - page * PAGE) as usize..(to - page * PAGE) as usize]
                .copy_from_slice(&bytes[(at - offset) as usize..(to - offset) as usize]);
            at = to;
        }
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        let touched: Vec<u64> = self
            .pages
            .range(offset / PAGE..end.div_ceil(PAGE).max(offset / PAGE))
            .map(|(page, _)| *page)
            .collect();
        for page in touched {
            let (from, to) = ((page * PAGE).max(offset), ((page + 1) * PAGE).min(end));
            if to - from == PAGE {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                bytes[(from - page * PAGE) as usize..(to - page * PAGE) as usize].fill(0);
            }
        }
    }

    fn set_len(&mut self, len: u64) -> io::Result<()> {
        if len > MAX_LEN {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        if len < self.len {
            self.zero(len, self.len - len);
        }
        self.len = len;
        Ok(())
    }

    /// Adds an extent that lies at `file_offset` to a checksum: every 512 bytes of it that are not zeros, and where
    /// they are.
    fn sum(&self, mut sum: u32, extent: &Extent, file_offset: u64) -> u32 {
        let end = file_offset + extent.len;
        assert!(end <= self.len, "an extent lies in its file");
        let mut buffer = [0; 512];
        for page in self
            .pages
            .range(file_offset / PAGE..end.div_ceil(PAGE))
            .map(|(page, _)| *page)
        {
            let (from, to) = ((page * PAGE).max(file_offset), ((page + 1) * PAGE).min(end));
            for at in (from..to).step_by(512) {
                let _ = self.read(&mut buffer, at);
                if buffer != [0; 512] {
                    let place = extent.offset + (at - file_offset);
                    sum = crc32c::crc32c_append(sum, &place.to_le_bytes());
                    sum = crc32c::crc32c_append(sum, &buffer);
                }
            }
        }
        sum
    }

    /// Brings the checksums of headers and region tables up to date.
    fn fix(&mut self) -> io::Result<()> {
        let lens = [size_of::<RawHeader>(), REGION_TABLE_LEN];
        for (offsets, len) in [HEADER_OFFSETS, REGION_TABLE_OFFSETS].into_iter().zip(lens) {
            for offset in offsets {
                let mut bytes = vec![0; len];
                if self.read(&mut bytes, offset).is_ok() {
                    self.write(&checksum(&bytes).to_le_bytes(), offset + 4)?;
                }
            }
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Memory {
    contents: Mutex<Contents>,
    name: Arc<File>,
}

impl Memory {
    fn new(contents: Contents) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            contents: Mutex::new(contents),
            name: Arc::new(File::open("/dev/null")?),
        }))
    }

    fn with<T>(&self, work: impl FnOnce(&mut Contents) -> T) -> T {
        work(&mut self.contents.lock())
    }
}

impl Medium for Arc<Memory> {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(|contents| contents.read(buffer, offset))
    }
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.with(|contents| contents.write(bytes, offset))
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.with(|contents| contents.len))
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with(|contents| contents.set_len(len))
    }
    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.with(|contents| contents.zero(offset, len));
        Ok(true)
    }
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.with(|contents| contents.zero(offset, len));
        Ok(())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok(self.with(|contents| {
            let next = contents.pages.range(offset / PAGE..).next();
            next.map(|(page, _)| (page * PAGE).max(offset))
        }))
    }
    fn file(&self) -> &Arc<File> {
        &self.name
    }
}

/// Bytes that a fuzzer puts somewhere.
#[derive(Arbitrary, Clone, Debug)]
pub struct Patch {
    place: Place,
    offset: u16,
    bytes: Vec<u8>,
}

/// Near what bytes are put.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    Identifier,
    Header(bool),
    RegionTable(bool),
    Log(u8),
    MetadataTable,
    MetadataItems,
    Bat,
    Payload(u8),
}

impl Patch {
    fn apply(&self, contents: &mut Contents) -> io::Result<()> {
        let base = match self.place {
            Place::Identifier => 0,
            Place::Header(second) => HEADER_OFFSETS[usize::from(second)],
            Place::RegionTable(second) => REGION_TABLE_OFFSETS[usize::from(second)],
            Place::Log(sector) => LOG + u64::from(sector) * PAGE,
            Place::MetadataTable => METADATA,
            Place::MetadataItems => METADATA + 65536,
            Place::Bat => BAT,
            Place::Payload(block) => 4 * MIB + u64::from(block % 16) * MIB,
        };
        contents.write(&self.bytes, base + u64::from(self.offset % 4096))
    }
}

/// What is done to a disk that opens.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Step {
    /// Writes sectors.
    Write(u8, u8),
    /// Writes a block.
    Fill(u8),
    /// Trims blocks.
    Trim(u8, u8),
    /// Zeroes sectors.
    Zero(u8, u8, bool),
    /// Flushes.
    Flush,
}

/// A file that may be broken, and what is done to it.
#[derive(Arbitrary, Clone, Debug)]
pub struct Damaged {
    patches: Vec<Patch>,
    keep_checksums: bool,
    cut: Option<u32>,
    steps: Vec<Step>,
}

fn template(child: bool) -> &'static (Contents, Contents) {
    static ALONE: OnceLock<(Contents, Contents)> = OnceLock::new();
    static CHILD: OnceLock<(Contents, Contents)> = OnceLock::new();
    let made = if child { &CHILD } else { &ALONE };
    made.get_or_init(|| made_in_files(child).expect("a sound template"))
}

/// A small disk with a few blocks, and a child of it or a copy.
fn made_in_files(child: bool) -> io::Result<(Contents, Contents)> {
    let folder = tempfile::tempdir()?;
    let (base, top) = (folder.path().join("base"), folder.path().join("top"));
    let options = CreateOptions {
        block_size: 1 << 20,
        logical_sector: SectorSize::B512,
        ..CreateOptions::new(20 * MIB + 512)
    };
    let write = |path: &std::path::Path, places: &[u64]| -> io::Result<()> {
        let disk = Vhdx::open(path, &OpenMode::ReadWrite.into()).map_err(io::Error::other)?;
        for place in places {
            crate::blocking::write_at(&disk, &[*place as u8 + 1; 1024], place * 300 * 1024)
                .map_err(io::Error::other)?;
        }
        disk.close().map_err(io::Error::other)
    };
    Vhdx::create(&base, &options).map_err(io::Error::other)?;
    write(&base, &[0, 9, 30])?;
    if child {
        Vhdx::create_child(&top, &base, &ChildOptions::default()).map_err(io::Error::other)?;
        write(&top, &[1, 9, 40])?;
    } else {
        std::fs::copy(&base, &top)?;
    }
    let load = |path| -> io::Result<Contents> {
        let bytes = std::fs::read(path)?;
        let mut contents = Contents {
            len: bytes.len() as u64,
            ..Contents::default()
        };
        for (page, bytes) in (0..).zip(bytes.chunks(PAGE as usize)) {
            if bytes.iter().any(|byte| *byte != 0) {
                contents.write(bytes, page * PAGE)?;
            }
        }
        Ok(contents)
    };
    Ok((load(&base)?, load(&top)?))
}

fn opened(
    contents: &Contents,
    mode: OpenMode,
    below: Option<&Arc<Vhdx>>,
) -> Option<(Vhdx, Arc<Memory>)> {
    let memory = Memory::new(contents.clone()).ok()?;
    let disk = Vhdx::from_medium(Box::new(Arc::clone(&memory)), mode, below.cloned()).ok()?;
    Some((disk, memory))
}

/// What is looked at of a disk, however large: its first and last blocks, and one in between.
fn looked_at(size: u64) -> Vec<ByteRange> {
    let len = (8 * MIB).min(size);
    [0, size / 2 / PAGE * PAGE, size - len]
        .into_iter()
        .filter_map(|offset| {
            let offset = offset.min(size - len) / 512 * 512;
            ByteRange::new(offset, len / 512 * 512)
        })
        .collect()
}

/// The bytes that a reader sees, in short: a checksum of each part.
fn digest(disk: &Vhdx, files: &[&Arc<Memory>]) -> Result<Vec<(u64, u32)>, String> {
    let geometry = disk.geometry();
    let sector = u64::from(geometry.logical_sector.bytes());
    let mut sums = Vec::new();
    for range in looked_at(geometry.size) {
        let range = ByteRange::new(
            range.offset() / sector * sector,
            range.len() / sector * sector,
        )
        .ok_or("a range")?;
        let mut extents = Vec::new();
        let id = disk
            .resolve_read(range, &mut extents)
            .map_err(|e| report::chain(&e).to_string())?;
        disk.finish(id, true);
        let mut at = range.offset();
        let mut sum = 0;
        for extent in &extents {
            assert_eq!(extent.offset, at, "in order and without gaps");
            at += extent.len;
            if let ExtentKind::Data { file, file_offset } = &extent.kind {
                let memory = files
                    .iter()
                    .find(|memory| Arc::ptr_eq(&memory.name, file))
                    .expect("a file of the chain");
                sum = memory.with(|contents| contents.sum(sum, extent, *file_offset));
            }
        }
        assert_eq!(at, range.end(), "in order and without gaps");
        sums.push((range.offset(), sum));
        let mut map = Vec::new();
        disk.map(range, &mut map)
            .map_err(|e| report::chain(&e).to_string())?;
        assert_eq!(map.iter().map(|part| part.len).sum::<u64>(), range.len());
    }
    Ok(sums)
}

fn perform(disk: &Vhdx, memory: &Arc<Memory>, step: Step) {
    let geometry = disk.geometry();
    let sector = u64::from(geometry.logical_sector.bytes());
    let inside = |offset: u64, len: u64| {
        let offset = offset.min(geometry.size - sector) / sector * sector;
        let len = len.min(geometry.size - offset) / sector * sector;
        ByteRange::new(offset, len)
    };
    let place = |at: u8| u64::from(at) * 100 * 1024;
    // A file that is full, or an entry that is broken, may refuse; a panic is what is looked for.
    let _ = match step {
        Step::Write(at, count) => inside(place(at), u64::from(count) * sector)
            .map_or(Ok(()), |range| write(disk, memory, range)),
        Step::Fill(block) => inside(u64::from(block % 24) * MIB, MIB)
            .map_or(Ok(()), |range| write(disk, memory, range)),
        Step::Trim(block, count) => {
            inside(u64::from(block % 24) * MIB, u64::from(count % 4 + 1) * MIB)
                .map_or(Ok(()), |range| disk.discard(range))
        }
        Step::Zero(at, count, may_unmap) => inside(place(at), u64::from(count) * 16 * sector)
            .map_or(Ok(()), |range| disk.write_zeroes(range, may_unmap)),
        Step::Flush => disk.flush(),
    };
}

fn write(
    disk: &Vhdx,
    memory: &Arc<Memory>,
    range: ByteRange,
) -> Result<(), crate::disk::DiskError> {
    let mut extents = Vec::new();
    let id = disk.resolve_write(range, &mut extents)?;
    let mut ok = true;
    for extent in &extents {
        if let ExtentKind::Data { file_offset, .. } = extent.kind {
            let bytes = vec![0xC3; extent.len as usize];
            ok &= memory.write_all_at(&bytes, file_offset).is_ok();
        }
    }
    disk.finish(id, ok);
    Ok(())
}

/// The files of a chain.
fn files<'a>(
    own: &'a Arc<Memory>,
    below: Option<(&'a Arc<Vhdx>, &'a Arc<Memory>)>,
) -> Vec<&'a Arc<Memory>> {
    std::iter::once(own)
        .chain(below.map(|(_, memory)| memory))
        .collect()
}

/// Opens a file both ways, works on it, and looks whether what a reader sees is what it has to be.
fn exercise(contents: &Contents, below: Option<(&Arc<Vhdx>, &Arc<Memory>)>, steps: &[Step]) {
    let parent = below.map(|(disk, _)| disk);
    let read_only = opened(contents, OpenMode::ReadOnly, parent);
    let before = read_only
        .as_ref()
        .map(|(disk, memory)| digest(disk, &files(memory, below)));
    if let Some((_, memory)) = &read_only {
        assert_eq!(
            &memory.with(|now| now.clone()),
            contents,
            "reading writes nothing"
        );
    }
    let Some((disk, memory)) = opened(contents, OpenMode::ReadWrite, parent) else {
        return;
    };
    let replayed = digest(&disk, &files(&memory, below));
    if let (Some(Ok(before)), Ok(replayed)) = (&before, &replayed) {
        assert_eq!(before, replayed, "a replay changes nothing that is read");
    }
    for step in steps.iter().take(32) {
        perform(&disk, &memory, *step);
    }
    let Ok(worked) = digest(&disk, &files(&memory, below)) else {
        return;
    };
    if disk.close().is_err() {
        return;
    }
    drop(disk);
    let closed = memory.with(|contents| contents.clone());
    let again = opened(&closed, OpenMode::ReadOnly, parent);
    let (disk, memory) = again.expect("what was closed opens");
    assert_eq!(
        digest(&disk, &files(&memory, below)),
        Ok(worked),
        "a close changes nothing"
    );
}

/// Opens a damaged file.
pub fn open(input: &Damaged) {
    let mut contents = template(false).1.clone();
    if damage(&mut contents, input).is_ok() {
        exercise(&contents, None, &input.steps);
    }
}

fn damage(contents: &mut Contents, input: &Damaged) -> io::Result<()> {
    for patch in input.patches.iter().take(16) {
        patch.apply(contents)?;
    }
    if !input.keep_checksums {
        contents.fix()?;
    }
    if let Some(cut) = input.cut {
        let len = u64::from(cut) % (contents.len + MIB);
        contents.set_len(len)?;
    }
    Ok(())
}

/// Opens a damaged child over a sound parent, and its locator as whatever it is.
pub fn chain(input: &(Damaged, Vec<u8>)) {
    let (base, child) = template(true);
    if let Ok(locator) = crate::vhdx::ParentLocator::parse(&input.1) {
        // Wherever it leads, nothing is opened there.
        let _ = locator.candidates(std::path::Path::new("/srv"));
        assert_eq!(
            crate::vhdx::ParentLocator::parse(&locator.to_disk()).as_ref(),
            Ok(&locator)
        );
    }
    let Some((parent, memory)) = opened(base, OpenMode::ReadOnly, None) else {
        return;
    };
    let parent = Arc::new(parent);
    let mut contents = child.clone();
    if damage(&mut contents, &input.0).is_ok() {
        exercise(&contents, Some((&parent, &memory)), &input.0.steps);
    }
}

/// A descriptor of a log entry.
#[derive(Arbitrary, Clone, Debug)]
struct Change {
    is_zero: bool,
    place: Place,
    sector: u8,
    len: u8,
    fill: u8,
    odd: Option<u64>,
}

/// An entry of a log.
#[derive(Arbitrary, Clone, Debug)]
struct Entry {
    /// Where it begins, in sectors; behind the one before it where that is not given.
    position: Option<u8>,
    /// By how much its number is higher than that of the one before it, less one.
    gap: u8,
    /// How many entries back its tail is.
    tail: u8,
    foreign: bool,
    torn: Option<u16>,
    flushed: u8,
    last: u8,
    changes: Vec<Change>,
}

/// A log, and what is done afterwards.
#[derive(Arbitrary, Clone, Debug)]
pub struct Log {
    entries: Vec<Entry>,
    start: u8,
    steps: Vec<Step>,
}

/// Replays a log.
pub fn log_replay(input: &Log) {
    let mut contents = template(false).1.clone();
    if write_log(&mut contents, input).is_ok() && contents.fix().is_ok() {
        exercise(&contents, None, &input.steps);
    }
}

fn write_log(contents: &mut Contents, input: &Log) -> io::Result<()> {
    let guid = Guid::from_bytes([7; 16]);
    let sectors = MIB / PAGE;
    let mut next = u64::from(input.start) % sectors;
    let mut sequence = 1_u64;
    let mut positions = Vec::new();
    for entry in input.entries.iter().take(12) {
        let position = entry.position.map_or(next, u64::from) % sectors;
        sequence += 1 + u64::from(entry.gap / 64);
        positions.push(position);
        let back = usize::from(entry.tail % 4).min(positions.len() - 1);
        let tail = positions[positions.len() - 1 - back] * PAGE;
        let head = RawLogEntry {
            signature: *b"loge",
            checksum: 0.into(),
            entry_length: 0.into(),
            tail: (tail as u32).into(),
            sequence: sequence.into(),
            descriptor_count: 0.into(),
            reserved: 0.into(),
            log_guid: if entry.foreign {
                Guid::from_bytes([9; 16])
            } else {
                guid
            },
            flushed_file_offset: (u64::from(entry.flushed % 8) * MIB).into(),
            last_file_offset: (u64::from(entry.last % 64) * MIB).into(),
        };
        let bytes = encoded(head, sequence, &entry.changes);
        let torn = entry
            .torn
            .map_or(bytes.len(), |torn| usize::from(torn) % bytes.len());
        for (number, sector) in (0..).zip(bytes[..torn].chunks(PAGE as usize)) {
            contents.write(sector, LOG + (position + number) % sectors * PAGE)?;
        }
        next = position + bytes.len() as u64 / PAGE;
    }
    for offset in HEADER_OFFSETS {
        let mut raw = vec![0; size_of::<RawHeader>()];
        contents.read(&mut raw, offset)?;
        if let Ok(header) = RawHeader::mut_from_bytes(&mut raw) {
            header.log_guid = guid;
        }
        contents.write(&raw, offset)?;
    }
    Ok(())
}

fn encoded(mut head: RawLogEntry, sequence: u64, changes: &[Change]) -> Vec<u8> {
    let changes = &changes[..changes.len().min(24)];
    let data = changes.iter().filter(|change| !change.is_zero).count();
    head.descriptor_count = (changes.len() as u32).into();
    let first = (size_of::<RawLogEntry>() + changes.len() * size_of::<RawDescriptor>())
        .next_multiple_of(PAGE as usize);
    let len = first + data * PAGE as usize;
    head.entry_length = (len as u32).into();
    let mut bytes = head.as_bytes().to_vec();
    for change in changes {
        let base = match change.place {
            Place::Identifier => 0,
            Place::Header(second) => HEADER_OFFSETS[usize::from(second)],
            Place::RegionTable(second) => REGION_TABLE_OFFSETS[usize::from(second)],
            Place::Log(sector) => LOG + u64::from(sector) * PAGE,
            Place::MetadataTable => METADATA,
            Place::MetadataItems => METADATA + 65536,
            Place::Bat => BAT,
            Place::Payload(block) => 4 * MIB + u64::from(block % 16) * MIB,
        };
        let offset = change
            .odd
            .unwrap_or(base + u64::from(change.sector % 8) * PAGE);
        let descriptor = RawDescriptor {
            signature: if change.is_zero { *b"zero" } else { *b"desc" },
            trailing: [change.fill; 4],
            leading: if change.is_zero {
                (u64::from(change.len) * PAGE).to_le_bytes()
            } else {
                [change.fill; 8]
            },
            file_offset: offset.into(),
            sequence: sequence.into(),
        };
        bytes.extend_from_slice(descriptor.as_bytes());
    }
    bytes.resize(first, 0);
    for change in changes.iter().filter(|change| !change.is_zero) {
        bytes.extend_from_slice(b"data");
        bytes.extend_from_slice(&((sequence >> 32) as u32).to_le_bytes());
        bytes.resize(bytes.len() + 4084, change.fill);
        bytes.extend_from_slice(&(sequence as u32).to_le_bytes());
    }
    let sum = checksum(&bytes).to_le_bytes();
    bytes[4..8].copy_from_slice(&sum);
    bytes
}
