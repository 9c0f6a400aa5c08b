//! Rings from a driver that means harm: whatever it writes, each request ends in a status or the device in need of a
//! reset, and no byte of guest memory changes that the driver did not offer for writing.

use std::os::unix::fs::FileExt;

use proptest::collection::vec;
use proptest::prelude::*;
use storage::SectorSize;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use super::request::Header;
use super::tests::{DISK_SIZE, FileDisk, QUEUE_SIZE, WRITE, activate, device, memory};
use super::*;

const INDIRECT: u16 = 4;
/// A table for indirect descriptors; the rings are below it and all buffers above.
const TABLE: u64 = 0x8000;
const BUFFERS: u64 = 0x1_0000;
const MEMORY_END: u64 = 0x4_0200;

type RawBuffer = (u64, u32, u16, u16);

fn descriptor() -> impl Strategy<Value = RawBuffer> {
    let address = prop_oneof![
        8 => (0u64..16).prop_map(|header| BUFFERS + 32 * header),
        8 => BUFFERS..MEMORY_END,
        2 => (0u64..16).prop_map(|index| TABLE + 16 * index),
        1 => MEMORY_END - 8..MEMORY_END + 8,
        1 => u64::MAX - 1024..=u64::MAX,
    ];
    let len = prop_oneof![
        6 => prop::sample::select(vec![0u32, 1, 15, 16, 17, 20, 32, 511, 512, 513, 4096]),
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![
        10 => prop::sample::select(vec![0u16, 1, 1, 1, 2, 3, 3]),
        1 => any::<u16>(),
        2 => Just(INDIRECT),
    ];
    (address, len, flags, 0..QUEUE_SIZE + 1)
}

fn header() -> impl Strategy<Value = (u32, u64)> {
    let kind = prop::sample::select(vec![0u32, 0, 0, 1, 1, 4, 8, 11, 13, 14, 99]);
    let sector = prop_oneof![4 => 0u64..2049, 1 => any::<u64>()];
    (kind, sector)
}

/// An indirect table is only looked for where the rings and the table are; a buffer that is written to lies above them.
fn tame((address, len, flags, next): RawBuffer) -> RawBuffer {
    if flags & INDIRECT != 0 {
        (TABLE + address % 16 * 16, len % 512, flags, next)
    } else if flags & WRITE != 0 && address < BUFFERS {
        (address + BUFFERS, len, flags, next)
    } else {
        (address, len, flags, next)
    }
}

fn check(
    engine: EngineKind,
    tables: [&[RawBuffer]; 2],
    headers: &[(u32, u64)],
    heads: &[u16],
    (jump, event_idx): (u16, bool),
) -> Result<(), TestCaseError> {
    let memory = memory();
    let disk = FileDisk::new(false, SectorSize::B512);
    disk.file
        .write_all_at(&vec![0xdd; DISK_SIZE as usize], 0)
        .unwrap();
    let mut device = device(disk, engine);
    let ring = MockSplitQueue::new(&memory, QUEUE_SIZE);
    let mut offered = Vec::new();
    for (base, table) in [0, TABLE].into_iter().zip(tables) {
        for (index, buffer) in (0u64..).zip(table) {
            let (address, len, flags, next) = tame(*buffer);
            if flags & WRITE != 0 {
                offered.push(address..address.saturating_add(len.into()));
            }
            let raw = RawDescriptor::from(Descriptor::new(address, len, flags, next));
            memory
                .write_obj(raw, GuestAddress(base + 16 * index))
                .unwrap();
        }
    }
    for (index, (kind, sector)) in (0u64..).zip(headers) {
        let header = Header {
            kind: (*kind).into(),
            reserved: 0.into(),
            sector: (*sector).into(),
        };
        let at = GuestAddress(BUFFERS + 32 * index);
        memory.write_slice(header.as_bytes(), at).unwrap();
    }
    for (slot, head) in heads.iter().enumerate() {
        ring.avail().ring().ref_at(slot).unwrap().store(*head);
    }
    let available = heads.len() as u16 + jump;
    ring.avail().idx().store(available);
    let mut queue: Queue = ring.create_queue().unwrap();
    queue.set_event_idx(event_idx);
    // Flags, index, elements and `avail_event`.
    let used_ring = queue.used_ring()..queue.used_ring() + 4 + 8 * u64::from(QUEUE_SIZE) + 2;
    let mut before = vec![0; MEMORY_END as usize];
    memory.read_slice(&mut before, GuestAddress(0)).unwrap();

    activate(&mut device, &memory, queue, true);
    device.serve(0);
    device.pause();

    let mut after = vec![0; MEMORY_END as usize];
    memory.read_slice(&mut after, GuestAddress(0)).unwrap();
    for (address, _) in (0u64..)
        .zip(before.iter().zip(&after))
        .filter(|(_, (before, after))| before != after)
    {
        let allowed =
            used_ring.contains(&address) || offered.iter().any(|range| range.contains(&address));
        prop_assert!(allowed, "{address:#x} has changed");
    }
    let used = ring.used().idx().load();
    prop_assert!(device.interrupt.needs_reset() || used == available);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_ring_makes_the_device_panic_hang_or_write_where_it_may_not(
        table in vec(descriptor(), usize::from(QUEUE_SIZE)),
        indirect in vec(descriptor(), 32),
        headers in vec(header(), 16),
        heads in vec(0..QUEUE_SIZE + 1, 0..=usize::from(QUEUE_SIZE)),
        event_idx: bool,
        jump in prop_oneof![20 => Just(0u16), 1 => any::<u16>()],
    ) {
        let jump = jump.min(u16::MAX - QUEUE_SIZE);
        for engine in [EngineKind::IoUring, EngineKind::Worker] {
            check(engine, [&table, &indirect], &headers, &heads, (jump, event_idx))?;
        }
    }

    /// Chains with the right shape, so that the properties reach what is behind the checks of the shape.
    #[test]
    fn no_request_of_the_right_shape_does_either(
        (kind, sector) in header(),
        data in vec((BUFFERS + 0x1000..MEMORY_END, 0u32..2048, any::<bool>()), 0..6),
    ) {
        let mut table = vec![(BUFFERS, 16, 1, 1)];
        let mut data = data;
        data.sort_by_key(|(_, _, writable)| *writable);
        for (address, len, writable) in data {
            let flags = 1 | if writable { WRITE } else { 0 };
            table.push((address, len, flags, table.len() as u16 + 1));
        }
        table.push((BUFFERS + 0x800, 1, WRITE, 0));
        for engine in [EngineKind::IoUring, EngineKind::Worker] {
            check(engine, [&table, &[]], &[(kind, sector)], &[0], (0, true))?;
        }
    }
}
