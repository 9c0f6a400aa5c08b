//! Files that are rearranged, and chains that change, while they are used.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::SECTOR;
use super::files::{get, open, put, small};
use crate::disk::{ByteRange, Disk, DiskError, ExtentState, SectorSize};
use crate::options::OpenOptions;
use crate::progress::{Progress, Unwatched};
use crate::vhdx::format::MIB;
use crate::vhdx::{self, ChildOptions, CompactOptions, CreateOptions, Vhdx};

const BLOCK: u64 = MIB / SECTOR;

fn len(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

fn range(block: u64, count: u64) -> ByteRange {
    ByteRange::new(block * MIB, count * MIB).unwrap()
}

/// Cancels after a number of reports of progress.
struct Until(AtomicU64);

impl Progress for Until {
    fn advance(&self, _: u64, _: u64) {
        let _ = self
            .0
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                left.checked_sub(1)
            });
    }
    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }
}

#[test]
fn compaction_moves_blocks_down_and_cuts_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    Vhdx::create(&path, &small()).unwrap();
    let empty = len(&path);
    let disk = open(&path, false);
    for block in 0..40 {
        put(&disk, block * BLOCK, BLOCK, block as u32 + 1);
    }
    for block in (0..40).filter(|block| block % 4 != 0) {
        disk.discard(range(block, 1)).unwrap();
    }
    // A block of zeros, and one that only looks like it.
    put(&disk, 50 * BLOCK, BLOCK, 0);
    put(&disk, 51 * BLOCK, BLOCK, 0);
    put(&disk, 51 * BLOCK + 100, 1, 9);
    disk.close().unwrap();
    let before = disk.identifiers();
    let done = disk
        .compact(CompactOptions { find_zeros: true }, &Unwatched)
        .unwrap();
    assert_eq!((done.zeros, done.after), (1, len(&path)));
    assert_eq!(len(&path), empty + 11 * MIB);
    let after = disk.identifiers();
    assert_eq!(before.data_write_guid, after.data_write_guid);
    assert_ne!(before.file_write_guid, after.file_write_guid);
    for disk in [&disk, &open_after(&folder, &path)] {
        for block in 0..40 {
            let expected = if block % 4 == 0 { block as u32 + 1 } else { 0 };
            assert_eq!(get(disk, block * BLOCK + 7), expected, "block {block}");
        }
        assert_eq!((get(disk, 50 * BLOCK), get(disk, 51 * BLOCK + 100)), (0, 9));
    }
}

/// A copy of an open file, opened.
fn open_after(folder: &tempfile::TempDir, path: &Path) -> Vhdx {
    let copy = folder.path().join("copy");
    std::fs::copy(path, &copy).unwrap();
    open(&copy, true)
}

#[test]
fn a_child_with_bitmaps_is_compacted() {
    let folder = tempfile::tempdir().unwrap();
    let (base, child) = (folder.path().join("base"), folder.path().join("child"));
    Vhdx::create(&base, &small()).unwrap();
    let disk = open(&base, false);
    for block in 0..64 {
        put(&disk, block * BLOCK, BLOCK, 7);
    }
    drop(disk);
    Vhdx::create_child(&child, &base, &ChildOptions::default()).unwrap();
    let empty = len(&child);
    let disk = open(&child, false);
    // Whole blocks come first, so that the bitmap lies behind them.
    for block in 0..20 {
        put(&disk, block * BLOCK, BLOCK, block as u32 + 100);
    }
    for block in 20..40 {
        put(&disk, block * BLOCK + 3, 2, block as u32 + 100);
    }
    disk.discard(range(0, 18)).unwrap();
    disk.compact(CompactOptions::default(), &Unwatched).unwrap();
    assert_eq!(len(&child), empty + 23 * MIB);
    drop(disk);
    let disk = open(&child, true);
    for block in 0..64 {
        let expected = match block {
            0..18 => (0, 0),
            18..20 => (block as u32 + 100, block as u32 + 100),
            20..40 => (block as u32 + 100, 7),
            _ => (7, 7),
        };
        let found = (get(&disk, block * BLOCK + 4), get(&disk, block * BLOCK + 5));
        assert_eq!(found, expected, "block {block}");
    }
}

#[test]
fn compaction_that_is_cancelled_anywhere_leaves_a_sound_disk() {
    for steps in [0, 1, 3, 8] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        Vhdx::create(&path, &small()).unwrap();
        let disk = open(&path, false);
        for block in 0..20 {
            put(&disk, block * BLOCK, 2, block as u32 + 1);
        }
        disk.discard(range(0, 10)).unwrap();
        let stopped = disk.compact(CompactOptions::default(), &Until(AtomicU64::new(steps)));
        assert!(matches!(stopped, Err(DiskError::Cancelled)), "{stopped:?}");
        drop(disk);
        let disk = open(&path, false);
        for block in 10..20 {
            assert_eq!(get(&disk, block * BLOCK), block as u32 + 1);
        }
    }
}

#[test]
fn a_disk_is_compacted_while_others_write_and_trim() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    Vhdx::create(&path, &small()).unwrap();
    let disk = Arc::new(open(&path, false));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..3_u64)
            .map(|worker| {
                let (disk, stop) = (Arc::clone(&disk), &stop);
                scope.spawn(move || {
                    let mut model = [0; 21];
                    let mut n = worker + 1;
                    while !stop.load(Ordering::Relaxed) {
                        n = n * 48271 % 0x7fff_ffff;
                        let own = n % 21;
                        let block = own * 3 + worker;
                        if n % 5 == 0 {
                            disk.discard(range(block, 1)).unwrap();
                            model[own as usize] = 0;
                        } else {
                            put(&disk, block * BLOCK, BLOCK, n as u32);
                            model[own as usize] = n as u32;
                        }
                        if n % 7 == 0 {
                            disk.flush().unwrap();
                        }
                        let looked = n / 7 % 21;
                        let found = get(&disk, (looked * 3 + worker) * BLOCK + 5);
                        assert_eq!(found, model[looked as usize]);
                    }
                    (worker, model)
                })
            })
            .collect();
        for _ in 0..6 {
            disk.compact(CompactOptions { find_zeros: true }, &Unwatched)
                .unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            let (worker, model) = worker.join().unwrap();
            for (own, expected) in model.into_iter().enumerate() {
                let block = own as u64 * 3 + worker;
                assert_eq!(get(&disk, block * BLOCK + 9), expected);
            }
        }
    });
}

#[test]
fn a_user_with_requests_in_flight_may_begin_another() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    Vhdx::create(&path, &small()).unwrap();
    let disk = open(&path, false);
    for block in 0..6 {
        put(&disk, block * BLOCK, 2, 1);
    }
    disk.discard(range(0, 3)).unwrap();
    disk.flush().unwrap();
    std::thread::scope(|scope| {
        let compaction =
            scope.spawn(|| disk.compact(CompactOptions::default(), &Unwatched).unwrap());
        // One request is always in flight when the next begins, as on a device with a queue.
        let mut before = None;
        while !compaction.is_finished() {
            for block in 3..6 {
                let mut out = Vec::new();
                let range = ByteRange::new(block * MIB, SECTOR).unwrap();
                let next = disk.resolve_write(range, &mut out).unwrap();
                if let Some(id) = before.replace(next) {
                    disk.finish(id, true);
                }
            }
        }
        if let Some(id) = before {
            disk.finish(id, true);
        }
        compaction.join().unwrap();
    });
}

#[test]
fn space_of_trimmed_blocks_is_used_again_before_the_file_grows_also_after_an_open() {
    for punch_holes in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        Vhdx::create(&path, &small()).unwrap();
        let options = OpenOptions {
            punch_holes,
            ..OpenOptions::default()
        };
        let disk = Vhdx::open(&path, &options).unwrap();
        for block in 0..30 {
            put(&disk, block * BLOCK, BLOCK, 1);
        }
        disk.write_zeroes(range(10, 10), true).unwrap();
        disk.discard(range(0, 10)).unwrap();
        disk.close().unwrap();
        let full = len(&path);
        for block in 30..39 {
            put(&disk, block * BLOCK, BLOCK, 2);
            // Nothing of what was there shows.
            put(&disk, block * BLOCK + 3, 1, 3);
        }
        disk.close().unwrap();
        assert_eq!(len(&path), full, "in the same open");
        drop(disk);
        let disk = Vhdx::open(&path, &options).unwrap();
        for block in 40..50 {
            put(&disk, block * BLOCK + 3, 1, 4);
            assert_eq!(get(&disk, block * BLOCK + 9), 0, "stale data");
        }
        disk.close().unwrap();
        assert!(
            len(&path) <= full,
            "after another open: {} {full}",
            len(&path)
        );
        for block in 20..30 {
            assert_eq!(get(&disk, block * BLOCK), 1);
        }
    }
}

#[test]
fn a_trim_gives_space_back_to_the_host() {
    use std::os::unix::fs::MetadataExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    Vhdx::create(&path, &small()).unwrap();
    let disk = open(&path, false);
    put(&disk, 0, 30 * BLOCK, 1);
    disk.flush().unwrap();
    let blocks = || std::fs::metadata(&path).unwrap().blocks() * 512;
    let full = blocks();
    disk.discard(range(0, 29)).unwrap();
    disk.flush().unwrap();
    assert!(blocks() + 28 * MIB < full, "{} of {full}", blocks());
}

#[test]
fn a_block_that_was_trimmed_takes_its_own_space_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    Vhdx::create(&path, &small()).unwrap();
    let disk = open(&path, false);
    put(&disk, 0, 3 * BLOCK, 1);
    let place = |disk: &Vhdx| {
        let mut map = Vec::new();
        disk.map(range(1, 1), &mut map).unwrap();
        map[0].file_offset
    };
    let before = place(&disk);
    disk.discard(range(1, 1)).unwrap();
    disk.flush().unwrap();
    disk.flush().unwrap();
    assert_eq!(place(&disk), None);
    put(&disk, BLOCK, 1, 2);
    assert_eq!(place(&disk), before);
    assert_eq!((get(&disk, BLOCK), get(&disk, BLOCK + 1)), (2, 0));
}

#[test]
fn a_disk_grows_while_it_is_used_and_its_table_moves_where_it_is_too_short() {
    let folder = tempfile::tempdir().unwrap();
    for (number, (sector, parent)) in [
        (SectorSize::B512, false),
        (SectorSize::B4096, false),
        (SectorSize::B512, true),
    ]
    .into_iter()
    .enumerate()
    {
        let base = folder.path().join(format!("base{number}"));
        let options = CreateOptions {
            logical_sector: sector,
            size: 64 * MIB + 8 * SECTOR,
            ..small()
        };
        Vhdx::create(&base, &options).unwrap();
        let path = if parent {
            let disk = open(&base, false);
            put(&disk, 0, 64 * BLOCK + 8, 5);
            drop(disk);
            let path = folder.path().join("child");
            Vhdx::create_child(&path, &base, &ChildOptions::default()).unwrap();
            path
        } else {
            base
        };
        let below = if parent { 5 } else { 0 };
        let disk = open(&path, false);
        put(&disk, 0, 3, 1);
        put(&disk, 64 * BLOCK + 3, 5, 2);
        // What is known of the last block now is not all that it is later.
        assert_eq!(get(&disk, 64 * BLOCK), below);
        // 1 MiB of table is good for 128 GiB.
        for (step, size) in [(0, 100 << 30), (1, 300 << 30), (2, 2 << 40)] {
            disk.resize(size, false).unwrap();
            assert_eq!(disk.geometry().size, size);
            let last = size / SECTOR - 1;
            put(&disk, last, 1, 10 + step);
            for sector in [64 * BLOCK + 8, 64 * BLOCK + 20, 65 * BLOCK, last - 5] {
                assert_eq!(get(&disk, sector), 0, "what is new reads as zeros");
            }
        }
        assert!(matches!(
            disk.resize(100 << 30, false),
            Err(DiskError::Size { .. })
        ));
        drop(disk);
        let disk = open(&path, false);
        assert_eq!(disk.geometry().size, 2 << 40);
        let values = [0, 2, 3, 64 * BLOCK + 4, 64 * BLOCK].map(|sector| get(&disk, sector));
        assert_eq!(values, [1, 1, below, 2, below]);
        for (step, size) in [(0, 100 << 30), (1, 300 << 30), (2, 2_u64 << 40)] {
            assert_eq!(get(&disk, size / SECTOR - 1), 10 + step);
        }
        // Shrunk, and grown again: what was cut off is gone.
        disk.resize(64 * MIB + 8 * SECTOR, true).unwrap();
        disk.resize(300 << 30, false).unwrap();
        assert_eq!(get(&disk, (100 << 30) / SECTOR - 1), 0);
        assert_eq!(get(&disk, 64 * BLOCK + 4), 2);
        drop(disk);
        open(&path, true);
    }
}

#[test]
fn a_fixed_disk_grows_with_its_space() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let options = CreateOptions {
        fixed: true,
        ..small()
    };
    Vhdx::create(&path, &options).unwrap();
    let disk = open(&path, false);
    disk.resize(96 * MIB, false).unwrap();
    let mut map = Vec::new();
    disk.map(range(0, 96), &mut map).unwrap();
    assert!(
        map.iter()
            .all(|mapping| mapping.state == ExtentState::Mapped)
    );
    drop(disk);
    assert!(len(&path) >= 96 * MIB);
    open(&path, true);
}

/// A parent with blocks of 2 MiB, and a child with blocks of 1 MiB that says something else here and there; gives what
/// the child reads.
fn family(folder: &Path) -> Vec<u32> {
    let (base, child) = (folder.join("base"), folder.join("child"));
    let options = CreateOptions {
        block_size: 2 << 20,
        ..small()
    };
    Vhdx::create(&base, &options).unwrap();
    let disk = open(&base, false);
    put(&disk, 0, 30 * BLOCK, 7);
    drop(disk);
    let options = ChildOptions {
        block_size: Some(1 << 20),
        ..ChildOptions::default()
    };
    Vhdx::create_child(&child, &base, &options).unwrap();
    let disk = open(&child, false);
    put(&disk, 0, BLOCK, 1);
    put(&disk, 3 * BLOCK + 5, 9, 2);
    disk.discard(range(5, 1)).unwrap();
    disk.write_zeroes(range(8, 3), true).unwrap();
    put(&disk, 50 * BLOCK + 1, 2, 3);
    put(&disk, 63 * BLOCK, BLOCK, 4);
    (0..64 * BLOCK).map(|sector| get(&disk, sector)).collect()
}

#[test]
fn a_committed_child_leaves_the_parent_as_the_child_was() {
    let folder = tempfile::tempdir().unwrap();
    let expected = family(folder.path());
    let (base, child) = (folder.path().join("base"), folder.path().join("child"));
    let options = OpenOptions::default();
    // Stopped on the way the child is what it was, and the merge is begun anew.
    for steps in [1, 4] {
        let stopped = Vhdx::commit(&child, &options, &Until(AtomicU64::new(steps)));
        assert!(stopped.is_err());
        let disk = open(&child, true);
        for (sector, expected) in (0..).zip(&expected) {
            assert_eq!(get(&disk, sector), *expected, "sector {sector}");
        }
    }
    let merged = Vhdx::commit(&child, &options, &Unwatched).unwrap();
    assert!(
        merged.copied >= 2 * MIB && merged.cleared == 4 * MIB,
        "{merged:?}"
    );
    for path in [&base, &child] {
        let disk = open(path, true);
        for (sector, expected) in (0..).zip(&expected) {
            assert_eq!(get(&disk, sector), *expected, "sector {sector}");
        }
    }
}

#[test]
fn a_snapshot_of_a_disk_in_use_goes_on_in_a_new_file_and_tells_what_changed() {
    let folder = tempfile::tempdir().unwrap();
    let name = |file: &str| folder.path().join(file);
    Vhdx::create(name("a"), &small()).unwrap();
    let a = Arc::new(open(&name("a"), false));
    put(&a, 0, 4, 1);
    let in_flight = a
        .resolve_write(ByteRange::new(0, SECTOR).unwrap(), &mut Vec::new())
        .unwrap();
    let b = std::thread::scope(|scope| {
        let snapshot = scope.spawn(|| a.snapshot(&name("a"), &name("b")));
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!snapshot.is_finished(), "requests in flight are waited for");
        a.finish(in_flight, true);
        snapshot.join().unwrap().unwrap()
    });
    assert!(matches!(
        a.resolve_write(ByteRange::new(0, SECTOR).unwrap(), &mut Vec::new()),
        Err(DiskError::ReadOnly)
    ));
    let then = a.identifiers();
    assert_eq!(then.virtual_disk_id, b.identifiers().virtual_disk_id);
    put(&b, 1, 1, 2);
    b.discard(range(40, 2)).unwrap();
    assert_eq!([0, 1, 2].map(|sector| get(&b, sector)), [1, 2, 1]);
    let changed = b.changed_since(then.data_write_guid).unwrap();
    let changed: Vec<_> = changed
        .iter()
        .map(|mapping| (mapping.offset / SECTOR, mapping.len / SECTOR))
        .collect();
    assert_eq!(changed, [(1, 1), (40 * BLOCK, 2 * BLOCK)]);
    assert!(
        b.changed_since(b.identifiers().data_write_guid)
            .unwrap()
            .is_empty()
    );
    let c = b.snapshot(&name("b"), &name("c")).unwrap();
    put(&c, 2, 1, 3);
    assert_eq!(c.changed_since(then.data_write_guid).unwrap().len(), 3);
    let unknown = vhdx::Guid::random();
    assert!(c.changed_since(unknown).is_err());
    // Others may read what is now a parent, and not write it.
    open(&name("a"), true);
    assert!(Vhdx::open(name("b"), &OpenOptions::default()).is_err());
    drop((a, b, c));
    let disk = open(&name("c"), true);
    assert_eq!([0, 1, 2].map(|sector| get(&disk, sector)), [1, 2, 3]);
}

#[test]
fn a_snapshot_that_cannot_be_made_leaves_the_disk_in_use() {
    let folder = tempfile::tempdir().unwrap();
    let name = |file: &str| folder.path().join(file);
    Vhdx::create(name("a"), &small()).unwrap();
    let a = Arc::new(open(&name("a"), false));
    put(&a, 0, 1, 1);
    for child in ["a", "none/b"] {
        assert!(a.snapshot(&name("a"), &name(child)).is_err());
        put(&a, 1, 1, 2);
    }
    assert_eq!((get(&a, 0), get(&a, 1)), (1, 2));
    drop(a);
    open(&name("a"), false);
}

#[test]
fn a_disk_in_use_is_committed_into_its_parent() {
    let folder = tempfile::tempdir().unwrap();
    let mut expected = family(folder.path());
    let name = |file: &str| folder.path().join(file);
    let check = |disk: &Vhdx, expected: &[u32], when: &str| {
        for (sector, expected) in (0..).zip(expected) {
            assert_eq!(get(disk, sector), *expected, "{when}: sector {sector}");
        }
    };
    let top = Arc::new(open(&name("child"), false));
    put(&top, 20 * BLOCK, 1, 11);
    expected[20 * BLOCK as usize] = 11;
    let new = top.snapshot(&name("child"), &name("new")).unwrap();
    put(&new, 21 * BLOCK, 1, 12);
    expected[21 * BLOCK as usize] = 12;
    // While another process reads the bottom, nothing happens.
    let reader = open(&name("base"), true);
    assert!(new.open_for_commit().is_err());
    put(&new, 22 * BLOCK, 1, 13);
    expected[22 * BLOCK as usize] = 13;
    drop(reader);
    let new = {
        let opened = new.open_for_commit().unwrap();
        drop((new, top));
        opened
    };
    let middle = Arc::clone(new.parent().unwrap());
    assert!(middle.merge_into_parent(&Until(AtomicU64::new(2))).is_err());
    check(&new, &expected, "cancelled");
    std::thread::scope(|scope| {
        let merge = scope.spawn(|| middle.merge_into_parent(&Unwatched));
        put(&new, 23 * BLOCK, 1, 14);
        put(&new, 3 * BLOCK + 6, 1, 15);
        new.flush().unwrap();
        merge.join().unwrap().unwrap();
    });
    expected[23 * BLOCK as usize] = 14;
    expected[3 * BLOCK as usize + 6] = 15;
    check(&new, &expected, "merged");
    let bottom = new.finish_commit(&name("new"), &name("base")).unwrap();
    drop((new, middle));
    check(&bottom, &expected, "at the end");
    put(&bottom, 24 * BLOCK, 1, 16);
    drop(bottom);
    std::fs::remove_file(name("child")).unwrap();
    std::fs::remove_file(name("new")).unwrap();
    assert_eq!(get(&open(&name("base"), false), 24 * BLOCK), 16);
}

#[test]
fn a_child_is_given_another_place_of_its_parent_and_another_parent_only_by_force() {
    let folder = tempfile::tempdir().unwrap();
    let expected = family(folder.path());
    let name = |file: &str| folder.path().join(file);
    let options = OpenOptions::default();
    std::fs::rename(name("base"), name("moved")).unwrap();
    assert!(Vhdx::open(name("child"), &options).is_err());
    Vhdx::rebase(&name("child"), &name("moved"), false, &options).unwrap();
    assert_eq!(
        get(&open(&name("child"), true), 3 * BLOCK),
        expected[3 * BLOCK as usize]
    );
    // A deep name makes the locator longer than it was.
    let deep = folder.path().join("d".repeat(200)).join("e".repeat(200));
    std::fs::create_dir_all(&deep).unwrap();
    std::fs::rename(name("moved"), deep.join("base")).unwrap();
    Vhdx::rebase(&name("child"), &deep.join("base"), false, &options).unwrap();
    let disk = open(&deep.join("base"), false);
    put(&disk, 3 * BLOCK, 1, 99);
    drop(disk);
    let refused = Vhdx::rebase(&name("child"), &deep.join("base"), false, &options);
    let said = report::chain(&refused.unwrap_err()).to_string();
    assert!(said.contains("has changed"), "{said}");
    let before = open_identifiers(&name("child"));
    Vhdx::rebase(&name("child"), &deep.join("base"), true, &options).unwrap();
    let child = open(&name("child"), true);
    assert_eq!(get(&child, 3 * BLOCK), 99);
    assert_eq!(before, child.identifiers().data_write_guid);
}

#[test]
fn a_copy_of_a_child_names_another_place_of_its_parent_and_keeps_its_identifiers() {
    let folder = tempfile::tempdir().unwrap();
    let expected = family(folder.path());
    let root = folder.path().canonicalize().unwrap();
    // A name that is longer than the first one, for a parent that is not there yet.
    let other = root.join("f".repeat(100));
    std::fs::create_dir(&other).unwrap();
    let (child, base) = (other.join("child"), other.join("base"));
    std::fs::copy(root.join("child"), &child).unwrap();
    let before = open(&root.join("child"), true).identifiers();
    let move_parent = |path: &Path| {
        let file = std::fs::File::options().read(true).write(true).open(path);
        vhdx::move_parent(file.unwrap(), &other, &base)
    };
    let named = move_parent(&child).unwrap().unwrap();
    assert_eq!(named.candidates(&root), [root.join("base")]);
    std::fs::rename(root.join("base"), &base).unwrap();
    let disk = open(&child, true);
    assert_eq!(get(&disk, 3 * BLOCK), expected[3 * BLOCK as usize]);
    let after = disk.identifiers();
    assert_eq!(after.data_write_guid, before.data_write_guid);
    assert_eq!(after.virtual_disk_id, before.virtual_disk_id);
    let locator = disk.locator().unwrap();
    assert_eq!(locator.linkage, named.linkage);
    assert_eq!(locator.candidates(&other), std::slice::from_ref(&base));
    drop(disk);
    // A disk without a parent gets none.
    let whole = std::fs::read(&base).unwrap();
    assert_eq!(move_parent(&base).unwrap(), None);
    assert!(std::fs::read(&base).unwrap() == whole);
    // Nobody else may have it open.
    let _reader = open(&child, true);
    assert!(move_parent(&child).is_err());
}

fn open_identifiers(path: &Path) -> vhdx::Guid {
    let options = OpenOptions {
        ignore_changed_parents: true,
        ..OpenOptions::read_only()
    };
    Vhdx::open(path, &options)
        .unwrap()
        .identifiers()
        .data_write_guid
}
