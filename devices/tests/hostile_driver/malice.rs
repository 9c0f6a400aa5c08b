//! What a hostile driver does.

use std::ops::Range;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::stack::{
    Buffer, DRIVER_OK, EVENT_IDX, INDIRECT, INDIRECT_DESC, NEXT, Rings, Stack, Subject, VERSION_1,
    WRITE, register,
};

/// A table for indirect descriptors. The rings are below it.
const TABLE: u64 = 0x4000;
/// What a descriptor may offer for writing lies above.
const BUFFERS: u64 = 0x1_0000;
const MEMORY_END: u64 = 0x5_1000;
pub const QUEUE_SIZE: u16 = 16;

/// One thing that a hostile driver does.
#[derive(Clone, Debug)]
pub enum Action {
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
    /// Begins anew, and well.
    Start,
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
    Notify(u32),
    Fire(Volley),
    /// Nothing that the driver sees: its guest is saved and goes on elsewhere.
    Move,
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

pub fn action() -> impl Strategy<Value = Action> {
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
        2 => Just(Action::Start),
        8 => (select(vec![0x1000, TABLE]), 0u64..16, buffer())
            .prop_map(|(table, index, buffer)| Action::Describe { table, index, buffer }),
        3 => (prop_oneof![4 => Just(0x2000), 1 => ring_address()], vec(0..=QUEUE_SIZE, 0..17), prop_oneof![8 => 0u16..18, 1 => any::<u16>()])
            .prop_map(|(ring, heads, index)| Action::MakeAvailable { ring, heads, index }),
        1 => (0u64..0x5000, vec(any::<u8>(), 1..64))
            .prop_map(|(address, bytes)| Action::Scribble { address, bytes }),
        6 => (0u32..3).prop_map(Action::Notify),
        4 => volley().prop_map(Action::Fire),
        1 => Just(Action::Move),
    ]
}

pub fn perform<D: Subject>(stack: &mut Stack<D>, action: Action) {
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
        Action::Start => stack.start(VERSION_1 | INDIRECT_DESC, QUEUE_SIZE, Rings::APART),
        Action::Describe {
            table,
            index,
            buffer,
        } => stack.describe(table, index, buffer),
        Action::MakeAvailable { ring, heads, index } => {
            stack.make_available(ring, QUEUE_SIZE, 0, &heads, index);
        }
        Action::Scribble { address, bytes } => stack.poke(address, 0, &bytes),
        Action::Notify(queue) => stack.notify(queue),
        Action::Fire(volley) => {
            // Right after what was served so far, where the rings are where an honest driver has them.
            let first = stack.used_index(Rings::APART);
            volley.load(stack, Rings::APART, first);
            stack.notify(0);
        }
        Action::Move => stack.go_on_elsewhere(),
    }
}

/// A ring's worth of malice.
#[derive(Clone, Debug)]
pub struct Volley {
    table: Vec<Buffer>,
    indirect: Vec<Buffer>,
    /// Type and sector of requests to a disk, 32 bytes apart from [`BUFFERS`] on.
    headers: Vec<(u32, u64)>,
    heads: Vec<u16>,
    /// By how much the available index lies.
    jump: u16,
}

impl Volley {
    /// Puts it into memory, behind available index `first`; the new index, and what is offered for writing.
    pub fn load<D: Subject>(
        &self,
        stack: &Stack<D>,
        rings: Rings,
        first: u16,
    ) -> (u16, Vec<Range<u64>>) {
        let mut offered = Vec::new();
        for (base, table) in [(rings.desc, &self.table), (TABLE, &self.indirect)] {
            for (index, buffer) in (0..).zip(table) {
                let buffer = apart(*buffer);
                let (address, len, flags, _) = buffer;
                if flags & WRITE != 0 {
                    offered.push(address..address.saturating_add(len.into()));
                }
                stack.describe(base, index, buffer);
            }
        }
        for (slot, (kind, sector)) in (0..).zip(&self.headers) {
            stack.poke(BUFFERS, 32 * slot, &kind.to_le_bytes());
            stack.poke(BUFFERS, 32 * slot + 8, &sector.to_le_bytes());
        }
        let index = first
            .wrapping_add(self.heads.len() as u16)
            .wrapping_add(self.jump);
        stack.make_available(rings.driver, QUEUE_SIZE, first, &self.heads, index);
        (index, offered)
    }
}

fn header() -> impl Strategy<Value = (u32, u64)> {
    (
        select(vec![0u32, 0, 0, 1, 1, 4, 8, 11, 13, 99]),
        prop_oneof![4 => 0u64..130, 1 => any::<u64>()],
    )
}

pub fn volley() -> impl Strategy<Value = Volley> {
    prop_oneof![wild_volley(), well_formed_volley()]
}

fn wild_volley() -> impl Strategy<Value = Volley> {
    (
        vec(buffer(), usize::from(QUEUE_SIZE)),
        vec(buffer(), 32),
        vec(header(), 16),
        vec(0..QUEUE_SIZE, 0..=usize::from(QUEUE_SIZE)),
        prop_oneof![20 => Just(0u16), 1 => any::<u16>()],
    )
        .prop_map(|(table, indirect, headers, heads, jump)| Volley {
            table,
            indirect,
            headers,
            heads,
            jump,
        })
}

/// Chains of the right shape, a header, data and a status each, so that what is behind the checks of the shape is reached. Their
/// data may overlap, also with the headers.
fn well_formed_volley() -> impl Strategy<Value = Volley> {
    let len = prop_oneof![4 => select(vec![512u32, 1024, 4096]), 1 => 0u32..5000];
    // Memory has a hole, and ends: what is in neither is refused.
    let address = prop_oneof![8 => BUFFERS..0x3_e000, 1 => BUFFERS..MEMORY_END];
    vec((header(), address, len), 5).prop_map(|requests| {
        let mut table = Vec::new();
        for (slot, ((kind, _), address, len)) in (0..).zip(&requests) {
            let direction = if matches!(kind, 0 | 8) { WRITE } else { 0 };
            let head = 3 * slot as u16;
            table.push((BUFFERS + 32 * slot, 16, NEXT, head + 1));
            table.push((*address, *len, NEXT | direction, head + 2));
            table.push((BUFFERS + 0x800 + slot, 1, WRITE, 0));
        }
        Volley {
            table,
            indirect: Vec::new(),
            headers: requests.into_iter().map(|(header, _, _)| header).collect(),
            heads: vec![0, 3, 6, 9, 12],
            jump: 0,
        }
    })
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
