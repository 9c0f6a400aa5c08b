//! The other files that a source names, by a header that a guest could have written.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use storage::foreign::{self, Backing, NotFollowed, SourceError, SourceFormat, SourceOptions};
use storage::vhdx::{ChildOptions, CreateOptions, Vhdx};

const SIZE: u64 = 1 << 20;

/// The first 256 KiB of a qcow2 image (version 2) of 1 MiB without data, on a backing file of this name.
fn qcow2(backing: &str, format: Option<&str>) -> Vec<u8> {
    let mut image = vec![0; 256 << 10];
    let mut head = Vec::new();
    head.extend(b"QFI\xfb");
    head.extend(2_u32.to_be_bytes());
    head.extend(1024_u64.to_be_bytes());
    head.extend((backing.len() as u32).to_be_bytes());
    head.extend(16_u32.to_be_bytes());
    head.extend(SIZE.to_be_bytes());
    // No encryption; a table of one entry at 64 KiB, the table of reference counts at 128 KiB, no snapshots.
    head.extend(0_u32.to_be_bytes());
    head.extend(1_u32.to_be_bytes());
    head.extend((64_u64 << 10).to_be_bytes());
    head.extend((128_u64 << 10).to_be_bytes());
    head.extend(1_u32.to_be_bytes());
    head.extend([0; 12]);
    if let Some(format) = format {
        // The header extension that names the format of the backing file.
        head.extend(0xE279_2ACA_u32.to_be_bytes());
        head.extend((format.len() as u32).to_be_bytes());
        head.extend(format.bytes());
        head.resize(head.len().next_multiple_of(8), 0);
    }
    image[..head.len()].copy_from_slice(&head);
    image[1024..1024 + backing.len()].copy_from_slice(backing.as_bytes());
    image
}

fn vmdk(extent: &str) -> Vec<u8> {
    format!("# Disk DescriptorFile\nversion=1\nRW 2048 FLAT \"{extent}\" 0\n").into_bytes()
}

fn following(format: SourceFormat, backing: Backing) -> SourceOptions {
    SourceOptions {
        backing: Some(backing),
        ..SourceOptions::named(format)
    }
}

fn refusal(path: &Path, options: &SourceOptions) -> (SourceError, String) {
    let error = foreign::open(path, options).err().unwrap();
    let said = report::chain(&error).to_string();
    (error, said)
}

/// The first bytes of a disk.
fn first(path: &Path, options: &SourceOptions) -> Vec<u8> {
    let (_, mut disk) = foreign::open(path, options).unwrap();
    assert_eq!(disk.size(), SIZE);
    let mut bytes = vec![0; 512];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// A guest's folder beside that of a neighbour, whose disk of 1 MiB is all sevens.
struct Host {
    _all: tempfile::TempDir,
    guest: PathBuf,
    neighbour: PathBuf,
}

fn host() -> Host {
    let all = tempfile::tempdir().unwrap();
    let root = all.path().canonicalize().unwrap();
    let (guest, other) = (root.join("guest"), root.join("other"));
    fs::create_dir(&guest).unwrap();
    fs::create_dir(&other).unwrap();
    let neighbour = other.join("disk.raw");
    fs::write(&neighbour, vec![7; SIZE as usize]).unwrap();
    Host {
        _all: all,
        guest,
        neighbour,
    }
}

/// What a guest plants in its raw disk, of each format that names files.
fn planted(host: &Host, name: &str) -> Vec<(SourceFormat, PathBuf)> {
    let mut all = Vec::new();
    for (format, bytes) in [
        (SourceFormat::Qcow2, qcow2(name, Some("raw"))),
        (SourceFormat::Qcow2, qcow2(name, None)),
        (SourceFormat::Vmdk, vmdk(name)),
    ] {
        let path = host.guest.join(format!("planted-{}", all.len()));
        fs::write(&path, bytes).unwrap();
        all.push((format, path));
    }
    all
}

#[test]
fn a_guessed_format_follows_nothing_and_says_how_to_be_allowed() {
    let host = host();
    fs::copy(&host.neighbour, host.guest.join("inside")).unwrap();
    let parent = host.guest.join("parent.vhdx");
    Vhdx::create(&parent, &CreateOptions::new(SIZE)).unwrap();
    let child = host.guest.join("child.vhdx");
    Vhdx::create_child(&child, &parent, &ChildOptions::default()).unwrap();
    let mut sources = planted(&host, host.neighbour.to_str().unwrap());
    sources.extend(planted(&host, "inside"));
    sources.push((SourceFormat::Vhdx, child));
    for (format, path) in sources {
        for damaged in [false, true] {
            // A folder without a format allows nothing.
            for backing in [None, Some(Backing::Beside)] {
                let options = SourceOptions {
                    damaged,
                    backing,
                    ..SourceOptions::default()
                };
                let (error, said) = refusal(&path, &options);
                assert!(
                    matches!(
                        error,
                        SourceError::Named {
                            reason: NotFollowed::Guessed { .. },
                            ..
                        }
                    ),
                    "{said}"
                );
                let way = format!("`--from {} --backing`", format.name());
                assert!(said.contains(&way), "{said}");
            }
        }
        let (error, said) = refusal(&path, &SourceOptions::named(format));
        assert!(
            matches!(
                error,
                SourceError::Named {
                    reason: NotFollowed::NotAsked,
                    ..
                }
            ),
            "{said}"
        );
        assert!(said.contains("`--backing`"), "{said}");
    }
}

#[test]
fn what_is_named_is_read_in_the_folder_that_is_allowed_and_nowhere_else() {
    let host = host();
    let outer = host.guest.parent().unwrap().to_owned();
    fs::create_dir(host.guest.join("below")).unwrap();
    fs::write(host.guest.join("below/inside"), vec![5; SIZE as usize]).unwrap();
    symlink("below/inside", host.guest.join("link-in")).unwrap();
    symlink(&host.neighbour, host.guest.join("link-out")).unwrap();
    symlink("../other", host.guest.join("folder-out")).unwrap();
    for inside in ["below/inside", "link-in", "../guest/below/inside"] {
        for (format, path) in planted(&host, inside) {
            let found = first(&path, &following(format, Backing::Beside));
            assert_eq!(found, [5; 512], "{inside}");
        }
    }
    let neighbour = host.neighbour.to_str().unwrap();
    for outside in [
        neighbour,
        "../other/disk.raw",
        "link-out",
        "folder-out/disk.raw",
    ] {
        for (format, path) in planted(&host, outside) {
            let (error, said) = refusal(&path, &following(format, Backing::Beside));
            assert!(
                matches!(&error, SourceError::Named { reason: NotFollowed::Outside { found, .. }, .. } if *found == host.neighbour),
                "{said}"
            );
            assert!(said.contains("`--backing-dir`"), "{said}");
            let allowed = following(format, Backing::Within(outer.clone()));
            assert_eq!(first(&path, &allowed), [7; 512], "{outside}");
        }
    }
}

#[test]
fn parents_of_a_vhdx_are_followed_as_other_files_are() {
    let host = host();
    let outer = host.guest.parent().unwrap().to_owned();
    let parent = outer.join("other/parent.vhdx");
    Vhdx::create(&parent, &CreateOptions::new(SIZE)).unwrap();
    let child = host.guest.join("child.vhdx");
    Vhdx::create_child(&child, &parent, &ChildOptions::default()).unwrap();
    for damaged in [false, true] {
        let options = |backing| SourceOptions {
            damaged,
            ..following(SourceFormat::Vhdx, backing)
        };
        let (_, said) = refusal(&child, &options(Backing::Beside));
        assert!(
            said.contains("parent.vhdx") && said.contains("`--backing-dir`"),
            "{said}"
        );
        first(&child, &options(Backing::Within(outer.clone())));
    }
}

#[test]
fn what_is_no_regular_file_is_refused_without_waiting() {
    let host = host();
    let fifo = host.guest.join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.unwrap().success());
    fs::create_dir(host.guest.join("folder")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(host.guest.join("socket")).unwrap();
    for (name, within, kind) in [
        ("fifo", &*host.guest, "a FIFO"),
        ("folder", &host.guest, "a directory"),
        (".", &host.guest, "a directory"),
        ("socket", &host.guest, "a socket"),
        ("/dev/zero", Path::new("/dev"), "a character device"),
        ("/dev/zero", Path::new("/"), "a character device"),
    ] {
        for (format, path) in planted(&host, name) {
            let options = following(format, Backing::Within(within.to_owned()));
            let (_, said) = refusal(&path, &options);
            assert!(said.contains(kind), "{name}: {said}");
        }
    }
    for (format, path) in planted(&host, "none") {
        let (_, said) = refusal(&path, &following(format, Backing::Beside));
        assert!(said.contains("No such file"), "{said}");
    }
}

#[test]
fn a_circle_is_named() {
    let host = host();
    let follow = following(SourceFormat::Qcow2, Backing::Beside);
    let names = ["a", "b", "c"];
    for (name, next) in [("a", "b"), ("b", "c"), ("c", "a"), ("self", "self")] {
        fs::write(host.guest.join(name), qcow2(next, Some("qcow2"))).unwrap();
    }
    // By another name, and another link, it is the same file.
    symlink("again", host.guest.join("link")).unwrap();
    fs::write(host.guest.join("again"), qcow2("link", Some("qcow2"))).unwrap();
    fs::hard_link(host.guest.join("again"), host.guest.join("second")).unwrap();
    for name in names.iter().chain(&["self", "again", "second"]) {
        let (error, said) = refusal(&host.guest.join(name), &follow);
        assert!(
            matches!(&error, SourceError::Named { reason: NotFollowed::Circle(other), .. } if other.ends_with(name)),
            "{said}"
        );
        assert!(said.contains("in a circle"), "{said}");
    }
    fs::write(host.guest.join("descriptor"), vmdk("descriptor")).unwrap();
    let options = following(SourceFormat::Vmdk, Backing::Beside);
    let (_, said) = refusal(&host.guest.join("descriptor"), &options);
    assert!(said.contains("in a circle"), "{said}");
}

#[test]
fn sixteen_files_may_stand_one_behind_the_other() {
    let host = host();
    let follow = following(SourceFormat::Qcow2, Backing::Beside);
    let name = |number: u32| host.guest.join(number.to_string());
    fs::write(name(0), vec![3; SIZE as usize]).unwrap();
    fs::write(name(1), qcow2("0", Some("raw"))).unwrap();
    for number in 2..=17 {
        let image = qcow2(&(number - 1).to_string(), Some("qcow2"));
        fs::write(name(number), image).unwrap();
    }
    assert_eq!(first(&name(16), &follow), [3; 512]);
    let (error, said) = refusal(&name(17), &follow);
    assert!(
        matches!(&error, SourceError::Named { name, reason: NotFollowed::TooDeep, .. } if name == "0"),
        "{said}"
    );

    let name = |number: u32| host.guest.join(format!("{number}.vhdx"));
    Vhdx::create(name(0), &CreateOptions::new(SIZE)).unwrap();
    for number in 1..=17 {
        Vhdx::create_child(name(number), name(number - 1), &ChildOptions::default()).unwrap();
    }
    let follow = following(SourceFormat::Vhdx, Backing::Beside);
    first(&name(16), &follow);
    let (_, said) = refusal(&name(17), &follow);
    assert!(said.contains("more than 16 files"), "{said}");
}

#[test]
fn a_backing_file_of_no_known_format_is_guessed_and_names_nothing() {
    let host = host();
    let follow = following(SourceFormat::Qcow2, Backing::Beside);
    let path = |name: &str| host.guest.join(name);
    fs::copy(&host.neighbour, path("raw")).unwrap();
    fs::write(path("middle"), qcow2("raw", Some("raw"))).unwrap();
    fs::write(path("top"), qcow2("middle", None)).unwrap();
    let (error, said) = refusal(&path("top"), &follow);
    assert!(
        matches!(&error, SourceError::Named { name, reason: NotFollowed::Guessed { .. }, .. } if name == "raw"),
        "{said}"
    );
    fs::write(path("top"), qcow2("middle", Some("qcow2"))).unwrap();
    assert_eq!(first(&path("top"), &follow), [7; 512]);
    // A raw disk under an image that says so stays raw, whatever its guest has written.
    fs::write(path("raw"), qcow2(host.neighbour.to_str().unwrap(), None)).unwrap();
    let (_, mut disk) = foreign::open(&path("top"), &follow).unwrap();
    let mut bytes = [0; 4];
    disk.read_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"QFI\xfb");
}

#[test]
fn the_file_with_the_data_of_an_image_is_one_that_it_names() {
    let host = host();
    let (image, data) = (host.guest.join("image"), host.guest.join("data"));
    let options = format!("data_file={},data_file_raw=on", data.display());
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", &options])
        .arg(&image)
        .arg("1M")
        .status();
    assert!(made.expect("qemu-img: run resources/setup.sh").success());
    let (error, said) = refusal(&image, &SourceOptions::default());
    assert!(
        matches!(
            &error,
            SourceError::Named {
                what: "file with the data",
                reason: NotFollowed::Guessed { .. },
                ..
            }
        ),
        "{said}"
    );
    let follow = following(SourceFormat::Qcow2, Backing::Beside);
    let written = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 4 0 64k"])
        .arg(&image)
        .output();
    assert!(written.unwrap().status.success());
    assert_eq!(first(&image, &follow), [4; 512]);
    fs::remove_file(&data).unwrap();
    symlink(&host.neighbour, &data).unwrap();
    let (_, said) = refusal(&image, &follow);
    assert!(said.contains("`--backing-dir`"), "{said}");
}
