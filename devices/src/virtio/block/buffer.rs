//! Guest memory as the buffer of a request to the disk.

use std::sync::Arc;

use libc::iovec;
use storage::io::IoBuffer;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::super::chain::{ChainError, Segment};
use crate::GuestMemory;

/// What a request is when its I/O has come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write,
    Flush,
    Discard,
}

/// A request that the disk works on: where its data are, and how the driver is told of its end.
#[derive(Debug)]
pub(super) struct Ticket {
    iovecs: Vec<iovec>,
    /// Keeps mapped what the ranges point to.
    memory: Arc<GuestMemory>,
    /// Index of the queue it came from.
    pub(super) queue: usize,
    /// Head descriptor of its chain.
    pub(super) head: u16,
    /// Where the status byte goes.
    pub(super) status: GuestAddress,
    pub(super) operation: Operation,
    /// Bytes of data.
    pub(super) len: u32,
}

// SAFETY: the ranges come from `GuestMemory::get_slices`, so they are mapped, readable and writable, as long as `memory` lives. Guest
// memory is shared with vCPUs anyway: nobody has a Rust reference into it, and any thread may access it.
unsafe impl IoBuffer for Ticket {
    fn iovecs(&self) -> &[iovec] {
        &self.iovecs
    }
}

// SAFETY: the pointers are to guest memory, which any thread may access and which the value keeps mapped.
unsafe impl Send for Ticket {}

impl Ticket {
    /// A request on the data in `segments`.
    ///
    /// # Errors
    /// `Memory` where a segment is outside guest memory.
    pub(super) fn new(
        memory: &Arc<GuestMemory>,
        segments: &[Segment],
        (queue, head): (usize, u16),
        status: GuestAddress,
        operation: Operation,
    ) -> Result<Self, ChainError> {
        let mut iovecs = Vec::with_capacity(segments.len());
        let mut len = 0u32;
        for segment in segments {
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
            iovecs,
            memory: memory.clone(),
            queue,
            head,
            status,
            operation,
            len,
        })
    }

    /// The memory that the request lies in.
    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }
}
