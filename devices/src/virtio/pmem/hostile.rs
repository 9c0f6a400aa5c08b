//! Rings from a driver that means harm: each request ends in a response or the device in need of a reset, and no byte
//! of guest memory changes that the driver did not offer for writing.

use proptest::collection::vec;
use proptest::prelude::*;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress};

use super::tests::{Counting, RING_SIZE, WRITE, activate, device, memory};
use super::*;

/// The rings are below, and all buffers above.
const BUFFERS: u64 = 0x1_0000;
const MEMORY_END: u64 = 0x4_0000;

type RawBuffer = (u64, u32, u16, u16);

fn descriptor() -> impl Strategy<Value = RawBuffer> {
    let address = prop_oneof![
        8 => BUFFERS..MEMORY_END,
        1 => MEMORY_END - 8..MEMORY_END + 8,
        1 => u64::MAX - 64..=u64::MAX,
    ];
    let len = prop_oneof![
        6 => prop::sample::select(vec![0u32, 1, 2, 3, 4, 5, 8]),
        1 => any::<u32>(),
    ];
    // Indirect tables have their own tests, as all devices share the walk.
    let flags = prop::sample::select(vec![0u16, 1, 1, 1, 2, 3, 3]);
    (address, len, flags, 0..RING_SIZE + 1)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_ring_makes_the_device_panic_hang_or_write_where_it_may_not(
        table in vec(descriptor(), usize::from(RING_SIZE)),
        kinds in vec(0u32..3, 16),
        heads in vec(0..RING_SIZE + 1, 0..=usize::from(RING_SIZE)),
        keeps: bool,
        event_idx: bool,
    ) {
        let memory = memory();
        let ring = MockSplitQueue::new(&memory, RING_SIZE);
        let mut offered = Vec::new();
        for (index, (address, len, flags, next)) in (0..).zip(&table) {
            if flags & WRITE != 0 {
                offered.push(*address..address.saturating_add((*len).into()));
            }
            let raw = RawDescriptor::from(Descriptor::new(*address, *len, *flags, *next));
            ring.desc_table().store(index, raw).unwrap();
        }
        for (index, kind) in (0u64..).zip(&kinds) {
            memory.write_obj(*kind, GuestAddress(BUFFERS + 0x1000 * index)).unwrap();
        }
        for (slot, head) in heads.iter().enumerate() {
            ring.avail().ring().ref_at(slot).unwrap().store(*head);
        }
        ring.avail().idx().store(heads.len() as u16);
        let mut queue: Queue = ring.create_queue().unwrap();
        queue.set_event_idx(event_idx);
        // Flags, index, elements and `avail_event`.
        let used_ring = queue.used_ring()..queue.used_ring() + 4 + 8 * u64::from(RING_SIZE) + 2;
        let mut before = vec![0; MEMORY_END as usize];
        memory.read_slice(&mut before, GuestAddress(0)).unwrap();

        let mut device = device(keeps.then(|| Arc::new(Counting::default()) as Arc<dyn Backing>));
        activate(&mut device, &memory, queue);
        device.serve();
        device.pause();

        let mut after = vec![0; MEMORY_END as usize];
        memory.read_slice(&mut after, GuestAddress(0)).unwrap();
        let changed = (0u64..).zip(before.iter().zip(&after)).filter(|(_, (before, after))| before != after);
        for (address, _) in changed {
            let allowed = used_ring.contains(&address) || offered.iter().any(|range| range.contains(&address));
            prop_assert!(allowed, "{address:#x} has changed");
        }
        let used = ring.used().idx().load();
        prop_assert!(device.interrupt.needs_reset() || used == heads.len() as u16);
    }
}
