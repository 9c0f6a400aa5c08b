//! Power cuts. Random work on a disk is recorded, and cut at every operation on its files; what was done since a file's
//! last sync is kept, dropped, torn into sectors of 512 bytes and reordered. After each cut the disk opens, everything
//! that was flushed is there, and everything else is as it was or as it was to be: no sector ever holds anything of
//! another.
//!
//! `POWER_CUTS` and `POWER_SEED` in the environment ask for more, and for others, than a normal run has.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::memory::{Clock, Contents, Memory, Op};
use super::{SECTOR, created, family};
use crate::disk::{ByteRange, Disk, ExtentKind, RequestId, SectorSize};
use crate::lock::OpenMode;
use crate::medium::Medium;
use crate::progress::Unwatched;
use crate::vhdx::format::MIB;
use crate::vhdx::{CompactOptions, CreateOptions, Vhdx};

const BLOCK: u64 = MIB / SECTOR;
/// Blocks that are worked on. The disk has some more, in another page of the table.
const BLOCKS: u64 = 12;
/// What a cut tears.
const TORN: u64 = 512;
/// Sectors of each block that are looked at: its first and last ones, and some that lie together.
const PLACES: [u64; 8] = [0, 1, 100, 101, 102, 103, 254, 255];
/// Cuts of a normal run, at least.
const CUTS: u64 = 10_000;

/// A generator that depends on its seed alone.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % bound
    }
}

/// What a sector holds after a write: the number of the write, and the sector, so that it is told from every other.
fn stamp(step: u64, sector: u64) -> u32 {
    ((step as u32 + 1) << 14) | (sector as u32 & 0x3FFF)
}

/// A value that a sector had or was to have, and when it was brought there: from when, and until when.
#[derive(Clone, Copy, Debug)]
struct Written {
    begin: usize,
    end: usize,
    value: u32,
}

#[derive(Default)]
struct History {
    /// What sectors held at the beginning, where that is not zeros.
    initial: BTreeMap<u64, u32>,
    sectors: BTreeMap<u64, Vec<Written>>,
    flushes: Vec<(usize, usize)>,
}

impl History {
    /// Whether a sector may hold a value after a cut, when all that ended before `flushed` is durable.
    fn allows(&self, sector: u64, found: u32, flushed: usize, cut: usize) -> bool {
        let none = Vec::new();
        let writes = self.sectors.get(&sector).unwrap_or(&none);
        let durable = writes
            .iter()
            .rev()
            .find(|written| written.end <= flushed)
            .map_or(self.initial.get(&sector).copied().unwrap_or(0), |written| {
                written.value
            });
        found == durable
            || writes.iter().any(|written| {
                written.end > flushed && written.begin < cut && written.value == found
            })
    }

    fn flushed_before(&self, cut: usize) -> usize {
        self.flushes
            .iter()
            .filter(|(_, end)| *end <= cut)
            .map(|(begin, _)| *begin)
            .max()
            .unwrap_or(0)
    }
}

/// A disk over one file, or a child and its parent.
struct Subject {
    files: Vec<Arc<Memory>>,
    disk: Vhdx,
}

impl Subject {
    /// Opens the files, the base first. Where `merging` is set the parent can be written too.
    fn open(contents: &[Contents], clock: &Clock, mode: OpenMode, merging: bool) -> Self {
        let files: Vec<_> = contents
            .iter()
            .map(|contents| Memory::timed(contents.clone(), clock))
            .collect();
        let mut below = None;
        for file in &files[..files.len() - 1] {
            let mode = if merging { mode } else { OpenMode::ReadOnly };
            let disk = Vhdx::from_medium(Box::new(Arc::clone(file)), mode, below.take()).unwrap();
            below = Some(Arc::new(disk));
        }
        let top = Arc::clone(&files[files.len() - 1]);
        let disk = Vhdx::from_medium(Box::new(top), mode, below).unwrap();
        Self { files, disk }
    }

    fn top(&self) -> &Arc<Memory> {
        &self.files[self.files.len() - 1]
    }

    /// The values of a sector's eighths.
    fn read(&self, sector: u64) -> [u32; (SECTOR / TORN) as usize] {
        let mut extents = Vec::new();
        let range = ByteRange::new(sector * SECTOR, SECTOR).unwrap();
        let id = self.disk.resolve_read(range, &mut extents).unwrap();
        let mut bytes = vec![0; SECTOR as usize];
        for extent in &extents {
            if let ExtentKind::Data { file, file_offset } = &extent.kind {
                let start = (extent.offset - range.offset()) as usize;
                let part = &mut bytes[start..start + extent.len as usize];
                let memory = self
                    .files
                    .iter()
                    .find(|memory| Arc::ptr_eq(file, memory.file()))
                    .unwrap();
                memory.read_exact_at(part, *file_offset).unwrap();
            }
        }
        self.disk.finish(id, true);
        let mut values = [0; (SECTOR / TORN) as usize];
        for (value, piece) in values.iter_mut().zip(bytes.chunks(TORN as usize)) {
            *value = u32::from_le_bytes(piece[..4].try_into().unwrap());
            let filled = value.to_le_bytes().repeat(TORN as usize / 4);
            assert_eq!(piece, filled, "sector {sector}: 512 bytes hold one write");
        }
        values
    }

    /// The value of a sector that was not torn.
    fn value(&self, sector: u64) -> u32 {
        let values = self.read(sector);
        assert!(
            values.iter().all(|value| *value == values[0]),
            "sector {sector}: {values:x?}"
        );
        values[0]
    }
}

/// A write that has been resolved and not finished.
struct InFlight {
    id: RequestId,
    extents: Vec<(u64, u64, u64)>,
    first: u64,
    count: u64,
    step: u64,
    begin: usize,
}

/// Random work on a subject, and what it should have come to.
struct Work {
    subject: Subject,
    random: Random,
    history: History,
    in_flight: Vec<InFlight>,
    step: u64,
}

impl Work {
    fn now(&self) -> usize {
        self.subject.top().count()
    }

    /// A few sectors of a block that are looked at.
    fn place(&mut self) -> (u64, u64) {
        let block = self.random.below(BLOCKS);
        match self.random.below(3) {
            0 => (block * BLOCK, 1 + self.random.below(2)),
            1 => (
                block * BLOCK + 100 + self.random.below(2),
                1 + self.random.below(3),
            ),
            _ => (block * BLOCK + 254, 1 + self.random.below(2)),
        }
    }

    fn begin_write(&mut self, first: u64, count: u64) {
        let begin = self.now();
        let mut extents = Vec::new();
        let range = ByteRange::new(first * SECTOR, count * SECTOR).unwrap();
        let id = self
            .subject
            .disk
            .resolve_write(range, &mut extents)
            .unwrap();
        let extents = extents
            .iter()
            .map(|extent| match extent.kind {
                ExtentKind::Data { file_offset, .. } => (extent.offset, extent.len, file_offset),
                ExtentKind::Zero | ExtentKind::Unmapped => panic!("a write has space"),
            })
            .collect();
        self.in_flight.push(InFlight {
            id,
            extents,
            first,
            count,
            step: self.step,
            begin,
        });
    }

    fn end_write(&mut self, number: usize) {
        let write = self.in_flight.remove(number);
        for (offset, len, file_offset) in &write.extents {
            let mut bytes = Vec::new();
            for sector in offset / SECTOR..(offset + len) / SECTOR {
                bytes.extend(
                    stamp(write.step, sector)
                        .to_le_bytes()
                        .repeat(SECTOR as usize / 4),
                );
            }
            self.subject
                .top()
                .write_all_at(&bytes, *file_offset)
                .unwrap();
        }
        self.subject.disk.finish(write.id, true);
        let end = self.now();
        // A trim may have come in between; then the write may be lost with what it was written to.
        for sector in write.first..write.first + write.count {
            if !PLACES.contains(&(sector % BLOCK)) {
                continue;
            }
            let value = self.subject.value(sector);
            let written = stamp(write.step, sector);
            let writes = self.history.sectors.entry(sector).or_default();
            let cleared = writes.iter().any(|other| other.end >= write.begin);
            assert!(value == written || cleared, "sector {sector}: {value:x}");
            for value in [written, value] {
                writes.push(Written {
                    begin: write.begin,
                    end,
                    value,
                });
            }
        }
    }

    /// Notes what a request that changes a range without writing to it has come to.
    fn note(&mut self, begin: usize, first: u64, count: u64, zeros: bool) {
        let end = self.now();
        for block in first / BLOCK..(first + count).div_ceil(BLOCK) {
            for sector in PLACES.map(|place| block * BLOCK + place) {
                if !(first..first + count).contains(&sector) {
                    continue;
                }
                let value = self.subject.value(sector);
                let known = self.history.initial.get(&sector).copied().unwrap_or(0);
                let writes = self.history.sectors.entry(sector).or_default();
                let before = writes.last().map_or(known, |written| written.value);
                assert!(value == 0 || (!zeros && value == before), "sector {sector}");
                writes.push(Written { begin, end, value });
            }
        }
    }

    fn flush(&mut self) {
        let begin = self.now();
        if self.subject.disk.flush_by_sync().is_some() {
            self.subject.top().sync_data().unwrap();
        } else {
            self.subject.disk.flush().unwrap();
        }
        self.history.flushes.push((begin, self.now()));
    }

    fn step(&mut self) {
        self.step += 1;
        let begin = self.now();
        let range = |first, count| ByteRange::new(first * SECTOR, count * SECTOR).unwrap();
        match self.random.below(100) {
            0..=39 => {
                let (first, count) = self.place();
                // Requests in flight do not overlap: nobody could tell what they come to.
                if self
                    .in_flight
                    .iter()
                    .all(|write| first + count <= write.first || write.first + write.count <= first)
                {
                    self.begin_write(first, count);
                    if self.random.below(4) > 0 || self.in_flight.len() > 3 {
                        self.end_write(self.in_flight.len() - 1);
                    }
                }
            }
            40..=42 => {
                let block = self.random.below(BLOCKS);
                if self
                    .in_flight
                    .iter()
                    .all(|write| write.first / BLOCK != block)
                {
                    self.begin_write(block * BLOCK, BLOCK);
                    self.end_write(self.in_flight.len() - 1);
                }
            }
            43..=50 if !self.in_flight.is_empty() => {
                let number = self.random.below(self.in_flight.len() as u64) as usize;
                self.end_write(number);
            }
            51..=62 => {
                let block = self.random.below(BLOCKS);
                let count = 1 + self.random.below(2);
                let blocks = range(block * BLOCK, count * BLOCK);
                self.subject.disk.discard(blocks).unwrap();
                self.note(begin, block * BLOCK, count * BLOCK, true);
            }
            63..=66 => {
                let (first, count) = self.place();
                self.subject.disk.discard(range(first, count)).unwrap();
                self.note(begin, first, count, false);
            }
            67..=70 => {
                let (first, count) = self.place();
                if self
                    .in_flight
                    .iter()
                    .all(|write| write.first / BLOCK != first / BLOCK)
                {
                    let may_unmap = self.random.below(2) == 0;
                    let zeroed = self
                        .subject
                        .disk
                        .write_zeroes(range(first, count), may_unmap);
                    zeroed.unwrap();
                    self.note(begin, first, count, true);
                }
            }
            71..=74 => {
                let block = self.random.below(BLOCKS);
                if self
                    .in_flight
                    .iter()
                    .all(|write| write.first / BLOCK != block)
                {
                    let may_unmap = self.random.below(3) > 0;
                    let zeroed = self
                        .subject
                        .disk
                        .write_zeroes(range(block * BLOCK, BLOCK), may_unmap);
                    zeroed.unwrap();
                    self.note(begin, block * BLOCK, BLOCK, true);
                }
            }
            75..=93 => self.flush(),
            94..=95 if self.in_flight.is_empty() => {
                self.subject.disk.close().unwrap();
                self.history.flushes.push((begin, self.now()));
            }
            96..=97 if self.in_flight.is_empty() => {
                let options = CompactOptions {
                    find_zeros: self.random.below(2) == 0,
                };
                self.subject.disk.compact(options, &Unwatched).unwrap();
                self.history.flushes.push((begin, self.now()));
            }
            98 if self.in_flight.is_empty() => {
                let size = self.subject.disk.geometry().size + MIB;
                self.subject.disk.resize(size, false).unwrap();
                self.history.flushes.push((begin, self.now()));
            }
            _ => {}
        }
    }
}

/// What was recorded: the files at the beginning, what was done to each, and what should have come of it.
struct Recorded {
    start: Vec<Contents>,
    ops: Vec<Vec<(usize, Op)>>,
    end: usize,
    history: History,
    merging: bool,
}

/// The kinds of work, by their number in a seed.
fn record(seed: u64) -> Recorded {
    let mut random = Random::new(seed);
    let options = CreateOptions {
        block_size: 1 << 20,
        logical_sector: if random.below(2) == 0 {
            SectorSize::B512
        } else {
            SectorSize::B4096
        },
        ..CreateOptions::new((BLOCKS + 2) * MIB)
    };
    let mut initial = BTreeMap::new();
    let (start, merging) = if seed.is_multiple_of(2) {
        (vec![created(&options)], false)
    } else {
        let mut sectors = Vec::new();
        for block in (0..BLOCKS).filter(|block| block % 4 != 0) {
            for sector in PLACES.map(|place| block * BLOCK + place) {
                let value = 0xF000_0000 | sector as u32;
                sectors.push((sector, 1, value));
                initial.insert(sector, value);
            }
        }
        let (parent, child) = family(&options, &sectors);
        (vec![parent, child], seed % 4 == 3)
    };
    let clock = Clock::default();
    let mut subject = Subject::open(&start, &clock, OpenMode::ReadWrite, merging);
    subject.disk.punch_holes = random.below(4) > 0;
    let mut work = Work {
        subject,
        random,
        history: History {
            initial,
            ..History::default()
        },
        in_flight: Vec::new(),
        step: 0,
    };
    for _ in 0..70 {
        work.step();
    }
    while !work.in_flight.is_empty() {
        work.end_write(0);
    }
    if merging {
        // The disk does not change, in the child, while that is merged and afterwards.
        work.flush();
        work.subject.disk.merge_into_parent(&Unwatched).unwrap();
        work.subject.disk.accept_parent().unwrap();
    }
    work.flush();
    let Work {
        subject, history, ..
    } = work;
    let Subject { files, disk } = subject;
    drop(disk);
    Recorded {
        start,
        ops: files.iter().map(|file| file.timed_ops()).collect(),
        end: files[0].count(),
        history,
        merging,
    }
}

/// What a power cut leaves of operations that no sync has followed: some of them, and of those some sectors, in another
/// order.
fn torn(ops: &[Op], random: &mut Random) -> Vec<Op> {
    // Most cuts keep most or little; the interesting ones lie at both ends.
    let keep = [50, 50, 90, 10][random.below(4) as usize];
    let mut kept = Vec::new();
    for op in ops {
        match op {
            Op::Write { offset, bytes } => {
                let whole = random.below(3) == 0;
                let all = random.below(100) < keep;
                for (piece, at) in bytes
                    .chunks(TORN as usize)
                    .zip((*offset..).step_by(TORN as usize))
                {
                    if if whole { all } else { random.below(100) < keep } {
                        kept.push(Op::Write {
                            offset: at,
                            bytes: piece.to_vec(),
                        });
                    }
                }
            }
            Op::Zero { .. } | Op::SetLen(_) if random.below(100) < keep => kept.push(op.clone()),
            Op::Zero { .. } | Op::SetLen(_) | Op::Sync => {}
        }
    }
    kept
}

impl Recorded {
    /// Checks a disk that was cut, and goes on with it.
    fn check(&self, contents: &[Contents], cut: usize, context: &str) {
        let flushed = self.history.flushed_before(cut);
        let look = |subject: &Subject, when: &str| {
            for block in 0..BLOCKS {
                for sector in PLACES.map(|place| block * BLOCK + place) {
                    for found in subject.read(sector) {
                        assert!(
                            self.history.allows(sector, found, flushed, cut),
                            "{context}, {when}: sector {sector} holds {found:#x}; from {flushed}: {:x?}",
                            self.history.sectors.get(&sector)
                        );
                    }
                }
            }
        };
        let clock = Clock::default();
        let subject = Subject::open(contents, &clock, OpenMode::ReadOnly, false);
        look(&subject, "read only");
        assert_eq!(clock.load(std::sync::atomic::Ordering::SeqCst), 0);
        drop(subject);
        let subject = Subject::open(contents, &clock, OpenMode::ReadWrite, self.merging);
        look(&subject, "replayed");
        // What is free is used by a block that nothing was written to, and shows nothing of others.
        let fresh = BLOCKS * BLOCK + 50;
        let written = super::write(&subject.disk, subject.top(), fresh, 1, u32::MAX);
        written.unwrap();
        assert_eq!(subject.value(fresh + 1), 0, "{context}: stale data");
        subject.disk.flush().unwrap();
        look(&subject, "written");
        let after: Vec<_> = subject.files.iter().map(|file| file.contents()).collect();
        drop(subject);
        let subject = Subject::open(&after, &clock, OpenMode::ReadOnly, false);
        look(&subject, "killed again");
        assert_eq!(subject.value(fresh), u32::MAX, "{context}");
    }

    /// Cuts at every operation, in `variants` ways each; gives how many cuts that were.
    fn cut_everywhere(&self, seed: u64, variants: u64) -> u64 {
        let mut random = Random::new(seed ^ 0x5EED);
        // The files as they are durably, and how many of their operations that is.
        let mut durable: Vec<(usize, Contents)> =
            self.start.iter().map(|start| (0, start.clone())).collect();
        let mut cuts = 0;
        for cut in 0..=self.end {
            for (file, ops) in durable.iter_mut().zip(&self.ops) {
                // A sync that was over before the cut.
                let synced = ops
                    .iter()
                    .take_while(|(at, _)| *at < cut)
                    .enumerate()
                    .filter(|(_, (_, op))| matches!(op, Op::Sync))
                    .map(|(number, _)| number + 1)
                    .last();
                if let Some(synced) = synced
                    && synced > file.0
                {
                    for (_, op) in &ops[file.0..synced] {
                        file.1.apply(op);
                    }
                    file.0 = synced;
                }
            }
            for variant in 0..variants {
                let contents: Vec<Contents> = durable
                    .iter()
                    .zip(&self.ops)
                    .map(|((from, start), ops)| {
                        let mut contents = start.clone();
                        let since: Vec<Op> = ops[*from..]
                            .iter()
                            .take_while(|(at, _)| *at < cut)
                            .map(|(_, op)| op.clone())
                            .collect();
                        let kept = match variant {
                            // A kill: everything that was done is there.
                            0 => since,
                            _ => torn(&since, &mut random),
                        };
                        for op in &kept {
                            contents.apply(op);
                        }
                        contents
                    })
                    .collect();
                self.check(
                    &contents,
                    cut,
                    &format!(
                        "POWER_SEED={seed}, cut {cut} of {}, variant {variant}",
                        self.end
                    ),
                );
                cuts += 1;
            }
        }
        cuts
    }
}

fn asked(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| {
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name}={value} is no number"))
    })
}

#[test]
fn a_power_cut_at_any_operation_leaves_what_was_flushed_and_nothing_strange() {
    let (wanted, first) = (asked("POWER_CUTS", CUTS), asked("POWER_SEED", 1));
    let mut cuts = 0;
    let mut seed = first;
    while cuts < wanted {
        cuts += record(seed).cut_everywhere(seed, 4);
        seed += 1;
    }
    println!("{cuts} cuts, seeds {first} to {}", seed - 1);
    assert!(cuts >= wanted);
}
