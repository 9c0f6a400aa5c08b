//! Guest memory that the kernel reads frames from and writes them to, without a copy in between.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::iovec;
use vm_memory::GuestMemoryBackend;

use super::super::chain::{ChainError, Segment};
use super::header::NetHeader;
use crate::GuestMemory;

/// `IOV_MAX`: the most pieces that one call takes (readv(2)).
pub(super) const MAX_PIECES: usize = 1024;

/// Pieces of guest memory, in order.
pub(super) struct Scatter<'m> {
    memory: &'m GuestMemory,
    iovecs: Vec<iovec>,
    len: usize,
}

impl<'m> Scatter<'m> {
    /// No piece.
    pub(super) fn new(memory: &'m GuestMemory) -> Self {
        Self {
            memory,
            iovecs: Vec::new(),
            len: 0,
        }
    }

    /// Becomes empty, and keeps its room.
    pub(super) fn clear(&mut self) {
        self.iovecs.clear();
        self.len = 0;
    }

    /// Adds segments behind the others.
    ///
    /// # Errors
    /// `Memory` where one is outside guest memory; `TooLong` where there would be more pieces than a call takes. Then
    /// nothing is added.
    pub(super) fn push(&mut self, segments: &[Segment]) -> Result<(), ChainError> {
        let (pieces, len) = (self.iovecs.len(), self.len);
        let pushed = self.try_push(segments);
        if pushed.is_err() {
            self.iovecs.truncate(pieces);
            self.len = len;
        }
        pushed
    }

    fn try_push(&mut self, segments: &[Segment]) -> Result<(), ChainError> {
        for segment in segments {
            // A segment may go on from one memory region to the next.
            for slice in
                GuestMemoryBackend::get_slices(self.memory, segment.address, segment.len as usize)
            {
                let slice = slice.map_err(|_| ChainError::Memory)?;
                // One piece is the header's, or what does not fit.
                if self.iovecs.len() + 1 >= MAX_PIECES {
                    return Err(ChainError::TooLong);
                }
                self.iovecs.push(iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
                self.len = self
                    .len
                    .checked_add(slice.len())
                    .ok_or(ChainError::TooLong)?;
            }
        }
        Ok(())
    }

    fn count(&self) -> libc::c_int {
        // There are at most `MAX_PIECES`.
        libc::c_int::try_from(self.iovecs.len()).unwrap_or(libc::c_int::MAX)
    }

    /// Reads one frame of `source`, header first. Gives its length; `None` where it did not fit, and is lost.
    ///
    /// # Errors
    /// The host's error; then pieces may have been written to.
    pub(super) fn receive(&mut self, source: BorrowedFd<'_>) -> io::Result<Option<usize>> {
        // A tap cuts a frame and tells nobody, but for this byte.
        let mut rest = 0u8;
        self.iovecs.push(iovec {
            iov_base: (&raw mut rest).cast(),
            iov_len: 1,
        });
        // SAFETY: each piece but the last comes from `GuestMemoryBackend::get_slices` of the memory that `self`
        // borrows, so it is mapped and writable as long as that is; no Rust reference into guest memory exists. The
        // last is `rest`, which outlives the call. There are at most `MAX_PIECES` pieces, as `push` sees to.
        let got = unsafe { libc::readv(source.as_raw_fd(), self.iovecs.as_ptr(), self.count()) };
        self.iovecs.pop();
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        Ok((got <= self.len).then_some(got))
    }

    /// Sends the pieces as one frame, behind `header`.
    ///
    /// # Errors
    /// The host's error.
    pub(super) fn send(&mut self, header: &NetHeader, target: BorrowedFd<'_>) -> io::Result<()> {
        let first = iovec {
            iov_base: std::ptr::from_ref(header).cast_mut().cast(),
            iov_len: size_of::<NetHeader>(),
        };
        self.iovecs.insert(0, first);
        // SAFETY: the first piece is `header`, which outlives the call and is only read; for the others see
        // `Scatter::receive`.
        let sent = unsafe { libc::writev(target.as_raw_fd(), self.iovecs.as_ptr(), self.count()) };
        self.iovecs.remove(0);
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}
