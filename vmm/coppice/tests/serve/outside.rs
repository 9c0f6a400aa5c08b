//! What the host has outside of the folder of a guest, which nothing that the guest's process does may change.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::daemon::Daemon;

/// What is compared of a file: its owner and group, its mode, its inode, its length, and a hash of what it holds.
type Known = (u32, u32, u32, Option<u64>, u64, u64);

/// Files that people of the host have, beside a daemon.
pub struct Canaries(tempfile::TempDir);

impl Canaries {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("folder")).unwrap();
        for (name, mode) in [("secret", 0o600), ("open", 0o666), ("folder/file", 0o644)] {
            let path = folder.path().join(name);
            fs::write(&path, name).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        Self(folder)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }
}

/// All files outside of the folders of some guests.
#[derive(Debug)]
pub struct Outside(BTreeMap<PathBuf, Known>);

impl Outside {
    /// The canaries, and all that is the daemon's, but for the folders `without` and what it writes as it runs. It may
    /// write its records anew.
    pub fn of(canaries: &Canaries, daemon: &Daemon, without: &[PathBuf]) -> Self {
        let mut found = BTreeMap::new();
        walk(canaries.path(), &|_| false, true, &mut found);
        let own = ["cache", "log", "s"].map(|name| daemon.folder().join(name));
        let sockets = ["api.sock", "console.sock", "log", "log.pipe"];
        let is_left_out = |path: &Path| {
            own.iter().chain(without).any(|own| own == path)
                || sockets.iter().any(|name| path.ends_with(name))
        };
        walk(daemon.folder(), &is_left_out, false, &mut found);
        Self(found)
    }

    /// Checks that all is as it was `before`.
    pub fn expect(&self, before: &Self, what: &str) {
        let paths: BTreeSet<_> = self.0.keys().chain(before.0.keys()).collect();
        for path in paths {
            let (was, is) = (before.0.get(path), self.0.get(path));
            assert_eq!(is, was, "{}, {what}", path.display());
        }
    }

    /// The files that a guest's process has open and that are not its own.
    pub fn open_files_of(&self, pid: u32) -> Vec<PathBuf> {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten();
        let open = descriptors
            .flatten()
            .filter_map(|entry| entry.path().metadata().ok());
        let open: Vec<_> = open.map(|file| (file.dev(), file.ino())).collect();
        let is_open = |path: &&PathBuf| {
            let file = path.symlink_metadata();
            file.is_ok_and(|file| open.contains(&(file.dev(), file.ino())))
        };
        self.0.keys().filter(is_open).cloned().collect()
    }
}

fn walk(
    folder: &Path,
    is_left_out: &dyn Fn(&Path) -> bool,
    with_inodes: bool,
    found: &mut BTreeMap<PathBuf, Known>,
) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        // A record is written under this name.
        let is_half = path.extension().is_some_and(|end| end == "new");
        let Ok(metadata) = path.symlink_metadata() else {
            continue;
        };
        if is_half || is_left_out(&path) {
            continue;
        }
        let mut hash = DefaultHasher::new();
        if metadata.is_file() {
            fs::read(&path).unwrap().hash(&mut hash);
        } else if metadata.is_symlink() {
            fs::read_link(&path).unwrap().hash(&mut hash);
        }
        let len = if metadata.is_dir() { 0 } else { metadata.len() };
        let inode = with_inodes.then_some(metadata.ino());
        let owner = (metadata.uid(), metadata.gid());
        let known = (owner.0, owner.1, metadata.mode(), inode, len, hash.finish());
        found.insert(path.clone(), known);
        if metadata.is_dir() {
            walk(&path, is_left_out, with_inodes, found);
        }
    }
}
