//! Rings and frames from those who mean harm: whatever a driver writes, each buffer comes back or the device is in need
//! of a reset, and whatever the network sends, only buffers that the driver has offered are written to.

use std::ops::Range;

use proptest::collection::vec;
use proptest::prelude::*;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use vm_memory::{Bytes, GuestAddress};

use super::super::RING_FEATURES;
use super::super::mock_ring::{INDIRECT, RING_SIZE, RawBuffer, Ring, Volley};
use super::mock::{WRITE, device, memory};
use super::*;

const MEMORY_END: u64 = 0x20_0000;
const PAGE: u64 = 0x1000;
/// A table for indirect descriptors.
const TABLE: u64 = 0x3_0000;
/// Headers, frames and commands.
const DATA: u64 = 0x4_0000;
const QUEUES: usize = 3;
/// The rings and all buffers of a sound driver lie in so many bytes.
const LOOKED_AT: usize = 0x9_0000;

fn descriptor() -> impl Strategy<Value = RawBuffer> {
    let address = prop_oneof![
        8 => (0u64..16).prop_map(|slot| DATA + 0x100 * slot),
        6 => 0..MEMORY_END,
        2 => (0u64..16).prop_map(|index| TABLE + 16 * index),
        1 => MEMORY_END - 8..MEMORY_END + 8,
        1 => u64::MAX - 1024..=u64::MAX,
    ];
    let len = prop_oneof![
        8 => prop::sample::select(vec![0u32, 1, 2, 10, 11, 12, 13, 14, 60, 1514, 1530, 4096, 65_562, 65_565, 0x1_0000]),
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![
        10 => prop::sample::select(vec![0u16, 0, 1, 2, 2, 3]),
        1 => any::<u16>(),
        2 => Just(INDIRECT),
    ];
    (address, len, flags, 0..RING_SIZE + 1)
}

/// Bytes that a header may have, and the first of a frame for the station.
fn byte() -> impl Strategy<Value = u8> {
    prop_oneof![6 => 0u8..6, 1 => Just(0xee), 1 => Just(0x80), 2 => any::<u8>()]
}

fn changed(before: &[u8], after: &[u8]) -> Vec<u64> {
    let bytes = (0u64..).zip(before.iter().zip(after));
    bytes
        .filter(|(_, (a, b))| a != b)
        .map(|(at, _)| at)
        .collect()
}

fn contents(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; LOOKED_AT];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

fn activation(memory: &GuestMemory, rings: &[Ring<'_>], features: u64) -> Activation {
    let queues = rings.iter().map(|ring| {
        let mut queue = ring.queue();
        virtio_queue::QueueT::set_event_idx(&mut queue, features & (1 << 29) != 0);
        Some(queue)
    });
    Activation {
        memory: memory.clone(),
        queues: queues.collect(),
        features,
    }
}

fn serve_all(device: &mut VirtioNet) {
    for queue in 0..QUEUES {
        // The kick, and one for each turn that was not enough.
        for _ in 0..64 {
            if device.kicks[queue].read().is_err() {
                break;
            }
            device.serve(queue);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_ring_makes_the_device_panic_hang_or_keep_a_buffer(
        volleys in vec(Volley::of(descriptor(), 20), QUEUES),
        indirect in vec(descriptor(), 32),
        bytes in vec(byte(), 256),
        features: u64,
        frames in vec(0usize..70_000, 0..6),
    ) {
        let memory = memory();
        let (mut device, network, _) = device(1);
        let features = (features & device.features()) | (RING_FEATURES & !(1 << 29));
        let rings = Ring::several(&memory, QUEUES);
        memory.write_slice(&bytes.repeat(16), GuestAddress(DATA)).unwrap();
        for (index, (address, len, flags, next)) in (0u64..).zip(&indirect) {
            let raw = RawDescriptor::from(Descriptor::new(*address, *len, *flags, *next));
            memory.write_obj(raw, GuestAddress(TABLE + 16 * index)).unwrap();
        }
        for (ring, volley) in rings.iter().zip(&volleys) {
            volley.put_on(ring, TABLE);
        }
        device.activate(activation(&memory, &rings, features)).unwrap();
        for len in frames {
            let _ = rustix::net::send(&network[0], &vec![1; len], rustix::net::SendFlags::empty());
        }
        serve_all(&mut device);
        if !device.interrupt.needs_reset() {
            prop_assert_eq!(rings[1].used(), volleys[1].available(), "all that was sent was given back");
            for position in device.ring_positions().into_iter().flatten() {
                prop_assert_eq!(position.in_flight(), 0);
            }
        }
        device.reset();
        device.interrupt.reset();
        // A driver that behaves is served afterwards.
        let rings = Ring::several(&memory, QUEUES);
        for ring in &rings {
            memory.write_slice(&[0; PAGE as usize], GuestAddress(ring.used_ring().start - 0x800)).unwrap();
        }
        rings[1].describe(0, (DATA, 12 + 60, 0, 0));
        memory.write_slice(&[0; 72], GuestAddress(DATA)).unwrap();
        rings[1].set_available(1);
        while rustix::net::recv(&network[0], &mut [0u8; 8][..], rustix::net::RecvFlags::empty()).is_ok() {}
        device.activate(activation(&memory, &rings, RING_FEATURES)).unwrap();
        serve_all(&mut device);
        let mut sent = [0; 80];
        let (len, _) = rustix::net::recv(&network[0], &mut sent[..], rustix::net::RecvFlags::empty()).unwrap();
        prop_assert_eq!(len, 72);
    }

    #[test]
    fn a_frame_is_written_to_the_buffers_that_were_offered_and_nowhere_else(
        lens in vec(12u32..3000, 1..RING_SIZE as usize),
        frames in vec((0usize..40_000, any::<u8>()), 1..12),
        mergeable: bool,
        segments: bool,
    ) {
        let memory = memory();
        let (mut device, network, _) = device(1);
        let bit = |is_on: bool, bit: u32| u64::from(!is_on) << bit;
        let features = device.features() & !bit(mergeable, VIRTIO_NET_F_MRG_RXBUF) & !bit(segments, 1);
        let rings = Ring::several(&memory, QUEUES);
        let mut offered: Vec<Range<u64>> = vec![rings[0].used_ring()];
        for (head, len) in (0u16..).zip(&lens) {
            let at = DATA + 2 * PAGE * u64::from(head) + 5;
            rings[0].describe(head, (at, *len, WRITE, 0));
            rings[0].set_head(head, head);
            offered.push(at..at + u64::from(*len));
        }
        rings[0].set_available(lens.len() as u16);
        device.activate(activation(&memory, &rings, features)).unwrap();
        let before = contents(&memory);
        for (len, byte) in frames {
            let _ = rustix::net::send(&network[0], &vec![byte; len], rustix::net::SendFlags::empty());
        }
        serve_all(&mut device);
        for at in changed(&before, &contents(&memory)) {
            let others = [1, 2].map(|ring: usize| rings[ring].used_ring());
            prop_assert!(offered.iter().chain(&others).any(|range| range.contains(&at)), "{at:#x} has changed");
        }
        prop_assert!(!device.interrupt.needs_reset());
    }
}
