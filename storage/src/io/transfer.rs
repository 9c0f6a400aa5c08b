//! One contiguous piece of I/O on one file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use libc::iovec;

/// Ranges the kernel takes at once (`IOV_MAX`).
const MAX_IOVECS: usize = 1024;

/// What to do with the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    /// `fdatasync`.
    Sync,
}

/// A read, write or sync that has not come to its end.
///
/// Its ranges belong to a buffer that outlives it: the maker of a transfer keeps the buffer until the transfer is
/// finished.
pub(super) struct Transfer {
    pub(super) kind: Kind,
    pub(super) file: Arc<File>,
    /// Where in the file, in bytes.
    pub(super) offset: u64,
    iovecs: Vec<iovec>,
    /// Ranges before this one are done.
    done: usize,
}

// SAFETY: the ranges are those of an `IoBuffer`, which may be accessed from any thread.
unsafe impl Send for Transfer {}

/// What became of one attempt.
pub(super) enum Progress {
    /// All bytes are moved.
    Finished,
    /// Some are left: try again.
    Again(Transfer),
    /// It cannot be done.
    Failed(Failure),
}

/// Where a transfer failed, and why.
pub(super) struct Failure {
    /// Offset in the file, in bytes, of what was not moved.
    pub(super) file_offset: u64,
    pub(super) source: io::Error,
}

impl Transfer {
    pub(super) fn new(kind: Kind, file: Arc<File>, offset: u64, iovecs: Vec<iovec>) -> Self {
        Self {
            kind,
            file,
            offset,
            iovecs,
            done: 0,
        }
    }

    /// The ranges of the next attempt.
    pub(super) fn iovecs(&self) -> &[iovec] {
        let left = self.iovecs.get(self.done..).unwrap_or_default();
        &left[..left.len().min(MAX_IOVECS)]
    }

    fn failed(&self, source: io::Error) -> Progress {
        Progress::Failed(Failure {
            file_offset: self.offset,
            source,
        })
    }

    /// Takes note of an attempt's result: a count of bytes, or a negative error number.
    pub(super) fn advance(mut self, result: i32) -> Progress {
        let moved = match usize::try_from(result) {
            Ok(moved) => moved,
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => {
                return Progress::Again(self);
            }
            Err(_) => return self.failed(io::Error::from_raw_os_error(-result)),
        };
        if self.kind == Kind::Sync {
            return Progress::Finished;
        }
        if moved == 0 && !self.iovecs().is_empty() {
            return self.failed(match self.kind {
                Kind::Read => io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the file ends inside the extent",
                ),
                Kind::Write | Kind::Sync => io::ErrorKind::WriteZero.into(),
            });
        }
        self.offset += moved as u64;
        let mut left = moved;
        while let Some(range) = self.iovecs.get_mut(self.done)
            && left > 0
        {
            let part = left.min(range.iov_len);
            range.iov_base = range.iov_base.wrapping_byte_add(part);
            range.iov_len -= part;
            left -= part;
            if range.iov_len == 0 {
                self.done += 1;
            }
        }
        if self.iovecs().is_empty() {
            Progress::Finished
        } else {
            Progress::Again(self)
        }
    }

    /// Makes an attempt on this thread.
    pub(super) fn attempt(self) -> Progress {
        let ranges = self.iovecs();
        let (fd, count) = (
            self.file.as_raw_fd(),
            libc::c_int::try_from(ranges.len()).unwrap_or(libc::c_int::MAX),
        );
        let Ok(offset) = libc::off64_t::try_from(self.offset) else {
            return self.failed(io::Error::from_raw_os_error(libc::EFBIG));
        };
        // SAFETY: the ranges are those of an `IoBuffer` that outlives the transfer, and `fd` is open as long as `file`.
        // For a sync no memory is involved.
        let result = unsafe {
            match self.kind {
                Kind::Read => libc::preadv64(fd, ranges.as_ptr(), count, offset),
                Kind::Write => libc::pwritev64(fd, ranges.as_ptr(), count, offset),
                Kind::Sync => libc::fdatasync(fd) as isize,
            }
        };
        let result = if result < 0 {
            -io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO)
        } else {
            result as i32
        };
        self.advance(result)
    }

    /// Makes attempts until the end.
    pub(super) fn run(mut self) -> Result<(), Failure> {
        loop {
            match self.attempt() {
                Progress::Finished => return Ok(()),
                Progress::Again(left) => self = left,
                Progress::Failed(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transfer(kind: Kind, lens: &[usize]) -> Transfer {
        let ranges = lens
            .iter()
            .map(|len| iovec {
                iov_base: 0x1000 as *mut _,
                iov_len: *len,
            })
            .collect();
        Transfer::new(kind, Arc::new(tempfile::tempfile().unwrap()), 100, ranges)
    }

    #[test]
    fn a_short_transfer_goes_on_where_it_stopped() {
        let Progress::Again(left) = transfer(Kind::Read, &[10, 10, 10]).advance(15) else {
            panic!()
        };
        assert_eq!(left.offset, 115);
        assert_eq!(
            left.iovecs().iter().map(|r| r.iov_len).collect::<Vec<_>>(),
            [5, 10]
        );
        assert!(matches!(left.advance(15), Progress::Finished));
    }

    #[test]
    fn an_interrupted_transfer_is_tried_again_and_a_failed_one_not() {
        assert!(matches!(
            transfer(Kind::Write, &[1]).advance(-libc::EINTR),
            Progress::Again(_)
        ));
        assert!(matches!(
            transfer(Kind::Write, &[1]).advance(-libc::ENOSPC),
            Progress::Failed(_)
        ));
    }

    #[test]
    fn the_end_of_the_file_inside_an_extent_is_an_error() {
        assert!(matches!(
            transfer(Kind::Read, &[1]).advance(0),
            Progress::Failed(_)
        ));
        assert!(matches!(
            transfer(Kind::Sync, &[]).advance(0),
            Progress::Finished
        ));
    }
}
