//! Opening a disk, whatever its format.

use std::fmt;
use std::fs::{File, FileType};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::disk::Disk;
use crate::lock::{self, LockError, OpenMode};
use crate::raw::Raw;
use crate::vhdx::{self, Guid, Vhdx};

/// The format of a disk's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// [MS-VHDX].
    Vhdx,
}

/// How to open a disk.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Open for reading alone; the file is shared with other readers and never written.
    pub read_only: bool,
    /// The format. `None` looks for the signature of VHDX and takes everything else as raw: right for files that
    /// their owner made, but name the format of a raw disk that a guest can write, since the guest decides
    /// what its first bytes look like.
    pub format: Option<Format>,
    /// Where the parents of a differencing disk may lie.
    pub parents: Parents,
    /// Read a child whose parent has changed since it was made. What is read may never have been on the disk. Only with
    /// `read_only`.
    pub ignore_changed_parents: bool,
    /// Give space that is freed back to the host at once, rather than keep it for the next block.
    pub punch_holes: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            format: None,
            parents: Parents::default(),
            ignore_changed_parents: false,
            punch_holes: true,
        }
    }
}

impl From<OpenMode> for OpenOptions {
    fn from(mode: OpenMode) -> Self {
        Self {
            read_only: mode.is_read_only(),
            ..Self::default()
        }
    }
}

impl OpenOptions {
    /// To open for reading alone.
    pub fn read_only() -> Self {
        Self {
            read_only: true,
            ..Self::default()
        }
    }

    /// What these options open a file for.
    pub fn mode(&self) -> OpenMode {
        if self.read_only {
            OpenMode::ReadOnly
        } else {
            OpenMode::ReadWrite
        }
    }
}

/// Where the parents of a differencing disk may lie. The disk's own file says which files they are, so whoever made it could name
/// any file of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Parents {
    /// Anywhere: for disks of an owner who is trusted.
    #[default]
    Anywhere,
    /// In this folder or below, links followed.
    Within(PathBuf),
    /// A disk with a parent is refused.
    Nowhere,
}

/// Why a disk could not be opened. Its one-line `Display` names the file and says all there is to say,
/// the host's own words included, so it has no further [`source`](std::error::Error::source).
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct OpenError {
    path: PathBuf,
    reason: Refusal,
}

impl OpenError {
    pub(crate) fn new(path: &Path, reason: Refusal) -> Self {
        Self {
            path: path.to_owned(),
            reason,
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What was wrong with it.
    pub fn reason(&self) -> &Refusal {
        &self.reason
    }
}

/// What was wrong with a file that should have been a disk.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The host refused an operation.
    #[error("cannot {operation}: {error}")]
    Io {
        /// What was tried, such as `open the file`.
        operation: String,
        /// What the host said.
        error: io::Error,
    },
    /// Not a regular file.
    #[error("is {found}; a disk has to be a regular file")]
    FileKind {
        /// What it is, such as `a directory`.
        found: &'static str,
    },
    /// Somebody else has it open.
    #[error("{0}")]
    Locked(LockError),
    /// The file has no bytes.
    #[error("is empty; a disk has at least one sector")]
    Empty,
    /// A raw disk that does not end with a sector.
    #[error("has {size} bytes; the size of a raw disk has to be a multiple of 512")]
    RawSize {
        /// Its size in bytes.
        size: u64,
    },
    /// The file says something that its format forbids.
    #[error("{structure} at file offset {offset:#x} is corrupt: {expected}")]
    Corrupt {
        /// The structure of the format, such as `region table 1`.
        structure: String,
        /// Where it lies in the file, in bytes.
        offset: u64,
        /// What was expected and what was found.
        expected: String,
    },
    /// The parent that a differencing disk stands on cannot be used.
    #[error(transparent)]
    Parent(#[from] ParentRefusal),
    /// The file is sound as far as can be seen, but uses what is not supported.
    #[error("{0}")]
    Unsupported(String),
}

/// Why the parent of a differencing disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ParentRefusal {
    /// No file.
    #[error(
        "its parent is not found: tried {}; the file records {}; record another place by `coppice disk rebase --parent`",
        names(tried),
        recorded.join(", ")
    )]
    Missing {
        /// The files that were looked for, in order.
        tried: Vec<PathBuf>,
        /// The paths as the file has them.
        recorded: Vec<String>,
    },
    /// The parent is not what it was.
    #[error(
        "its parent {} has changed since: the child was made on DataWriteGuid {expected}, the parent has {found}; if it is the right file, and its content as it was, record that by `coppice disk rebase --force --parent`",
        parent.display()
    )]
    Changed {
        /// The parent.
        parent: PathBuf,
        /// The identifier that the child records.
        expected: Guid,
        /// The one that the parent has.
        found: Guid,
    },
    /// The parent stands on the child.
    #[error(
        "its parent {} is the same file as {}, which stands on it: the chain is a cycle",
        parent.display(),
        other.display()
    )]
    Cycle {
        /// The file as the child calls it.
        parent: PathBuf,
        /// The file as it was called before.
        other: PathBuf,
    },
    /// The parent is larger.
    #[error(
        "its parent {} is a disk of {found} bytes, and the child one of {child}: a child is at least as large",
        parent.display()
    )]
    Size {
        /// The parent.
        parent: PathBuf,
        /// Size of the child in bytes.
        child: u64,
        /// Size of the parent in bytes.
        found: u64,
    },
    /// The parent has other sectors.
    #[error(
        "its parent {} has logical sectors of {found} bytes, and the child of {expected}",
        parent.display()
    )]
    SectorSize {
        /// The parent.
        parent: PathBuf,
        /// Bytes of the child's sectors.
        expected: u32,
        /// Bytes of the parent's.
        found: u32,
    },
    /// The parent lies where parents may not lie.
    #[error("its parent {} is {}", parent.display(), forbidden(allowed.as_deref()))]
    Forbidden {
        /// The parent.
        parent: PathBuf,
        /// Where it would have had to lie.
        allowed: Option<PathBuf>,
    },
    /// The parent cannot be opened.
    #[error("its parent {}: {reason}", parent.display())]
    Unusable {
        /// The parent.
        parent: PathBuf,
        /// Why.
        reason: Box<Refusal>,
    },
}

fn names(paths: &[PathBuf]) -> String {
    if paths.is_empty() {
        return "nothing, as no path of it leads anywhere here".into();
    }
    let names: Vec<_> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    names.join(", ")
}

fn forbidden(allowed: Option<&Path>) -> String {
    match allowed {
        Some(folder) => format!(
            "outside {}, where the parents of this disk have to lie",
            folder.display()
        ),
        None => "not opened: this disk may not have parents".into(),
    }
}

impl Refusal {
    pub(crate) fn io(operation: impl Into<String>, error: io::Error) -> Self {
        Self::Io {
            operation: operation.into(),
            error,
        }
    }

    pub(crate) fn corrupt(
        structure: impl Into<String>,
        offset: u64,
        expected: impl fmt::Display,
    ) -> Self {
        Self::Corrupt {
            structure: structure.into(),
            offset,
            expected: expected.to_string(),
        }
    }
}

/// Opens and locks the disk in the file at `path`. Nothing is written to a file that is refused.
///
/// # Errors
/// See [`Refusal`].
pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Arc<dyn Disk>, OpenError> {
    let path = path.as_ref();
    let failed = |reason| OpenError::new(path, reason);
    let file = open_locked(path, options.mode()).map_err(failed)?;
    let format = match options.format {
        Some(format) => format,
        None => detect(&file).map_err(failed)?,
    };
    Ok(match format {
        Format::Raw => Arc::new(Raw::new(file, options.mode()).map_err(failed)?),
        Format::Vhdx => Arc::new(Vhdx::open_chain(path, file, options)?),
    })
}

/// Opens a regular file and locks it. Never waits, neither for the other end of a FIFO nor for a lock.
pub(crate) fn open_locked(path: &Path, mode: OpenMode) -> Result<Arc<File>, Refusal> {
    let cannot = |error| Refusal::io("open the file", error);
    // Looked at before it is opened, because opening a device can have effects of its own, and after, because the
    // name may have come to mean another file.
    check_kind(std::fs::metadata(path).map_err(cannot)?.file_type())?;
    let file = File::options()
        .read(true)
        .write(!mode.is_read_only())
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(cannot)?;
    check_kind(file.metadata().map_err(cannot)?.file_type())?;
    // io_uring answers `EAGAIN` instead of waiting where the file is non-blocking.
    let flags = rustix::fs::fcntl_getfl(&file).map_err(|e| cannot(e.into()))?;
    rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(|e| cannot(e.into()))?;
    lock::lock(&file, mode).map_err(Refusal::Locked)?;
    Ok(Arc::new(file))
}

fn check_kind(kind: FileType) -> Result<(), Refusal> {
    let found = if kind.is_file() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_block_device() {
        "a block device"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "no regular file"
    };
    Err(Refusal::FileKind { found })
}

fn detect(file: &File) -> Result<Format, Refusal> {
    let starts_with = |signature: &[u8], offset| -> Result<bool, Refusal> {
        let mut found = [0; 8];
        let found = &mut found[..signature.len()];
        match file.read_exact_at(found, offset) {
            Ok(()) => Ok(found == signature),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(e) => Err(Refusal::io("read the signature", e)),
        }
    };
    if starts_with(vhdx::SIGNATURE, 0)? {
        return Ok(Format::Vhdx);
    }
    // A VHDX whose first bytes are damaged must not reach a guest as a raw disk.
    for offset in vhdx::HEADER_OFFSETS {
        if starts_with(vhdx::HEADER_SIGNATURE, offset)? {
            return Err(Refusal::corrupt(
                "VHDX file identifier",
                0,
                format!(
                    "expected \"vhdxfile\", as there is a VHDX header at {offset:#x}; name the format if the disk is raw"
                ),
            ));
        }
    }
    Ok(Format::Raw)
}
