//! A cut at any operation leaves a file that opens and holds all that was flushed.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::memory::{Contents, Memory, Op};
use super::{SECTOR, created, opened, value, write};
use crate::disk::{ByteRange, Disk};
use crate::lock::OpenMode;
use crate::vhdx::format::MIB;
use crate::vhdx::{CreateOptions, Vhdx};

const BLOCK: u64 = MIB / SECTOR;
/// Past the first chunk of 4 GiB, so that bitmap entries count.
const BLOCKS: u64 = 5000;

/// A small generator, so that a failure names its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % bound
    }
}

/// What was written where, and when: times are counts of operations on the file.
#[derive(Default)]
struct History {
    /// For each sector the values, each with when its write began and ended.
    sectors: BTreeMap<u64, Vec<(usize, usize, u32)>>,
    /// When each flush began and ended.
    flushes: Vec<(usize, usize)>,
}

impl History {
    /// Checks a disk that was cut after `cut` operations.
    fn check(&self, disk: &Vhdx, memory: &Memory, cut: usize, context: &str) {
        let flushed = self
            .flushes
            .iter()
            .filter(|(_, end)| *end <= cut)
            .map(|(start, _)| *start)
            .max()
            .unwrap_or(0);
        for (sector, writes) in &self.sectors {
            let found = value(disk, memory, *sector).unwrap();
            let durable = writes
                .iter()
                .rev()
                .find(|(_, end, _)| *end <= flushed)
                .map_or(0, |(.., value)| *value);
            let possible = found == durable
                || writes
                    .iter()
                    .any(|(start, end, value)| *end > flushed && *start < cut && *value == found);
            assert!(
                possible,
                "{context}: sector {sector} holds {found}, and {durable} was flushed: {writes:?}"
            );
        }
    }
}

/// Writes, zeroes and flushes at random, closing now and then; gives what was recorded.
fn scenario(seed: u64, steps: u64) -> (Contents, Vec<Op>, History) {
    let mut random = Random(seed);
    let start = created(&CreateOptions {
        block_size: 1 << 20,
        ..CreateOptions::new(BLOCKS * MIB)
    });
    let memory = Memory::new(start.clone());
    let disk = opened(&memory, OpenMode::ReadWrite);
    let mut history = History::default();
    // A few blocks in several pages, so that blocks are written again and entries share pages.
    let homes: Vec<u64> = (0..24).map(|_| random.below(BLOCKS - 2)).collect();
    for step in 1..=steps {
        match random.below(20) {
            0..=11 => {
                let sector = homes[random.below(24) as usize] * BLOCK + BLOCK - 1 - random.below(3);
                let count = 1 + random.below(4);
                let begin = memory.count();
                write(&disk, &memory, sector, count, step as u32).unwrap();
                let end = memory.count();
                for sector in sector..sector + count {
                    history
                        .sectors
                        .entry(sector)
                        .or_default()
                        .push((begin, end, step as u32));
                }
            }
            12 => {
                let sector = homes[random.below(24) as usize] * BLOCK + BLOCK - 2;
                let begin = memory.count();
                let range = ByteRange::new(sector * SECTOR, 2 * SECTOR).unwrap();
                disk.write_zeroes(range, random.below(2) == 0).unwrap();
                let end = memory.count();
                for sector in sector..sector + 2 {
                    history
                        .sectors
                        .entry(sector)
                        .or_default()
                        .push((begin, end, 0));
                }
            }
            13..=18 => {
                let begin = memory.count();
                if disk.flush_by_sync().is_some() {
                    crate::medium::Medium::sync_data(&memory).unwrap();
                } else {
                    disk.flush().unwrap();
                }
                history.flushes.push((begin, memory.count()));
            }
            _ => {
                let begin = memory.count();
                disk.close().unwrap();
                history.flushes.push((begin, memory.count()));
            }
        }
    }
    drop(disk);
    (start, memory.ops(), history)
}

/// Opens a file that was cut in both ways, and lets it be used further.
fn check_cut(contents: &Contents, history: &History, cut: usize, context: &str) {
    let memory = Memory::new(contents.clone());
    let disk = opened(&memory, OpenMode::ReadOnly);
    history.check(&disk, &memory, cut, context);
    drop(disk);
    assert_eq!(
        &memory.contents(),
        contents,
        "{context}: reading writes nothing"
    );

    let disk = opened(&memory, OpenMode::ReadWrite);
    history.check(&disk, &memory, cut, context);
    write(&disk, &memory, 77 * BLOCK, 1, u32::MAX).unwrap();
    disk.flush().unwrap();
    history.check(&disk, &memory, cut, context);
    drop(disk);
    let disk = opened(&memory, OpenMode::ReadOnly);
    history.check(&disk, &memory, cut, context);
    assert_eq!(
        value(&disk, &memory, 77 * BLOCK).unwrap(),
        u32::MAX,
        "{context}"
    );
}

#[test]
fn a_cut_during_replay_is_recovered_by_the_next_replay() {
    let (start, ops, history) = scenario(5, 60);
    let mut contents = start;
    for (done, op) in ops.iter().enumerate() {
        contents.apply(op);
        if !matches!(op, Op::Sync) {
            continue;
        }
        let memory = Memory::new(contents.clone());
        // Opening alone, without the close that a drop is.
        let disk = opened(&memory, OpenMode::ReadWrite);
        let replay = memory.ops();
        drop(disk);
        let mut recovering = contents.clone();
        for (step, op) in replay.iter().enumerate() {
            check_cut(
                &recovering,
                &history,
                done + 1,
                &format!("cut at {done}, then in replay at {step}"),
            );
            recovering.apply(op);
        }
    }
}

#[test]
fn the_log_turns_many_times_and_still_replays() {
    let start = created(&CreateOptions {
        block_size: 1 << 20,
        ..CreateOptions::new(BLOCKS * MIB)
    });
    let memory = Memory::new(start);
    let disk = opened(&memory, OpenMode::ReadWrite);
    // Two pages a flush, three sectors an entry: 400 flushes are more than four turns of 256 sectors.
    for n in 0..400 {
        write(&disk, &memory, (2 * n) % 500 * BLOCK, 1, n as u32 + 1).unwrap();
        write(&disk, &memory, (600 + n) * BLOCK, 1, n as u32 + 1).unwrap();
        disk.flush().unwrap();
    }
    let cut = Memory::new(memory.contents());
    let found = opened(&cut, OpenMode::ReadOnly);
    for n in 0..400 {
        assert_eq!(
            value(&found, &cut, (600 + n) * BLOCK).unwrap(),
            n as u32 + 1
        );
    }
    drop((disk, found));
    assert!(
        Arc::strong_count(&memory) == 1,
        "a dropped disk lets its file go"
    );
}
