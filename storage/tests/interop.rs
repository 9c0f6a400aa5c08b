//! VHDX files between this crate and QEMU, in both directions.

#![allow(clippy::unwrap_used, reason = "these are tests")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use storage::vhdx::{CreateOptions, Vhdx};
use storage::{Disk, Format, OpenMode, OpenOptions, SectorSize};
use support::{GIB, MIB, arg, pattern, qemu_check, qemu_io, read, run, write};

fn open(path: &Path, mode: OpenMode) -> Vhdx {
    Vhdx::open(path, &mode.into()).unwrap()
}

/// The disk as QEMU sees it, in a raw file.
fn converted(path: &Path) -> File {
    let raw = path.with_extension("raw");
    run(
        "qemu-img",
        &["convert", "-f", "vhdx", "-O", "raw", arg(path), arg(&raw)],
    );
    File::open(raw).unwrap()
}

fn bytes(file: &File, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

/// Places worth writing: both ends of the disk, both sides of block boundaries, and blocks that are skipped.
fn places(size: u64, block: u64) -> Vec<(u64, usize)> {
    let mut places = vec![(0, 4096), (size - 4096, 4096)];
    for boundary in [block, 3 * block] {
        if boundary + 65536 < size {
            places.push((boundary - 8192, 65536));
        }
    }
    places
}

#[test]
fn qemu_reads_what_we_wrote_in_every_block_and_sector_size() {
    let folder = tempfile::tempdir().unwrap();
    for block_mib in [1_u32, 2, 8, 32, 64, 256] {
        for fixed in [false, true] {
            let path = folder.path().join(format!("{block_mib}-{fixed}.vhdx"));
            let block = u64::from(block_mib) * MIB;
            // Does not end with a block.
            let size = if fixed {
                block + 3 * MIB
            } else {
                5 * block + MIB + 512 * 8
            };
            let options = CreateOptions {
                block_size: block_mib << 20,
                fixed,
                ..CreateOptions::new(size)
            };
            Vhdx::create(&path, &options).unwrap();
            qemu_check(&path);
            let disk = open(&path, OpenMode::ReadWrite);
            for (offset, len) in places(size, block) {
                write(&disk, offset, &pattern(offset, len));
            }
            disk.close().unwrap();
            drop(disk);
            qemu_check(&path);
            let raw = converted(&path);
            assert_eq!(raw.metadata().unwrap().len(), size);
            let disk = open(&path, OpenMode::ReadOnly);
            for (offset, len) in places(size, block) {
                assert_eq!(
                    bytes(&raw, offset, len),
                    read(&disk, offset, len),
                    "{block_mib} MiB, {offset:#x}"
                );
            }
            std::fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn we_read_what_qemu_made_and_wrote() {
    let folder = tempfile::tempdir().unwrap();
    for block_mib in [1_u64, 8, 16, 256] {
        for subformat in ["dynamic", "fixed"] {
            let path = folder.path().join(format!("{block_mib}-{subformat}.vhdx"));
            let block = block_mib * MIB;
            let size = if subformat == "fixed" {
                block + 2 * MIB
            } else {
                4 * block + MIB
            };
            let options = format!("subformat={subformat},block_size={block}");
            run(
                "qemu-img",
                &[
                    "create",
                    "-q",
                    "-f",
                    "vhdx",
                    "-o",
                    &options,
                    arg(&path),
                    &size.to_string(),
                ],
            );
            let places: Vec<_> = places(size, block).into_iter().zip(1..).collect();
            let commands: Vec<_> = places
                .iter()
                .map(|((at, len), n)| format!("write -P {n} {at} {len}"))
                .collect();
            qemu_io(
                &path,
                &commands.iter().map(String::as_str).collect::<Vec<_>>(),
            );
            let raw = converted(&path);
            let disk = open(&path, OpenMode::ReadOnly);
            assert_eq!(disk.geometry().size, size);
            let mut at = 0;
            while at < size {
                let len = (size - at).min(MIB);
                assert!(
                    read(&disk, at, len as usize) == bytes(&raw, at, len as usize),
                    "{subformat} {at:#x}"
                );
                at += len;
            }
            drop(disk);
            // And write into it.
            let disk = open(&path, OpenMode::ReadWrite);
            write(&disk, size / 2 / 512 * 512, &[0xAB; 1024]);
            disk.close().unwrap();
            drop(disk);
            qemu_check(&path);
            assert_eq!(
                bytes(&converted(&path), size / 2 / 512 * 512, 1024),
                [0xAB; 1024]
            );
            std::fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn we_read_what_qemu_converted_in_all_its_ways() {
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("source.raw");
    let size = 70 * MIB + 4096;
    let source = File::create_new(&raw).unwrap();
    source.set_len(size).unwrap();
    for (offset, len) in [
        (0, 70_000),
        (MIB, 4096),
        (33 * MIB - 512, 3 << 20),
        (size - 512, 512),
    ] {
        source.write_all_at(&pattern(offset, len), offset).unwrap();
    }
    let source = storage::open(
        &raw,
        &OpenOptions {
            read_only: true,
            format: None,
            ..OpenOptions::default()
        },
    )
    .unwrap();
    for options in [
        "subformat=dynamic",
        "subformat=fixed",
        "subformat=dynamic,block_state_zero=off,block_size=1M",
        "subformat=dynamic,log_size=4M,block_size=4M",
        "subformat=fixed,block_size=16M",
    ] {
        let path = folder.path().join("disk.vhdx");
        run(
            "qemu-img",
            &[
                "convert",
                "-f",
                "raw",
                "-O",
                "vhdx",
                "-o",
                options,
                arg(&raw),
                arg(&path),
            ],
        );
        let disk = open(&path, OpenMode::ReadOnly);
        assert_eq!(disk.geometry().size, size, "{options}");
        for at in (0..size).step_by(1 << 20) {
            let len = (size - at).min(MIB) as usize;
            assert!(
                read(&disk, at, len) == read(&*source, at, len),
                "{options}, {at:#x}"
            );
        }
        drop(disk);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn contents_past_the_first_chunk_agree_in_both_directions() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ours.vhdx");
    // Chunks of 4 GiB: bitmap entries lie at 4, 8 and 12 GiB.
    let size = 13 * GIB;
    Vhdx::create(&path, &CreateOptions::new(size)).unwrap();
    let disk = open(&path, OpenMode::ReadWrite);
    let offsets: Vec<u64> = (1..=3)
        .flat_map(|chunk| {
            [-2_i64, -1, 0, 1].map(|n| {
                (chunk * 4 * GIB)
                    .checked_add_signed(n * 2 * MIB.cast_signed())
                    .unwrap()
            })
        })
        .collect();
    for (offset, n) in offsets.iter().zip(1..) {
        write(&disk, *offset, &[n; 4096]);
    }
    disk.close().unwrap();
    drop(disk);
    qemu_check(&path);
    let reads: Vec<_> = offsets
        .iter()
        .zip(1..)
        .map(|(at, n): (_, u8)| format!("read -P {n} {at} 4096"))
        .collect();
    let printed = qemu_io(&path, &reads.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(
        !printed.contains("Pattern verification failed"),
        "{printed}"
    );

    let path = folder.path().join("theirs.vhdx");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "vhdx",
            "-o",
            "block_size=2M",
            arg(&path),
            &size.to_string(),
        ],
    );
    let writes: Vec<_> = offsets
        .iter()
        .zip(1..)
        .map(|(at, n): (_, u8)| format!("write -P {n} {at} 4096"))
        .collect();
    qemu_io(
        &path,
        &writes.iter().map(String::as_str).collect::<Vec<_>>(),
    );
    let disk = open(&path, OpenMode::ReadOnly);
    for (offset, n) in offsets.iter().zip(1..) {
        assert_eq!(read(&disk, *offset, 4096), [n; 4096], "{offset:#x}");
        assert_eq!(read(&disk, *offset + 4096, 512), [0; 512]);
    }
}

#[test]
fn sectors_of_4096_bytes_are_kept_across_the_first_chunk() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("4k.vhdx");
    // A chunk is 32 GiB.
    let options = CreateOptions {
        logical_sector: SectorSize::B4096,
        block_size: 256 << 20,
        ..CreateOptions::new(100 * GIB)
    };
    Vhdx::create(&path, &options).unwrap();
    let offsets = [
        0,
        32 * GIB - 4096,
        32 * GIB,
        64 * GIB + 4096,
        100 * GIB - 4096,
    ];
    let disk = open(&path, OpenMode::ReadWrite);
    for (offset, n) in offsets.iter().zip(1..) {
        write(&disk, *offset, &[n; 4096]);
    }
    drop(disk);
    let disk = open(&path, OpenMode::ReadOnly);
    assert_eq!(disk.geometry().logical_sector, SectorSize::B4096);
    for (offset, n) in offsets.iter().zip(1..) {
        assert_eq!(read(&disk, *offset, 4096), [n; 4096]);
    }
    // QEMU has no disks with such sectors and says so.
    let printed = support::output("qemu-img", &["info", "-f", "vhdx", arg(&path)]);
    if printed.status.success() {
        qemu_check(&path);
    }
}

#[test]
fn the_largest_disk_opens_and_holds_its_last_sector() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("64t.vhdx");
    let size = 64 << 40;
    Vhdx::create(
        &path,
        &CreateOptions {
            block_size: 1 << 20,
            ..CreateOptions::new(size)
        },
    )
    .unwrap();
    let disk = open(&path, OpenMode::ReadWrite);
    write(&disk, size - 512, &[9; 512]);
    disk.flush().unwrap();
    drop(disk);
    qemu_check(&path);
    qemu_io(&path, &[&format!("read -P 9 {} 512", size - 512)]);
    assert_eq!(
        read(&open(&path, OpenMode::ReadOnly), size - 1024, 1024)[512..],
        [9; 512]
    );
}

#[test]
fn a_locked_file_is_refused_here_and_by_qemu() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhdx");
    Vhdx::create(&path, &CreateOptions::new(64 * MIB)).unwrap();

    let reader = open(&path, OpenMode::ReadOnly);
    let second = open(&path, OpenMode::ReadOnly);
    qemu_check(&path);
    let error = Vhdx::open(&path, &OpenMode::ReadWrite.into()).unwrap_err();
    assert_eq!(
        report::chain(&error).to_string(),
        format!(
            "{}: is in use for reading by another process",
            path.display()
        )
    );
    let refused = support::output("qemu-io", &["-f", "vhdx", "-c", "write 0 512", arg(&path)]);
    assert!(
        support::describe(&refused).contains("lock"),
        "{}",
        support::describe(&refused)
    );
    drop((reader, second));

    let writer = open(&path, OpenMode::ReadWrite);
    for read_only in [false, true] {
        let options = OpenOptions {
            read_only,
            format: Some(Format::Vhdx),
            ..OpenOptions::default()
        };
        let error = storage::open(&path, &options).unwrap_err();
        assert_eq!(
            report::chain(&error).to_string(),
            format!(
                "{}: is in use for writing by another process",
                path.display()
            )
        );
    }
    let refused = support::output("qemu-img", &["check", "-f", "vhdx", arg(&path)]);
    assert!(
        support::describe(&refused).contains("lock"),
        "{}",
        support::describe(&refused)
    );
    drop(writer);
    qemu_check(&path);
}
