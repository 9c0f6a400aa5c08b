//! Conversion from every format, with qemu-img as the one who made the source and who compares.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

mod support;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use storage::convert::{ConvertError, ConvertOptions, Converted, Target, convert};
use storage::foreign::{self, Backing, SourceFormat, SourceOptions};
use storage::{DiskError, Progress, Unwatched};
use support::MIB;

const SIZE: u64 = 37 * MIB + 512 * 11;
const VHDX: Target = Target::Vhdx {
    block_size: 1 << 20,
    logical_sector: None,
    fixed: false,
};

fn qemu(arguments: &[&str], path: &Path) {
    let output = Command::new("qemu-img")
        .args(arguments)
        .arg(path)
        .output()
        .expect("qemu-img: run resources/setup.sh");
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A raw disk with data here and there, zeros that are written, and holes.
fn raw(folder: &Path, seed: u64) -> PathBuf {
    let path = folder.join("source.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(SIZE).unwrap();
    let mut state = seed;
    for _ in 0..60 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let at = (state >> 20) % (SIZE - 70_000) / 512 * 512;
        let len = 512 + (state >> 40) as usize % 60_000 / 512 * 512;
        let byte = (state >> 50) as u8 % 5;
        let bytes: Vec<u8> = (0..len).map(|n| byte.wrapping_mul(n as u8)).collect();
        file.write_all_at(&bytes, at).unwrap();
    }
    file.write_all_at(&[9; 512], SIZE - 512).unwrap();
    path
}

fn converted(
    from: &Path,
    options: &SourceOptions,
    to: &Path,
    target: Target,
) -> (SourceFormat, Converted) {
    let (format, mut source) = foreign::open(from, options).unwrap();
    let done = convert(
        (from, &mut *source),
        to,
        &ConvertOptions::new(target),
        &Unwatched,
    )
    .unwrap();
    (format, done)
}

/// To follow what a source of a format names, in its folder.
fn following(format: SourceFormat) -> SourceOptions {
    SourceOptions {
        backing: Some(Backing::Beside),
        ..SourceOptions::named(format)
    }
}

/// The first bytes of a disk that qemu may have made a little larger.
fn compare(raw: &Path, to: &Path) {
    let (expected, found) = (std::fs::read(raw).unwrap(), std::fs::read(to).unwrap());
    assert!(found.len() >= expected.len());
    assert!(
        found[..expected.len()] == expected[..],
        "{} differs",
        to.display()
    );
    assert!(found[expected.len()..].iter().all(|byte| *byte == 0));
}

#[test]
fn every_format_that_qemu_writes_is_read_to_the_last_byte() {
    use SourceFormat::{Qcow2, Raw, Vhd, Vhdx, Vmdk};
    let cases: [(SourceFormat, &str, &str); 15] = [
        (Raw, "raw", ""),
        (Qcow2, "qcow2", ""),
        (Qcow2, "qcow2", "compat=0.10"),
        (Qcow2, "qcow2", "cluster_size=4096"),
        (Qcow2, "qcow2", "cluster_size=2097152"),
        (Qcow2, "qcow2", "compressed"),
        (Vhd, "vpc", "subformat=dynamic,force_size=on"),
        (Vhd, "vpc", "subformat=fixed,force_size=on"),
        (Vmdk, "vmdk", "subformat=monolithicSparse"),
        (Vmdk, "vmdk", "subformat=streamOptimized"),
        (Vmdk, "vmdk", "subformat=monolithicFlat"),
        (Vmdk, "vmdk", "subformat=twoGbMaxExtentSparse"),
        (Vmdk, "vmdk", "subformat=twoGbMaxExtentFlat"),
        (Vhdx, "vhdx", "subformat=dynamic"),
        (Vhdx, "vhdx", "subformat=fixed"),
    ];
    for (seed, (format, name, options)) in (1..).zip(cases) {
        let folder = tempfile::tempdir().unwrap();
        let source = raw(folder.path(), seed);
        let made = folder.path().join("made");
        let mut arguments = vec!["convert", "-f", "raw", "-O", name];
        match options {
            "" => {}
            "compressed" => arguments.push("-c"),
            options => arguments.extend(["-o", options]),
        }
        arguments.push(source.to_str().unwrap());
        qemu(&arguments, &made);
        // A raw disk whose first bytes look like another format is named; nothing here does.
        let (found, to) = (folder.path().join("found"), folder.path().join("to"));
        assert_eq!(storage::detect(&made).unwrap(), format, "{name} {options}");
        // A descriptor of VMDK names its extents.
        let names_files = options.ends_with("Flat") || options.starts_with("subformat=twoGb");
        let how = if names_files {
            following(format)
        } else {
            SourceOptions::default()
        };
        let (detected, done) = converted(&made, &how, &found, VHDX);
        assert_eq!(detected, format, "{name} {options}");
        assert!(done.size >= SIZE);
        let same = format!("{name} {options}");
        if done.size == SIZE {
            qemu(
                &[
                    "compare",
                    "-q",
                    "-f",
                    "raw",
                    "-F",
                    "vhdx",
                    source.to_str().unwrap(),
                ],
                &found,
            );
        }
        let again = converted(&found, &SourceOptions::default(), &to, Target::Raw);
        assert_eq!(again.0, Vhdx, "{same}");
        compare(&source, &to);
        let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&to).unwrap());
        assert!(blocks * 512 < 10 * MIB, "{same}: holes are kept");
    }
}

#[test]
fn a_qcow2_image_is_read_through_its_backing_file_where_that_lies_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let source = raw(folder.path(), 99);
    let images = folder.path().join("images");
    std::fs::create_dir(&images).unwrap();
    let base = images.join("base.qcow2");
    qemu(
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            source.to_str().unwrap(),
        ],
        &base,
    );
    let top = images.join("top.qcow2");
    qemu(
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            "base.qcow2",
        ],
        &top,
    );
    let to = folder.path().join("to");
    converted(&top, &following(SourceFormat::Qcow2), &to, Target::Raw);
    compare(&source, &to);
    let outside = folder.path().join("outside.qcow2");
    std::fs::rename(&base, &outside).unwrap();
    let stray = images.join("stray.qcow2");
    qemu(
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            "../outside.qcow2",
        ],
        &stray,
    );
    let error = foreign::open(&stray, &following(SourceFormat::Qcow2));
    let error = report::chain(&error.err().unwrap()).to_string();
    assert!(
        error.contains("outside.qcow2, and only what lies in"),
        "{error}"
    );
    std::fs::remove_file(&to).unwrap();
    let within = SourceOptions {
        backing: Some(Backing::Within(folder.path().to_owned())),
        ..SourceOptions::named(SourceFormat::Qcow2)
    };
    converted(&stray, &within, &to, Target::Raw);
    compare(&source, &to);
}

#[test]
fn disks_that_lack_what_a_parent_holds_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let name = |file: &str| folder.path().join(file);
    qemu(
        &[
            "create",
            "-q",
            "-f",
            "vmdk",
            name("base.vmdk").to_str().unwrap(),
        ],
        Path::new("8M"),
    );
    qemu(
        &[
            "create",
            "-q",
            "-f",
            "vmdk",
            "-F",
            "vmdk",
            "-b",
            "base.vmdk",
        ],
        &name("child.vmdk"),
    );
    let error = foreign::open(&name("child.vmdk"), &SourceOptions::default())
        .err()
        .unwrap();
    let error = report::chain(&error).to_string();
    assert!(error.contains("with a parent"), "{error}");
}

#[test]
fn a_size_that_is_no_multiple_of_a_sector_is_rounded_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd");
    std::fs::write(&path, [7; 5001]).unwrap();
    let target = Target::Vhdx {
        block_size: 1 << 20,
        logical_sector: Some(storage::SectorSize::B4096),
        fixed: false,
    };
    let to = folder.path().join("to");
    let (_, done) = converted(&path, &SourceOptions::default(), &to, target);
    assert_eq!(done.size, 8192);
    let back = folder.path().join("back");
    converted(&to, &SourceOptions::default(), &back, Target::Raw);
    compare(&path, &back);
}

/// Cancels after a number of looks.
struct After(AtomicU64);

impl Progress for After {
    fn advance(&self, _: u64, _: u64) {}
    fn is_cancelled(&self) -> bool {
        self.0.fetch_sub(1, Ordering::SeqCst) == 1
    }
}

#[test]
fn what_is_cancelled_or_refused_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let source = raw(folder.path(), 5);
    let names = || {
        let mut names: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    let before = names();
    let to = folder.path().join("to");
    let run = |overwrite, progress: &dyn Progress| {
        let (_, mut disk) = foreign::open(&source, &SourceOptions::default()).unwrap();
        let options = ConvertOptions {
            overwrite,
            ..ConvertOptions::new(VHDX)
        };
        convert((&source, &mut *disk), &to, &options, progress)
    };
    for looks in [1, 3, 10] {
        let stopped = run(false, &After(AtomicU64::new(looks)));
        assert!(matches!(
            stopped,
            Err(ConvertError::Disk(DiskError::Cancelled))
        ));
        assert_eq!(names(), before);
    }
    std::fs::write(&to, "mine").unwrap();
    assert!(matches!(
        run(false, &Unwatched),
        Err(ConvertError::Exists(_))
    ));
    assert_eq!(std::fs::read(&to).unwrap(), b"mine");
    run(true, &Unwatched).unwrap();
    // In use: not taken away.
    let disk = storage::open(&to, &storage::OpenOptions::default()).unwrap();
    assert!(matches!(run(true, &Unwatched), Err(ConvertError::Open(_))));
    drop(disk);
    assert_eq!(names().len(), before.len() + 1);
}

/// Reads all of a source, as far as it lets itself be read.
fn read_all(path: &Path, options: &SourceOptions) {
    let Ok((_, mut source)) = foreign::open(path, options) else {
        return;
    };
    // A header can claim more than anyone would wait for.
    let size = source.size().min(64 * MIB);
    let (mut at, mut looks) = (0, 0);
    let mut buffer = vec![0; 65536];
    while at < size && looks < 4096 {
        looks += 1;
        let Ok(run) = source.span_at(at) else {
            return;
        };
        assert!(run.len > 0, "a run has bytes");
        if run.is_data {
            let len = run.len.min(buffer.len() as u64).min(size - at) as usize;
            let _ = source.read_at(&mut buffer[..len], at);
            at += len as u64;
        } else {
            at += run.len;
        }
    }
}

#[test]
fn damaged_sources_are_refused_or_read_and_never_harm() {
    let folder = tempfile::tempdir().unwrap();
    let small = folder.path().join("small.raw");
    let file = std::fs::File::create(&small).unwrap();
    file.set_len(3 * MIB).unwrap();
    file.write_all_at(&vec![0x5A; 200_000], 100_000).unwrap();
    for (format, name, options) in [
        (SourceFormat::Qcow2, "qcow2", "compat=1.1"),
        (SourceFormat::Vhd, "vpc", "subformat=dynamic"),
        (SourceFormat::Vmdk, "vmdk", "subformat=monolithicSparse"),
        (SourceFormat::Vmdk, "vmdk", "subformat=streamOptimized"),
    ] {
        let made = folder.path().join("made");
        let _ = std::fs::remove_file(&made);
        qemu(
            &[
                "convert",
                "-f",
                "raw",
                "-O",
                name,
                "-o",
                options,
                small.to_str().unwrap(),
            ],
            &made,
        );
        let good = std::fs::read(&made).unwrap();
        let broken = folder.path().join("broken");
        // The structures lie at the start, and in part at the end.
        let mut state = 1_u64;
        for round in 0..400 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let mut bytes = good.clone();
            if round % 8 == 0 {
                bytes.truncate((state >> 20) as usize % bytes.len());
            } else {
                let near = if round % 3 == 0 {
                    bytes.len()
                } else {
                    2048.min(bytes.len())
                };
                for _ in 0..=round % 4 {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    bytes[(state >> 20) as usize % near] = (state >> 50) as u8;
                }
            }
            std::fs::write(&broken, &bytes).unwrap();
            read_all(&broken, &SourceOptions::default());
            read_all(&broken, &following(format));
        }
    }
}
