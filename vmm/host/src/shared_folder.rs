//! Files below a folder in which others make links: the one that this process works in, where that is a guest's.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat2};

/// Bits of a folder's mode by which others than its owner can make links in it.
const OTHERS_WRITE: u32 = 0o022;

/// A whole path without `.` and `..`.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => _ = normal.pop(),
            Component::CurDir => {}
            Component::RootDir | Component::Normal(_) | Component::Prefix(_) => normal.push(part),
        }
    }
    normal
}

/// The path from the folder that this process works in, where the file lies below that folder and others may write
/// there: a guest's folder, in which the guest's process can put a link in the place of anything. That of a relative
/// path that leads elsewhere, too, as nobody means that.
pub(crate) fn in_shared_folder(path: &Path) -> io::Result<Option<PathBuf>> {
    let folder = std::env::current_dir()?;
    let whole = normal(&folder.join(path));
    let inside = match whole.strip_prefix(&folder) {
        Ok(inside) => inside,
        Err(_) if path.is_relative() => path,
        Err(_) => return Ok(None),
    };
    let metadata = fs::metadata(&folder)?;
    let is_own = metadata.uid() == rustix::process::geteuid().as_raw();
    let is_shared = !is_own || metadata.mode() & OTHERS_WRITE != 0;
    Ok(is_shared.then(|| inside.to_owned()))
}

/// Opens a path from `folder`, which leads to no place outside of it, and by no link.
///
/// # Errors
/// The host's error: `ELOOP` where there is a link, `EXDEV` where the path leads elsewhere (openat2(2)).
pub fn open_beneath(
    folder: impl AsFd,
    path: &Path,
    flags: OFlags,
    mode: Mode,
) -> rustix::io::Result<OwnedFd> {
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    openat2(folder, path, flags | OFlags::CLOEXEC, mode, within)
}

/// Whether a path leads to a regular file: below a folder in which others make links, by no link. Nothing is read.
pub fn is_plain_file(path: &Path) -> bool {
    plain_kind(path) == Some(FileType::RegularFile)
}

/// As [`is_plain_file`], to a block device.
pub fn is_plain_block_device(path: &Path) -> bool {
    plain_kind(path) == Some(FileType::BlockDevice)
}

fn plain_kind(path: &Path) -> Option<FileType> {
    // A path that a file there names may lead elsewhere.
    let whole = std::env::current_dir().map(|folder| folder.join(path));
    match whole.and_then(|whole| in_shared_folder(&whole)) {
        Ok(None) => {
            let metadata = path.metadata().ok()?;
            Some(FileType::from_raw_mode(metadata.mode()))
        }
        Ok(Some(inside)) => {
            let stat = open_beneath(CWD, &inside, OFlags::PATH, Mode::empty()).and_then(fstat);
            Some(FileType::from_raw_mode(stat.ok()?.st_mode))
        }
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// It changes the folder that the process works in; each test has a process of its own under nextest.
    #[test]
    fn a_plain_file_is_reached_by_no_link_where_others_make_links() {
        let outer = tempfile::tempdir().unwrap();
        let outer = outer.path().canonicalize().unwrap();
        let folder = outer.join("vm");
        fs::create_dir(&folder).unwrap();
        fs::create_dir(outer.join("other")).unwrap();
        for name in ["outside", "other/disk", "vm/disk"] {
            fs::write(outer.join(name), "").unwrap();
        }
        symlink("../outside", folder.join("link")).unwrap();
        symlink("../other", folder.join("folder")).unwrap();
        symlink("/", folder.join("root")).unwrap();
        std::env::set_current_dir(&folder).unwrap();
        let link = folder.join("link");
        let back = folder.join("../other/../vm/link");
        let links = [Path::new("link"), Path::new("folder/disk"), &link, &back];
        let never = [".", "root", "missing", "/", "/dev/null"].map(Path::new);
        let (disk, outside) = (folder.join("disk"), outer.join("outside"));
        let leads_out = folder.join("../other/disk");
        let always = [
            Path::new("disk"),
            Path::new("../other/disk"),
            &disk,
            &outside,
            &leads_out,
        ];
        for (mode, follows) in [(0o1770, false), (0o755, true)] {
            fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).unwrap();
            assert!(links.iter().all(|path| is_plain_file(path) == follows));
            assert!(never.iter().all(|path| !is_plain_file(path)));
            assert!(always.iter().all(|path| is_plain_file(path)));
        }
    }
}
