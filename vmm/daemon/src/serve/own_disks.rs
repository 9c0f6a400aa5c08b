//! Disks in a guest's folder: those that it was given as children of others, and its own alone.

use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, linkat, open, openat2};

use super::pending::is_missing;
use super::store;

/// The name of a guest's own disk for a drive, in the guest's folder: `of` tells what it is a child of.
pub fn own_disk(folder: &Path, drive: &str, of: &str) -> PathBuf {
    folder.join(format!("disk-{drive}-{of}.vhdx"))
}

/// Such a name that no file has: a guest may have become a template of that name before.
///
/// # Errors
/// What the host says.
pub fn free_disk(folder: &Path, drive: &str, of: &str) -> io::Result<PathBuf> {
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

/// Whether it is such a name, of whichever number.
pub fn is_free_disk_of(path: &Path, folder: &Path, drive: &str, of: &str) -> bool {
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

/// Gives the file at `inside` of a guest's folder a second name, and no file that is reached by way of what the guest has put there.
///
/// # Errors
/// What the host says.
pub fn link_inside(folder: &Path, inside: &Path, second: &Path) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let folder = open(folder, flags | OFlags::DIRECTORY, Mode::empty())?;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let file = openat2(&folder, inside, flags, Mode::empty(), within)?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(CWD, path, CWD, second, AtFlags::SYMLINK_FOLLOW)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_disk_that_goes_on_has_a_name_that_no_file_has() {
        let folder = tempfile::tempdir().unwrap();
        let name = || free_disk(folder.path(), "root", "after-t").unwrap();
        for expected in ["disk-root-after-t.vhdx", "disk-root-after-t-2.vhdx"] {
            assert_eq!(name(), folder.path().join(expected));
            assert!(is_free_disk_of(&name(), folder.path(), "root", "after-t"));
            fs::write(name(), "").unwrap();
        }
        for (name, of) in [
            ("after-t", "after-u"),
            ("after-two", "after-t"),
            ("t", "after-t"),
        ] {
            let path = own_disk(folder.path(), "root", name);
            assert!(!is_free_disk_of(&path, folder.path(), "root", of), "{name}");
        }
    }

    #[test]
    fn only_what_is_in_a_guests_folder_is_linked() {
        let outside = tempfile::tempdir().unwrap();
        let folder = outside.path().join("vm");
        fs::create_dir_all(folder.join("sub")).unwrap();
        for name in ["secret", "vm/disk", "vm/sub/disk"] {
            fs::write(outside.path().join(name), name).unwrap();
        }
        std::os::unix::fs::symlink(outside.path(), folder.join("way")).unwrap();
        std::os::unix::fs::symlink("../secret", folder.join("link")).unwrap();
        let second = outside.path().join("second");
        for inside in ["way/secret", "../secret", "sub/../../secret", "link"] {
            link_inside(&folder, Path::new(inside), &second).unwrap_err();
            assert!(is_missing(&second).unwrap(), "{inside}");
        }
        for inside in ["disk", "sub/disk"] {
            link_inside(&folder, Path::new(inside), &second).unwrap();
            let linked = fs::read_to_string(&second).unwrap();
            assert_eq!(linked, format!("vm/{inside}"));
            fs::remove_file(&second).unwrap();
        }
    }
}
