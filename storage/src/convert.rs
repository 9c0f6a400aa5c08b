//! A disk copied into another format. What reads as zeros becomes no data.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::blocking;
use crate::disk::{ByteRange, Disk, DiskError, SectorSize};
use crate::file::open_locked;
use crate::foreign::{Source, SourceError};
use crate::lock::OpenMode;
use crate::options::OpenOptions;
use crate::progress::Progress;
use crate::refusal::OpenError;
use crate::vhdx::{CreateError, CreateOptions, Vhdx};

/// Bytes that are copied at once.
const STEP: u64 = 1 << 20;
/// How far a salvage goes on where it cannot be said what is there, in bytes: no format maps less at once than it
/// allocates, and that is seldom less.
const LOST_UNIT: u64 = 65536;
/// Unit in which zeros are looked for inside data, and in which a salvage reads where more fails, in bytes.
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

/// How a conversion is done.
#[derive(Clone, Copy, Debug)]
pub struct ConvertOptions {
    /// What is written.
    pub target: Target,
    /// Whether a file that is there already is replaced.
    pub overwrite: bool,
    /// Whether what cannot be read is left as zeros and listed, rather than ends the conversion.
    pub salvage: bool,
}

impl ConvertOptions {
    /// To make a new file of a sound disk.
    pub fn new(target: Target) -> Self {
        Self {
            target,
            overwrite: false,
            salvage: false,
        }
    }
}

/// What a conversion came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Converted {
    /// Size of the disk in bytes: that of the source, rounded up to whole sectors.
    pub size: u64,
    /// Bytes of data that were written.
    pub written: u64,
    /// What a salvage could not read, in order: zeros in the copy.
    pub lost: Vec<ByteRange>,
}

/// Why a conversion failed. The target is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The source cannot be read.
    #[error("{}", path.display())]
    Source {
        /// The source.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
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
    #[error("{}: cannot {operation}", path.display())]
    Io {
        /// The target.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// The error of the host.
        source: io::Error,
    },
}

/// Where the copy goes.
enum Sink {
    Raw(File),
    Vhdx(Box<Vhdx>),
}

impl Sink {
    /// Makes the copy, which will be called `to`.
    fn create(
        copy: &Path,
        to: &Path,
        size: u64,
        target: Target,
        logical_sector: SectorSize,
    ) -> Result<Self, ConvertError> {
        match target {
            Target::Raw => {
                let made = File::options().write(true).create_new(true).open(copy);
                let file = made.and_then(|file| file.set_len(size).map(|()| file));
                file.map(Self::Raw).map_err(|source| ConvertError::Io {
                    path: to.to_owned(),
                    operation: "make the copy",
                    source,
                })
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
                Vhdx::create(copy, &options)?;
                let disk = Vhdx::open(copy, &OpenOptions::default())?;
                Ok(Self::Vhdx(Box::new(disk)))
            }
        }
    }

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

/// Copies a source, which was opened from the file `from`, into a new file at `to`. The copy is made under another name
/// and gets this one when it is whole and durable.
///
/// # Errors
/// See [`ConvertError`]; `Disk(Cancelled)` where the progress says so.
pub fn convert(
    (from, source): (&Path, &mut dyn Source),
    to: &Path,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<Converted, ConvertError> {
    let ConvertOptions {
        target,
        overwrite,
        salvage,
    } = *options;
    if !overwrite && to.symlink_metadata().is_ok() {
        return Err(ConvertError::Exists(to.to_owned()));
    }
    let failed = |operation| {
        move |source| ConvertError::Io {
            path: to.to_owned(),
            operation,
            source,
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
    let sink = Sink::create(&copy, to, size, target, logical_sector)?;
    let sector = u64::from(logical_sector.bytes());
    let mut copying = Copying {
        sink: &sink,
        sector,
        lost: salvage.then(Vec::new),
        written: 0,
    };
    copying.run((from, source), progress)?;
    let (written, lost) = (copying.written, copying.lost.unwrap_or_default());
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
    Ok(Converted {
        size,
        written,
        lost,
    })
}

/// A copy under way.
struct Copying<'a> {
    sink: &'a Sink,
    /// Bytes of a sector of the target.
    sector: u64,
    /// What could not be read, where that is not an error.
    lost: Option<Vec<ByteRange>>,
    written: u64,
}

impl Copying<'_> {
    fn run(
        &mut self,
        (from, source): (&Path, &mut dyn Source),
        progress: &dyn Progress,
    ) -> Result<(), ConvertError> {
        let unread = |error| ConvertError::Source {
            path: from.to_owned(),
            error,
        };
        let size = source.size();
        let lost = source.lost().to_vec();
        let mut lost = lost.into_iter().peekable();
        let mut at = 0;
        let mut buffer = vec![0; STEP as usize];
        while at < size {
            progress.advance(at, size);
            if progress.is_cancelled() {
                return Err(DiskError::Cancelled.into());
            }
            if let Some(range) = lost.next_if(|range| range.offset() <= at) {
                self.lose(at, range.end());
                at = range.end().max(at);
                continue;
            }
            // Nothing of the next range that is lost is read.
            let limit = lost.peek().map_or(size, |range| range.offset());
            let run = match source.span_at(at) {
                Ok(run) => run,
                Err(_) if self.lost.is_some() => {
                    let end = (at + 1).next_multiple_of(LOST_UNIT).min(limit);
                    self.lose(at, end);
                    at = end;
                    continue;
                }
                Err(error) => return Err(unread(error)),
            };
            if !run.is_data {
                at += run.len.max(1);
                continue;
            }
            // Always whole units, so that the target is written in its sectors: runs end where they like.
            let start = at / ZERO_UNIT as u64 * ZERO_UNIT as u64;
            let end = (at + run.len)
                .next_multiple_of(ZERO_UNIT as u64)
                .min(start + STEP)
                .min(limit.next_multiple_of(ZERO_UNIT as u64));
            let held = end.min(size);
            let bytes = &mut buffer[..(end - start) as usize];
            let inside = (held - start) as usize;
            match source.read_at(&mut bytes[..inside], start) {
                Ok(()) => {}
                Err(_) if self.lost.is_some() => {
                    self.read_units(source, &mut bytes[..inside], start);
                }
                Err(error) => return Err(unread(error)),
            }
            bytes[inside..].fill(0);
            // Past the size of the source the target ends with a sector.
            let kept = (inside as u64).next_multiple_of(self.sector) as usize;
            for (first, len) in data_in(&bytes[..kept]) {
                self.sink
                    .write(&bytes[first..first + len], start + first as u64)?;
                self.written += len as u64;
            }
            at = held;
        }
        progress.advance(size, size);
        Ok(())
    }

    /// Reads what of a range can be read, a unit at a time; the rest is lost.
    fn read_units(&mut self, source: &mut dyn Source, bytes: &mut [u8], start: u64) {
        for (unit, offset) in bytes
            .chunks_mut(ZERO_UNIT)
            .zip((start..).step_by(ZERO_UNIT))
        {
            if source.read_at(unit, offset).is_err() {
                unit.fill(0);
                self.lose(offset, offset + unit.len() as u64);
            }
        }
    }

    /// Notes that a range is lost.
    fn lose(&mut self, start: u64, end: u64) {
        if let Some(lost) = &mut self.lost {
            let joined = lost.pop_if(|last| last.end() >= start);
            let start = joined.map_or(start, ByteRange::offset);
            lost.extend(ByteRange::new(start, end.saturating_sub(start)));
        }
    }
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
