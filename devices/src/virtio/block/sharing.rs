//! Reads whose bytes guests can share.
//!
//! A read is moved as ever, and the memory manager is told which pages are now copies of which file's; zeros are not moved at all. A long read can
//! also be put in place by the manager, without a copy.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use memshare::{PAGE_SIZE, Refusal, SharedMemory};
use storage::io::Source;
use vm_memory::{Address, Bytes, GuestAddress};

use super::super::chain::Segment;
use crate::GuestMemory;

/// How a drive's reads are shared.
#[derive(Clone, Debug)]
pub struct DriveSharing {
    /// The memory of the guest that reads.
    pub memory: Arc<SharedMemory>,
    /// Parts of a read of at least so many bytes in one piece are put in place at once; none where absent.
    pub place_from: Option<u64>,
}

/// Bytes that a read copies.
#[derive(Clone, Debug)]
pub(super) struct Copied {
    address: GuestAddress,
    len: u64,
    file: Arc<File>,
    file_offset: u64,
}

impl DriveSharing {
    /// Sees to a part of a read that comes from one place; true where nothing is left to be read.
    pub(super) fn fill(
        &self,
        memory: &GuestMemory,
        segments: &[Segment],
        from: Source<'_>,
        copied: &mut Vec<Copied>,
    ) -> bool {
        match from {
            Source::Zeros => segments.iter().all(|segment| self.zero(memory, *segment)),
            Source::File {
                disk,
                file,
                file_offset,
            } if disk.is_settled(file) => self.share(segments, file, file_offset, copied),
            Source::File { .. } => {
                let pages = segments
                    .iter()
                    .map(|segment| u64::from(segment.len).div_ceil(PAGE_SIZE));
                self.memory.stats().refuse(Refusal::Mutable, pages.sum());
                false
            }
        }
    }

    fn share(
        &self,
        segments: &[Segment],
        file: &Arc<File>,
        file_offset: u64,
        copied: &mut Vec<Copied>,
    ) -> bool {
        let (first, mut offset) = (copied.len(), file_offset);
        for segment in segments {
            let (address, len) = (segment.address, u64::from(segment.len));
            // Segments that touch are one piece.
            match copied.get_mut(first..).and_then(<[Copied]>::last_mut) {
                Some(last) if last.address.unchecked_add(last.len) == address => last.len += len,
                Some(_) | None => copied.push(Copied {
                    address,
                    len,
                    file: file.clone(),
                    file_offset: offset,
                }),
            }
            offset += len;
        }
        let Some(least) = self.place_from else {
            return false;
        };
        let place = |piece: &Copied| {
            let address = piece.address.raw_value();
            piece.len >= least
                && self
                    .memory
                    .place(address, piece.len, file, piece.file_offset)
        };
        // All or nothing: what is moved after all overwrites what was put in place.
        let filled = copied.iter().skip(first).all(place);
        if filled {
            copied.truncate(first);
        }
        filled
    }

    /// Makes a segment zeros; false where it could not be written to.
    fn zero(&self, memory: &GuestMemory, segment: Segment) -> bool {
        let start = segment.address.raw_value();
        let end = start + u64::from(segment.len);
        let cleared = self.memory.zero(start, u64::from(segment.len));
        let edges = [start..cleared.start, cleared.end..end];
        edges.into_iter().all(|edge| write_zeros(memory, edge))
    }

    /// Tells of the copies that a read has made.
    pub(super) fn note(&self, copied: &[Copied]) {
        for piece in copied {
            let Copied {
                address,
                len,
                file,
                file_offset,
            } = piece;
            self.memory
                .note_read(address.raw_value(), *len, file, *file_offset);
        }
    }
}

fn write_zeros(memory: &GuestMemory, range: Range<u64>) -> bool {
    let zeros = [0; PAGE_SIZE as usize];
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(PAGE_SIZE);
        if memory
            .write_slice(&zeros[..len as usize], GuestAddress(at))
            .is_err()
        {
            return false;
        }
        at += len;
    }
    true
}
