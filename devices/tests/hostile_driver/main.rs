//! A driver that means harm, at the registers and in the rings, before whole devices.
//!
//! Whatever it does, the device does not panic, hang or touch memory that is not its to touch, it answers by the protocol, and after
//! a reset it serves a driver that behaves.

#![allow(clippy::unwrap_used, reason = "these are tests")]

mod stack;

use devices::virtio::block::VirtioBlock;
use devices::virtio::rng::VirtioRng;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use vm_memory::{Bytes, GuestAddress};

use self::stack::{
    Buffer, DRIVER_OK, Device, EVENT_IDX, INDIRECT, INDIRECT_DESC, NEEDS_RESET, NEXT, Rings, Stack,
    VERSION_1, WRITE, register, snapshot,
};

/// A table for indirect descriptors. The rings are below it.
const TABLE: u64 = 0x4000;
/// What a descriptor may offer for writing lies above.
const BUFFERS: u64 = 0x1_0000;
const MEMORY_END: u64 = 0x5_1000;
const QUEUE_SIZE: u16 = 16;

/// One thing that a hostile driver does.
#[derive(Clone, Debug)]
enum Action {
    Access {
        offset: u64,
        value: u64,
        width: usize,
        is_write: bool,
    },
    Negotiate(u64),
    SetUpQueue {
        queue: u32,
        size: u32,
        rings: Rings,
    },
    DriverOk,
    Describe {
        table: u64,
        index: u64,
        buffer: Buffer,
    },
    MakeAvailable {
        ring: u64,
        heads: Vec<u16>,
        index: u16,
    },
    Scribble {
        address: u64,
        bytes: Vec<u8>,
    },
    Kick(u32),
}

fn ring_address() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => select(vec![0x1000u64, 0x2000, 0x3000]),
        // Rings that overlap.
        2 => (0u64..0x40).prop_map(|offset| 0x1000 + 4 * offset),
        // At the ends of the regions, in the hole, and where the end wraps around.
        2 => select(vec![0u64, 0x1_fff0, 0x3_fff0, 0x4_0000, 0x5_0ff0, u64::MAX - 15]),
        1 => any::<u64>(),
    ]
}

fn rings() -> impl Strategy<Value = Rings> {
    prop_oneof![
        3 => Just(Rings::APART),
        2 => (ring_address(), ring_address(), ring_address())
            .prop_map(|(desc, driver, device)| Rings { desc, driver, device }),
    ]
}

fn buffer() -> impl Strategy<Value = Buffer> {
    let address = prop_oneof![
        8 => (0u64..16).prop_map(|slot| BUFFERS + 32 * slot),
        8 => BUFFERS..MEMORY_END,
        3 => (0u64..16).prop_map(|index| TABLE + 16 * index),
        2 => 0u64..0x5000,
        1 => MEMORY_END - 8..MEMORY_END + 8,
        1 => u64::MAX - 1024..=u64::MAX,
    ];
    let len = prop_oneof![
        8 => select(vec![0u32, 1, 15, 16, 17, 20, 32, 48, 511, 512, 513, 4096, 0x2_0000]),
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![
        8 => select(vec![0, NEXT, NEXT, WRITE, WRITE, WRITE | NEXT]),
        2 => Just(INDIRECT),
        1 => any::<u16>(),
    ];
    (address, len, flags, 0..=QUEUE_SIZE)
}

fn action() -> impl Strategy<Value = Action> {
    let offset = prop_oneof![
        4 => (0u64..0x48).prop_map(|register| 4 * register),
        1 => 0u64..0x1000 - 8,
        2 => Just(register::STATUS),
    ];
    let value = prop_oneof![
        any::<u64>(),
        0u64..3,
        select(vec![1u64, 3, 11, 15, 64, 128, 143])
    ];
    let width = prop_oneof![4 => Just(4usize), 1 => select(vec![1, 2, 8])];
    prop_oneof![
        4 => (offset, value, width, any::<bool>()).prop_map(|(offset, value, width, is_write)| {
            Action::Access { offset, value, width, is_write }
        }),
        1 => prop_oneof![
            4 => select(vec![VERSION_1, VERSION_1 | EVENT_IDX, VERSION_1 | EVENT_IDX | INDIRECT_DESC]),
            1 => any::<u64>(),
        ].prop_map(Action::Negotiate),
        2 => (0u32..3, prop_oneof![4 => select(vec![1u32, 2, 8, 16]), 1 => any::<u32>()], rings())
            .prop_map(|(queue, size, rings)| Action::SetUpQueue { queue, size, rings }),
        2 => Just(Action::DriverOk),
        8 => (select(vec![0x1000, TABLE]), 0u64..16, buffer())
            .prop_map(|(table, index, buffer)| Action::Describe { table, index, buffer }),
        3 => (prop_oneof![4 => Just(0x2000), 1 => ring_address()], vec(0..=QUEUE_SIZE, 0..17), prop_oneof![8 => 0u16..18, 1 => any::<u16>()])
            .prop_map(|(ring, heads, index)| Action::MakeAvailable { ring, heads, index }),
        1 => (0u64..0x5000, vec(any::<u8>(), 1..64))
            .prop_map(|(address, bytes)| Action::Scribble { address, bytes }),
        6 => (0u32..3).prop_map(Action::Kick),
    ]
}

fn perform<D: Device>(stack: &mut Stack<D>, action: Action) {
    match action {
        Action::Access {
            offset,
            value,
            width,
            is_write,
        } => stack.access(offset, value, width, is_write),
        Action::Negotiate(features) => stack.negotiate(features),
        Action::SetUpQueue { queue, size, rings } => stack.set_up_queue(queue, size, rings),
        Action::DriverOk => stack.write(register::STATUS, DRIVER_OK),
        Action::Describe {
            table,
            index,
            buffer,
        } => stack.describe(table, index, buffer),
        Action::MakeAvailable { ring, heads, index } => {
            stack.make_available(ring, QUEUE_SIZE, 0, &heads, index);
        }
        Action::Scribble { address, bytes } => stack.poke(address, 0, &bytes),
        Action::Kick(queue) => stack.kick(queue),
    }
}

fn survives<D: Device>(actions: Vec<Action>) -> Result<(), TestCaseError> {
    let mut stack = Stack::<D>::new();
    // Half of what a random driver does is for nothing without a device that runs.
    stack.negotiate(VERSION_1 | INDIRECT_DESC);
    stack.set_up_queue(0, QUEUE_SIZE.into(), Rings::APART);
    stack.write(register::STATUS, DRIVER_OK);
    for action in actions {
        perform(&mut stack, action);
        let status = stack.read(register::STATUS);
        let steps = status & DRIVER_OK;
        prop_assert!([0, 1, 3, 11, 15].contains(&steps), "{status:#x}");
        prop_assert!(
            status & NEEDS_RESET == 0 || steps == DRIVER_OK,
            "{status:#x}"
        );
    }
    prop_assert!(stack.serves_an_honest_driver());
    Ok(())
}

/// A ring's worth of malice: descriptors of the ring and of the indirect table, request headers, heads, and by how much the
/// available index lies.
type Volley = (Vec<Buffer>, Vec<Buffer>, Vec<(u32, u64)>, Vec<u16>, u16);

fn volley() -> impl Strategy<Value = Volley> {
    let header = (
        select(vec![0u32, 0, 0, 1, 1, 4, 8, 11, 13, 99]),
        prop_oneof![4 => 0u64..130, 1 => any::<u64>()],
    );
    (
        vec(buffer(), usize::from(QUEUE_SIZE)),
        vec(buffer(), 32),
        vec(header, 16),
        vec(0..QUEUE_SIZE, 0..=usize::from(QUEUE_SIZE)),
        prop_oneof![20 => Just(0u16), 1 => any::<u16>()],
    )
}

/// Keeps what a device may write apart from the rings and tables, since a device that writes new descriptors into them, as it was
/// told to, would offer what this test does not know of.
fn apart((address, len, flags, next): Buffer) -> Buffer {
    if flags & INDIRECT != 0 {
        (TABLE + address % 16 * 16, len % 512, flags, next)
    } else if flags & WRITE != 0 && address < BUFFERS {
        (address + BUFFERS, len, flags, next)
    } else {
        (address, len, flags, next)
    }
}

fn writes_only_what_is_offered<D: Device>(
    volleys: Vec<Volley>,
    features: u64,
) -> Result<(), TestCaseError> {
    let mut stack = Stack::<D>::new();
    let rings = Rings::APART;
    stack.negotiate(VERSION_1 | features);
    stack.set_up_queue(0, QUEUE_SIZE.into(), rings);
    stack.write(register::STATUS, DRIVER_OK);
    prop_assert_eq!(stack.read(register::STATUS), DRIVER_OK);
    // Flags, index, elements and `avail_event`.
    let used_ring = rings.device..rings.device + 4 + 8 * u64::from(QUEUE_SIZE) + 2;
    let mut available = 0u16;
    for (table, indirect, headers, heads, jump) in volleys {
        let mut offered = vec![used_ring.clone()];
        for (base, table) in [(rings.desc, table), (TABLE, indirect)] {
            for (index, buffer) in (0..).zip(table) {
                let buffer = apart(buffer);
                let (address, len, flags, _) = buffer;
                if flags & WRITE != 0 {
                    offered.push(address..address.saturating_add(len.into()));
                }
                stack.describe(base, index, buffer);
            }
        }
        for (slot, (kind, sector)) in (0..).zip(headers) {
            let at = 32 * slot;
            stack.poke(BUFFERS, at, &kind.to_le_bytes());
            stack.poke(BUFFERS, at + 8, &sector.to_le_bytes());
        }
        let first = available;
        available = available
            .wrapping_add(heads.len() as u16)
            .wrapping_add(jump);
        stack.make_available(rings.driver, QUEUE_SIZE, first, &heads, available);
        let before = snapshot(&stack.memory);

        stack.kick(0);

        for ((base, before), (_, after)) in before.iter().zip(&snapshot(&stack.memory)) {
            for (address, _) in (*base..)
                .zip(before.iter().zip(after))
                .filter(|(_, (before, after))| before != after)
            {
                let allowed = offered.iter().any(|range| range.contains(&address));
                prop_assert!(allowed, "{address:#x} has changed");
            }
        }
        let used: u16 = stack
            .memory
            .read_obj(GuestAddress(rings.device + 2))
            .unwrap();
        let status = stack.read(register::STATUS);
        prop_assert!(
            status == DRIVER_OK && used == available || status == DRIVER_OK | NEEDS_RESET,
            "status {status:#x}, used {used} of {available}"
        );
    }
    prop_assert!(stack.serves_an_honest_driver());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_entropy_device_survives_any_driver(actions in vec(action(), 0..80)) {
        survives::<VirtioRng>(actions)?;
    }

    #[test]
    fn the_block_device_survives_any_driver(actions in vec(action(), 0..80)) {
        survives::<VirtioBlock>(actions)?;
    }

    #[test]
    fn the_entropy_device_writes_only_what_is_offered(
        volleys in vec(volley(), 1..4),
        features in select(vec![0, EVENT_IDX, INDIRECT_DESC | EVENT_IDX]),
    ) {
        writes_only_what_is_offered::<VirtioRng>(volleys, features)?;
    }

    #[test]
    fn the_block_device_writes_only_what_is_offered(
        volleys in vec(volley(), 1..4),
        features in select(vec![0, EVENT_IDX, INDIRECT_DESC | EVENT_IDX]),
    ) {
        writes_only_what_is_offered::<VirtioBlock>(volleys, features)?;
    }
}
