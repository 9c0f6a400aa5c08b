//! What the tests put a device between: guest memory, rings, and a host that takes memory back.

use std::sync::Mutex;

use virtio_queue::QueueT;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::*;

pub(super) const RING_SIZE: u16 = 32;
/// The rings lie in a page each from here on.
pub(super) const RINGS: u64 = 0x1_0000;
pub(super) const MEMORY_END: u64 = 0x20_1000;

/// Two regions that touch, and a page behind a hole.
pub(super) fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[
        (GuestAddress(0), 0x10_0000),
        (GuestAddress(0x10_0000), 0x8_0000),
        (GuestAddress(0x20_0000), 0x1000),
    ])
    .unwrap()
}

/// What a device gave back, in order: address and length.
pub(super) type Given = Arc<Mutex<Vec<(u64, u64)>>>;

pub(super) fn everything() -> BalloonConfig {
    BalloonConfig {
        target_pages: 256,
        deflate_on_oom: true,
        statistics_interval: 1,
        hinting: true,
        reporting: true,
    }
}

pub(super) fn device(config: &BalloonConfig) -> (VirtioBalloon, Given) {
    let given = Given::default();
    let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let taker = given.clone();
    let give_back: GiveBack = Arc::new(move |address, len| {
        taker.lock().unwrap().push((address.0, len));
        // As a host that cannot do without its last page.
        if address.0 == MEMORY_END - 0x1000 {
            return Err(io::Error::other("it is needed"));
        }
        Ok(())
    });
    let device = VirtioBalloon::new(config, give_back, Arc::new(Interrupt::new(irqfd))).unwrap();
    (device, given)
}

/// A ring of [`RING_SIZE`] whose parts lie apart, which those of `MockSplitQueue` do not where the ring is filled.
pub(super) struct Ring<'a> {
    memory: &'a GuestMemory,
    base: u64,
}

impl<'a> Ring<'a> {
    pub(super) fn all(memory: &'a GuestMemory) -> Vec<Self> {
        let bases = (0..QUEUES as u64).map(|queue| RINGS + 0x1000 * queue);
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
