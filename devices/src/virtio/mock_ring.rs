//! Rings for tests, as a driver writes them.

use proptest::collection::vec;
use proptest::prelude::*;
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

/// The flag of a descriptor that stands for a table of others (VIRTIO 1.2, 2.7.5.3).
pub(super) const INDIRECT: u16 = 4;

/// What the driver of one queue does that means harm: its descriptors, the heads it offers, and by how much its index
/// lies.
#[derive(Clone, Debug)]
pub(super) struct Volley {
    table: Vec<RawBuffer>,
    heads: Vec<u16>,
    jump: u16,
}

impl Volley {
    /// Of such descriptors. The index is honest so many times for each that it lies.
    pub(super) fn of(
        descriptor: impl Strategy<Value = RawBuffer>,
        honest: u32,
    ) -> impl Strategy<Value = Self> {
        let size = usize::from(RING_SIZE);
        let heads = vec(
            prop_oneof![40 => 0..RING_SIZE, 1 => Just(RING_SIZE)],
            0..=size,
        );
        let jump = prop_oneof![honest => Just(0u16), 1 => 0..u16::MAX - RING_SIZE];
        (vec(descriptor, size), heads, jump).prop_map(|(table, heads, jump)| Self {
            table,
            heads,
            jump,
        })
    }

    /// Writes it to a ring. Descriptors that are [`INDIRECT`] mean `tables`.
    pub(super) fn put_on(&self, ring: &Ring<'_>, tables: u64) {
        for (index, (address, len, flags, next)) in (0u16..).zip(&self.table) {
            let (address, len) = if flags & INDIRECT == 0 {
                (*address, *len)
            } else {
                (tables, len % 512)
            };
            ring.describe(index, (address, len, *flags, *next));
        }
        for (slot, head) in (0..).zip(&self.heads) {
            ring.set_head(slot, *head);
        }
        ring.set_available(self.available());
    }

    /// The index of the available ring, as the driver has it.
    pub(super) fn available(&self) -> u16 {
        self.heads.len() as u16 + self.jump
    }
}
