//! Files that guests of different owners read: base images, the disks and memory of templates.
//!
//! Each guest's process locks what it reads, so that nobody writes it meanwhile. A process that was taken over could
//! keep all others out of such a file by its own locks, so the daemon guards the files as long as a guest has them: see
//! [`storage::lock::guard`]. Which files these are, the process writes down while it still is the daemon's: before its
//! jail, and before anything of the guest is read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rustix::process::geteuid;
use storage::lock;

use super::store::{self, open_without_waiting};
use host::report::chain;

/// The file in a guest's folder that names what the guest shares.
pub const SHARED: &str = "shared.json";

/// A file on the host: its device and its inode.
type Identity = (u64, u64);

#[derive(Debug)]
struct Guarded {
    /// It has the locks.
    _file: File,
    /// The guests that have it.
    guests: BTreeSet<String>,
}

/// The files that this daemon guards.
#[derive(Debug, Default)]
pub struct GuardedFiles(Mutex<BTreeMap<Identity, Guarded>>);

fn identity(file: &File) -> io::Result<Identity> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

impl GuardedFiles {
    /// Guards what the guest in `folder` shares, whose process has begun.
    pub fn guard_all(&self, guest: &str, folder: &Path) {
        let path = folder.join(SHARED);
        let is_own = fs::symlink_metadata(&path).is_ok_and(|file| file.uid() == geteuid().as_raw());
        if !is_own {
            return;
        }
        let files = store::read::<Vec<PathBuf>>(&path).unwrap_or_else(|error| {
            tracing::warn!(guest, error = %chain(&error), "it is not known which files a guest shares");
            None
        });
        for file in files.iter().flatten() {
            if let Err(error) = self.guard(guest, file) {
                // Such as on a file system that is read-only, where nobody writes.
                tracing::debug!(guest, path = %file.display(), error = %chain(&error), "a shared file is not guarded");
            }
        }
    }

    fn guard(&self, guest: &str, path: &Path) -> io::Result<()> {
        let file = open_without_waiting(path, File::options().read(true).write(true))?;
        let identity = identity(&file)?;
        let mut guarded = self.0.lock();
        if let Some(known) = guarded.get_mut(&identity) {
            known.guests.insert(guest.to_owned());
        } else if lock::guard(&file).map_err(io::Error::other)? {
            let known = Guarded {
                _file: file,
                guests: BTreeSet::from([guest.to_owned()]),
            };
            guarded.insert(identity, known);
        }
        Ok(())
    }

    /// Lets go of all that a guest has had, whose process has ended.
    pub fn release_all(&self, guest: &str) {
        self.0.lock().retain(|_, known| known.release(guest));
    }

    /// Lets go of a file that a guest is about to write to.
    pub fn release(&self, guest: &str, path: &Path) {
        let Ok(metadata) = fs::metadata(path) else {
            return;
        };
        let identity = (metadata.dev(), metadata.ino());
        self.0
            .lock()
            .retain(|other, known| *other != identity || known.release(guest));
    }
}

impl Guarded {
    /// Notes that a guest does not have it any more. Whether others do.
    fn release(&mut self, guest: &str) -> bool {
        self.guests.remove(guest);
        !self.guests.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use storage::OpenMode;
    use storage::lock::LockError;

    use super::*;

    fn can_write(path: &Path) -> bool {
        let file = File::options().read(true).write(true).open(path).unwrap();
        match lock::lock(&file, OpenMode::ReadWrite) {
            Ok(()) => true,
            Err(LockError::Read) => false,
            Err(error) => panic!("{error:?}"),
        }
    }

    #[test]
    fn a_file_is_guarded_from_its_first_guest_to_its_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for (guest, files) in [("a", vec!["base", "memory"]), ("b", vec!["base", "none"])] {
            fs::create_dir(path(guest)).unwrap();
            let files: Vec<_> = files.into_iter().map(path).collect();
            store::write(&path(guest).join(SHARED), &files, false).unwrap();
        }
        for file in ["base", "memory"] {
            fs::write(path(file), "").unwrap();
        }
        let guarded = GuardedFiles::default();
        guarded.guard_all("a", &path("a"));
        guarded.guard_all("b", &path("b"));
        assert!(!can_write(&path("base")) && !can_write(&path("memory")));
        guarded.release("a", &path("memory"));
        assert!(can_write(&path("memory")));
        guarded.release_all("a");
        assert!(!can_write(&path("base")));
        guarded.release_all("b");
        assert!(can_write(&path("base")));
    }
}
