//! One bit of one structure is wrong: the disk opens with what it held, or is refused; no panic, no write.

#![allow(clippy::unwrap_used, reason = "these are tests")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use storage::convert::{ConvertOptions, Target, convert};
use storage::foreign::{self, SourceOptions};
use storage::vhdx::{CreateOptions, Vhdx};
use storage::{ByteRange, Disk, OpenMode, Unwatched};
use support::{MIB, pattern, read, write};

/// Size of the disks here.
const SIZE: u64 = 64 * MIB;
const LOG: u64 = MIB;
const METADATA: u64 = 2 * MIB;
const BAT: u64 = 3 * MIB;
/// The parts of the file that hold anything but zeros and payload.
const PARTS: [(u64, usize); 4] = [
    (0, 320 << 10),
    (LOG, 32 << 10),
    (METADATA, 68 << 10),
    (BAT, 8 << 10),
];

struct Sample {
    path: PathBuf,
    file: File,
    structures: Vec<u8>,
}

impl Sample {
    /// A disk with two blocks; with `dirty` as a kill leaves it after a flush, log and all.
    fn new(folder: &Path, dirty: bool) -> Self {
        let path = folder.join("disk.vhdx");
        Vhdx::create(&path, &CreateOptions::new(SIZE)).unwrap();
        let disk = Vhdx::open(&path, &OpenMode::ReadWrite.into()).unwrap();
        write(&disk, 0, &pattern(1, 8192));
        disk.flush().unwrap();
        write(&disk, 10 * MIB, &pattern(2, 8192));
        disk.flush().unwrap();
        let path = if dirty {
            let killed = folder.join("killed.vhdx");
            support::copy(&path, &killed);
            killed
        } else {
            path
        };
        drop(disk);
        assert_eq!(support::log_guid(&path) != [0; 16], dirty);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let structures = structures(&file);
        Self {
            path,
            file,
            structures,
        }
    }

    fn flip(&self, offset: u64, bit: u8) {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, offset).unwrap();
        self.file
            .write_all_at(&[byte[0] ^ (1 << bit)], offset)
            .unwrap();
    }

    fn restore(&self) {
        let mut left = &self.structures[..];
        for (offset, len) in PARTS {
            let (part, rest) = left.split_at(len);
            self.file.write_all_at(part, offset).unwrap();
            left = rest;
        }
    }

    /// Flips every bit of the ranges, one at a time, and says what became of the disk.
    fn each_bit(
        &self,
        ranges: &[std::ops::Range<u64>],
        mut judge: impl FnMut(&str, Result<Vhdx, String>),
    ) {
        for offset in ranges.iter().cloned().flatten() {
            for bit in 0..8 {
                self.flip(offset, bit);
                let before = structures(&self.file);
                let opened = Vhdx::open(&self.path, &OpenMode::ReadOnly.into())
                    .map_err(|e| report::chain(&e).to_string());
                if let Err(printed) = &opened {
                    assert!(
                        !printed.contains('\n')
                            && printed.contains("disk.vhdx") | printed.contains("killed.vhdx"),
                        "{printed}"
                    );
                }
                judge(&format!("bit {bit} of byte {offset:#x}"), opened);
                assert!(structures(&self.file) == before, "reading writes nothing");
                if let Err(printed) = Vhdx::open(&self.path, &OpenMode::ReadWrite.into()) {
                    assert!(
                        structures(&self.file) == before,
                        "a refused file is left as it is: {printed}"
                    );
                }
                self.restore();
            }
        }
    }
}

fn structures(file: &File) -> Vec<u8> {
    let mut all = Vec::new();
    for (offset, len) in PARTS {
        let mut part = vec![0; len];
        file.read_exact_at(&mut part, offset).unwrap();
        all.extend(part);
    }
    all
}

fn assert_contents(disk: &Vhdx, context: &str) {
    assert_eq!(disk.geometry().size, SIZE, "{context}");
    assert!(read(disk, 0, 8192) == pattern(1, 8192), "{context}");
    assert!(read(disk, 10 * MIB, 8192) == pattern(2, 8192), "{context}");
    assert!(read(disk, 20 * MIB, 512) == [0; 512], "{context}");
}

#[test]
fn a_damaged_identifier_is_refused_and_the_creator_is_nobodys_business() {
    let folder = tempfile::tempdir().unwrap();
    let sample = Sample::new(folder.path(), false);
    sample.each_bit(&[0..4, 4..8], |context, opened| {
        assert!(
            opened
                .unwrap_err()
                .contains("file identifier at file offset 0x0"),
            "{context}"
        );
    });
    sample.each_bit(&[8..12, 500..520], |context, opened| {
        assert_contents(&opened.unwrap(), context);
    });
}

#[test]
fn one_damaged_header_or_region_table_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let sample = Sample::new(folder.path(), false);
    for copy in [64, 128, 192, 256_u64].map(|kib| kib << 10) {
        sample.each_bit(
            &[copy..copy + 80, copy + 4094..copy + 4096],
            |context, opened| {
                assert_contents(&opened.unwrap(), context);
            },
        );
    }
}

#[test]
fn one_damaged_header_does_not_lose_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let sample = Sample::new(folder.path(), true);
    for copy in [64 << 10, 128 << 10] {
        // Checksum, sequence number, and the log's identifier, length and place.
        sample.each_bit(
            &[
                copy + 4..copy + 10,
                copy + 48..copy + 52,
                copy + 70..copy + 76,
            ],
            |context, opened| {
                assert_contents(&opened.unwrap(), context);
            },
        );
    }
}

#[test]
fn a_damaged_region_table_is_repaired_by_the_first_write() {
    let folder = tempfile::tempdir().unwrap();
    let sample = Sample::new(folder.path(), false);
    for copy in [192 << 10, 256 << 10] {
        sample.flip(copy + 20, 3);
        let disk = Vhdx::open(&sample.path, &OpenMode::ReadWrite.into()).unwrap();
        assert_ne!(
            structures(&sample.file)[192 << 10..320 << 10],
            sample.structures[192 << 10..320 << 10]
        );
        write(&disk, 0, &pattern(1, 8192));
        drop(disk);
        assert_eq!(
            structures(&sample.file)[192 << 10..320 << 10],
            sample.structures[192 << 10..320 << 10]
        );
    }
}

#[test]
fn two_damaged_copies_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let sample = Sample::new(folder.path(), false);
    for (first, name) in [(64 << 10, "header pair"), (192 << 10, "region table")] {
        sample.flip(first + 20, 0);
        sample.flip(first + (64 << 10) + 20, 0);
        let refused = Vhdx::open(&sample.path, &OpenMode::ReadWrite.into()).unwrap_err();
        let printed = report::chain(&refused).to_string();
        assert!(
            printed.contains(&format!("{name} at file offset {first:#x} is corrupt")),
            "{printed}"
        );
        sample.restore();
    }
}

#[test]
fn damaged_metadata_is_refused_or_has_no_meaning() {
    let folder = tempfile::tempdir().unwrap();
    let sample = Sample::new(folder.path(), false);
    let (mut refused, mut same) = (0, 0);
    let items = METADATA + (64 << 10);
    sample.each_bit(
        &[METADATA..METADATA + 192, items..items + 40],
        |context, opened| match opened {
            Ok(disk) if disk.geometry().size == SIZE => {
                assert_contents(&disk, context);
                same += 1;
            }
            // The size has no checksum, so another size that the BAT has room for is believed.
            Ok(disk) => assert_eq!((disk.geometry().size ^ SIZE).count_ones(), 1, "{context}"),
            Err(_) => refused += 1,
        },
    );
    assert!(
        refused > 600 && same > 200,
        "{refused} refused, {same} without meaning"
    );
}

#[test]
fn a_damaged_bat_entry_harms_its_own_block_at_most() {
    let folder = tempfile::tempdir().unwrap();
    let sample = Sample::new(folder.path(), false);
    // Block 5, the second that is there.
    sample.each_bit(
        &[BAT + 5 * 8..BAT + 5 * 8 + 4, BAT + 5 * 8 + 4..BAT + 6 * 8],
        |context, opened| {
            if let Ok(disk) = opened {
                assert!(read(&disk, 0, 8192) == pattern(1, 8192), "{context}");
                let _ = disk.resolve_read(ByteRange::new(10 * MIB, 8192).unwrap(), &mut Vec::new());
            }
        },
    );
    // Blocks that are not there, and bytes past the table.
    sample.each_bit(
        &[
            BAT + 8..BAT + 16,
            BAT + 32 * 8..BAT + 33 * 8,
            BAT + 4096..BAT + 4104,
        ],
        |context, opened| {
            if let Ok(disk) = opened {
                assert_contents(&disk, context);
            }
        },
    );
}

#[test]
fn a_bat_entry_is_refused_by_number_where_it_leads_out_of_the_file_or_into_something_else() {
    let folder = tempfile::tempdir().unwrap();
    let sample = Sample::new(folder.path(), false);
    let entry = |mib: u64, state: u64| ((mib << 20) | state).to_le_bytes();
    let mut first = [0; 8];
    sample.file.read_exact_at(&mut first, BAT).unwrap();
    let first = u64::from_le_bytes(first) >> 20;
    for (bytes, expected) in [
        (entry(first, 6), "which something else has"),
        (entry(first + 1, 6), "which something else has"),
        (entry(2, 6), "which something else has"),
        (entry(1 << 30, 6), "expected the block inside the file"),
        (
            entry((1 << 44) - 1, 6),
            "expected the block inside the file",
        ),
        (entry(0, 6), "after the first MiB"),
        (entry(4, 4), "found 4"),
        (entry(4, 5), "found 5"),
        (entry(4, 7), "no partially present block"),
    ] {
        sample.file.write_all_at(&bytes, BAT + 9 * 8).unwrap();
        let refused = Vhdx::open(&sample.path, &OpenMode::ReadWrite.into()).unwrap_err();
        let printed = report::chain(&refused).to_string();
        assert!(
            printed.contains("BAT entry 9 at file offset 0x300048 is corrupt")
                && printed.contains(expected),
            "{printed}"
        );
    }
}

/// An entry that is damaged cannot be told from one that a cut tore, so the disk falls back to an earlier flush, and
/// never to anything else.
#[test]
fn a_damaged_log_leads_to_the_state_of_some_flush() {
    let folder = tempfile::tempdir().unwrap();
    let sample = Sample::new(folder.path(), true);
    // The entry of the start in sector 0, that of the first flush in 1 and 2, that of the second in 3 and 4.
    let sector = |n: u64| LOG + n * 4096;
    for (range, may_fall_back) in [
        (sector(0)..sector(0) + 64, false),
        (sector(1)..sector(1) + 100, false),
        (sector(2)..sector(2) + 16, false),
        (sector(3)..sector(3) + 100, true),
        (sector(5) - 8..sector(5), true),
        (sector(5)..sector(5) + 8, false),
    ] {
        let half = range.start.midpoint(range.end);
        sample.each_bit(&[range.start..half, half..range.end], |context, opened| {
            let disk = opened.unwrap();
            if may_fall_back && read(&disk, 10 * MIB, 8192) == [0; 8192] {
                assert!(read(&disk, 0, 8192) == pattern(1, 8192), "{context}");
            } else {
                assert_contents(&disk, context);
            }
        });
    }
    // Without any entry there is nothing that could be relied on.
    sample.file.write_all_at(&vec![0; 5 * 4096], LOG).unwrap();
    let refused = Vhdx::open(&sample.path, &OpenMode::ReadWrite.into()).unwrap_err();
    let printed = report::chain(&refused).to_string();
    assert!(
        printed.contains("log at file offset 0x100000 is corrupt: expected a valid sequence"),
        "{printed}"
    );
}

/// A disk of 64 MiB with blocks of 1 MiB, of which the first `blocks` hold a pattern of their own.
fn filled(path: &Path, blocks: u64) {
    let options = CreateOptions {
        block_size: MIB as u32,
        ..CreateOptions::new(SIZE)
    };
    Vhdx::create(path, &options).unwrap();
    let disk = Vhdx::open(path, &OpenMode::ReadWrite.into()).unwrap();
    for block in 0..blocks {
        write(&disk, block * MIB, &pattern(block, MIB as usize));
    }
}

/// The entry of a block, and its place in the file.
fn entry(file: &File, block: u64) -> u64 {
    let mut raw = [0; 8];
    file.read_exact_at(&mut raw, BAT + block * 8).unwrap();
    u64::from_le_bytes(raw)
}

fn set_entry(file: &File, block: u64, raw: u64) {
    file.write_all_at(&raw.to_le_bytes(), BAT + block * 8)
        .unwrap();
}

fn mib(first: u64, count: u64) -> ByteRange {
    ByteRange::new(first * MIB, count * MIB).unwrap()
}

/// A disk with eight blocks, three of which are lost in three ways; gives the place of each block in the file.
fn damaged(path: &Path) -> Vec<u64> {
    filled(path, 8);
    let file = File::options().read(true).write(true).open(path).unwrap();
    let places: Vec<_> = (0..8).map(|block| entry(&file, block)).collect();
    // Past the end, in a state that there is not, and in the place of another.
    set_entry(&file, 2, (900 * MIB) | 6);
    set_entry(&file, 3, places[3] | 5);
    set_entry(&file, 6, places[1]);
    places
}

#[test]
fn a_repair_names_what_is_lost_and_is_undone_by_its_backup() {
    let folder = tempfile::tempdir().unwrap();
    let (path, backup) = (folder.path().join("a.vhdx"), folder.path().join("backup"));
    let places = damaged(&path);
    let before = std::fs::read(&path).unwrap();
    let repaired = Vhdx::repair(&path, Some(&backup), &Unwatched).unwrap();
    assert_eq!(repaired.before.lost, [mib(2, 2), mib(6, 1)]);
    assert_eq!(repaired.backup.as_deref(), Some(&*backup));
    let disk = Vhdx::open(&path, &OpenMode::ReadOnly.into()).unwrap();
    for block in 0..8 {
        let expected = if [2, 3, 6].contains(&block) {
            vec![0; MIB as usize]
        } else {
            pattern(block, MIB as usize)
        };
        assert!(
            read(&disk, block * MIB, MIB as usize) == expected,
            "{block}"
        );
    }
    drop(disk);
    assert_eq!(Vhdx::undo_repair(&path, &backup).unwrap().entries, 3);
    let after = std::fs::read(&path).unwrap();
    assert_eq!(after.len(), before.len());
    assert!(
        after[BAT as usize..] == before[BAT as usize..],
        "table and payload are as they were"
    );
    assert!(Vhdx::undo_repair(&path, &backup).is_err(), "once");
    let checked = Vhdx::check(&path, &Unwatched).unwrap();
    assert_eq!(checked.lost, [mib(2, 2), mib(6, 1)]);

    // With what was missing put right by hand, all is there.
    let file = File::options().write(true).open(&path).unwrap();
    for block in [2, 3, 6] {
        set_entry(&file, block, places[block as usize]);
    }
    let disk = Vhdx::open(&path, &OpenMode::ReadOnly.into()).unwrap();
    for block in 0..8 {
        assert!(read(&disk, block * MIB, MIB as usize) == pattern(block, MIB as usize));
    }
}

#[test]
fn a_cut_file_gets_its_blocks_back_with_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let (path, backup) = (folder.path().join("a.vhdx"), folder.path().join("backup"));
    filled(&path, 8);
    let child = folder.path().join("child.vhdx");
    Vhdx::create_child(&child, &path, &storage::vhdx::ChildOptions::default()).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let cut = whole.len() as u64 - 2 * MIB - 4096;
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(cut).unwrap();
    let repaired = Vhdx::repair(&path, Some(&backup), &Unwatched).unwrap();
    assert_eq!(repaired.before.lost, [mib(5, 3)]);
    assert_eq!(file.metadata().unwrap().len(), cut);
    assert!(
        Vhdx::open(&child, &OpenMode::ReadOnly.into()).is_err(),
        "its parent has changed"
    );
    file.write_all_at(&whole[cut as usize..], cut).unwrap();
    Vhdx::undo_repair(&path, &backup).unwrap();
    assert!(Vhdx::check(&path, &Unwatched).unwrap().is_sound());
    let disk = Vhdx::open(&child, &OpenMode::ReadOnly.into()).unwrap();
    for block in 0..8 {
        assert!(read(&disk, block * MIB, MIB as usize) == pattern(block, MIB as usize));
    }
}

#[test]
fn a_repair_is_not_undone_once_the_disk_was_written_or_by_the_backup_of_another() {
    let folder = tempfile::tempdir().unwrap();
    let [path, backup, other, others] =
        ["a.vhdx", "a", "b.vhdx", "b"].map(|name| folder.path().join(name));
    damaged(&path);
    damaged(&other);
    Vhdx::repair(&path, Some(&backup), &Unwatched).unwrap();
    Vhdx::repair(&other, Some(&others), &Unwatched).unwrap();
    let refused = Vhdx::undo_repair(&path, &others).unwrap_err();
    let printed = report::chain(&refused).to_string();
    assert!(
        printed.contains("is not as the repair left it"),
        "{printed}"
    );
    let disk = Vhdx::open(&path, &OpenMode::ReadWrite.into()).unwrap();
    write(&disk, 0, &[1; 512]);
    drop(disk);
    assert!(Vhdx::undo_repair(&path, &backup).is_err());
    assert!(Vhdx::check(&path, &Unwatched).unwrap().is_sound());
    // A backup that is there is kept, and then the disk too.
    damaged(&folder.path().join("c.vhdx"));
    let third = folder.path().join("c.vhdx");
    let before = std::fs::read(&third).unwrap();
    assert!(Vhdx::repair(&third, Some(&backup), &Unwatched).is_err());
    assert!(std::fs::read(&third).unwrap() == before);
}

#[test]
fn a_salvage_reads_what_is_there_and_names_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let [path, raw, vhdx] = ["a.vhdx", "a.raw", "b.vhdx"].map(|name| folder.path().join(name));
    damaged(&path);
    // The last block is cut in its middle too.
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - MIB / 2)
        .unwrap();
    assert!(foreign::open(&path, &SourceOptions::default()).is_err());
    let target = Target::Vhdx {
        block_size: MIB as u32,
        logical_sector: None,
        fixed: false,
    };
    for (to, target) in [(&raw, Target::Raw), (&vhdx, target)] {
        let options = SourceOptions {
            damaged: true,
            ..SourceOptions::default()
        };
        let (_, mut source) = foreign::open(&path, &options).unwrap();
        let options = ConvertOptions {
            salvage: true,
            ..ConvertOptions::new(target)
        };
        let done = convert((&path, &mut *source), to, &options, &Unwatched).unwrap();
        assert_eq!(done.lost, [mib(2, 2), mib(6, 2)]);
        let disk = storage::open(to, &storage::OpenOptions::read_only()).unwrap();
        for block in 0..8 {
            let expected = if [2, 3, 6, 7].contains(&block) {
                vec![0; MIB as usize]
            } else {
                pattern(block, MIB as usize)
            };
            assert!(
                read(&*disk, block * MIB, MIB as usize) == expected,
                "{block}"
            );
        }
    }
}
