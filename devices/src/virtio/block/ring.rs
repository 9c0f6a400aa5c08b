//! A request queue and how many of its requests are under way.

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::super::RingPosition;
use super::super::chain::{self, Chain, ChainError};
use super::RingFault;
use crate::GuestMemory;

/// What a ring has to offer.
pub(super) enum Next {
    /// A request.
    Chain(Chain),
    /// A request with a buffer outside guest memory, and its status byte. No fault of the driver: memory that is not RAM, such as a file on a
    /// pmem device, is a good buffer to the programs of the guest.
    Outside { head: u16, status: GuestAddress },
    /// Nothing; the driver will kick.
    Empty,
    /// Maybe something, but as many requests are under way as the ring has descriptors.
    Full,
}

/// A queue.
pub(super) struct Ring {
    queue: Queue,
    /// Requests taken and not given back.
    in_flight: u16,
    /// Whether a look for more was put off because of `in_flight`.
    stalled: bool,
    /// Whether requests were given back that the driver may not know of.
    used: bool,
}

impl Ring {
    pub(super) fn new(queue: Queue) -> Self {
        Self {
            queue,
            in_flight: 0,
            stalled: false,
            used: false,
        }
    }

    pub(super) fn size(&self) -> u16 {
        self.queue.size()
    }

    pub(super) fn position(&self) -> RingPosition {
        RingPosition::of(&self.queue)
    }

    /// Takes the next request; asks for a kick where there is none.
    pub(super) fn next(&mut self, memory: &GuestMemory) -> Result<Next, RingFault> {
        // An honest driver has no more under way than descriptors, but nothing keeps it from making one available again and again.
        if self.in_flight >= self.queue.size() {
            self.stalled = true;
            return Ok(Next::Full);
        }
        let mut descriptors = self.queue.iter(memory)?.next();
        if descriptors.is_none() && self.queue.enable_notification(memory)? {
            // One came in between.
            descriptors = self.queue.iter(memory)?.next();
        }
        let Some(descriptors) = descriptors else {
            return Ok(Next::Empty);
        };
        let size = self.queue.size();
        let next = match Chain::walk(&descriptors, size) {
            Ok(chain) => Next::Chain(chain),
            Err(ChainError::Memory) => Next::Outside {
                head: descriptors.head_index(),
                status: chain::last_writable_byte(&descriptors, size).ok_or(ChainError::Memory)?,
            },
            Err(error) => return Err(error.into()),
        };
        self.in_flight += 1;
        Ok(next)
    }

    /// Gives a request back, with its status byte and the count of bytes written.
    pub(super) fn finish(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        status_at: GuestAddress,
        (status, written): (u8, u32),
    ) -> Result<(), RingFault> {
        memory
            .write_obj(status, status_at)
            .map_err(virtio_queue::Error::GuestMemory)?;
        self.queue.add_used(memory, head, written)?;
        self.in_flight = self.in_flight.saturating_sub(1);
        self.used = true;
        Ok(())
    }

    /// Like [`Ring::finish`], for a request that was under way; whether requests may be waiting that there was no room for.
    pub(super) fn complete(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        status_at: GuestAddress,
        ended: (u8, u32),
    ) -> Result<bool, RingFault> {
        self.finish(memory, head, status_at, ended)?;
        Ok(std::mem::take(&mut self.stalled))
    }

    /// Whether the driver wants to hear of what was given back since the last call.
    pub(super) fn take_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, RingFault> {
        if !std::mem::take(&mut self.used) {
            return Ok(false);
        }
        Ok(self.queue.needs_notification(memory)?)
    }
}
