//! A disk read and written from buffers, waiting for the bytes: for tools, where an engine would be too much.

use std::os::unix::fs::FileExt;

use crate::disk::{ByteRange, Disk, DiskError, ExtentKind};
use crate::progress::Progress;

/// What is looked at together where a disk is searched, in bytes.
const STRIDE: u64 = 1 << 30;
/// Bytes that are read at once.
const STEP: u64 = 1 << 20;
/// Unit in which disks are compared, in bytes.
const UNIT: u64 = 4096;

fn range(offset: u64, len: u64) -> Result<ByteRange, DiskError> {
    ByteRange::new(offset, len).ok_or(DiskError::Range { offset, len })
}

/// Fills a buffer from an offset of the disk.
///
/// # Errors
/// As [`Disk::resolve_read`], and `Io`.
pub fn read_at(disk: &dyn Disk, buffer: &mut [u8], offset: u64) -> Result<(), DiskError> {
    let mut extents = Vec::new();
    let id = disk.resolve_read(range(offset, buffer.len() as u64)?, &mut extents)?;
    let filled = extents.iter().try_for_each(|extent| {
        let start = (extent.offset - offset) as usize;
        let part = &mut buffer[start..start + extent.len as usize];
        match &extent.kind {
            ExtentKind::Data { file, file_offset } => file
                .read_exact_at(part, *file_offset)
                .map_err(|source| DiskError::Io {
                    operation: format!("read the disk at {:#x}", extent.offset),
                    source,
                }),
            ExtentKind::Zero | ExtentKind::Unmapped => {
                part.fill(0);
                Ok(())
            }
        }
    });
    disk.finish(id, true);
    filled
}

/// Writes bytes at an offset of the disk. They are durable after a flush.
///
/// # Errors
/// As [`Disk::resolve_write`], `Disguise`, and `Io`.
pub fn write_at(disk: &dyn Disk, bytes: &[u8], offset: u64) -> Result<(), DiskError> {
    let all = range(offset, bytes.len() as u64)?;
    // A range outside the disk is refused here, before its sectors are looked at.
    let mut extents = Vec::new();
    let id = disk.resolve_write(all, &mut extents)?;
    let inspected = disk.inspected(all).into_iter().try_for_each(|sector| {
        let start = (sector.offset() - offset) as usize;
        disk.inspect(sector, &bytes[start..start + sector.len() as usize])
    });
    if let Err(error) = inspected {
        disk.finish(id, false);
        return Err(error);
    }
    let written = extents.iter().try_for_each(|extent| match &extent.kind {
        ExtentKind::Data { file, file_offset } => {
            let start = (extent.offset - offset) as usize;
            file.write_all_at(&bytes[start..start + extent.len as usize], *file_offset)
                .map_err(|source| DiskError::Io {
                    operation: format!("write the disk at {:#x}", extent.offset),
                    source,
                })
        }
        ExtentKind::Zero | ExtentKind::Unmapped => Ok(()),
    });
    disk.finish(id, written.is_ok());
    written
}

/// A part of a disk: what is not data reads as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Bytes from where it was asked for, never zero.
    pub len: u64,
    /// Whether a file holds bytes for it.
    pub is_data: bool,
}

/// What the disk holds from an offset inside it, up to where that changes or a little before.
///
/// # Errors
/// As [`Disk::map`].
pub fn span_at(disk: &dyn Disk, offset: u64) -> Result<Span, DiskError> {
    span_before(disk, offset, disk.geometry().size)
}

/// As [`span_at`]; nothing from `end` on is looked at.
pub(crate) fn span_before(disk: &dyn Disk, offset: u64, end: u64) -> Result<Span, DiskError> {
    let mut map = Vec::new();
    disk.map(range(offset, STRIDE.min(end - offset))?, &mut map)?;
    let is_data = map
        .first()
        .is_some_and(|mapping| mapping.file_offset.is_some());
    let len = map
        .iter()
        .take_while(|mapping| mapping.file_offset.is_some() == is_data)
        .map(|mapping| mapping.len)
        .sum();
    Ok(Span { len, is_data })
}

/// Calls `visit` with offset and bytes of every piece of the disk that a file holds, in order, 1 MiB at most.
///
/// # Errors
/// Where the disk cannot be read, `Cancelled`, and what `visit` says.
pub(crate) fn for_each_piece<E: From<DiskError>>(
    disk: &dyn Disk,
    progress: &dyn Progress,
    mut visit: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let size = disk.geometry().size;
    let mut buffer = vec![0; STEP as usize];
    let mut at = 0;
    while at < size {
        progress.advance(at, size);
        if progress.is_cancelled() {
            return Err(DiskError::Cancelled.into());
        }
        let run = span_at(disk, at)?;
        if run.is_data {
            // To the end of a step, so that pieces of one disk are those of another.
            let len = (STEP - at % STEP).min(run.len);
            let piece = &mut buffer[..len as usize];
            read_at(disk, piece, at)?;
            visit(at, piece)?;
            at += len;
        } else {
            at += run.len;
        }
    }
    progress.advance(size, size);
    Ok(())
}

/// Where two disks of one size differ, in units of 4 KiB, in order; what one has beyond the end of the other differs.
///
/// # Errors
/// Where a disk cannot be read, and `Cancelled`.
pub fn differences(
    one: &dyn Disk,
    other: &dyn Disk,
    progress: &dyn Progress,
) -> Result<Vec<ByteRange>, DiskError> {
    let (size, larger) = {
        let sizes = [one.geometry().size, other.geometry().size];
        (sizes[0].min(sizes[1]), sizes[0].max(sizes[1]))
    };
    let mut found: Vec<ByteRange> = Vec::new();
    let mut note = |offset: u64, len: u64| {
        if let Some(last) = found.last_mut()
            && last.end() == offset
            && let Some(longer) = ByteRange::new(last.offset(), last.len() + len)
        {
            *last = longer;
        } else {
            found.extend(ByteRange::new(offset, len));
        }
    };
    let (mut left, mut right) = (vec![0; STEP as usize], vec![0; STEP as usize]);
    let mut at = 0;
    while at < size {
        progress.advance(at, larger);
        if progress.is_cancelled() {
            return Err(DiskError::Cancelled);
        }
        let runs = [span_at(one, at)?, span_at(other, at)?];
        let len = runs[0].len.min(runs[1].len).min(size - at);
        if !runs[0].is_data && !runs[1].is_data {
            at += len;
            continue;
        }
        let len = len.min(STEP) as usize;
        read_at(one, &mut left[..len], at)?;
        read_at(other, &mut right[..len], at)?;
        let units = left[..len]
            .chunks(UNIT as usize)
            .zip(right[..len].chunks(UNIT as usize));
        for ((a, b), offset) in units.zip((at..).step_by(UNIT as usize)) {
            if a != b {
                note(offset, a.len() as u64);
            }
        }
        at += len as u64;
    }
    if larger > size {
        note(size, larger - size);
    }
    Ok(found)
}
