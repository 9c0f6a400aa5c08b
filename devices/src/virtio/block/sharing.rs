//! Reads whose bytes guests can share.
//!
//! A read is moved as ever, and the memory manager is told which pages are now copies of which file's; zeros are not
//! moved at all. A long read can also be put in place by the manager, without a copy.

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
    /// Fills a part of a read that comes from one place, where that can be done without a transfer; false where the
    /// bytes have to be read.
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
            } if disk.is_immutable(file) => self.share(segments, file, file_offset, copied),
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

    /// Has the memory manager note the copies that a read has made. Pages whose bytes come from two of them are
    /// counted, and left alone.
    pub(super) fn note(&self, copied: &[Copied]) {
        let mut seam = None;
        for (index, piece) in copied.iter().enumerate() {
            let address = piece.address.raw_value();
            let (mut start, mut end) = (address, address + piece.len);
            if seam == Some(start) {
                start = start.next_multiple_of(PAGE_SIZE);
            }
            let next = copied.get(index + 1);
            let meets = next.is_some_and(|next| next.address.raw_value() == end);
            seam = (meets && !end.is_multiple_of(PAGE_SIZE)).then_some(end);
            if seam.is_some() {
                self.memory.stats().refuse(Refusal::Split, 1);
                end -= end % PAGE_SIZE;
            }
            if start < end {
                let offset = piece.file_offset + (start - address);
                self.memory
                    .note_read(start, end - start, &piece.file, offset);
            }
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

#[cfg(test)]
mod tests {
    use memshare::{Limits, Region, Window};

    use super::*;

    #[test]
    fn a_page_of_two_layers_is_counted_at_each_seam_and_its_neighbours_are_candidates() {
        let window = Window::reserve(8 * PAGE_SIZE).unwrap();
        let regions = vec![Region { start: 0, window }];
        let memory = Arc::new(SharedMemory::new(regions, Limits::of_host(5, false)));
        let sharing = DriveSharing {
            memory: memory.clone(),
            place_from: None,
        };
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 * PAGE_SIZE).unwrap();
        let file = Arc::new(file);
        let piece = |start: u64, len: u64| Copied {
            address: GuestAddress(start),
            len,
            file: file.clone(),
            file_offset: start,
        };
        // The third page has a sector of another layer in its midst; the last page is read in part.
        sharing.note(&[
            piece(0, 2 * PAGE_SIZE + 512),
            piece(2 * PAGE_SIZE + 512, 512),
            piece(2 * PAGE_SIZE + 1024, 3 * PAGE_SIZE),
        ]);
        let candidates: Vec<_> = memory
            .candidates()
            .iter()
            .map(|run| (run.gfn, run.pages))
            .collect();
        assert_eq!(candidates, [(0, 2), (3, 2)]);
        assert_eq!(memory.stats().refused(Refusal::Split), 2);
        assert_eq!(memory.stats().refused(Refusal::Partial), 1);
    }
}
