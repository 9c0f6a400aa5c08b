//! What each format of others offers: a disk that can be read from any place.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::blocking::Span;
use crate::disk::{ByteRange, DiskError, SectorSize};
use crate::medium::{Holes, Medium};
use crate::refusal::{OpenError, Refusal};
use crate::signature::SourceFormat;

/// A disk that can be read, whatever it is.
pub trait Source {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// Sectors of the disk.
    fn logical_sector(&self) -> SectorSize {
        SectorSize::B512
    }
    /// What lies at an offset inside the disk, up to where that changes or a little before.
    fn span_at(&mut self, offset: u64) -> Result<Span, SourceError>;
    /// Fills a buffer from an offset of the disk.
    fn read_at(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), SourceError>;
    /// What is known to be lost from the start, in order: it cannot be asked for.
    fn lost(&self) -> &[ByteRange] {
        &[]
    }
}

/// Why a disk cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The disk said so.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The host refused.
    #[error("cannot {operation}")]
    Io {
        /// What was tried.
        operation: String,
        /// The error of the host.
        source: io::Error,
    },
    /// The file says something that its format forbids.
    #[error("{structure} at file offset {offset:#x} is corrupt: {expected}")]
    Corrupt {
        /// The structure of the format.
        structure: &'static str,
        /// Where it lies in the file, in bytes.
        offset: u64,
        /// What was expected.
        expected: String,
    },
    /// It names another file, which is not opened.
    #[error("the {what} {name:?} that it names is not opened")]
    Named {
        /// What the other file is to it, such as `backing file`.
        what: &'static str,
        /// As it calls the other file.
        name: String,
        /// Why not.
        #[source]
        reason: NotFollowed,
    },
    /// The file is sound as far as can be seen, but uses what cannot be read.
    #[error("{0}")]
    Unsupported(String),
}

/// How many files may stand one behind the other below a source.
pub(super) const MAX_DEPTH: usize = 16;

/// Why a file that a source names is not opened.
#[derive(Debug, thiserror::Error)]
pub enum NotFollowed {
    /// The format of the source was guessed.
    #[error(
        "the format was found by the signature, and a guest can write one into its raw disk; if no guest wrote this one, `--from {} --backing` follows it",
        format.name()
    )]
    Guessed {
        /// What was found.
        format: SourceFormat,
    },
    /// The caller did not ask for it.
    #[error("`--backing` follows it")]
    NotAsked,
    /// It lies elsewhere.
    #[error(
        "it is {}, and only what lies in {} or below is; `--backing-dir` names another folder",
        found.display(),
        folder.display()
    )]
    Outside {
        /// The file, whatever links lead to it.
        found: PathBuf,
        /// Where it would have had to lie.
        folder: PathBuf,
    },
    /// The source stands on too many files.
    #[error("more than {MAX_DEPTH} files stand one behind the other")]
    TooDeep,
    /// The file stands on itself.
    #[error("it is {}, which stands on it: the files name each other in a circle", .0.display())]
    Circle(PathBuf),
    /// It is no disk.
    #[error("it cannot be used")]
    Refused(#[source] Box<Refusal>),
}

impl From<Refusal> for NotFollowed {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(Box::new(refusal))
    }
}

impl SourceError {
    pub(super) fn io(operation: impl Into<String>, source: io::Error) -> Self {
        Self::Io {
            operation: operation.into(),
            source,
        }
    }

    pub(super) fn corrupt(
        structure: &'static str,
        offset: u64,
        expected: impl Into<String>,
    ) -> Self {
        Self::Corrupt {
            structure,
            offset,
            expected: expected.into(),
        }
    }
}

/// A run of a file that is the disk, or a part of it.
pub(super) fn hole_or_data(file: &Arc<File>, offset: u64, left: u64) -> Result<Span, SourceError> {
    let failed = |e| SourceError::io(format!("look for holes from {offset:#x}"), e);
    let end = offset.saturating_add(left);
    let data = file.next_data(offset).map_err(failed)?;
    Ok(match data.filter(|data| *data < end) {
        Some(data) if data <= offset => Span {
            len: file
                .next_hole(offset)
                .map_err(failed)?
                .clamp(offset + 1, end)
                - offset,
            is_data: true,
        },
        Some(data) => Span {
            len: data - offset,
            is_data: false,
        },
        None => Span {
            len: left,
            is_data: false,
        },
    })
}
