//! Chains of files on disk: what is recorded, what is checked, what is refused.

use std::path::Path;

use super::SECTOR;
use super::files::{get, open, put, small};
use crate::disk::{ByteRange, Disk, ExtentState, SectorSize};
use crate::options::{OpenOptions, Parents};
use crate::vhdx::format::MIB;
use crate::vhdx::{ChildOptions, CreateOptions, Vhdx};

const BLOCK: u64 = MIB / SECTOR;

fn refusal(path: &Path, options: &OpenOptions) -> String {
    report::chain(&Vhdx::open(path, options).unwrap_err()).to_string()
}

#[test]
fn a_chain_of_layers_with_blocks_of_every_size_reads_as_one_disk() {
    for sector in [SectorSize::B512, SectorSize::B4096] {
        let folder = tempfile::tempdir().unwrap();
        let name = |layer: u32| folder.path().join(format!("{layer}.vhdx"));
        let options = CreateOptions {
            logical_sector: sector,
            ..small()
        };
        Vhdx::create(name(0), &options).unwrap();
        let mut model = vec![0; 64 * BLOCK as usize];
        for layer in 0..10_u32 {
            if layer > 0 {
                let options = ChildOptions {
                    block_size: Some(1 << (20 + layer % 5)),
                    ..ChildOptions::default()
                };
                Vhdx::create_child(name(layer), name(layer - 1), &options).unwrap();
            }
            let disk = open(&name(layer), false);
            let step = u64::from(layer) * 7 + 3;
            for n in 0..40 {
                let sector = n * step * 13 % (64 * BLOCK - 3);
                let count = 1 + n % 3;
                put(&disk, sector, count, layer * 100 + n as u32 + 1);
                model[sector as usize..(sector + count) as usize].fill(layer * 100 + n as u32 + 1);
            }
            let trimmed = u64::from(layer) * 5;
            disk.discard(ByteRange::new(trimmed * MIB, MIB).unwrap())
                .unwrap();
            let whole = (trimmed * BLOCK) as usize..((trimmed + 1) * BLOCK) as usize;
            let is_block = disk.block_size == MIB;
            if is_block {
                model[whole].fill(0);
            } else {
                // A part of a block is forgotten where this layer has it, and otherwise as the parent says.
                for sector in whole {
                    model[sector] = get(&disk, sector as u64);
                }
            }
        }
        let disk = open(&name(9), true);
        for (sector, expected) in (0..).zip(&model) {
            assert_eq!(get(&disk, sector), *expected, "sector {sector}");
        }
        // In one piece too.
        let mut extents = Vec::new();
        let all = ByteRange::new(0, 64 * MIB).unwrap();
        let id = disk.resolve_read(all, &mut extents).unwrap();
        disk.finish(id, true);
        let mut at = 0;
        for extent in &extents {
            assert_eq!(extent.offset, at, "in order and without gaps");
            at += extent.len;
        }
        assert_eq!(at, 64 * MIB);
        let mut map = Vec::new();
        disk.map(all, &mut map).unwrap();
        assert_eq!(map.iter().map(|mapping| mapping.len).sum::<u64>(), 64 * MIB);
        assert!(map.is_sorted_by_key(|mapping| mapping.offset));
        let deepest = map
            .iter()
            .filter(|mapping| mapping.state == ExtentState::Mapped)
            .map(|mapping| mapping.layer)
            .max();
        assert_eq!(deepest, Some(9));
    }
}

#[test]
fn a_child_whose_parent_changed_is_refused_with_both_identifiers_and_opened_read_only_by_option() {
    let folder = tempfile::tempdir().unwrap();
    let (base, child) = (
        folder.path().join("base.vhdx"),
        folder.path().join("child.vhdx"),
    );
    Vhdx::create(&base, &small()).unwrap();
    Vhdx::create_child(&child, &base, &ChildOptions::default()).unwrap();
    let before = open(&base, true).identifiers();
    // Neither an open nor a flush changes it.
    let unwritten = open(&base, false);
    unwritten.flush().unwrap();
    drop(unwritten);
    open(&child, false);
    let disk = open(&base, false);
    put(&disk, 0, 1, 1);
    drop(disk);
    let after = open(&base, true).identifiers();
    let error = refusal(&child, &OpenOptions::default());
    for part in [
        child.display().to_string(),
        base.display().to_string(),
        before.data_write_guid.to_string(),
        after.data_write_guid.to_string(),
        "disk rebase --force".into(),
    ] {
        assert!(error.contains(&part), "{error} names {part}");
    }
    let ignoring = OpenOptions {
        ignore_changed_parents: true,
        ..OpenOptions::read_only()
    };
    assert_eq!(get(&Vhdx::open(&child, &ignoring).unwrap(), 0), 1);
    let writing = OpenOptions {
        ignore_changed_parents: true,
        ..OpenOptions::default()
    };
    assert!(refusal(&child, &writing).contains("has changed"));
}

#[test]
fn a_parent_in_use_by_a_child_is_shared_and_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let name = |file: &str| folder.path().join(file);
    Vhdx::create(name("base"), &small()).unwrap();
    for child in ["a", "b"] {
        Vhdx::create_child(name(child), name("base"), &ChildOptions::default()).unwrap();
    }
    let (a, b) = (open(&name("a"), false), open(&name("b"), false));
    put(&a, 0, 1, 1);
    put(&b, 0, 1, 2);
    assert_eq!((get(&a, 0), get(&b, 0)), (1, 2));
    let error = refusal(&name("base"), &OpenOptions::default());
    assert!(error.contains("in use for reading"), "{error}");
    open(&name("base"), true);
}

#[test]
fn a_moved_family_is_found_and_a_lost_parent_is_named_with_what_was_tried() {
    let folder = tempfile::tempdir().unwrap();
    let old = folder.path().join("old");
    let new = folder.path().join("new");
    std::fs::create_dir_all(old.join("images")).unwrap();
    std::fs::create_dir_all(old.join("guests")).unwrap();
    Vhdx::create(old.join("images/base.vhdx"), &small()).unwrap();
    let child = old.join("guests/a.vhdx");
    Vhdx::create_child(
        &child,
        old.join("images/base.vhdx"),
        &ChildOptions::default(),
    )
    .unwrap();
    std::fs::rename(&old, &new).unwrap();
    let child = new.join("guests/a.vhdx");
    open(&child, true);
    // The child alone goes elsewhere: the absolute path leads to where the parent was.
    std::fs::rename(&new, &old).unwrap();
    let moved = folder.path().join("a.vhdx");
    std::fs::rename(old.join("guests/a.vhdx"), &moved).unwrap();
    open(&moved, true);
    std::fs::remove_file(old.join("images/base.vhdx")).unwrap();
    let error = refusal(&moved, &OpenOptions::default());
    for part in [
        "not found",
        "images/base.vhdx",
        "relative_path",
        "absolute_win32_path",
    ] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn cycles_and_misfits_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let name = |file: &str| folder.path().join(file);
    Vhdx::create(name("base"), &small()).unwrap();
    Vhdx::create_child(name("a"), name("base"), &ChildOptions::default()).unwrap();
    Vhdx::create_child(name("b"), name("a"), &ChildOptions::default()).unwrap();
    // The base becomes the child of its grandchild.
    std::fs::copy(name("b"), name("copy")).unwrap();
    std::fs::rename(name("copy"), name("a")).unwrap();
    let ignoring = OpenOptions {
        ignore_changed_parents: true,
        ..OpenOptions::read_only()
    };
    let error = refusal(&name("b"), &ignoring);
    assert!(error.contains("cycle"), "{error}");

    let larger = CreateOptions {
        size: 128 * MIB,
        ..small()
    };
    let sectors = CreateOptions {
        logical_sector: SectorSize::B4096,
        ..small()
    };
    for (options, expected) in [(larger, "at least as large"), (sectors, "logical sectors")] {
        let _ = std::fs::remove_file(name("base"));
        Vhdx::create(name("base"), &options).unwrap();
        std::fs::remove_file(name("a")).unwrap();
        let other = folder.path().join("other");
        let _ = std::fs::remove_file(&other);
        Vhdx::create(&other, &small()).unwrap();
        Vhdx::create_child(name("a"), &other, &ChildOptions::default()).unwrap();
        std::fs::rename(name("base"), &other).unwrap();
        let error = refusal(&name("a"), &ignoring);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn parents_are_opened_only_where_they_may_lie() {
    let folder = tempfile::tempdir().unwrap();
    let (inside, outside) = (folder.path().join("in"), folder.path().join("out"));
    std::fs::create_dir_all(&inside).unwrap();
    std::fs::create_dir_all(&outside).unwrap();
    Vhdx::create(inside.join("base"), &small()).unwrap();
    Vhdx::create(outside.join("base"), &small()).unwrap();
    let options = ChildOptions::default();
    Vhdx::create_child(inside.join("good"), inside.join("base"), &options).unwrap();
    Vhdx::create_child(inside.join("bad"), outside.join("base"), &options).unwrap();
    std::os::unix::fs::symlink(outside.join("base"), inside.join("link")).unwrap();
    let within = OpenOptions {
        parents: Parents::Within(inside.clone()),
        ..OpenOptions::read_only()
    };
    Vhdx::open(inside.join("good"), &within).unwrap();
    assert!(refusal(&inside.join("bad"), &within).contains("outside"));
    let nowhere = OpenOptions {
        parents: Parents::Nowhere,
        ..OpenOptions::read_only()
    };
    assert!(refusal(&inside.join("good"), &nowhere).contains("may not have parents"));
}
