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
use crate::vhdx::{self, Vhdx};

/// The format of a disk's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// [MS-VHDX].
    Vhdx,
}

/// How to open a disk.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// Open for reading alone; the file is shared with other readers and never written.
    pub read_only: bool,
    /// The format. `None` looks for the signature of VHDX and takes everything else as raw: right for files that
    /// their owner made, but name the format of a raw disk that a guest can write, since the guest decides
    /// what its first bytes look like.
    pub format: Option<Format>,
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
    /// The file is sound as far as can be seen, but uses what is not supported.
    #[error("{0}")]
    Unsupported(String),
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
    let mode = if options.read_only {
        OpenMode::ReadOnly
    } else {
        OpenMode::ReadWrite
    };
    let disk = || -> Result<Arc<dyn Disk>, Refusal> {
        let file = open_locked(path, mode)?;
        let format = match options.format {
            Some(format) => format,
            None => detect(&file)?,
        };
        Ok(match format {
            Format::Raw => Arc::new(Raw::new(file, mode)?),
            Format::Vhdx => Arc::new(Vhdx::from_medium(Box::new(file), mode)?),
        })
    };
    disk().map_err(|reason| OpenError::new(path, reason))
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
