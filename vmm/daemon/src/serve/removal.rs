//! The removal of a folder that a guest's process has written to.
//!
//! No link in it is followed. Its folders may be in each other any number of times: what removes them one inside the
//! other, as the standard library does, has a file open and takes stack for each, until the daemon has no more of
//! either. So a folder that is found in another one is moved to the top, and removed from there.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, Mode, OFlags, RenameFlags, fchmod, fchown, openat, renameat_with, unlinkat,
};
use rustix::io::Errno;
use rustix::path::Arg;
use rustix::process::{getegid, geteuid};

/// Names of a folder that are kept at the same time.
const AT_ONCE: usize = 4096;

fn open_folder(at: impl AsFd, path: impl Arg) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    openat(at, path, flags, Mode::empty())
}

/// Opens a folder to remove what is in it. Where the daemon is root's, the process can put nothing more into it.
fn take(at: impl AsFd, path: impl Arg) -> rustix::io::Result<OwnedFd> {
    let folder = open_folder(at, path)?;
    let _ = fchown(&folder, Some(geteuid()), Some(getegid()));
    fchmod(&folder, Mode::RWXU)?;
    Ok(folder)
}

/// Some of the names in a folder, without those of itself and of the one above it; none where it is empty.
fn some_names(folder: impl AsFd) -> rustix::io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let name = entry?.file_name().to_owned();
        if !matches!(name.as_bytes(), b"." | b"..") {
            names.push(name);
        }
        if names.len() == AT_ONCE {
            break;
        }
    }
    Ok(names)
}

/// Removes what is no folder, or a folder that is empty; false where it is a folder that is not. What is gone is
/// removed.
fn remove_one(at: impl AsFd, path: impl Arg + Copy) -> rustix::io::Result<bool> {
    let removed = match unlinkat(&at, path, AtFlags::empty()) {
        Err(Errno::ISDIR) => unlinkat(&at, path, AtFlags::REMOVEDIR),
        removed => removed,
    };
    match removed {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Moves a folder to the top, under a name that nothing has there.
fn hoist(folder: &OwnedFd, inner: &CStr, top: &OwnedFd, moved: &mut u64) -> io::Result<()> {
    loop {
        let new = format!("removed-{moved}");
        *moved += 1;
        match renameat_with(folder, inner, top, &*new, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {}
            Err(Errno::NOENT) => return Ok(()),
            renamed => return Ok(renamed?),
        }
    }
}

/// Removes a folder and all in it, or what is there instead, if there is anything.
///
/// # Errors
/// The host's error.
pub fn remove_folder(path: &Path) -> io::Result<()> {
    if remove_one(CWD, path)? {
        return Ok(());
    }
    let (top, mut moved) = (take(CWD, path)?, 0);
    loop {
        let names = some_names(&top)?;
        if names.is_empty() {
            break;
        }
        for name in names {
            while !remove_one(&top, &*name)? {
                let folder = take(&top, &*name)?;
                for inner in some_names(&folder)? {
                    if !remove_one(&folder, &*inner)? {
                        hoist(&folder, &inner, &top, &mut moved)?;
                    }
                }
            }
        }
    }
    if remove_one(CWD, path)? {
        return Ok(());
    }
    Err(Errno::NOTEMPTY.into())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use rustix::fs::mkdirat;
    use rustix::process::{Resource, Rlimit, setrlimit};

    use super::*;

    #[test]
    fn folders_in_each_other_take_neither_files_nor_stack_and_no_link_is_followed() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("vm");
        fs::create_dir(&folder).unwrap();
        fs::write(outer.path().join("kept"), "").unwrap();
        let mut inner = open_folder(CWD, &folder).unwrap();
        for depth in 0..4000 {
            for name in ["d", "e"] {
                mkdirat(&inner, name, Mode::RWXU).unwrap();
            }
            let below = open_folder(&inner, "d").unwrap();
            if depth == 7 {
                rustix::fs::symlinkat(outer.path(), &below, "link").unwrap();
            }
            inner = below;
        }
        fs::create_dir(folder.join("removed-0")).unwrap();
        fs::write(folder.join("removed-0/file"), "").unwrap();
        fs::write(folder.join("removed-1"), "").unwrap();
        symlink("kept", outer.path().join("link")).unwrap();
        let few = Some(32);
        let limit = Rlimit {
            current: few,
            maximum: few,
        };
        setrlimit(Resource::Nofile, limit).unwrap();
        remove_folder(&folder).unwrap();
        remove_folder(&folder).unwrap();
        remove_folder(&outer.path().join("link")).unwrap();
        let names = fs::read_dir(outer.path()).unwrap().flatten();
        let names: Vec<_> = names.map(|entry| entry.file_name()).collect();
        assert_eq!(names, ["kept"]);
    }
}
