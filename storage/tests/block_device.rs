//! Block devices of the host as raw disks: a loop device stands for any. Only root can make one.

#![allow(clippy::unwrap_used, reason = "these are tests")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use storage::{ByteRange, FileKinds, Format, OpenOptions, remeasure};
use tempfile::NamedTempFile;

const SIZE: u64 = 4 << 20;

/// A loop device over a file, which goes with it.
struct Loop {
    file: NamedTempFile,
    device: PathBuf,
}

impl Loop {
    /// `None`, with a report, where the host gives none.
    fn new() -> Option<Self> {
        if !skip::unless_root() {
            return None;
        }
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(SIZE).unwrap();
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file.path())
            .output();
        match made {
            Ok(made) if made.status.success() => {
                let device = String::from_utf8(made.stdout).unwrap();
                let device = PathBuf::from(device.trim());
                Some(Self { file, device })
            }
            Ok(made) => {
                skip::because(&String::from_utf8_lossy(&made.stderr));
                None
            }
            Err(error) => {
                skip::because(&format!("losetup: {error}"));
                None
            }
        }
    }

    /// The device learns that its file is larger.
    fn grow(&self, size: u64) {
        self.file.as_file().set_len(size).unwrap();
        let told = Command::new("losetup").arg("-c").arg(&self.device).status();
        assert!(told.unwrap().success());
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

fn options(read_only: bool) -> OpenOptions {
    OpenOptions {
        read_only,
        kinds: FileKinds::RegularAndBlock,
        ..OpenOptions::default()
    }
}

fn refused(path: &Path, options: &OpenOptions) -> String {
    let error = storage::open(path, options).unwrap_err();
    report::chain(&error).to_string()
}

#[test]
fn a_block_device_is_a_raw_disk_of_its_size_where_that_is_asked_for() {
    let Some(device) = Loop::new() else {
        return;
    };
    let path = &device.device;
    assert!(refused(path, &OpenOptions::default()).contains("a block device"));
    let vhdx = OpenOptions {
        format: Some(Format::Vhdx),
        ..options(false)
    };
    assert!(refused(path, &vhdx).contains("nothing but raw"));

    let disk = storage::open(path, &options(false)).unwrap();
    assert_eq!(disk.geometry().size, SIZE);
    let range = ByteRange::new(4096, 8192).unwrap();
    File::options()
        .write(true)
        .open(path)
        .unwrap()
        .write_all_at(&[7; 16384], 0)
        .unwrap();
    disk.write_zeroes(range, false).unwrap();
    disk.discard(ByteRange::new(12288, 4096).unwrap()).unwrap();
    disk.discard(ByteRange::new(512, 512).unwrap()).unwrap();
    disk.flush().unwrap();
    let mut map = Vec::new();
    disk.map(ByteRange::new(0, SIZE).unwrap(), &mut map)
        .unwrap();
    let mut found = vec![0; 16384];
    let own = disk.files().remove(0);
    own.read_exact_at(&mut found, 0).unwrap();
    assert_eq!(found[..512], [7; 512]);
    assert_eq!(found[4096..12288], [0; 8192]);
    assert_eq!(map.iter().map(|part| part.len).sum::<u64>(), SIZE);
}

#[test]
fn a_block_device_has_one_writer_and_its_pages_are_shared_with_nobody() {
    let Some(device) = Loop::new() else {
        return;
    };
    let path = &device.device;
    let writer = storage::open(path, &options(false)).unwrap();
    assert!(refused(path, &options(false)).contains("open the file"));
    assert!(refused(path, &options(true)).contains("in use for writing"));
    drop(writer);
    let (first, second) = (
        storage::open(path, &options(true)).unwrap(),
        storage::open(path, &options(true)).unwrap(),
    );
    assert!(first.geometry().read_only);
    for disk in [&first, &second] {
        let file = disk.files().remove(0);
        assert!(!disk.is_immutable(&file));
    }
    assert!(refused(path, &options(false)).contains("in use for reading"));
}

#[test]
fn a_disk_that_was_made_larger_is_measured_anew_while_it_is_open() {
    let Some(device) = Loop::new() else {
        return;
    };
    let path = &device.device;
    let disk = storage::open(path, &options(false)).unwrap();
    device.grow(2 * SIZE);
    let larger = remeasure(&disk, path).unwrap().unwrap();
    assert_eq!(larger.geometry().size, 2 * SIZE);
    let last = ByteRange::new(2 * SIZE - 512, 512).unwrap();
    let write = larger.resolve_write(last, &mut Vec::new()).unwrap();
    larger.finish(write, true);
}

#[test]
fn a_raw_file_is_measured_anew_and_no_other_file_is_taken_for_it() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    let disk = storage::open(file.path(), &OpenOptions::default()).unwrap();
    file.as_file().set_len(SIZE + 512).unwrap();
    let larger = remeasure(&disk, file.path()).unwrap().unwrap();
    assert_eq!(larger.geometry().size, SIZE + 512);
    file.as_file().set_len(SIZE + 1).unwrap();
    remeasure(&disk, file.path()).unwrap_err();
    let other = NamedTempFile::new().unwrap();
    other.as_file().set_len(SIZE).unwrap();
    assert!(remeasure(&disk, other.path()).unwrap().is_none());
    remeasure(&disk, Path::new("/nonexistent/disk")).unwrap_err();
}
