//! Chains that change while they are used: a new child on top, the top merged into what it stands on, another parent.
//!
//! Layers of a chain that is in use are made anew over the same open files, whose locks they keep: nobody else can
//! get at a file in between.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::create::ChildOptions;
use super::disk::Vhdx;
use super::format::Guid;
use super::locator::ParentLocator;
use super::open::Layer;
use super::state::Exclusion;
use crate::disk::{ByteRange, Disk, DiskError, ExtentState, Mapping};
use crate::file::open_locked;
use crate::lock::{self, OpenMode};
use crate::options::OpenOptions;
use crate::progress::{Progress, Unwatched};
use crate::refusal::{OpenError, ParentRefusal, Refusal};
use crate::vhdx::create::{CreateError, folder_of};
use crate::vhdx::merge::Merged;

/// Why a chain could not be changed. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// The new file could not be made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// A file cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The disk refused.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A file of the chain that is in use cannot be used so.
    #[error("a file of the chain cannot be used")]
    Refused(#[source] Refusal),
}

impl Vhdx {
    /// Puts a new child, in a new file at `child`, on this disk, whose file is at `path`. The disk takes no writes from
    /// then on, and its file is shared with other readers; requests in flight are waited for. On an error it goes on as
    /// before.
    ///
    /// # Errors
    /// See [`ChainError`].
    pub fn snapshot(self: &Arc<Self>, path: &Path, child: &Path) -> Result<Arc<Self>, ChainError> {
        self.exclude(Exclusion::Everything);
        let made = self.snapshot_while_excluded(path, child);
        self.readmit();
        made
    }

    fn snapshot_while_excluded(
        self: &Arc<Self>,
        path: &Path,
        child: &Path,
    ) -> Result<Arc<Self>, ChainError> {
        self.close()?;
        let options = ChildOptions {
            same_disk: true,
            ..ChildOptions::default()
        };
        self.create_child_of(child, path, &options)?;
        let over = || -> Result<Arc<Self>, ChainError> {
            let failed = |reason| OpenError::new(child, reason);
            let file = open_locked(child, OpenMode::ReadWrite).map_err(failed)?;
            let layer = Layer::read(Box::new(file), OpenMode::ReadWrite).map_err(failed)?;
            let parent = Some(Arc::clone(self));
            let top = layer
                .finish(OpenMode::ReadWrite, parent, self.punch_holes)
                .map_err(failed)?;
            if !self.geometry.read_only {
                lock::share(self.view.medium.file())
                    .map_err(|e| ChainError::Refused(Refusal::Locked(e)))?;
                self.frozen.store(true, Ordering::Release);
            }
            Ok(Arc::new(top))
        };
        over().inspect_err(|_| {
            // What is reported is why it cannot be used.
            let _ = std::fs::remove_file(child);
        })
    }

    /// The file of the parent, for a disk whose file is at `path`.
    pub fn parent_path(&self, path: &Path) -> Option<PathBuf> {
        let folder = std::path::absolute(path).ok()?.parent()?.to_owned();
        let candidates = self.locator()?.candidates(&folder);
        candidates.into_iter().find(|path| path.exists())
    }

    /// Whether the parent could be opened for writing: no other process has it open, and its file may be written.
    ///
    /// # Errors
    /// See [`ChainError`].
    pub fn check_parent_writable(&self) -> Result<(), ChainError> {
        let parent = self
            .parent
            .as_ref()
            .ok_or_else(|| DiskError::Unsupported("the disk has no parent".into()))?;
        let file = parent.view.medium.file();
        let tried = reopen_for_writing(file).map_err(ChainError::Refused)?;
        lock::share(&tried)
            .and_then(|()| lock::lock(file, OpenMode::ReadOnly))
            .map_err(|e| ChainError::Refused(Refusal::Locked(e)))
    }

    /// Makes a chain, whose top is this disk, ready for the merge of its second layer into its third. Both can be
    /// written then. Nobody else may use the disk meanwhile, and what is given takes its place; on an error it goes on
    /// as before.
    ///
    /// # Errors
    /// See [`ChainError`]; a third layer that others use is refused.
    pub fn open_for_commit(&self) -> Result<Arc<Self>, ChainError> {
        let no_layer = || DiskError::Unsupported("the disk has too few layers".into());
        let middle = self.parent.as_ref().ok_or_else(no_layer)?;
        let bottom = middle.parent.as_ref().ok_or_else(no_layer)?;
        self.close()?;
        let (old, file) = (bottom.view.medium.file(), middle.view.medium.file());
        let below = reopen_for_writing(old).map_err(ChainError::Refused)?;
        let again = |file: &Arc<File>, parent| {
            Layer::read(Box::new(Arc::clone(file)), OpenMode::ReadWrite)
                .and_then(|layer| layer.finish(OpenMode::ReadWrite, parent, self.punch_holes))
                .map(Arc::new)
        };
        let opened = || -> Result<Arc<Self>, Refusal> {
            lock::lock(file, OpenMode::ReadWrite).map_err(Refusal::Locked)?;
            let bottom = again(&below, bottom.parent.clone())?;
            let middle = again(file, Some(bottom))?;
            again(self.view.medium.file(), Some(middle))
        };
        let opened = opened();
        opened.map_err(|refusal| {
            // Makes readers of the writers again. No other process can lock a file in between, as one of the two open
            // files keeps its lock meanwhile.
            let restored = lock::share(file)
                .and_then(|()| lock::share(&below))
                .and_then(|()| lock::lock(old, OpenMode::ReadOnly));
            ChainError::Refused(match restored {
                Ok(()) => refusal,
                Err(lost) => Refusal::Locked(lost),
            })
        })
    }

    /// Ends a commit, whose merge of the second layer is done: merges this disk, the top, into the third layer and
    /// gives that, which takes its place. Nobody may use the disk meanwhile. `bottom` is the name of that layer's file,
    /// and `path` that of the top's.
    ///
    /// # Errors
    /// See [`ChainError`]; the disk goes on as before.
    pub fn finish_commit(&self, path: &Path, bottom: &Path) -> Result<Arc<Self>, ChainError> {
        let no_layer = || DiskError::Unsupported("the disk has too few layers".into());
        let middle = self.parent.as_ref().ok_or_else(no_layer)?;
        let target = Arc::clone(middle.parent.as_ref().ok_or_else(no_layer)?);
        // From here on the middle layer is not needed: the top stands on what it was merged into.
        self.record_parent(path, bottom, &target)?;
        self.close()?;
        let top = Layer::read(
            Box::new(Arc::clone(self.view.medium.file())),
            OpenMode::ReadWrite,
        )
        .and_then(|layer| {
            layer.finish(
                OpenMode::ReadWrite,
                Some(Arc::clone(&target)),
                self.punch_holes,
            )
        })
        .map_err(ChainError::Refused)?;
        top.merge_into_parent(&Unwatched)?;
        top.accept_parent()?;
        Ok(target)
    }

    fn record_parent(&self, path: &Path, parent: &Path, disk: &Self) -> Result<(), ChainError> {
        let absolute = |path: &Path| {
            path.canonicalize().map_err(|e| {
                ChainError::Open(OpenError::new(path, Refusal::io("find its name", e)))
            })
        };
        let linkage = disk.identifiers().data_write_guid;
        let (folder, parent) = (absolute(folder_of(path))?, absolute(parent)?);
        Ok(self.set_locator(ParentLocator::new(linkage, &folder, &parent))?)
    }

    /// Merges the child in the file at `path` into its parent, which nobody else may use.
    ///
    /// # Errors
    /// See [`ChainError`]. Both files can be used as before, and the merge begun anew.
    pub fn commit(
        path: &Path,
        options: &OpenOptions,
        progress: &dyn Progress,
    ) -> Result<Merged, ChainError> {
        let child = Self::open_with_parent_for_writing(path, options)?;
        let merged = child.merge_into_parent(progress)?;
        child.accept_parent()?;
        child.close()?;
        if let Some(parent) = child.parent() {
            parent.close()?;
        }
        Ok(merged)
    }

    /// Records another parent, or another place of it, in the child at `path`. Unless `force` is set the file has to be
    /// the one that the child was made on, by its identifier; with it, its content has to be as that was, which is not
    /// checked.
    ///
    /// # Errors
    /// See [`ChainError`]; the child is as it was.
    pub fn rebase(
        path: &Path,
        parent: &Path,
        force: bool,
        options: &OpenOptions,
    ) -> Result<(), ChainError> {
        let failed = |reason| OpenError::new(path, reason);
        let file = open_locked(path, OpenMode::ReadWrite).map_err(failed)?;
        let layer = Layer::read(Box::new(file), OpenMode::ReadWrite).map_err(failed)?;
        let below = Self::open(
            parent,
            &OpenOptions {
                parents: options.parents.clone(),
                ..OpenOptions::read_only()
            },
        )?;
        let Some(locator) = layer.locator() else {
            return Err(failed(Refusal::Unsupported("the disk has no parent".into())).into());
        };
        let found = below.identifiers().data_write_guid;
        if !locator.links_to(found) && !force {
            let changed = ParentRefusal::Changed {
                parent: parent.to_owned(),
                expected: locator.linkage,
                found,
            };
            return Err(failed(changed.into()).into());
        }
        layer
            .check_parent(&below.geometry(), parent)
            .map_err(|e| failed(e.into()))?;
        let below = Arc::new(below);
        let child = layer
            .finish(OpenMode::ReadWrite, Some(Arc::clone(&below)), true)
            .map_err(failed)?;
        child.record_parent(path, parent, &below)?;
        Ok(child.close()?)
    }

    /// The ranges of the disk that may have changed since a layer of its chain had this DataWriteGuid, in order: what
    /// the layers above that one say.
    ///
    /// # Errors
    /// `Unsupported` where no layer of the chain has it, else as [`Disk::map`].
    pub fn changed_since(&self, identifier: Guid) -> Result<Vec<Mapping>, DiskError> {
        let mut layer = Some(self);
        let mut depth = 0;
        let mut seen = Vec::new();
        while let Some(disk) = layer {
            let found = disk.identifiers().data_write_guid;
            if found == identifier {
                return self.changed_above(depth);
            }
            seen.push(found.to_string());
            layer = disk.parent.as_deref();
            depth += 1;
        }
        Err(DiskError::Unsupported(format!(
            "no layer of the disk has the DataWriteGuid {identifier}, from the top they have {}",
            seen.join(", ")
        )))
    }

    fn changed_above(&self, depth: u32) -> Result<Vec<Mapping>, DiskError> {
        let size = self.geometry().size;
        let mut changed: Vec<Mapping> = Vec::new();
        let mut map = Vec::new();
        // What is kept are ranges that changed; the whole map of a large disk is not.
        let step = 1024 * self.block_size;
        let mut at = 0;
        while at < size {
            map.clear();
            if let Some(range) = ByteRange::new(at, step.min(size - at)) {
                self.map(range, &mut map)?;
            }
            changed.extend(map.iter().filter(|mapping| {
                mapping.layer < depth && mapping.state != ExtentState::Transparent
            }));
            at += step;
        }
        Ok(changed)
    }
}

/// Has the child in an open file name another place of its parent, the path `parent`, for a child that lies in
/// `folder`. Both are absolute and without links; neither is looked at, and the parent is the same disk, by its
/// identifier. Gives what the child named before; where it names no parent, that is `None`, and the file is as it was.
///
/// # Errors
/// See [`ChainError`]; the child is as it was.
pub fn move_parent(
    file: File,
    folder: &Path,
    parent: &Path,
) -> Result<Option<ParentLocator>, ChainError> {
    lock::lock(&file, OpenMode::ReadWrite).map_err(|e| ChainError::Refused(Refusal::Locked(e)))?;
    let layer =
        Layer::read(Box::new(Arc::new(file)), OpenMode::ReadWrite).map_err(ChainError::Refused)?;
    let Some(before) = layer.locator().cloned() else {
        return Ok(None);
    };
    let child = layer
        .finish(OpenMode::ReadWrite, None, true)
        .map_err(ChainError::Refused)?;
    child.set_locator(ParentLocator {
        linkage2: before.linkage2,
        ..ParentLocator::new(before.linkage, folder, parent)
    })?;
    child.close()?;
    Ok(Some(before))
}

/// The children of the disk at `parent` among the files of a folder, without the file `but`: those that record it, by
/// name and whatever its identifier is now. Files that cannot be read, as they are in use, are left out.
///
/// # Errors
/// Where the folder cannot be read.
pub fn children_in(
    folder: &Path,
    parent: &Path,
    but: Option<&Path>,
) -> std::io::Result<Vec<PathBuf>> {
    let same = |a: &Path, b: &Path| {
        a.canonicalize()
            .is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
    };
    let mut children = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if but.is_some_and(|but| same(&path, but)) {
            continue;
        }
        let locator = open_locked(&path, OpenMode::ReadOnly)
            .and_then(|file| Layer::read(Box::new(file), OpenMode::ReadOnly))
            .ok()
            .and_then(|layer| layer.locator().cloned());
        if locator.is_some_and(|locator| {
            locator
                .candidates(folder)
                .iter()
                .any(|candidate| same(candidate, parent))
        }) {
            children.push(path);
        }
    }
    children.sort_unstable();
    Ok(children)
}

/// Opens the file of a reader again, for a writer. Other readers make it fail; no other process can lock the file in
/// between.
fn reopen_for_writing(file: &Arc<File>) -> Result<Arc<File>, Refusal> {
    let again = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map_err(|e| Refusal::io("open the file for writing", e))?;
    lock::lock(&again, OpenMode::ReadOnly).map_err(Refusal::Locked)?;
    lock::unlock(file).map_err(Refusal::Locked)?;
    match lock::lock(&again, OpenMode::ReadWrite) {
        Ok(()) => Ok(Arc::new(again)),
        Err(error) => {
            lock::lock(file, OpenMode::ReadOnly).map_err(Refusal::Locked)?;
            Err(Refusal::Locked(error))
        }
    }
}
