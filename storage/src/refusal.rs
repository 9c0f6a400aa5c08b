//! Why a file cannot be opened as a disk.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::guid::Guid;
use crate::lock::LockError;

/// Why a disk could not be opened. Its `Display` names the file, and its source says what was wrong with that.
#[derive(Debug, thiserror::Error)]
#[error("{}", path.display())]
pub struct OpenError {
    path: PathBuf,
    #[source]
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
    #[error("cannot {operation}")]
    Io {
        /// What was tried, such as `open the file`.
        operation: String,
        /// The error of the host.
        source: io::Error,
    },
    /// Not a regular file.
    #[error("is {found}; a disk has to be a regular file")]
    FileKind {
        /// What it is, such as `a directory`.
        found: &'static str,
    },
    /// Somebody else has it open.
    #[error(transparent)]
    Locked(LockError),
    /// The file has no bytes.
    #[error("is empty; a disk has at least one sector")]
    Empty,
    /// A container of another format, whose bytes are not those of the disk in it.
    #[error(
        "is {name}, which is not a disk as it is: `{program}` makes one of it; if its bytes are those of the disk all the same, name the format raw"
    )]
    Container {
        /// What it is.
        name: &'static str,
        /// The command that reads it.
        program: &'static str,
    },
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
    #[error("its parent {}", parent.display())]
    Unusable {
        /// The parent.
        parent: PathBuf,
        /// Why.
        #[source]
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
        None => "not opened: this disk may not have parents, as nobody has named its format (of a guest's disk: format=vhdx, or a name that ends in .vhdx)".into(),
    }
}

impl Refusal {
    pub(crate) fn io(operation: impl Into<String>, source: io::Error) -> Self {
        Self::Io {
            operation: operation.into(),
            source,
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
