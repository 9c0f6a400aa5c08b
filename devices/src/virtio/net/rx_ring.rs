//! The ring of receive buffers, of which a frame may take several at once.
//!
//! The driver looks for all buffers of a frame when it sees the first (Linux's `receive_mergeable`), so the index of
//! the used ring is not to move before all of them are written. The crate `virtio-queue` moves it with each, so the
//! elements but for the last are written here.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::super::RingPosition;
use super::super::chain::Chain;
use crate::GuestMemory;

/// Sizes of a ring's parts (VIRTIO 1.2, 2.7): its flags and index, and an element of the used ring and the available.
const RING_HEAD: u64 = 4;
const USED_ELEMENT: u64 = 8;
const AVAILABLE_ELEMENT: u64 = 2;

/// A receive queue.
pub(super) struct RxRing {
    queue: Queue,
    /// The index of the used ring when the driver's wish for an interrupt was last looked at.
    looked_at: Wrapping<u16>,
}

/// A buffer that was taken from the ring.
pub(super) struct Taken {
    pub(super) head: u16,
    /// `None` where it breaks a rule.
    pub(super) chain: Option<Chain>,
}

impl RxRing {
    pub(super) fn new(queue: Queue) -> Self {
        let looked_at = Wrapping(queue.next_used());
        Self { queue, looked_at }
    }

    pub(super) fn size(&self) -> u16 {
        self.queue.size()
    }

    pub(super) fn position(&self) -> RingPosition {
        RingPosition::of(&self.queue)
    }

    /// Takes the next buffer, if there is one.
    pub(super) fn take(&mut self, memory: &GuestMemory) -> Result<Option<Taken>, Error> {
        let size = self.queue.size();
        let descriptors = self.queue.iter(memory)?.next();
        Ok(descriptors.map(|descriptors| Taken {
            head: descriptors.head_index(),
            chain: Chain::walk(&descriptors, size).ok(),
        }))
    }

    /// Puts the last `count` buffers that were taken back, as if they had not been.
    pub(super) fn put_back(&mut self, count: u16) {
        let next = Wrapping(self.queue.next_avail()) - Wrapping(count);
        self.queue.set_next_avail(next.0);
    }

    /// Has the driver notify of the next buffer. Whether one has come already.
    pub(super) fn enable_notification(&mut self, memory: &GuestMemory) -> Result<bool, Error> {
        self.queue.enable_notification(memory)
    }

    /// Has the driver not notify of buffers.
    pub(super) fn disable_notification(&mut self, memory: &GuestMemory) -> Result<(), Error> {
        self.queue.disable_notification(memory)
    }

    /// Gives buffers back, all at once: their heads, and how much was written to each.
    pub(super) fn use_all(
        &mut self,
        memory: &GuestMemory,
        used: &[(u16, u32)],
    ) -> Result<(), Error> {
        let Some(((last, len), before)) = used.split_last() else {
            return Ok(());
        };
        let mut next = Wrapping(self.queue.next_used());
        for (head, len) in before {
            let slot = u64::from(next.0 % self.queue.size());
            let offset = RING_HEAD + USED_ELEMENT * slot;
            let at = self
                .queue
                .used_ring()
                .checked_add(offset)
                .ok_or(Error::AddressOverflow)?;
            // `struct virtq_used_elem`: the head, and the length behind it.
            let element = (u64::from(*len) << 32 | u64::from(*head)).to_le();
            memory
                .write_obj(element, GuestAddress(at))
                .map_err(Error::GuestMemory)?;
            next += 1;
        }
        self.queue.set_next_used(next.0);
        self.queue.add_used(memory, *last, *len)
    }

    /// Whether the driver wants an interrupt for the buffers that were given back since the last call (2.7.7.2).
    pub(super) fn needs_notification(&mut self, memory: &GuestMemory) -> Result<bool, Error> {
        let used = Wrapping(self.queue.next_used());
        let before = std::mem::replace(&mut self.looked_at, used);
        if used == before {
            return Ok(false);
        }
        if !self.queue.event_idx_enabled() {
            return Ok(true);
        }
        // The index has to be there before the driver's wish is read: the driver writes the one and reads the other.
        fence(Ordering::SeqCst);
        let offset = RING_HEAD + AVAILABLE_ELEMENT * u64::from(self.queue.size());
        let at = self
            .queue
            .avail_ring()
            .checked_add(offset)
            .ok_or(Error::AddressOverflow)?;
        let wanted: u16 = memory
            .load(GuestAddress(at), Ordering::Relaxed)
            .map_err(Error::GuestMemory)?;
        Ok(used - Wrapping(u16::from_le(wanted)) - Wrapping(1) < used - before)
    }
}
