//! Rings for tests, as a driver writes them.

use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::GuestMemory;

pub(super) const RING_SIZE: u16 = 32;
/// The rings lie in a page each from here on.
pub(super) const RINGS: u64 = 0x1_0000;

/// A ring of [`RING_SIZE`] whose parts lie apart, which those of `MockSplitQueue` do not where the ring is filled.
pub(super) struct Ring<'a> {
    memory: &'a GuestMemory,
    base: u64,
}

impl<'a> Ring<'a> {
    /// So many, one behind the other.
    pub(super) fn several(memory: &'a GuestMemory, count: usize) -> Vec<Self> {
        let bases = (0..count as u64).map(|queue| RINGS + 0x1000 * queue);
        bases.map(|base| Self { memory, base }).collect()
    }

    pub(super) fn queue(&self) -> Queue {
        let mut queue = Queue::new(RING_SIZE).unwrap();
        for (set, part) in [
            (Queue::try_set_desc_table_address as fn(&mut _, _) -> _, 0),
            (Queue::try_set_avail_ring_address, 0x400),
            (Queue::try_set_used_ring_address, 0x800),
        ] {
            set(&mut queue, GuestAddress(self.base + part)).unwrap();
        }
        queue.set_ready(true);
        queue
    }

    fn write<T: ByteValued>(&self, offset: u64, value: T) {
        let at = GuestAddress(self.base + offset);
        self.memory.write_obj(value, at).unwrap();
    }

    /// Writes a descriptor: address, length, flags, next.
    pub(super) fn describe(&self, index: u16, (address, len, flags, next): RawBuffer) {
        let raw = RawDescriptor::from(Descriptor::new(address, len, flags, next));
        self.write(16 * u64::from(index), raw);
    }

    pub(super) fn set_head(&self, slot: u16, head: u16) {
        self.write(0x404 + 2 * u64::from(slot % RING_SIZE), head);
    }

    pub(super) fn set_available(&self, index: u16) {
        self.write(0x402, index);
    }

    pub(super) fn available(&self) -> u16 {
        let at = GuestAddress(self.base + 0x402);
        self.memory.read_obj(at).unwrap()
    }

    /// The device's index.
    pub(super) fn used(&self) -> u16 {
        let at = GuestAddress(self.base + 0x802);
        self.memory.read_obj(at).unwrap()
    }

    /// What of memory the device writes.
    pub(super) fn used_ring(&self) -> std::ops::Range<u64> {
        self.base + 0x800..self.base + 0x800 + 4 + 8 * u64::from(RING_SIZE) + 2
    }
}

pub(super) type RawBuffer = (u64, u32, u16, u16);
