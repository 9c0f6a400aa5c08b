//! What cannot be a disk is refused in one line that names the file, and left as it is.

#![allow(clippy::unwrap_used, reason = "these are tests")]

mod support;

use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use storage::foreign::{SourceFormat, SourceOptions};
use storage::vhdx::{CreateError, CreateOptions, Vhdx};
use storage::{Format, OpenOptions};
use support::{MIB, arg, pattern, read, run, write};

/// Tries to open a file in both modes, which have to say the same and change nothing; gives what they say after its
/// name.
fn refusal(path: &Path, format: Option<Format>) -> String {
    let before = fs::read(path).ok();
    let [writing, reading] = [false, true].map(|read_only| {
        let error = storage::open(
            path,
            &OpenOptions {
                read_only,
                format,
                ..OpenOptions::default()
            },
        )
        .unwrap_err();
        let printed = report::chain(&error).to_string();
        assert!(!printed.contains('\n'), "{printed}");
        printed
            .strip_prefix(&format!("{}: ", path.display()))
            .unwrap()
            .to_owned()
    });
    assert_eq!(writing, reading);
    assert!(
        fs::read(path).ok() == before,
        "a refused file is left as it is"
    );
    writing
}

#[test]
fn what_the_host_said_is_at_the_end_of_the_chain_and_nowhere_else() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    let error = storage::open(&missing, &OpenOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), missing.display().to_string());
    let reason = error.source().unwrap();
    assert_eq!(reason.to_string(), "cannot open the file");
    let host = reason.source().unwrap().downcast_ref::<io::Error>();
    assert_eq!(host.unwrap().raw_os_error(), Some(libc::ENOENT));
}

#[test]
fn what_is_no_regular_file_is_refused_without_waiting() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(
        refusal(&folder.path().join("missing"), None),
        "cannot open the file: No such file or directory (os error 2)"
    );
    let directory = folder.path().join("directory");
    fs::create_dir(&directory).unwrap();
    assert_eq!(
        refusal(&directory, None),
        "is a directory; a disk has to be a regular file"
    );
    assert_eq!(
        refusal(Path::new("/dev/null"), None),
        "is a character device; a disk has to be a regular file"
    );

    let fifo = folder.path().join("fifo");
    run("mkfifo", &[arg(&fifo)]);
    let refused = storage::open(&fifo, &OpenOptions::default()).unwrap_err();
    let printed = report::chain(&refused).to_string();
    assert!(
        printed.ends_with("is a FIFO; a disk has to be a regular file"),
        "{printed}"
    );
}

#[test]
fn files_of_the_wrong_size_or_format_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    File::create(&path).unwrap();
    assert_eq!(
        refusal(&path, None),
        "is empty; a disk has at least one sector"
    );
    assert_eq!(
        refusal(&path, Some(Format::Vhdx)),
        "is empty; a disk has at least one sector"
    );
    fs::write(&path, [1; 700]).unwrap();
    assert_eq!(
        refusal(&path, None),
        "has 700 bytes; the size of a raw disk has to be a multiple of 512"
    );
    assert_eq!(
        refusal(&path, Some(Format::Vhdx)),
        "file identifier at file offset 0x0 is corrupt: expected \"vhdxfile\", \
         found \"\\x01\\x01\\x01\\x01\\x01\\x01\\x01\\x01\""
    );
    fs::write(&path, b"vhdx").unwrap();
    assert_eq!(
        refusal(&path, Some(Format::Vhdx)),
        "file identifier at file offset 0x0 is corrupt: expected \"vhdxfile\", found a file of 4 bytes"
    );
}

#[test]
fn a_vhdx_that_ends_anywhere_too_early_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhdx");
    Vhdx::create(&path, &CreateOptions::new(64 * MIB)).unwrap();
    let disk = Vhdx::open(&path, &storage::OpenMode::ReadWrite.into()).unwrap();
    write(&disk, 0, &pattern(1, 4096));
    drop(disk);
    let len = fs::metadata(&path).unwrap().len();
    assert_eq!(len, 6 * MIB);
    for cut in [
        8,
        64 << 10,
        100 << 10,
        160 << 10,
        200 << 10,
        300 << 10,
        MIB,
        2 * MIB,
        3 * MIB,
        5 * MIB,
        len - 1,
    ] {
        let short = folder.path().join("short.vhdx");
        support::copy(&path, &short);
        File::options()
            .write(true)
            .open(&short)
            .unwrap()
            .set_len(cut)
            .unwrap();
        let printed = refusal(&short, None);
        assert!(
            printed.contains("is corrupt: expected"),
            "{cut:#x}: {printed}"
        );
    }
}

#[test]
fn a_vhdx_with_a_damaged_identifier_does_not_pass_for_raw() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhdx");
    Vhdx::create(&path, &CreateOptions::new(64 * MIB)).unwrap();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .write_all_at(b"VHDX", 0)
        .unwrap();
    let printed = refusal(&path, None);
    assert!(
        printed.starts_with("VHDX file identifier at file offset 0x0 is corrupt"),
        "{printed}"
    );
    // A format that is given as raw is taken without a check.
    storage::open(
        &path,
        &OpenOptions {
            read_only: true,
            format: Some(Format::Raw),
            ..OpenOptions::default()
        },
    )
    .unwrap();
}

#[test]
fn a_container_that_peers_made_does_not_pass_for_raw() {
    let folder = tempfile::tempdir().unwrap();
    for (format, name, program) in [
        ("vdi", "VDI", "qemu-img convert"),
        ("qed", "QED", "qemu-img convert"),
        ("parallels", "Parallels", "qemu-img convert"),
        ("gzip", "gzip", "gunzip"),
        ("xz", "xz", "unxz"),
        ("bzip2", "bzip2", "bunzip2"),
        ("qcow2", "qcow2", "coppice disk convert"),
        ("vpc", "VHD", "coppice disk convert"),
        ("vmdk", "VMDK", "coppice disk convert"),
    ] {
        let path = folder.path().join(name);
        let plain = folder.path().join("plain");
        fs::write(&plain, pattern(1, 8192)).unwrap();
        match format {
            packer @ ("gzip" | "xz" | "bzip2") => {
                let script = format!("{packer} -c {} > {}", plain.display(), path.display());
                run("sh", &["-c", &script]);
            }
            format => {
                let options = ["create", "-q", "-f", format, arg(&path), "8M"];
                run("qemu-img", &options);
            }
        }
        let printed = refusal(&path, None);
        assert!(
            printed.contains(name) && printed.contains(&format!("`{program}")),
            "{printed}"
        );
        if program != "coppice disk convert" {
            let refused = storage::foreign::open(&path, &SourceOptions::default())
                .err()
                .unwrap();
            let printed = report::chain(&refused).to_string();
            assert!(
                printed.contains(name) && printed.contains(program),
                "{printed}"
            );
        }
        // A format that is given as raw is taken without a check, also for a source of a length that a disk cannot
        // have.
        storage::foreign::open(&path, &SourceOptions::named(SourceFormat::Raw)).unwrap();
    }
}

#[test]
fn a_child_without_a_locator_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhdx");
    Vhdx::create(&path, &CreateOptions::new(64 * MIB)).unwrap();
    // The flags of the file parameters, the first item after the table of the metadata at 2 MiB.
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .write_all_at(&[2], 2 * MIB + (64 << 10) + 4)
        .unwrap();
    assert_eq!(
        refusal(&path, None),
        "metadata item \"parent locator\" at file offset 0x200000 is corrupt: expected this item, found none"
    );
}

#[test]
fn the_format_is_found_by_the_signature() {
    let folder = tempfile::tempdir().unwrap();
    let (vhdx, raw) = (folder.path().join("disk"), folder.path().join("other.vhdx"));
    Vhdx::create(&vhdx, &CreateOptions::new(64 * MIB)).unwrap();
    fs::write(&raw, pattern(3, 8192)).unwrap();
    let disk = storage::open(&vhdx, &OpenOptions::default()).unwrap();
    assert_eq!(
        (disk.geometry().size, disk.geometry().read_only),
        (64 * MIB, false)
    );
    let disk = storage::open(
        &raw,
        &OpenOptions {
            read_only: true,
            format: None,
            ..OpenOptions::default()
        },
    )
    .unwrap();
    assert_eq!(
        (disk.geometry().size, disk.geometry().read_only),
        (8192, true)
    );
    assert_eq!(read(&*disk, 0, 8192), pattern(3, 8192));
}

#[test]
fn create_takes_what_the_format_allows_and_never_a_file_that_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhdx");
    for size in [0, 100, (64 << 40) + 512] {
        assert!(matches!(
            Vhdx::create(&path, &CreateOptions::new(size)),
            Err(CreateError::Size { .. })
        ));
    }
    for block_size in [0, 512 << 10, 3 << 20, 512 << 20] {
        let options = CreateOptions {
            block_size,
            ..CreateOptions::new(MIB)
        };
        assert!(matches!(
            Vhdx::create(&path, &options),
            Err(CreateError::BlockSize(_))
        ));
    }
    fs::write(&path, b"precious").unwrap();
    assert!(matches!(
        Vhdx::create(&path, &CreateOptions::new(MIB)),
        Err(CreateError::Io { .. })
    ));
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}
