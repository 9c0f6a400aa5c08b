//! The lock of networks. The rules are one table for a network namespace, so there can be one daemon that has some.
//!
//! It is a file in a folder of root's, as anybody could take a lock on what all users can open, and keep the daemon
//! from starting.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::error::NetworksError;
use crate::serve::store;
use host::report::chain;

const FOLDER: &str = "/run/coppice";

/// The lock, which is held as long as this lives.
pub(super) struct NetworksLock {
    path: PathBuf,
    _file: File,
}

impl NetworksLock {
    /// Takes the lock; nothing where this user cannot make the file.
    ///
    /// # Errors
    /// `InUse`, `Lock`.
    pub(super) fn take() -> Result<Option<Self>, NetworksError> {
        let namespace = fs::metadata("/proc/self/ns/net").map_err(NetworksError::Lock)?;
        let name = format!("networks-{}.lock", namespace.ino());
        match Self::of(&Path::new(FOLDER).join(name)) {
            Ok(Some(lock)) => Ok(Some(lock)),
            Ok(None) => Err(NetworksError::InUse),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                tracing::warn!(error = %chain(&error), "nothing keeps another daemon from having networks, too");
                Ok(None)
            }
            Err(error) => Err(NetworksError::Lock(error)),
        }
    }

    /// Nothing where another process holds it.
    fn of(path: &Path) -> io::Result<Option<Self>> {
        if let Some(folder) = path.parent() {
            let made = DirBuilder::new().mode(0o755).recursive(true).create(folder);
            made.map_err(store::named(folder))?;
        }
        loop {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(false).mode(0o600);
            let opened = options.custom_flags(libc::O_NOFOLLOW).open(path);
            let file = opened.map_err(store::named(path))?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(store::named(path)(error.into())),
            }
            // The one who held it before may have removed the file, and a third one have made another.
            if file.metadata()?.nlink() > 0 {
                let path = path.to_owned();
                return Ok(Some(Self { path, _file: file }));
            }
        }
    }
}

impl Drop for NetworksLock {
    fn drop(&mut self) {
        // A file that stays does no harm: the next one takes it over.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_the_lock_until_it_lets_it_go() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/lock");
        let first = NetworksLock::of(&path).unwrap().unwrap();
        assert!(NetworksLock::of(&path).unwrap().is_none());
        drop(first);
        assert!(!path.exists());
        assert!(NetworksLock::of(&path).unwrap().is_some());
    }
}
