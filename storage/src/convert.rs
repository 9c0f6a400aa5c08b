//! A disk copied into another format. What reads as zeros becomes no data.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::blocking;
use crate::disk::{Disk, DiskError, SectorSize};
use crate::foreign::{Source, SourceError};
use crate::lock::OpenMode;
use crate::open::{OpenError, OpenOptions, open_locked};
use crate::progress::Progress;
use crate::vhdx::{CreateError, CreateOptions, Vhdx};

/// Bytes that are copied at once.
const STEP: u64 = 1 << 20;
/// Unit in which zeros are looked for inside data, in bytes.
const ZERO_UNIT: usize = 4096;

/// What a conversion writes.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// A raw disk: a file with holes.
    Raw,
    /// A VHDX.
    Vhdx {
        /// Bytes of a payload block.
        block_size: u32,
        /// Logical sectors; those of the source where that is not given.
        logical_sector: Option<SectorSize>,
        /// Whether all blocks have their space from the start.
        fixed: bool,
    },
}

/// What a conversion came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Converted {
    /// Size of the disk in bytes: that of the source, rounded up to whole sectors.
    pub size: u64,
    /// Bytes of data that were written.
    pub written: u64,
}

/// Why a conversion failed. The target is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The source cannot be read.
    #[error("{}: {error}", path.display())]
    Source {
        /// The source.
        path: PathBuf,
        /// What is wrong with it.
        error: SourceError,
    },
    /// The target is there already.
    #[error("{}: is there already; say so if it is to be replaced", .0.display())]
    Exists(PathBuf),
    /// The target cannot be made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The target cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The target cannot be written, or the conversion was cancelled.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The host refused.
    #[error("{}: cannot {operation}: {error}", path.display())]
    Io {
        /// The target.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// What the host said.
        error: io::Error,
    },
}

/// Where the copy goes.
enum Sink {
    Raw(File),
    Vhdx(Box<Vhdx>),
}

impl Sink {
    fn write(&self, bytes: &[u8], offset: u64) -> Result<(), DiskError> {
        match self {
            Self::Raw(file) => file
                .write_all_at(bytes, offset)
                .map_err(|source| DiskError::Io {
                    operation: format!("write the target at {offset:#x}"),
                    source,
                }),
            Self::Vhdx(disk) => blocking::write_at(&**disk, bytes, offset),
        }
    }
}

/// Copies a source, which was opened from the file `from`, into a new file at `to`; where that is there it is replaced only if
/// `overwrite` is set. The copy is made under another name and gets this one when it is whole and durable.
///
/// # Errors
/// See [`ConvertError`]; `Disk(Cancelled)` where the progress says so.
pub fn convert(
    (from, source): (&Path, &mut dyn Source),
    to: &Path,
    target: Target,
    overwrite: bool,
    progress: &dyn Progress,
) -> Result<Converted, ConvertError> {
    if !overwrite && to.symlink_metadata().is_ok() {
        return Err(ConvertError::Exists(to.to_owned()));
    }
    let failed = |operation| {
        move |error| ConvertError::Io {
            path: to.to_owned(),
            operation,
            error,
        }
    };
    let folder = to
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    // Goes with all in it when this function ends, however it does.
    let scratch = tempfile::Builder::new()
        .prefix(".coppice-convert-")
        .tempdir_in(folder)
        .map_err(failed("make a folder for the copy"))?;
    let copy = scratch.path().join("copy");
    let logical_sector = match target {
        Target::Raw => SectorSize::B512,
        Target::Vhdx { logical_sector, .. } => {
            logical_sector.unwrap_or_else(|| source.logical_sector())
        }
    };
    // Sources are refused that are larger than any disk, or the new file is.
    let size = source
        .size()
        .checked_next_multiple_of(u64::from(logical_sector.bytes()))
        .unwrap_or(u64::MAX);
    let sink = match target {
        Target::Raw => {
            let file = File::options()
                .write(true)
                .create_new(true)
                .open(&copy)
                .map_err(failed("make the copy"))?;
            file.set_len(size).map_err(failed("make the copy"))?;
            Sink::Raw(file)
        }
        Target::Vhdx {
            block_size, fixed, ..
        } => {
            let options = CreateOptions {
                block_size,
                logical_sector,
                fixed,
                ..CreateOptions::new(size)
            };
            Vhdx::create(&copy, &options)?;
            Sink::Vhdx(Box::new(Vhdx::open(&copy, &OpenOptions::default())?))
        }
    };
    let sector = u64::from(logical_sector.bytes());
    let written = transfer((from, source), &sink, sector, progress)?;
    match sink {
        Sink::Raw(file) => file.sync_all().map_err(failed("sync the copy"))?,
        Sink::Vhdx(disk) => disk.close()?,
    }
    let flags = if overwrite {
        // A disk that somebody uses is not taken from under them.
        if to.is_file() {
            open_locked(to, OpenMode::ReadWrite).map_err(|e| OpenError::new(to, e))?;
        }
        RenameFlags::empty()
    } else {
        RenameFlags::NOREPLACE
    };
    match renameat_with(CWD, &copy, CWD, to, flags) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Err(ConvertError::Exists(to.to_owned())),
        Err(error) => return Err(failed("give the copy its name")(error.into())),
    }
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(failed("make the name durable"))?;
    Ok(Converted { size, written })
}

fn transfer(
    (from, source): (&Path, &mut dyn Source),
    sink: &Sink,
    sector: u64,
    progress: &dyn Progress,
) -> Result<u64, ConvertError> {
    let unread = |error| ConvertError::Source {
        path: from.to_owned(),
        error,
    };
    let size = source.size();
    let (mut at, mut written) = (0, 0);
    let mut buffer = vec![0; STEP as usize];
    while at < size {
        progress.advance(at, size);
        if progress.is_cancelled() {
            return Err(DiskError::Cancelled.into());
        }
        let run = source.run_at(at).map_err(unread)?;
        if !run.is_data {
            at += run.len.max(1);
            continue;
        }
        // Always whole units, so that the target is written in its sectors: runs end where they like.
        let start = at / ZERO_UNIT as u64 * ZERO_UNIT as u64;
        let end = (at + run.len)
            .next_multiple_of(ZERO_UNIT as u64)
            .min(start + STEP);
        let held = end.min(size);
        let bytes = &mut buffer[..(end - start) as usize];
        let inside = (held - start) as usize;
        source
            .read_at(&mut bytes[..inside], start)
            .map_err(unread)?;
        bytes[inside..].fill(0);
        // Past the size of the source the target ends with a sector.
        let kept = (inside as u64).next_multiple_of(sector) as usize;
        for (first, len) in data_in(&bytes[..kept]) {
            sink.write(&bytes[first..first + len], start + first as u64)?;
            written += len as u64;
        }
        at = held;
    }
    progress.advance(size, size);
    Ok(written)
}

/// The parts of a buffer that are not zeros, in units: where each begins, and how long it is.
fn data_in(bytes: &[u8]) -> Vec<(usize, usize)> {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for (unit, start) in bytes.chunks(ZERO_UNIT).zip((0..).step_by(ZERO_UNIT)) {
        if unit.iter().all(|byte| *byte == 0) {
            continue;
        }
        match parts.last_mut() {
            Some((first, len)) if *first + *len == start => *len += unit.len(),
            Some(_) | None => parts.push((start, unit.len())),
        }
    }
    parts
}
