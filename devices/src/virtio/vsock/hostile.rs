//! Rings from a driver that means harm: whatever it writes, each buffer of the tx ring comes back or the device is in need of a reset, no byte of
//! guest memory changes but in used rings and in buffers of the rx and event rings, and what is kept stays within its bounds.

use proptest::collection::vec;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use super::super::mock_ring::{INDIRECT, RING_SIZE, RawBuffer, Ring, Volley};
use super::mock::{CID, SERVICE, device, memory};
use super::packet::Header;
use super::*;

const MEMORY_END: u64 = 0x20_0000;
const TABLE: u64 = 0x3_0000;
/// Headers, 64 bytes apart; what is behind them may be written to.
const DATA: u64 = 0x4_0000;
const HEADERS: u64 = 64;
const ROOM: u64 = 0x10_0000;

fn descriptor(writable: bool) -> impl Strategy<Value = RawBuffer> {
    let address = if writable {
        prop_oneof![
            12 => (0u64..64).prop_map(|slot| ROOM + 0x2000 * slot),
            1 => ROOM..MEMORY_END + 16,
        ]
        .boxed()
    } else {
        prop_oneof![
            16 => (0u64..HEADERS).prop_map(|slot| DATA + 64 * slot),
            4 => 0..MEMORY_END,
            1 => u64::MAX - 1024..=u64::MAX,
        ]
        .boxed()
    };
    let len = prop_oneof![
        8 => prop::sample::select(vec![0u32, 1, 43, 44, 45, 100, 4096, 4140, 0x1_0000]),
        1 => 0u32..0x2000,
    ];
    let kinds = if writable {
        vec![2u16, 2, 3]
    } else {
        vec![0, 0, 1, 1]
    };
    let flags = prop_oneof![
        12 => prop::sample::select(kinds),
        1 => Just(INDIRECT),
    ];
    (address, len, flags, 0..RING_SIZE + 1)
}

fn header() -> impl Strategy<Value = Header> {
    let port = || prop_oneof![8 => 0u32..4, 2 => Just(SERVICE), 1 => any::<u32>()];
    let len = prop_oneof![4 => Just(0u32), 4 => 0u32..200, 1 => any::<u32>()];
    (
        prop_oneof![20 => Just(u64::from(CID)), 1 => any::<u64>()],
        prop_oneof![20 => Just(2u64), 1 => any::<u64>()],
        (port(), port()),
        len,
        (prop_oneof![20 => Just(1u16), 1 => any::<u16>()], 0u16..9),
        any::<u32>(),
        any::<(u32, u32)>(),
    )
        .prop_map(|(src, dst, ports, len, (kind, op), flags, room)| Header {
            src_cid: src.into(),
            dst_cid: dst.into(),
            src_port: ports.0.into(),
            dst_port: ports.1.into(),
            len: len.into(),
            kind: kind.into(),
            op: op.into(),
            flags: flags.into(),
            buf_alloc: room.0.into(),
            fwd_cnt: room.1.into(),
        })
}

fn volley(writable: bool) -> impl Strategy<Value = Volley> {
    Volley::of(descriptor(writable), 30)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_ring_makes_the_device_panic_hang_write_or_keep_what_it_may_not(
        rx in volley(true),
        tx in volley(false),
        event in volley(true),
        headers in vec(header(), HEADERS as usize),
        event_idx: bool,
        restored: bool,
    ) {
        let memory = memory();
        let (mut device, folder) = device();
        // The guest reaches programs on some ports.
        let listeners: Vec<_> = (0..2)
            .map(|port| UnixListener::bind(folder.path().join(format!("v_{port}"))).unwrap())
            .collect();
        if restored {
            device.restore_state(&VsockState {}).unwrap();
        }
        for (slot, header) in (0..).zip(&headers) {
            memory.write_slice(header.as_bytes(), GuestAddress(DATA + 64 * slot)).unwrap();
        }
        let rings = Ring::several(&memory, QUEUES);
        for (ring, volley) in rings.iter().zip([&rx, &tx, &event]) {
            volley.put_on(ring, TABLE);
        }
        let queues = rings.iter().map(|ring| {
            use virtio_queue::QueueT;
            let mut queue = ring.queue();
            queue.set_event_idx(event_idx);
            Some(queue)
        });
        let activation = Activation { memory: memory.clone(), queues: queues.collect(), features: RING_FEATURES };
        let before = contents(&memory);
        device.activate(activation).unwrap();
        device.resume();

        let mut turns = 0;
        while device.kicks[0].read().is_ok() {
            device.poll();
            device.serve();
            turns += 1;
            prop_assert!(turns < 100, "it kicks itself for ever");
        }
        drop(listeners);
        device.poll();
        device.serve();
        prop_assert!(device.replies.len() <= 64 + 56);

        let after = contents(&memory);
        let changed = before.iter().zip(&after).enumerate().filter(|(_, (a, b))| a != b);
        for (address, _) in changed.map(|(address, bytes)| (address as u64, bytes)) {
            let is_used = rings.iter().any(|ring| ring.used_ring().contains(&address));
            prop_assert!(is_used || address >= ROOM, "{address:#x} has changed");
        }
        if !device.interrupt.needs_reset() && device.replies.len() < 64 {
            prop_assert_eq!(rings[1].used(), tx.available());
        }
        device.reset();
        prop_assert_eq!(device.table.len(), 0);
    }
}

fn contents(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY_END as usize];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}
