//! What each format of others offers: a disk that can be read from any place.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::blocking::Span;
use crate::disk::{ByteRange, DiskError, SectorSize};
use crate::medium::{Holes, Medium};
use crate::refusal::OpenError;

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
    /// The file is sound as far as can be seen, but uses what cannot be read.
    #[error("{0}")]
    Unsupported(String),
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

/// A file next to another that names it; nowhere else.
pub(super) fn beside(path: &Path, name: &str) -> Result<PathBuf, SourceError> {
    let outside = || {
        SourceError::Unsupported(format!(
            "names the file {name:?}, which does not lie in its own folder or below; only such files are opened"
        ))
    };
    let io = |e| SourceError::io(format!("find the file {name:?}"), e);
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
        .canonicalize()
        .map_err(io)?;
    let found = folder.join(name).canonicalize().map_err(io)?;
    if found.starts_with(&folder) {
        Ok(found)
    } else {
        Err(outside())
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
