//! Writers that are killed: what they leave opens here and in QEMU and holds what was flushed.

#![allow(clippy::unwrap_used, reason = "these are tests")]

mod support;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use storage::vhdx::{CreateOptions, Vhdx};
use storage::{Disk, OpenMode};
use support::{GIB, MIB, arg, copy, log_guid, qemu_check, qemu_io, read, run, write};

const SIZE: u64 = 6 * GIB;
/// Where the writer's n-th write goes: all over the disk, blocks in several pages of the BAT.
fn place(n: u64) -> u64 {
    n * 37 % 3000 * 2 * MIB + 4096
}

fn block(n: u64) -> Vec<u8> {
    support::pattern(n, 4096)
}

/// Lets QEMU replay the log, and compares all that it sees with all that we see.
fn compare_with_qemu(path: &Path) {
    let theirs = path.with_extension("theirs.vhdx");
    copy(path, &theirs);
    run(
        "qemu-img",
        &["check", "-q", "-r", "all", "-f", "vhdx", arg(&theirs)],
    );
    // Ours is seen through its log, as nobody has replayed it.
    let ours = Vhdx::open(path, &OpenMode::ReadOnly.into()).unwrap();
    let raw = path.with_extension("raw");
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            "vhdx",
            "-O",
            "raw",
            arg(&theirs),
            arg(&raw),
        ],
    );
    let raw_disk = storage::open(
        &raw,
        &storage::OpenOptions {
            read_only: true,
            ..Default::default()
        },
    )
    .unwrap();
    for at in (0..ours.geometry().size).step_by(2 << 20) {
        let (at, len) = (at, (ours.geometry().size - at).min(16384));
        let len = usize::try_from(len).unwrap();
        assert!(read(&ours, at, len) == read(&*raw_disk, at, len), "{at:#x}");
    }
}

/// QEMU applies a log entry as soon as it is durable, so that a kill hardly ever leaves one. Here the write that would
/// apply it fails, which leaves it every time.
#[test]
fn a_log_that_qemu_left_is_replayed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhdx");
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
            &SIZE.to_string(),
        ],
    );
    // The BAT is at 2 MiB. The entry of the block at 4 GiB has the index 2049, in the page of index 4.
    let fault = (2 * MIB + 4 * 4096) / 512;
    let options = format!(
        "driver=vhdx,file.driver=blkdebug,file.image.driver=file,file.image.filename={},\
         file.inject-error.0.event=none,file.inject-error.0.iotype=write,file.inject-error.0.sector={fault},\
         file.inject-error.0.once=off,file.inject-error.0.immediately=on",
        arg(&path)
    );
    let writes = ["write -P 1 0 64k", "write -P 2 6M 64k", "write -P 3 4G 64k"];
    let mut args = vec!["--image-opts"];
    for command in &writes {
        args.extend(["-c", command]);
    }
    args.push(&options);
    let printed = support::describe(&support::output("qemu-io", &args));
    assert!(
        printed.contains("write failed: Input/output error"),
        "{printed}"
    );
    assert_ne!(log_guid(&path), [0; 16], "qemu-io left a log");

    let check = |path: &Path, mode: OpenMode| {
        let disk = Vhdx::open(path, &mode.into()).unwrap();
        for (offset, n) in [(0, 1), (6 * MIB, 2), (4 * GIB, 3)] {
            assert!(read(&disk, offset, 65536) == vec![n; 65536], "{offset:#x}");
        }
    };
    let before = std::fs::metadata(&path).unwrap().modified().unwrap();
    check(&path, OpenMode::ReadOnly);
    let after = std::fs::metadata(&path).unwrap().modified().unwrap();
    assert_eq!(after, before, "reading writes nothing");
    compare_with_qemu(&path);
    check(&path, OpenMode::ReadWrite);
    assert_eq!(log_guid(&path), [0; 16], "the log was replayed and closed");
    qemu_check(&path);
}

#[test]
fn a_writer_killed_at_any_time_leaves_what_it_flushed_to_us_and_to_qemu() {
    let folder = tempfile::tempdir().unwrap();
    for kill_after in [1, 2, 3, 9, 40, 131, 300] {
        let path = folder.path().join(format!("{kill_after}.vhdx"));
        Vhdx::create(&path, &CreateOptions::new(SIZE)).unwrap();
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "the_writer_that_is_killed",
                "--ignored",
                "--nocapture",
            ])
            .env("COPPICE_TEST_DISK", &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut flushed = 0;
        for line in BufReader::new(writer.stdout.take().unwrap()).lines() {
            if let Some(n) = line.unwrap().strip_prefix("flushed ") {
                flushed = n.parse().unwrap();
                if flushed >= kill_after {
                    break;
                }
            }
        }
        writer.kill().unwrap();
        writer.wait().unwrap();
        assert!(flushed >= kill_after, "the writer ended by itself");

        assert_ne!(log_guid(&path), [0; 16]);
        compare_with_qemu(&path);
        for mode in [OpenMode::ReadOnly, OpenMode::ReadWrite, OpenMode::ReadWrite] {
            let disk = Vhdx::open(&path, &mode.into()).unwrap();
            for n in 1..=flushed {
                assert!(read(&disk, place(n), 4096) == block(n), "{n} of {flushed}");
            }
        }
        qemu_check(&path);
        qemu_io(&path, &["write -P 5 0 4096", "read -P 5 0 4096"]);
    }
}

/// Not a test: the process that the test before starts and kills.
#[test]
#[ignore = "the process that another test starts and kills"]
fn the_writer_that_is_killed() {
    let path = std::env::var_os("COPPICE_TEST_DISK").expect("run by the test that kills it");
    let disk = Vhdx::open(path, &OpenMode::ReadWrite.into()).unwrap();
    for n in 1..2900 {
        write(&disk, place(n), &block(n));
        if n % 3 != 0 {
            disk.flush().unwrap();
            println!("\nflushed {n}");
        }
    }
}
