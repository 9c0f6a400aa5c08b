//! Files that a process appends to: the log, the metrics, the output of a serial console.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

use crate::shared_folder::{in_shared_folder, open_beneath};

fn open(path: &Path, inside: Option<&Path>, access: OFlags) -> rustix::io::Result<File> {
    let flags = access
        | OFlags::APPEND
        | OFlags::CREATE
        | OFlags::NONBLOCK
        | OFlags::NOCTTY
        | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    let opened = match inside {
        Some(inside) => open_beneath(CWD, inside, flags, mode),
        None => openat(CWD, path, flags, mode),
    };
    Ok(opened?.into())
}

/// Opens a file or named pipe to append to. A file that does not exist is made for its owner alone. A named pipe is
/// opened for reading as well, because otherwise it could not be opened while it has no reader, and writes would fail
/// when its reader ends. Where the file lies below the folder that this process works in, and others may write to that
/// folder, no link is followed, and a relative path leads nowhere else.
///
/// # Errors
/// The host's error; `ELOOP` where there is a link that is not followed, `EXDEV` where a relative path leads elsewhere.
pub fn open_output(path: &Path) -> io::Result<File> {
    let inside = in_shared_folder(path)?;
    let inside = inside.as_deref();
    match open(path, inside, OFlags::WRONLY) {
        Ok(file) if !file.metadata()?.file_type().is_fifo() => Ok(file),
        // A named pipe, which has no reader in the second case.
        Ok(_) | Err(Errno::NXIO) => Ok(open(path, inside, OFlags::RDWR)?),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// The folder that a process works in is one for all its threads: this is the only test here that changes it, and
    /// each test has a process of its own under nextest.
    #[test]
    fn no_link_is_followed_in_a_folder_that_others_write_to_and_all_are_elsewhere() {
        let outer = tempfile::tempdir().unwrap();
        let outer = outer.path().canonicalize().unwrap();
        let (folder, outside) = (outer.join("vm"), outer.join("outside"));
        fs::create_dir_all(folder.join("sub")).unwrap();
        fs::create_dir(outer.join("other")).unwrap();
        fs::write(&outside, "").unwrap();
        symlink("../outside", folder.join("link")).unwrap();
        symlink("../other", folder.join("folder")).unwrap();
        std::env::set_current_dir(&folder).unwrap();
        let try_each = |paths: &[&Path]| {
            let opened = paths.iter().map(|path| open_output(path).is_ok());
            opened.collect::<Vec<_>>()
        };
        let whole = folder.join("link");
        let links = [Path::new("link"), Path::new("folder/new"), &whole];
        let leading_out = [Path::new("../outside")];
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o1770)).unwrap();
        assert_eq!(try_each(&links), [false; 3]);
        assert_eq!(try_each(&leading_out), [false]);
        assert!(!outer.join("other/new").exists());
        let plain = [Path::new("new"), Path::new("sub/new"), &outside];
        assert_eq!(try_each(&plain), [true; 3]);
        open_output(Path::new("new"))
            .unwrap()
            .write_all(b"a")
            .unwrap();
        open_output(Path::new("new"))
            .unwrap()
            .write_all(b"b")
            .unwrap();
        assert_eq!(fs::read("new").unwrap(), b"ab");
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(try_each(&links), [true; 3]);
        assert_eq!(try_each(&leading_out), [true]);
    }

    #[test]
    fn a_named_pipe_without_a_reader_is_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        rustix::fs::mknodat(CWD, &pipe, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
        open_output(&pipe).unwrap().write_all(b"a").unwrap();
    }
}
