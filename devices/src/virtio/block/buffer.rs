//! A request that the disk works on, and the guest memory that is its buffer.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use libc::iovec;
use storage::io::{IoBuffer, Source};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend};

use super::super::chain::{ChainError, Segment};
use super::ring::{InFlight, Ring};
use super::ring_fault::RingFault;
use super::sharing::{Copied, DriveSharing};
use crate::GuestMemory;

/// What a request does, as far as its end depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write,
    Flush,
    Discard,
}

/// A request that the disk works on: where its data are, and how the driver is told of its end.
#[derive(Debug)]
pub(super) struct RequestInFlight {
    /// Its place in its ring, for as long as this lives.
    place: InFlight,
    iovecs: Vec<iovec>,
    /// Where the data are in guest memory, in order.
    segments: Vec<Segment>,
    /// Of a read whose bytes guests can share: what is told where they come from.
    sharing: Option<Arc<DriveSharing>>,
    /// What a read copies from files that do not change.
    copied: Vec<Copied>,
    /// Keeps mapped what the ranges point to.
    memory: Arc<GuestMemory>,
    /// Index of the queue it came from.
    pub(super) queue: usize,
    /// Where the status byte goes.
    status: GuestAddress,
    pub(super) operation: Operation,
    /// When it was taken from the ring.
    pub(super) begun: Instant,
    /// Bytes of data.
    pub(super) len: u32,
}

// SAFETY: the ranges come from `GuestMemory::get_slices`, so they are mapped, readable and writable, as long as
// `memory` lives. Guest memory is shared with vCPUs anyway: nobody has a Rust reference into it, and any thread may
// access it.
unsafe impl IoBuffer for RequestInFlight {
    fn iovecs(&self) -> &[iovec] {
        &self.iovecs
    }

    fn try_fill(&mut self, part: Range<u64>, from: Source<'_>) -> bool {
        let Some(sharing) = &self.sharing else {
            return false;
        };
        let segments: Vec<Segment> = cut(&self.segments, &part).collect();
        sharing.fill(&self.memory, &segments, from, &mut self.copied)
    }
}

/// The parts of `segments` that hold a part of their bytes.
fn cut<'a>(segments: &'a [Segment], part: &Range<u64>) -> impl Iterator<Item = Segment> + use<'a> {
    let (mut at, part) = (0, part.clone());
    segments.iter().filter_map(move |segment| {
        let start = part.start.max(at);
        let end = part.end.min(at + u64::from(segment.len));
        let address = segment.address.unchecked_add(start.saturating_sub(at));
        at += u64::from(segment.len);
        (start < end).then_some(Segment {
            address,
            len: (end - start) as u32,
        })
    })
}

// SAFETY: the pointers are to guest memory, which any thread may access and which the value keeps mapped.
unsafe impl Send for RequestInFlight {}

impl RequestInFlight {
    /// A request on the data in `segments`.
    ///
    /// # Errors
    /// `Memory` where a segment is outside guest memory.
    pub(super) fn new(
        memory: &Arc<GuestMemory>,
        segments: Vec<Segment>,
        (queue, place): (usize, InFlight),
        status: GuestAddress,
        operation: Operation,
    ) -> Result<Self, ChainError> {
        let mut iovecs = Vec::with_capacity(segments.len());
        let mut len = 0u32;
        for segment in &segments {
            len = len.checked_add(segment.len).ok_or(ChainError::Memory)?;
            // A segment may go on from one memory region to the next.
            for slice in
                GuestMemoryBackend::get_slices(&**memory, segment.address, segment.len as usize)
            {
                let slice = slice.map_err(|_| ChainError::Memory)?;
                iovecs.push(iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        Ok(Self {
            place,
            iovecs,
            segments,
            sharing: None,
            copied: Vec::new(),
            memory: memory.clone(),
            queue,
            status,
            operation,
            begun: Instant::now(),
            len,
        })
    }

    /// This request; where it is a read, `sharing` is told where its bytes come from.
    pub(super) fn shared_by(mut self, sharing: Option<&Arc<DriveSharing>>) -> Self {
        if self.operation == Operation::Read {
            self.sharing = sharing.cloned();
        }
        self
    }

    /// Has the memory manager note the pages that the request, which has succeeded, has copied.
    pub(super) fn note_copies(&self) {
        if let Some(sharing) = &self.sharing {
            sharing.note(&self.copied);
        }
    }

    /// Whether the request writes to a range of guest memory.
    pub(super) fn is_writing(&self, address: GuestAddress, len: u64) -> bool {
        let range = address.raw_value()..address.raw_value().saturating_add(len);
        self.operation == Operation::Read
            && self.segments.iter().any(|segment| {
                let start = segment.address.raw_value();
                start < range.end && range.start < start + u64::from(segment.len)
            })
    }

    /// Gives the request back to the driver through the ring that it is of; as [`Ring::complete`].
    pub(super) fn complete(self, ring: &mut Ring, ended: (u8, u32)) -> Result<bool, RingFault> {
        ring.complete(&self.memory, self.place, self.status, ended)
    }
}
