//! Disks in a guest's folder, which are children of other disks. The guest's process makes them, so they are found by
//! rules for their names, and what lies under such a name is checked.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::store::{self, is_missing, open_without_waiting};
use config::DeviceId;
use storage::vhdx::SIGNATURE;

/// Whether the disk that a process has begun to make is complete: its signature is written last. The process may have
/// put anything under that name.
pub fn is_whole(path: &Path) -> bool {
    let looked = || -> io::Result<bool> {
        let mut file = open_without_waiting(path, File::options().read(true))?;
        let mut found = [0; SIGNATURE.len()];
        Ok(file.read_exact(&mut found).is_ok() && found == *SIGNATURE)
    };
    looked().unwrap_or(false)
}

/// The VHDX files in a guest's folder that have no second name elsewhere, as paths from there. Where one of these is
/// the parent of a disk, the guest may merge the disk into it. The disk of a template that an older daemon made has a
/// second name.
///
/// # Errors
/// The host's error.
pub fn own_disks(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut own = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = Path::new(".").join(entry.file_name());
        let is_alone = entry.metadata()?.nlink() == 1;
        if is_alone && name.to_str().is_some() && is_whole(&entry.path()) {
            own.push(name);
        }
    }
    own.sort();
    Ok(own)
}

/// The path of a guest's own disk for a drive, in the guest's folder. `of` is a part of its name that says what it is a
/// child of.
pub fn own_disk(folder: &Path, drive: &DeviceId, of: &str) -> PathBuf {
    folder.join(format!("disk-{drive}-{of}.vhdx"))
}

/// Such a path that no file has yet: with a number, where the guest has become a template of that name before.
///
/// # Errors
/// The host's error.
pub fn free_disk(folder: &Path, drive: &DeviceId, of: &str) -> io::Result<PathBuf> {
    let mut number = 1;
    loop {
        let of = match number {
            1 => of.to_owned(),
            _ => format!("{of}-{number}"),
        };
        let path = own_disk(folder, drive, &of);
        if is_missing(&path).map_err(store::named(&path))? {
            return Ok(path);
        }
        number += 1;
    }
}

/// Whether `path` is such a path, with any number or none.
pub fn is_free_disk_of(path: &Path, folder: &Path, drive: &DeviceId, of: &str) -> bool {
    let name = || {
        let name = path.strip_prefix(folder).ok()?.to_str()?;
        let number = name.strip_prefix(&format!("disk-{drive}-{of}"))?;
        number.strip_suffix(".vhdx")
    };
    let is_number = |rest: &str| {
        let number = rest.strip_prefix('-');
        number.is_some_and(|number| number.parse::<u32>().is_ok())
    };
    name().is_some_and(|number| number.is_empty() || is_number(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> DeviceId {
        DeviceId::new("root").unwrap()
    }

    #[test]
    fn a_disk_is_whole_when_its_first_bytes_are_there_which_are_written_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("child.vhdx");
        assert!(is_missing(&path).unwrap() && !is_whole(&path));
        fs::write(&path, [0; 64]).unwrap();
        assert!(!is_missing(&path).unwrap() && !is_whole(&path));
        fs::write(&path, SIGNATURE).unwrap();
        assert!(is_whole(&path));
        let link = folder.path().join("link.vhdx");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(!is_missing(&link).unwrap() && !is_whole(&link));
        assert!(!is_whole(folder.path()));
    }

    #[test]
    fn a_disk_that_goes_on_has_a_name_that_no_file_has() {
        let folder = tempfile::tempdir().unwrap();
        let name = || free_disk(folder.path(), &root(), "after-t").unwrap();
        for expected in ["disk-root-after-t.vhdx", "disk-root-after-t-2.vhdx"] {
            assert_eq!(name(), folder.path().join(expected));
            assert!(is_free_disk_of(&name(), folder.path(), &root(), "after-t"));
            fs::write(name(), "").unwrap();
        }
        for (name, of) in [
            ("after-t", "after-u"),
            ("after-two", "after-t"),
            ("t", "after-t"),
        ] {
            let path = own_disk(folder.path(), &root(), name);
            assert!(
                !is_free_disk_of(&path, folder.path(), &root(), of),
                "{name}"
            );
        }
    }
}
