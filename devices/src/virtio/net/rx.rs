//! The receiving side of a pair of queues: buffers of the guest, and the frames that are put into them.

use std::collections::VecDeque;

use virtio_queue::Error;
use vm_memory::Bytes;

use super::super::RingPosition;
use super::super::chain::{self, Segment};
use super::header::{HEADER_LEN, NUM_BUFFERS};
use super::rx_ring::{RxRing, Taken};
use crate::GuestMemory;

/// A buffer of the guest.
pub(super) struct Buffer {
    head: u16,
    len: usize,
    pub(super) segments: Vec<Segment>,
}

/// The receiving side of a pair.
pub(super) struct Rx {
    pub(super) ring: RxRing,
    /// Whether a frame may take several buffers.
    mergeable: bool,
    /// A frame that waits for more buffers of the guest, or for its turn.
    pub(super) waiting: Option<Waiting>,
}

pub(super) struct Waiting {
    /// Header first.
    pub(super) bytes: Vec<u8>,
    /// Whether it takes tokens of the limiter yet: frames of the station do not.
    pub(super) is_limited: bool,
}

/// What became of a frame.
pub(super) enum Outcome {
    Done,
    /// The guest has too few buffers for it.
    NoRoom,
    /// The limiter has too few tokens for it.
    Throttled,
}

impl Rx {
    pub(super) fn new(ring: RxRing, mergeable: bool) -> Self {
        Self {
            ring,
            mergeable,
            waiting: None,
        }
    }

    pub(super) fn position(&self) -> RingPosition {
        self.ring.position()
    }

    /// Takes buffers until those that were taken have `len` bytes, or the guest has no more. Whether they have.
    pub(super) fn gather(
        &mut self,
        memory: &GuestMemory,
        buffers: &mut VecDeque<Buffer>,
        len: usize,
    ) -> Result<bool, Error> {
        loop {
            let have: usize = buffers.iter().map(|buffer| buffer.len).sum();
            if have >= len {
                return Ok(true);
            }
            if !self.mergeable && !buffers.is_empty() {
                return Ok(false);
            }
            let Some(Taken { head, chain }) = self.ring.take(memory)? else {
                return Ok(false);
            };
            let segments = chain.map(|chain| chain.writable).unwrap_or_default();
            let len =
                usize::try_from(chain::total_len(&segments)).map_err(|_| Error::InvalidChain)?;
            // A buffer has room for the header at least (5.1.6.3.1).
            if len < HEADER_LEN {
                return Err(Error::InvalidChain);
            }
            buffers.push_back(Buffer {
                head,
                len,
                segments,
            });
        }
    }

    /// Gives the driver the buffers that a frame of `len` bytes lies in.
    pub(super) fn deliver(
        &mut self,
        memory: &GuestMemory,
        buffers: &mut VecDeque<Buffer>,
        len: usize,
    ) -> Result<(), Error> {
        let mut used = Vec::with_capacity(1);
        let (mut left, mut header) = (len, None);
        while left > 0 {
            let Some(buffer) = buffers.pop_front() else {
                return Err(Error::InvalidChain);
            };
            let part = left.min(buffer.len);
            left -= part;
            used.push((buffer.head, part as u32));
            header.get_or_insert(buffer.segments);
        }
        // The tap leaves the field as it was.
        let mut segments = header.unwrap_or_default();
        let count = (used.len() as u16).to_le_bytes();
        let written = chain::split_front(&mut segments, NUM_BUFFERS as u32)
            .and_then(|_| chain::write(memory, &segments, &count).ok());
        if written != Some(count.len() as u32) {
            return Err(Error::InvalidChain);
        }
        self.ring.use_all(memory, &used)
    }

    /// Copies the frame that waits into the guest's buffers.
    pub(super) fn deliver_waiting(
        &mut self,
        memory: &GuestMemory,
        buffers: &mut VecDeque<Buffer>,
    ) -> Result<Outcome, Error> {
        let Some(waiting) = self.waiting.take() else {
            return Ok(Outcome::Done);
        };
        let frame = &waiting.bytes;
        if !self.gather(memory, buffers, frame.len())? {
            let never = if self.mergeable {
                buffers.len() >= usize::from(self.ring.size())
            } else {
                !buffers.is_empty()
            };
            if !never {
                self.waiting = Some(waiting);
            }
            return Ok(Outcome::NoRoom);
        }
        let mut rest: &[u8] = frame;
        for segment in buffers.iter().flat_map(|buffer| &buffer.segments) {
            let (part, behind) = rest.split_at(rest.len().min(segment.len as usize));
            memory
                .write_slice(part, segment.address)
                .map_err(Error::GuestMemory)?;
            rest = behind;
            if rest.is_empty() {
                break;
            }
        }
        self.deliver(memory, buffers, frame.len())?;
        Ok(Outcome::Done)
    }
}
