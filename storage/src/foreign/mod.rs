//! Disks in formats of others, for reading: what a conversion starts from.
//!
//! qcow2 is read by a library; VHD, and VMDK with sparse extents, for which there is none, by the modules here.
//! Whatever a file says is checked before it is used: such files come from elsewhere.

mod qcow2;
mod source;
mod vhd;
mod vmdk;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

pub use crate::signature::SourceFormat;
use source::hole_or_data;
pub use source::{Source, SourceError};

use crate::blocking::{self, Span};
use crate::disk::{ByteRange, Disk, SectorSize};
use crate::file::open_locked;
use crate::lock::OpenMode;
use crate::medium::Medium;
use crate::open::detect_in;
use crate::options::{Format, OpenOptions};
use crate::refusal::OpenError;
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

/// Opens the disk at `path` for reading, found out by its signature where the format is not given. What has none that
/// is known is raw, and what has that of a format that cannot be read is refused.
///
/// # Errors
/// See [`SourceError`].
pub fn open(
    path: &Path,
    format: Option<SourceFormat>,
) -> Result<(SourceFormat, Box<dyn Source>), SourceError> {
    open_with(path, format, false)
}

/// As [`open`], for a salvage: a VHDX may have entries that lead nowhere.
///
/// # Errors
/// See [`SourceError`].
pub fn open_damaged(
    path: &Path,
    format: Option<SourceFormat>,
) -> Result<(SourceFormat, Box<dyn Source>), SourceError> {
    open_with(path, format, true)
}

fn open_with(
    path: &Path,
    format: Option<SourceFormat>,
    damaged: bool,
) -> Result<(SourceFormat, Box<dyn Source>), SourceError> {
    let failed = |reason| SourceError::Open(OpenError::new(path, reason));
    let file = open_locked(path, OpenMode::ReadOnly).map_err(failed)?;
    let format = match format {
        Some(format) => format,
        None => detect_in(&file).map_err(failed)?,
    };
    let source: Box<dyn Source> = match format {
        SourceFormat::Raw => Box::new(Flat::open(file)?),
        SourceFormat::Vhdx if damaged => {
            let (disk, lost) = Vhdx::open_damaged(path, file)?;
            Box::new(Damaged { disk, lost })
        }
        SourceFormat::Vhdx => {
            let options = OpenOptions {
                format: Some(Format::Vhdx),
                ..OpenOptions::read_only()
            };
            Box::new(Own(crate::open(path, &options)?))
        }
        SourceFormat::Qcow2 => Box::new(qcow2::Qcow2::open(path, file)?),
        SourceFormat::Vhd => Box::new(vhd::Vhd::open(file)?),
        SourceFormat::Vmdk => Box::new(vmdk::Vmdk::open(path, file)?),
    };
    Ok((format, source))
}
