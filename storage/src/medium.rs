//! The file under a disk format, as a seam: formats do their own I/O through [`Medium`], so that a test
//! can record it, cut it short or make it fail.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::disk::DiskError;

/// How much is written at once where zeros have to be written out.
static ZEROS: [u8; 65536] = [0; 65536];

/// A file that holds a disk. Offsets and lengths are in bytes.
pub(crate) trait Medium: Send + Sync + fmt::Debug {
    /// Fills `buffer` from `offset`; an end of file in between is an error.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `bytes` at `offset`.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Length of the file.
    fn len(&self) -> io::Result<u64>;
    /// Cuts the file, or extends it by zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes everything written, and the length, durable.
    fn sync_data(&self) -> io::Result<()>;
    /// Gives the space of the range back, which then reads as zeros; false where the file system cannot.
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<bool>;
    /// Makes the range read as zeros and keeps space for it where the file system can.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;
    /// The first offset, from `offset` on, that may hold anything but zeros; `None` where all the rest is a hole.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>>;
    /// The file, for engines that move payload.
    fn file(&self) -> &Arc<File>;
}

impl Medium for Arc<File> {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(&**self, buffer, offset)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(&**self, bytes, offset)
    }

    fn len(&self) -> io::Result<u64> {
        length(self)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }

    fn sync_data(&self) -> io::Result<()> {
        File::sync_data(self)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<bool> {
        fallocate(
            self,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        )
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        if fallocate(
            self,
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        )? {
            return Ok(());
        }
        write_zeros(self, offset, len)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        // The cursor that this moves is used by nobody: all I/O names its offset.
        match rustix::fs::seek(&**self, SeekFrom::Data(offset)) {
            Ok(found) => Ok(Some(found)),
            Err(Errno::NXIO) => Ok(None),
            // A file system without the notion of holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(offset)),
            Err(e) => Err(e.into()),
        }
    }

    fn file(&self) -> &Arc<File> {
        self
    }
}

/// Where the holes of a file begin.
pub(crate) trait Holes {
    /// The first offset, from `offset` on, where a hole begins; the end of the file is one.
    fn next_hole(&self, offset: u64) -> io::Result<u64>;
}

impl Holes for File {
    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        match rustix::fs::seek(self, SeekFrom::Hole(offset)) {
            Ok(found) => Ok(found),
            // A file system without the notion of holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => length(self),
            Err(e) => Err(e.into()),
        }
    }
}

/// Whether it is a block device. One that the host does not describe is none.
pub(crate) fn is_block_device(file: &File) -> bool {
    file.metadata()
        .is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// The length of a file, or the size of a block device, of which `stat` says 0.
fn length(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if metadata.file_type().is_block_device() {
        // The cursor that this moves is used by nobody: all I/O names its offset.
        return Ok(rustix::fs::seek(file, SeekFrom::End(0))?);
    }
    Ok(metadata.len())
}

/// Makes a range of a file read as zeros, giving its space back where allowed and possible.
pub(crate) fn make_zero(
    medium: &dyn Medium,
    offset: u64,
    len: u64,
    may_unmap: bool,
) -> Result<(), DiskError> {
    if len == 0 {
        return Ok(());
    }
    let zeroed = || -> io::Result<()> {
        if may_unmap && medium.punch_hole(offset, len)? {
            return Ok(());
        }
        medium.zero(offset, len)
    };
    zeroed().map_err(|source| DiskError::Io {
        operation: format!("write zeros at {offset:#x}+{len:#x}"),
        source,
    })
}

/// Writes zeros out, for want of a better way.
fn write_zeros(medium: &dyn Medium, offset: u64, len: u64) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let step = (len - done).min(ZEROS.len() as u64);
        medium.write_all_at(&ZEROS[..step as usize], offset + done)?;
        done += step;
    }
    Ok(())
}

fn fallocate(file: &File, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
    match rustix::fs::fallocate(file, flags, offset, len) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
        // The device's blocks are larger than those of the range.
        Err(Errno::INVAL) if is_block_device(file) => Ok(false),
        Err(e) => Err(e.into()),
    }
}
