//! How far a device is in a ring.

use virtio_queue::{Queue, QueueT};

/// The two indices that a device keeps of a ring; all else of it lies in guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingPosition {
    /// Index of the next buffer to take from the available ring, modulo 2^16.
    pub next_avail: u16,
    /// Index of the next element to write in the used ring, modulo 2^16.
    pub next_used: u16,
}

impl RingPosition {
    /// The position in `queue`.
    pub fn of(queue: &Queue) -> Self {
        Self {
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
        }
    }

    /// Lets `queue` go on from here.
    pub(super) fn set(self, queue: &mut Queue) {
        queue.set_next_avail(self.next_avail);
        queue.set_next_used(self.next_used);
    }

    /// Buffers taken and not given back.
    pub fn in_flight(self) -> u16 {
        self.next_avail.wrapping_sub(self.next_used)
    }
}
