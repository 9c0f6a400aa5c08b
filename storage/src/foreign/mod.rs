//! Disks in formats of others, for reading: what a conversion starts from.
//!
//! qcow2 is read by a library; VHD, and VMDK with sparse extents, for which there is none, by the modules here.
//! Whatever a file says is checked before it is used: such files come from elsewhere.

mod named;
mod qcow2;
mod source;
mod vhd;
mod vmdk;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

pub use crate::signature::SourceFormat;
pub use named::Backing;
use named::{Chain, NamedFiles};

use source::{MAX_DEPTH, hole_or_data};
pub use source::{NotFollowed, Source, SourceError};

use crate::blocking::{self, Span};
use crate::disk::{ByteRange, Disk, SectorSize};
use crate::file::open_locked;
use crate::lock::OpenMode;
use crate::medium::Medium;
use crate::open::detect_in;
use crate::options::{Format, OpenOptions, Parents};
use crate::refusal::{OpenError, ParentRefusal, Refusal};
use crate::vhdx::Vhdx;

/// A VHDX as a source.
struct Own(Arc<dyn Disk>);

impl Source for Own {
    fn size(&self) -> u64 {
        self.0.geometry().size
    }
    fn logical_sector(&self) -> SectorSize {
        self.0.geometry().logical_sector
    }
    fn span_at(&mut self, offset: u64) -> Result<Span, SourceError> {
        Ok(blocking::span_at(&*self.0, offset)?)
    }
    fn read_at(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), SourceError> {
        Ok(blocking::read_at(&*self.0, buffer, offset)?)
    }
}

/// A VHDX, some blocks of which are lost.
struct Damaged {
    disk: Vhdx,
    lost: Vec<ByteRange>,
}

impl Source for Damaged {
    fn size(&self) -> u64 {
        self.disk.geometry().size
    }
    fn logical_sector(&self) -> SectorSize {
        self.disk.geometry().logical_sector
    }
    fn span_at(&mut self, offset: u64) -> Result<Span, SourceError> {
        let next = self.lost.partition_point(|lost| lost.end() <= offset);
        let end = self
            .lost
            .get(next)
            .map_or(self.size(), |lost| lost.offset());
        Ok(blocking::span_before(&self.disk, offset, end)?)
    }
    fn read_at(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), SourceError> {
        Ok(blocking::read_at(&self.disk, buffer, offset)?)
    }
    fn lost(&self) -> &[ByteRange] {
        &self.lost
    }
}

/// A raw file, of any length.
struct Flat {
    file: Arc<File>,
    size: u64,
}

impl Flat {
    fn open(file: Arc<File>) -> Result<Self, SourceError> {
        let size = Medium::len(&file).map_err(|e| SourceError::io("read the length", e))?;
        if size == 0 {
            return Err(SourceError::Unsupported(
                "is empty; a disk has at least one sector".into(),
            ));
        }
        Ok(Self { file, size })
    }
}

impl Source for Flat {
    fn size(&self) -> u64 {
        self.size
    }
    fn span_at(&mut self, offset: u64) -> Result<Span, SourceError> {
        hole_or_data(&self.file, offset, self.size - offset)
    }
    fn read_at(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), SourceError> {
        FileExt::read_exact_at(&*self.file, buffer, offset)
            .map_err(|e| SourceError::io(format!("read the disk at {offset:#x}"), e))
    }
}

/// How a source is opened.
#[derive(Clone, Debug, Default)]
pub struct SourceOptions {
    /// The format. `None` finds it by the signature: what has none that is known is raw, and what has that of a format
    /// that cannot be read is refused. What is found so is followed to no other file.
    pub format: Option<SourceFormat>,
    /// Where other files lie that the source may name and that are opened with it: backing files, extents, parents, up
    /// to 16 one behind the other. A source that names any is refused where this is `None`, or where `format` is.
    pub backing: Option<Backing>,
    /// For a salvage: a VHDX may have entries that lead nowhere.
    pub damaged: bool,
}

impl SourceOptions {
    /// For a source of a format that is known, which names no other file.
    pub fn named(format: SourceFormat) -> Self {
        Self {
            format: Some(format),
            ..Self::default()
        }
    }
}

/// Opens the disk at `path` for reading.
///
/// # Errors
/// See [`SourceError`].
pub fn open(
    path: &Path,
    options: &SourceOptions,
) -> Result<(SourceFormat, Box<dyn Source>), SourceError> {
    let failed = |reason| SourceError::Open(OpenError::new(path, reason));
    let file = open_locked(path, OpenMode::ReadOnly).map_err(failed)?;
    let (format, is_guessed) = match options.format {
        Some(format) => (format, false),
        None => (detect_in(&file).map_err(failed)?, true),
    };
    let chain = Chain::new(path, &file)?;
    let files = NamedFiles::new(format, is_guessed, options.backing.as_ref(), &chain)?;
    let source: Box<dyn Source> = match format {
        SourceFormat::Raw => Box::new(Flat::open(file)?),
        SourceFormat::Vhdx => vhdx(path, file, &files, options.damaged)?,
        SourceFormat::Qcow2 => Box::new(qcow2::Qcow2::open(&file, chain, files)?),
        SourceFormat::Vhd => Box::new(vhd::Vhd::open(file)?),
        SourceFormat::Vmdk => Box::new(vmdk::Vmdk::open(file, &chain, &files)?),
    };
    Ok((format, source))
}

/// Opens a VHDX, and the parents that it may have.
fn vhdx(
    path: &Path,
    file: Arc<File>,
    files: &NamedFiles,
    damaged: bool,
) -> Result<Box<dyn Source>, SourceError> {
    let options = OpenOptions {
        format: Some(Format::Vhdx),
        parents: match files {
            NamedFiles::Guessed(_) | NamedFiles::NotAsked => Parents::Nowhere,
            NamedFiles::Below { path, .. } => Parents::Within(path.clone()),
        },
        ..OpenOptions::read_only()
    };
    let opened = if damaged {
        Vhdx::open_damaged(path, file, &options)
    } else {
        Vhdx::open_chain(path, file, &options).map(|disk| (disk, Vec::new()))
    };
    let (disk, lost) = opened.map_err(|error| not_followed(error, files))?;
    let mut parents = std::iter::successors(disk.parent(), |parent| parent.parent());
    if let Some(parent) = parents.nth(MAX_DEPTH) {
        return Err(SourceError::Named {
            what: "parent",
            name: parent.identifiers().data_write_guid.to_string(),
            reason: NotFollowed::TooDeep,
        });
    }
    Ok(if damaged {
        Box::new(Damaged { disk, lost })
    } else {
        Box::new(Own(Arc::new(disk)))
    })
}

/// The error of a VHDX that cannot be opened, with the way to be allowed its parent.
fn not_followed(error: OpenError, files: &NamedFiles) -> SourceError {
    let Refusal::Parent(ParentRefusal::Forbidden { parent, .. }) = error.reason() else {
        return error.into();
    };
    SourceError::Named {
        what: "parent",
        name: parent.display().to_string(),
        reason: match files {
            NamedFiles::Guessed(format) => NotFollowed::Guessed { format: *format },
            NamedFiles::NotAsked => NotFollowed::NotAsked,
            NamedFiles::Below { path, .. } => NotFollowed::Outside {
                found: parent.clone(),
                folder: path.clone(),
            },
        },
    }
}
