//! The files whose pages guests share, one record a file and process.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::{fmt, io};

use parking_lot::Mutex;

/// Which file it is, on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileIdentity {
    /// The file system.
    pub device: u64,
    /// The file in it.
    pub inode: u64,
}

impl FileIdentity {
    /// Of an open file.
    ///
    /// # Errors
    /// Where it cannot be examined.
    pub fn of(file: &File) -> io::Result<Self> {
        Ok(stamp(file)?.0)
    }
}

/// What changes with a file's content, if it is changed by the usual means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    len: u64,
    modified: (i64, i64),
}

/// What became of a file that was not to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FileChange {
    /// It ends before the end that it had: pages that are mapped past it cannot be read any more.
    #[error("it was cut to {len} bytes")]
    Truncated {
        /// Its length now, in bytes.
        len: u64,
    },
    /// It was written to.
    #[error("it was written to")]
    Written,
    /// It does not answer.
    #[error("it cannot be examined")]
    Gone,
}

/// Is called with a file that backs guest memory and what has become of it: once for each kind of change.
pub type OnChange = dyn Fn(&SharedFile, FileChange) + Send + Sync;

/// A file that does not change while its pages are shared.
pub struct SharedFile {
    file: Arc<File>,
    path: PathBuf,
    identity: FileIdentity,
    stamp: Stamp,
    /// Kinds of change that were reported, a bit each.
    reported: AtomicU8,
}

impl fmt::Debug for SharedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SharedFile").field(&self.path).finish()
    }
}

fn stamp(file: &File) -> io::Result<(FileIdentity, Stamp)> {
    let metadata = file.metadata()?;
    let identity = FileIdentity {
        device: metadata.dev(),
        inode: metadata.ino(),
    };
    let stamp = Stamp {
        len: metadata.len(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
    };
    Ok((identity, stamp))
}

impl SharedFile {
    /// The open file.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Its name when it was opened, for reports.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which file it is.
    pub fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// Bytes it had when it was first shared.
    pub fn len(&self) -> u64 {
        self.stamp.len
    }

    /// Whether it had no byte.
    pub fn is_empty(&self) -> bool {
        self.stamp.len == 0
    }

    /// Looks whether the file is as it was when it was first shared.
    ///
    /// # Errors
    /// What has happened to it.
    pub fn check(&self) -> Result<(), FileChange> {
        let (_, now) = stamp(&self.file).map_err(|_| FileChange::Gone)?;
        if now.len < self.stamp.len {
            Err(FileChange::Truncated { len: now.len })
        } else if now.modified != self.stamp.modified {
            Err(FileChange::Written)
        } else {
            Ok(())
        }
    }

    /// Marks a change as reported: whether it is the first of all, or `None` where one of its kind was reported before.
    pub(crate) fn mark_reported(&self, change: FileChange) -> Option<bool> {
        let kind = match change {
            FileChange::Written => 1,
            FileChange::Truncated { .. } => 2,
            FileChange::Gone => 4,
        };
        // Nothing else is ordered by it.
        let before = self.reported.fetch_or(kind, Ordering::Relaxed);
        (before & kind == 0).then_some(before == 0)
    }
}

/// Why a file is not shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// It cannot be examined.
    #[error(transparent)]
    Host(#[from] io::Error),
    /// Whoever runs the guest says no.
    #[error("guests that this one shares nothing with have the file")]
    Foreign,
}

impl From<ShareError> for io::Error {
    fn from(error: ShareError) -> Self {
        match error {
            ShareError::Host(error) => error,
            ShareError::Foreign => Self::other(error),
        }
    }
}

/// Says whether the pages of a file may be shared at all; asked often of a file that may not, and seldom of one that may.
pub type Admission = dyn Fn(&Arc<File>) -> bool + Send + Sync;

/// The files of a process whose pages are shared. A file that nobody refers to any more is forgotten, and with it its locks.
#[derive(Default)]
pub struct FileRegistry {
    files: Mutex<Vec<Weak<SharedFile>>>,
    admission: OnceLock<Box<Admission>>,
}

impl fmt::Debug for FileRegistry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FileRegistry").field(&self.files).finish()
    }
}

impl FileRegistry {
    /// Has `admits` asked of each file before it is shared. Only the first call counts.
    pub fn admit_by(&self, admits: Box<Admission>) {
        if self.admission.set(admits).is_err() {
            tracing::debug!("somebody is asked about files already");
        }
    }

    /// The files that somebody refers to.
    pub fn known(&self) -> Vec<Arc<SharedFile>> {
        let files = self.files.lock();
        files.iter().filter_map(Weak::upgrade).collect()
    }

    /// The record of `file`: the one there is, under whatever descriptor the file was opened before, or a new one.
    ///
    /// # Errors
    /// [`ShareError`].
    pub fn share(&self, file: &Arc<File>) -> Result<Arc<SharedFile>, ShareError> {
        use std::os::fd::AsRawFd;
        let mut files = self.files.lock();
        let known = files.iter().filter_map(Weak::upgrade);
        // The common case, without a system call.
        if let Some(same) = known.clone().find(|known| Arc::ptr_eq(&known.file, file)) {
            return Ok(same);
        }
        if self.admission.get().is_some_and(|admits| !admits(file)) {
            return Err(ShareError::Foreign);
        }
        let (identity, stamp) = stamp(file)?;
        if let Some(same) = known
            .clone()
            .find(|known| known.identity == identity && known.stamp == stamp)
        {
            return Ok(same);
        }
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let shared = Arc::new(SharedFile {
            file: file.clone(),
            path: std::fs::read_link(link).unwrap_or_default(),
            identity,
            stamp,
            reported: AtomicU8::new(0),
        });
        files.retain(|known| known.strong_count() > 0);
        files.push(Arc::downgrade(&shared));
        Ok(shared)
    }
}

/// The first bytes of `file` in `at..end` that are no hole; `None` where there are none.
///
/// # Errors
/// What the host says.
pub fn data_range(file: &File, at: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    use rustix::fs::{SeekFrom, seek};
    if at >= end {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        // Nothing but a hole up to the end of the file.
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let hole = seek(file, SeekFrom::Hole(start))?.min(end);
    Ok((start < hole).then_some(start..hole))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn data_is_found_between_holes() {
        let sparse = tempfile::tempfile().unwrap();
        sparse.write_all_at(b"head", 0).unwrap();
        sparse.write_all_at(b"tail", 1 << 20).unwrap();
        let ranges = |end: u64| {
            let (mut at, mut ranges) = (2, Vec::new());
            while let Some(range) = data_range(&sparse, at, end).unwrap() {
                at = range.end;
                ranges.push((range.start, range.end));
            }
            ranges
        };
        let mib = 1 << 20;
        assert_eq!(ranges(mib + 4), [(2, 4096), (mib, mib + 4)]);
        assert_eq!(ranges(mib), [(2, 4096)]);
        assert_eq!(ranges(3), [(2, 3)]);
    }

    #[test]
    fn a_file_has_one_record_however_often_it_is_opened() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let open = || Arc::new(File::open(named.path()).unwrap());
        let registry = FileRegistry::default();
        let (first, second) = (
            registry.share(&open()).unwrap(),
            registry.share(&open()).unwrap(),
        );
        assert!(Arc::ptr_eq(&first, &second));
        assert_eq!(first.path(), named.path());
        drop((first, second));
        registry
            .share(&Arc::new(tempfile::tempfile().unwrap()))
            .unwrap();
        assert_eq!(registry.files.lock().len(), 1, "the first is forgotten");
    }

    #[test]
    fn a_file_that_is_cut_or_written_to_is_found_out() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let shared = FileRegistry::default()
            .share(&Arc::new(file.reopen().unwrap()))
            .unwrap();
        assert_eq!(shared.check(), Ok(()));
        file.as_file()
            .set_modified(std::time::SystemTime::UNIX_EPOCH)
            .unwrap();
        assert_eq!(shared.check(), Err(FileChange::Written));
        file.as_file().set_len(100).unwrap();
        assert_eq!(shared.check(), Err(FileChange::Truncated { len: 100 }));
    }
}
