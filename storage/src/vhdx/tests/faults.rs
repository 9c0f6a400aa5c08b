//! What fails, and what does not fail with it.

use std::io;
use std::sync::Arc;

use super::memory::{Memory, Op};
use super::{SECTOR, created, opened, value, write};
use crate::disk::{ByteRange, Disk, DiskError, ExtentKind};
use crate::lock::OpenMode;
use crate::vhdx::CreateOptions;
use crate::vhdx::format::MIB;

const BLOCK: u64 = MIB / SECTOR;

fn options() -> CreateOptions {
    CreateOptions {
        block_size: 1 << 20,
        ..CreateOptions::new(3000 * MIB)
    }
}

fn broken() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

#[test]
fn a_file_that_cannot_grow_fails_that_request_alone() {
    let memory = Memory::new(created(&options()));
    let disk = opened(&memory, OpenMode::ReadWrite);
    write(&disk, &memory, 0, 1, 1).unwrap();
    memory.fail(|_, op| {
        matches!(op, Op::SetLen(_)).then(|| io::Error::from_raw_os_error(libc::ENOSPC))
    });
    // Blocks from the step that the file grew by are still there.
    let error = (1..20)
        .find_map(|block| write(&disk, &memory, block * BLOCK, 1, 2).err())
        .unwrap();
    assert!(matches!(error, DiskError::Io { .. }), "{error}");
    let mut out = Vec::new();
    assert!(
        disk.resolve_write(ByteRange::new(0, 40 * MIB).unwrap(), &mut out)
            .is_err()
    );
    assert!(out.is_empty());
    memory.fail(|_, _| None);
    write(&disk, &memory, 30 * BLOCK, 1, 3).unwrap();
    disk.flush().unwrap();
    assert_eq!(value(&disk, &memory, 0).unwrap(), 1);
    assert_eq!(value(&disk, &memory, 30 * BLOCK).unwrap(), 3);
}

#[test]
fn a_file_system_at_its_limit_still_gives_what_is_needed() {
    let start = created(&options());
    let limit = start.len + MIB;
    let memory = Memory::new(start);
    let disk = opened(&memory, OpenMode::ReadWrite);
    memory.fail(move |_, op| {
        matches!(op, Op::SetLen(len) if *len > limit)
            .then(|| io::Error::from_raw_os_error(libc::EFBIG))
    });
    write(&disk, &memory, 0, 1, 1).unwrap();
    assert!(write(&disk, &memory, BLOCK, 1, 1).is_err());
    disk.flush().unwrap();
    drop(disk);
    assert_eq!(memory.contents().len, limit);
}

#[test]
fn a_failure_at_any_operation_loses_nothing_that_was_flushed() {
    for failing in 0.. {
        let memory = Memory::new(created(&options()));
        let disk = opened(&memory, OpenMode::ReadWrite);
        memory.fail(move |number, _| (number == failing).then(broken));
        let (mut flushed, mut failed) = (0, false);
        for step in 1..=6 {
            let written = write(&disk, &memory, u64::from(step) * 400 * BLOCK, 1, step);
            // A neighbour comes and goes, so that space is freed and used again.
            let neighbour = ByteRange::new((u64::from(step) * 400 - 1) * MIB, MIB).unwrap();
            let done = written
                .and_then(|()| write(&disk, &memory, u64::from(step) * 400 * BLOCK - 3, 1, 77))
                .and_then(|()| disk.discard(neighbour))
                .and_then(|()| disk.flush());
            match done {
                Ok(()) if !failed => flushed = step,
                Ok(()) => {}
                Err(_) => failed = true,
            }
        }
        drop(disk);
        memory.fail(|_, _| None);
        let reopened = opened(&memory, OpenMode::ReadWrite);
        for step in 1..=flushed {
            let found = value(&reopened, &memory, u64::from(step) * 400 * BLOCK).unwrap();
            assert_eq!(found, step, "operation {failing}");
        }
        drop(reopened);
        if !failed {
            assert_eq!(flushed, 6);
            return;
        }
    }
}

#[test]
fn a_failed_sync_poisons_writes_and_leaves_reads() {
    let memory = Memory::new(created(&options()));
    let disk = opened(&memory, OpenMode::ReadWrite);
    write(&disk, &memory, 0, 1, 1).unwrap();
    disk.flush().unwrap();
    write(&disk, &memory, BLOCK, 1, 2).unwrap();
    memory.fail(|_, op| matches!(op, Op::Sync).then(broken));
    assert!(matches!(disk.flush(), Err(DiskError::Io { .. })));
    memory.fail(|_, _| None);
    let range = ByteRange::new(0, SECTOR).unwrap();
    assert!(matches!(
        disk.resolve_write(range, &mut Vec::new()),
        Err(DiskError::Poisoned)
    ));
    assert!(matches!(disk.discard(range), Err(DiskError::Poisoned)));
    assert!(matches!(disk.flush(), Err(DiskError::Poisoned)));
    assert!(matches!(disk.close(), Err(DiskError::Poisoned)));
    assert!(disk.flush_by_sync().is_none());
    assert_eq!(value(&disk, &memory, 0).unwrap(), 1);
    assert_eq!(value(&disk, &memory, BLOCK).unwrap(), 2);
    drop(disk);
    assert_eq!(
        value(&opened(&memory, OpenMode::ReadOnly), &memory, 0).unwrap(),
        1
    );
}

#[test]
fn flushes_succeed_again_when_writes_of_metadata_do() {
    let start = created(&options());
    for failing in 0..12 {
        let memory = Memory::new(start.clone());
        let disk = opened(&memory, OpenMode::ReadWrite);
        write(&disk, &memory, 0, 1, 1).unwrap();
        disk.flush().unwrap();
        let mut durable = 1;
        for round in 0..3_u32 {
            for n in 0..4 {
                write(&disk, &memory, (durable + n) * 300 * BLOCK, 1, round + 2).unwrap();
            }
            // No space for anything, from some write on: log, then what is in place.
            memory.fail(move |number, op| {
                let full = matches!(op, Op::Write { .. }) && number >= failing;
                full.then(|| io::Error::from_raw_os_error(libc::ENOSPC))
            });
            let failed = disk.flush().is_err();
            assert!(failed || failing > 1, "operation {failing}");
            // What is there is sound whenever the power goes.
            let cut = Memory::new(memory.contents());
            let found = opened(&cut, OpenMode::ReadOnly);
            assert_eq!(value(&found, &cut, 0).unwrap(), 1);
            memory.fail(|_, _| None);
            disk.flush().unwrap();
            let cut = Memory::new(memory.contents());
            let found = opened(&cut, OpenMode::ReadOnly);
            for n in 0..4 {
                let found = value(&found, &cut, (durable + n) * 300 * BLOCK).unwrap();
                assert_eq!(found, round + 2, "operation {failing}");
            }
            durable += 2;
        }
    }
}

#[test]
fn a_failed_read_of_metadata_fails_that_request_alone() {
    let memory = Memory::new(created(&options()));
    let disk = opened(&memory, OpenMode::ReadWrite);
    write(&disk, &memory, 0, 1, 1).unwrap();
    memory.fail_reads(true);
    // In another page of the table, which is not in memory.
    let range = ByteRange::new(2000 * MIB, SECTOR).unwrap();
    let mut out = Vec::new();
    assert!(matches!(
        disk.resolve_read(range, &mut out),
        Err(DiskError::Io { .. })
    ));
    assert!(matches!(
        disk.resolve_write(range, &mut out),
        Err(DiskError::Io { .. })
    ));
    assert!(
        disk.discard(ByteRange::new(2000 * MIB, MIB).unwrap())
            .is_err()
    );
    assert!(out.is_empty());
    disk.flush().unwrap();
    memory.fail_reads(false);
    write(&disk, &memory, 2000 * BLOCK, 1, 2).unwrap();
    disk.flush().unwrap();
    assert_eq!(value(&disk, &memory, 2000 * BLOCK).unwrap(), 2);
}

#[test]
fn a_close_that_failed_does_not_succeed_later() {
    let memory = Memory::new(created(&options()));
    let disk = opened(&memory, OpenMode::ReadWrite);
    write(&disk, &memory, 0, 1, 1).unwrap();
    disk.flush().unwrap();
    memory.fail(|_, op| matches!(op, Op::Write { offset, .. } if *offset < MIB).then(broken));
    assert!(disk.close().is_err());
    memory.fail(|_, _| None);
    assert!(matches!(disk.close(), Err(DiskError::Poisoned)));
    drop(disk);
    let disk = opened(&memory, OpenMode::ReadWrite);
    assert_eq!(value(&disk, &memory, 0).unwrap(), 1);
}

#[test]
fn an_open_for_writing_that_writes_nothing_leaves_every_byte() {
    let start = created(&options());
    let memory = Memory::new(start.clone());
    let disk = opened(&memory, OpenMode::ReadWrite);
    assert_eq!(value(&disk, &memory, 5).unwrap(), 0);
    disk.write_zeroes(ByteRange::new(0, 10 * MIB).unwrap(), false)
        .unwrap();
    disk.discard(ByteRange::new(0, 10 * MIB).unwrap()).unwrap();
    disk.flush().unwrap();
    disk.close().unwrap();
    drop(disk);
    assert_eq!(memory.contents(), start);
}

#[test]
fn identifiers_are_durable_before_the_first_payload() {
    let memory = Memory::new(created(&options()));
    let disk = opened(&memory, OpenMode::ReadWrite);
    write(&disk, &memory, 0, 1, 1).unwrap();
    let ops = memory.ops();
    let payload = ops
        .iter()
        .position(|op| matches!(op, Op::Write { offset, .. } if *offset >= 4 * MIB))
        .unwrap();
    let first = ops
        .iter()
        .position(|op| matches!(op, Op::Write { .. }))
        .unwrap();
    assert!(
        matches!(ops[first], Op::Write { offset, .. } if offset < MIB),
        "the header comes first"
    );
    assert!(matches!(ops[first + 1], Op::Sync));
    let last_sync = ops[..payload]
        .iter()
        .rposition(|op| matches!(op, Op::Sync))
        .unwrap();
    assert!(
        !ops[last_sync..payload]
            .iter()
            .any(|op| matches!(op, Op::Write { .. })),
        "all before it is durable"
    );
}

#[test]
fn flushes_of_many_threads_end_with_everything_durable() {
    let memory = Memory::new(created(&options()));
    let disk = Arc::new(opened(&memory, OpenMode::ReadWrite));
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (disk, memory) = (Arc::clone(&disk), Arc::clone(&memory));
            scope.spawn(move || {
                for n in 0..100 {
                    write(
                        &disk,
                        &memory,
                        (thread + 4 * n) * 7 * BLOCK,
                        1,
                        (thread * 1000 + n + 1) as u32,
                    )
                    .unwrap();
                    disk.flush().unwrap();
                }
            });
        }
    });
    // As it is now, without a close.
    let cut = Memory::new(memory.contents());
    let found = opened(&cut, OpenMode::ReadOnly);
    for thread in 0..4 {
        for n in 0..100 {
            let sector = (thread + 4 * n) * 7 * BLOCK;
            assert_eq!(
                u64::from(value(&found, &cut, sector).unwrap()),
                thread * 1000 + n + 1
            );
        }
    }
}

/// A disk whose every 512th block is in a page of its own.
fn many_pages() -> CreateOptions {
    CreateOptions {
        block_size: 1 << 20,
        ..CreateOptions::new(300 * 512 * MIB)
    }
}

#[test]
fn pages_are_committed_on_the_way_where_nobody_flushes() {
    let memory = Memory::new(created(&many_pages()));
    let disk = opened(&memory, OpenMode::ReadWrite);
    for page in 0..299 {
        write(&disk, &memory, page * 512 * BLOCK, 1, page as u32 + 1).unwrap();
        assert!(disk.state.lock().pages.dirty() <= 65);
    }
    disk.flush().unwrap();
    let cut = Memory::new(memory.contents());
    for (disk, memory) in [(opened(&cut, OpenMode::ReadOnly), cut), (disk, memory)] {
        for page in 0..299 {
            assert_eq!(
                value(&disk, &memory, page * 512 * BLOCK).unwrap(),
                page as u32 + 1
            );
        }
    }
}

#[test]
fn more_pages_than_the_log_holds_are_committed_in_turns() {
    let memory = Memory::new(created(&many_pages()));
    let disk = opened(&memory, OpenMode::ReadWrite);
    let range = ByteRange::new(MIB, 299 * 512 * MIB).unwrap();
    let mut out = Vec::new();
    let id = disk.resolve_write(range, &mut out).unwrap();
    disk.finish(id, true);
    assert_eq!(out.len(), 1, "blocks taken together lie together");
    disk.flush().unwrap();
    let cut = Memory::new(memory.contents());
    let reopened = opened(&cut, OpenMode::ReadOnly);
    let mut found = Vec::new();
    let id = reopened.resolve_read(range, &mut found).unwrap();
    reopened.finish(id, true);
    assert!(matches!((&out[0].kind, &found[0].kind),
        (ExtentKind::Data { file_offset: a, .. }, ExtentKind::Data { file_offset: b, .. }) if a == b));
    assert_eq!(found[0].len, range.len());
}
