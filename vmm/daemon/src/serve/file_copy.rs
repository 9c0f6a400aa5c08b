//! A copy of a file in a new inode: what becomes shared is nothing that a guest's process has ever had open.
//!
//! ```text
//! begin: a new file ── reflink (FICLONE) ──> done, the blocks are shared until one of the two is written to
//!                  └── else room for its data is reserved, so that a full disk is found now
//! fill:  its data is copied, its holes stay holes ──> durable
//! ```

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate, ioctl_ficlone, seek};
use rustix::io::Errno;

use super::store::named;

/// Bytes that are copied between two reports of the progress.
const STEP: u64 = 8 << 20;
/// Bytes of data by which a file may exceed twice of what was counted: a file system writes zeros where it splits what
/// was reserved.
const SLACK: u64 = 16 << 20;
/// Bytes that are copied at once where the kernel does not copy.
const BUFFER: usize = 256 << 10;

/// How far the copies of a template's files have come.
#[derive(Debug)]
pub struct CopyProgress {
    done: AtomicU64,
    total: u64,
}

impl CopyProgress {
    /// That of copies of `total` bytes, none of which is copied.
    pub fn new(total: u64) -> Self {
        Self {
            done: AtomicU64::new(0),
            total,
        }
    }

    /// Bytes that are copied, and bytes in all.
    pub fn bytes(&self) -> (u64, u64) {
        // A file can have grown by a little.
        let done = self.done.load(Ordering::Relaxed).min(self.total);
        (done, self.total)
    }

    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// A copy that has begun.
#[derive(Debug)]
pub struct FileCopy {
    source: File,
    file: File,
    path: PathBuf,
    len: u64,
    /// Bytes of data, without holes.
    bytes: u64,
    is_reflink: bool,
}

impl FileCopy {
    /// Begins a copy of a regular file, at a path where there is no file.
    ///
    /// # Errors
    /// The host's error, which names `path`; that of a full disk, too.
    pub fn begin(source: File, path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(path).map_err(named(path))?;
        let begun = || -> io::Result<Self> {
            let len = source.metadata()?.len();
            let is_reflink = reflink(&source, &file)?;
            let mut bytes = 0;
            if !is_reflink {
                file.set_len(len)?;
            }
            each_data(&source, len, |offset, count| {
                bytes += count;
                if is_reflink {
                    return Ok(());
                }
                match fallocate(&file, FallocateFlags::KEEP_SIZE, offset, count) {
                    // A file system that cannot reserve: a full disk is found later.
                    Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
                    done => Ok(done?),
                }
            })?;
            Ok(Self {
                source,
                file,
                path: path.to_owned(),
                len,
                bytes,
                is_reflink,
            })
        };
        begun().map_err(named(path))
    }

    /// The file that is copied.
    pub fn source(&self) -> &File {
        &self.source
    }

    /// The copy, which is open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of data that it has.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the blocks are shared with the file that is copied, and nothing has to be.
    pub fn is_reflink(&self) -> bool {
        self.is_reflink
    }

    /// Copies the data.
    ///
    /// # Errors
    /// The host's error, which names the path; where the file has become shorter, or has more data.
    pub fn fill(&self, progress: &CopyProgress) -> io::Result<()> {
        if self.is_reflink {
            progress.advance(self.bytes);
            return Ok(());
        }
        let mut left = self.bytes.saturating_mul(2).saturating_add(SLACK);
        let filled = each_data(&self.source, self.len, |offset, count| {
            // A process that was taken over may punch holes and write on, so that there is data without end.
            left = left.checked_sub(count).ok_or_else(|| {
                io::Error::other("the file that is copied has more data than before")
            })?;
            let end = offset + count;
            let mut at = offset;
            while at < end {
                let copied = copy_some(&self.source, &self.file, at, STEP.min(end - at))?;
                at += copied;
                progress.advance(copied);
            }
            Ok(())
        });
        filled.map_err(named(&self.path))
    }

    /// Makes the copy durable, and lets every user read it where it is `shared`. Otherwise it is the daemon's alone.
    ///
    /// # Errors
    /// The host's error, which names the path.
    pub fn finish(&self, shared: bool) -> io::Result<()> {
        let mode = if shared { 0o444 } else { 0o600 };
        let done = self.file.set_permissions(Permissions::from_mode(mode));
        done.and_then(|()| self.file.sync_all())
            .map_err(named(&self.path))
    }

    /// Bytes that the copy takes on the host's disk; those of a reflink, too.
    ///
    /// # Errors
    /// The host's error.
    pub fn allocated(&self) -> io::Result<u64> {
        let metadata = self.file.metadata().map_err(named(&self.path))?;
        Ok(metadata.blocks() * 512)
    }
}

/// Has a new file share the blocks of another, where the file system can do that.
fn reflink(source: &File, file: &File) -> io::Result<bool> {
    match ioctl_ficlone(file, source) {
        Ok(()) => Ok(true),
        Err(error @ (Errno::NOSPC | Errno::DQUOT | Errno::IO)) => Err(error.into()),
        // Which error tells of a file system that cannot differs from one to the next (ioctl_ficlone(2)).
        Err(_) => Ok(false),
    }
}

/// Calls `work` with offset and length of each range of a file, up to `len`, that may have other bytes than zeros.
fn each_data(
    file: &File,
    len: u64,
    mut work: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = 0;
    while at < len {
        // The cursor that this moves is used by nobody: all I/O has its offset.
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            // A file system without the notion of holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return work(at, len - at),
            Err(error) => return Err(error.into()),
        };
        if start >= len {
            return Ok(());
        }
        let end = match seek(file, SeekFrom::Hole(start)) {
            Ok(end) => end.min(len),
            // It has been cut since.
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        // Where the file was changed in between, what was data may be a hole.
        let end = end.max(start + 1);
        work(start, end - start)?;
        at = end;
    }
    Ok(())
}

/// Copies up to `count` bytes at an offset, and gives how many.
fn copy_some(source: &File, file: &File, at: u64, count: u64) -> io::Result<u64> {
    let (mut from, mut to) = (at, at);
    let most = usize::try_from(count).unwrap_or(usize::MAX);
    match copy_file_range(source, Some(&mut from), file, Some(&mut to), most) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(copied) => Ok(copied as u64),
        // The kernel copies between these file systems only by way of a buffer (copy_file_range(2)).
        Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL | Errno::PERM) => {
            let mut buffer = vec![0; BUFFER.min(most)];
            source.read_exact_at(&mut buffer, at)?;
            file.write_all_at(&buffer, at)?;
            Ok(buffer.len() as u64)
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copied(source: &Path, path: &Path) -> (FileCopy, CopyProgress) {
        let copy = FileCopy::begin(File::open(source).unwrap(), path).unwrap();
        let progress = CopyProgress::new(copy.bytes());
        copy.fill(&progress).unwrap();
        copy.finish(true).unwrap();
        (copy, progress)
    }

    #[test]
    fn a_copy_has_the_bytes_and_the_holes_of_the_file_in_another_inode() {
        let folder = tempfile::tempdir().unwrap();
        let (source, path) = (folder.path().join("a"), folder.path().join("b"));
        let file = File::create(&source).unwrap();
        file.set_len(64 << 20).unwrap();
        for at in [1 << 20, 40 << 20] {
            file.write_all_at(&vec![7; 100_000], at).unwrap();
        }
        let (copy, progress) = copied(&source, &path);
        assert!(std::fs::read(&source).unwrap() == std::fs::read(&path).unwrap());
        let (old, new) = (source.metadata().unwrap(), path.metadata().unwrap());
        assert_ne!(old.ino(), new.ino());
        assert!(new.blocks() <= old.blocks() + 16, "{}", new.blocks());
        assert_eq!(new.mode() & 0o7777, 0o444);
        let (done, total) = progress.bytes();
        assert!(
            done == total && (200_000..1 << 20).contains(&done),
            "{done}"
        );
        // Who has the first file open for writing changes nothing of the copy.
        let before = std::fs::read(&path).unwrap();
        file.write_all_at(&[9; 4096], 1 << 20).unwrap();
        assert!(std::fs::read(copy.path()).unwrap() == before);
    }

    #[test]
    fn a_file_that_changes_its_length_meanwhile_is_an_error_or_copied_as_far_as_it_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("a"), vec![1; 1 << 20]).unwrap();
        let begin = |name: &str| FileCopy::begin(File::open(path("a")).unwrap(), &path(name));
        let (longer, shorter) = (begin("b").unwrap(), begin("c").unwrap());
        if longer.is_reflink() {
            return skip::because("the file system shares blocks, so that nothing is copied later");
        }
        let file = OpenOptions::new().write(true).open(path("a")).unwrap();
        file.set_len(2 << 20).unwrap();
        file.write_all_at(&[2; 4096], 1 << 20).unwrap();
        longer.fill(&CopyProgress::new(0)).unwrap();
        assert!(std::fs::read(path("b")).unwrap() == vec![1; 1 << 20]);
        file.set_len(4096).unwrap();
        shorter.fill(&CopyProgress::new(0)).unwrap();
        let found = std::fs::read(path("c")).unwrap();
        assert!(found.len() == 1 << 20 && found[4096..].iter().all(|byte| *byte == 0));
        // A name that is taken is not written to.
        assert_eq!(begin("a").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }
}
