//! Memory that the host's kernel reads and writes on behalf of a request.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use libc::iovec;

use crate::Disk;

/// Memory that a transfer may go to or come from.
///
/// # Safety
/// Every range that `iovecs` names is mapped, readable and writable, from any thread, until the value is dropped, and
/// the result is the same for each call, whatever [`IoBuffer::try_fill`] does. The memory may change at any time (a
/// guest may write to it): no Rust reference points into it.
pub unsafe trait IoBuffer: Send + 'static {
    /// The ranges, in order.
    fn iovecs(&self) -> &[iovec];

    /// A read is about to fill a part of the ranges, counted in bytes from the start of the first. Returns true where
    /// the buffer has put the bytes there itself, so that no transfer is needed.
    fn try_fill(&mut self, part: Range<u64>, from: Source<'_>) -> bool {
        let _ = (part, from);
        false
    }
}

/// Where the bytes of a read come from.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// From a file.
    File {
        /// The disk, which knows whether the file changes ([`Disk::is_immutable`]).
        disk: &'a dyn Disk,
        /// The file.
        file: &'a Arc<File>,
        /// Where in it they begin, in bytes.
        file_offset: u64,
    },
    /// They are zeros.
    Zeros,
}

/// Bytes of the host's own, for tools and tests.
#[derive(Debug)]
pub struct OwnedBuffer {
    bytes: Box<[u8]>,
    iovec: [iovec; 1],
}

// SAFETY: the iovec names the heap allocation of `bytes`, which this value owns and never moves or frees before it is
// dropped, and to which no reference exists while a queue owns the value.
unsafe impl IoBuffer for OwnedBuffer {
    fn iovecs(&self) -> &[iovec] {
        &self.iovec
    }
}

// SAFETY: the pointer in the iovec is to memory that the value owns; sending the value sends the memory along.
unsafe impl Send for OwnedBuffer {}

impl OwnedBuffer {
    /// A buffer that holds `bytes`.
    pub fn new(bytes: Vec<u8>) -> Self {
        let mut bytes = bytes.into_boxed_slice();
        let iovec = [iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        }];
        Self { bytes, iovec }
    }

    /// The bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes.into_vec()
    }
}

/// A position in a list of ranges, from which ranges are cut off.
pub(super) struct Cursor<'a> {
    iovecs: &'a [iovec],
    /// Bytes of the first range that are cut off already.
    skip: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(iovecs: &'a [iovec]) -> Self {
        Self { iovecs, skip: 0 }
    }

    /// The ranges of the next `len` bytes, or of what is left.
    pub(super) fn take(&mut self, mut len: usize) -> Vec<iovec> {
        let mut taken = Vec::new();
        while len > 0
            && let Some((first, rest)) = self.iovecs.split_first()
        {
            let part = (first.iov_len - self.skip).min(len);
            if part > 0 {
                // Inside the range: `skip` is at most its length.
                taken.push(iovec {
                    iov_base: first.iov_base.wrapping_byte_add(self.skip),
                    iov_len: part,
                });
            }
            len -= part;
            self.skip += part;
            if self.skip == first.iov_len {
                (self.iovecs, self.skip) = (rest, 0);
            }
        }
        taken
    }
}

/// Bytes in all ranges; the ranges of one buffer are mapped at once, so that their sum is no overflow.
pub(super) fn total_len(iovecs: &[iovec]) -> u64 {
    iovecs.iter().map(|iovec| iovec.iov_len as u64).sum()
}

/// Copies part of a buffer.
pub(super) fn copy<B: IoBuffer>(buffer: &B, offset: u64, len: u64) -> Vec<u8> {
    let mut copy = vec![0; len as usize];
    let mut cursor = Cursor::new(buffer.iovecs());
    cursor.take(offset as usize);
    let mut left = &mut copy[..];
    for part in cursor.take(len as usize) {
        let (target, rest) = left.split_at_mut(part.iov_len);
        // SAFETY: `part` lies in a range of the buffer, which is mapped and readable while `buffer` is borrowed, and
        // `target` is as long and is memory of this function alone. A guest that writes there at the same time gets
        // some mix of its bytes copied; nothing is concluded from them but by reading the copy.
        unsafe {
            std::ptr::copy_nonoverlapping(
                part.iov_base.cast::<u8>(),
                target.as_mut_ptr(),
                part.iov_len,
            );
        }
        left = rest;
    }
    copy
}

/// Fills part of a buffer with zeros.
pub(super) fn zero<B: IoBuffer>(buffer: &B, offset: u64, len: u64) {
    let mut cursor = Cursor::new(buffer.iovecs());
    cursor.take(offset as usize);
    for part in cursor.take(len as usize) {
        // SAFETY: `part` lies in a range of the buffer, which is mapped and writable while `buffer` is borrowed; no
        // Rust reference points into it. A guest that writes there at the same time gets to keep either byte.
        unsafe { std::ptr::write_bytes(part.iov_base.cast::<u8>(), 0, part.iov_len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_cuts_ranges_anywhere() {
        let base = 0x1000 as *mut libc::c_void;
        let range = |offset: usize, len| iovec {
            iov_base: base.wrapping_byte_add(offset),
            iov_len: len,
        };
        let ranges = [range(0, 10), range(100, 0), range(200, 5)];
        for cuts in [
            vec![15],
            vec![1, 14],
            vec![10, 5],
            vec![3, 3, 3, 3, 3],
            vec![12, 100],
        ] {
            let mut cursor = Cursor::new(&ranges);
            let addresses: Vec<usize> = cuts
                .iter()
                .flat_map(|len| cursor.take(*len))
                .flat_map(|part| (0..part.iov_len).map(move |i| part.iov_base as usize + i))
                .collect();
            let expected: Vec<usize> = (0x1000..0x100a).chain(0x10c8..0x10cd).collect();
            assert_eq!(addresses, expected, "{cuts:?}");
        }
    }
}
