//! A request queue and its requests in flight.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::super::RingPosition;
use super::super::chain::{self, Chain, ChainError};
use super::ring_fault::RingFault;
use crate::GuestMemory;

/// What a ring has to offer.
pub(super) enum Next {
    /// A request.
    Chain(InFlight, Chain),
    /// A request with a buffer outside guest memory, and its status byte. No fault of the driver: memory that is not
    /// RAM, such as a file on a pmem device, is a good buffer to the programs of the guest.
    Outside(InFlight, GuestAddress),
    /// Nothing; the driver will kick.
    Empty,
    /// Maybe something, but as many requests are in flight as the ring has descriptors.
    Full,
}

/// The place of a request among those in flight, from when it is taken from the ring. [`Ring::finish`] gives the
/// request back to the driver. A request that is dropped instead, as its driver has reset or broken the device, leaves
/// its place all the same; the driver is not told of it.
#[derive(Debug)]
pub(super) struct InFlight {
    head: u16,
    count: Arc<AtomicU16>,
}

impl InFlight {
    fn new(head: u16, count: &Arc<AtomicU16>) -> Self {
        // The device's mutex orders it.
        count.fetch_add(1, Ordering::Relaxed);
        let count = count.clone();
        Self { head, count }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A queue.
pub(super) struct Ring {
    queue: Queue,
    /// Number of [`InFlight`].
    in_flight: Arc<AtomicU16>,
    /// Whether a look for more was put off because of `in_flight`.
    stalled: bool,
    /// Whether requests were given back that the driver may not know of.
    used: bool,
}

impl Ring {
    pub(super) fn new(queue: Queue) -> Self {
        Self {
            queue,
            in_flight: Arc::default(),
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
        // An honest driver has no more in flight than descriptors, but nothing keeps it from making one available again
        // and again.
        if self.in_flight.load(Ordering::Relaxed) >= self.queue.size() {
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
        let request = InFlight::new(descriptors.head_index(), &self.in_flight);
        match Chain::walk(&descriptors, size) {
            Ok(chain) => Ok(Next::Chain(request, chain)),
            Err(ChainError::Memory) => {
                let status = chain::last_writable_byte(&descriptors, size);
                Ok(Next::Outside(request, status.ok_or(ChainError::Memory)?))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Leaves to the driver, at its place in the ring, the request that was taken last. The driver need not notify the
    /// device until all are taken.
    pub(super) fn put_back(
        &mut self,
        memory: &GuestMemory,
        request: InFlight,
    ) -> Result<(), RingFault> {
        drop(request);
        self.queue.go_to_previous_position();
        Ok(self.queue.disable_notification(memory)?)
    }

    /// Gives a request back, with its status byte and the count of bytes written.
    pub(super) fn finish(
        &mut self,
        memory: &GuestMemory,
        request: InFlight,
        status_at: GuestAddress,
        (status, written): (u8, u32),
    ) -> Result<(), RingFault> {
        memory
            .write_obj(status, status_at)
            .map_err(virtio_queue::Error::GuestMemory)?;
        self.queue.add_used(memory, request.head, written)?;
        self.used = true;
        drop(request);
        Ok(())
    }

    /// Like [`Ring::finish`], for a request that the disk has worked on; whether requests may be waiting that there was
    /// no room for.
    pub(super) fn complete(
        &mut self,
        memory: &GuestMemory,
        request: InFlight,
        status_at: GuestAddress,
        ended: (u8, u32),
    ) -> Result<bool, RingFault> {
        self.finish(memory, request, status_at, ended)?;
        Ok(std::mem::take(&mut self.stalled))
    }

    /// Whether the driver wants an interrupt for what was given back since the last call.
    pub(super) fn take_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, RingFault> {
        if !std::mem::take(&mut self.used) {
            return Ok(false);
        }
        Ok(self.queue.needs_notification(memory)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_is_dropped_leaves_its_place() {
        let mut ring = Ring::new(Queue::new(4).unwrap());
        let taken: Vec<_> = (0..4)
            .map(|head| InFlight::new(head, &ring.in_flight))
            .collect();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
        assert!(matches!(ring.next(&memory), Ok(Next::Full)));
        assert!(ring.stalled);
        drop(taken);
        assert_eq!(ring.in_flight.load(Ordering::Relaxed), 0);
        // Requests of a ring that is gone are not counted by the next.
        let next = Ring::new(Queue::new(4).unwrap());
        let late = InFlight::new(0, &ring.in_flight);
        drop(ring);
        drop(late);
        assert_eq!(next.in_flight.load(Ordering::Relaxed), 0);
    }
}
