//! Rings from a driver that means harm: whatever it writes, each buffer comes back or the device is in need of a reset,
//! no byte of guest memory changes but in the used rings, and only whole pages of RAM are given back.

use proptest::collection::vec;
use proptest::prelude::*;
use virtio_queue::QueueT;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::super::mock_ring::{INDIRECT, RING_SIZE, RawBuffer, Ring, Volley};
use super::mock::{MEMORY_END, device, everything, memory};
use super::pages::PAGE;
use super::*;

/// A table for indirect descriptors.
const TABLE: u64 = 0x3_0000;
/// Page numbers, commands and statistics.
const DATA: u64 = 0x4_0000;

fn descriptor() -> impl Strategy<Value = RawBuffer> {
    let address = prop_oneof![
        8 => (0u64..16).prop_map(|slot| DATA + 0x100 * slot),
        6 => 0..MEMORY_END,
        4 => (0u64..0x201).prop_map(|page| page * PAGE),
        2 => (0u64..16).prop_map(|index| TABLE + 16 * index),
        1 => MEMORY_END - 8..MEMORY_END + 8,
        1 => u64::MAX - 1024..=u64::MAX,
    ];
    let len = prop_oneof![
        8 => prop::sample::select(vec![0u32, 1, 3, 4, 8, 10, 20, 255, 1024, 4095, 4096, 4097, 0x1_0000]),
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![
        10 => prop::sample::select(vec![0u16, 0, 1, 2, 2, 3]),
        1 => any::<u16>(),
        2 => Just(INDIRECT),
    ];
    (address, len, flags, 0..RING_SIZE + 1)
}

/// What a number in a buffer may be taken for: a page, a command, the tag of a statistic.
fn number() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0u32..4, 4 => 0u32..0x210, 1 => any::<u32>()]
}

fn volley() -> impl Strategy<Value = Volley> {
    Volley::of(descriptor(), 20)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_ring_makes_the_device_panic_hang_write_or_give_back_what_it_may_not(
        volleys in vec(volley(), QUEUES),
        indirect in vec(descriptor(), 32),
        numbers in vec(number(), 1024),
        features in 0u64..64,
        event_idx: bool,
        start: bool,
    ) {
        let memory = memory();
        let (mut device, given) = device(&everything());
        let rings = Ring::several(&memory, QUEUES);
        for (index, number) in (0..).zip(&numbers) {
            memory.write_obj(*number, GuestAddress(DATA + 4 * index)).unwrap();
        }
        for (index, (address, len, flags, next)) in (0u64..).zip(&indirect) {
            let raw = RawDescriptor::from(Descriptor::new(*address, *len, *flags, *next));
            memory.write_obj(raw, GuestAddress(TABLE + 16 * index)).unwrap();
        }
        let mut used = Vec::new();
        for (ring, volley) in rings.iter().zip(&volleys) {
            volley.put_on(ring, TABLE);
            used.push(ring.used_ring());
        }
        let queues = rings.iter().map(|ring| {
            let mut queue = ring.queue();
            queue.set_event_idx(event_idx);
            Some(queue)
        });
        let activation = Activation { memory: memory.clone(), queues: queues.collect(), features: RING_BITS | features };
        let before = contents(&memory);
        device.activate(activation).unwrap();
        if start && features & bit(F_FREE_PAGE_HINT) != 0 {
            device.start_hinting(true).unwrap();
        }

        for queue in 0..QUEUES {
            device.notified(queue);
            // The kick, and one for each turn that was not enough.
            while device.kicks[queue].read().is_ok() {
                device.serve(queue);
            }
            device.ask_for_statistics();
        }

        for address in changes(&before, &contents(&memory)) {
            prop_assert!(used.iter().any(|range| range.contains(&address)), "{address:#x} has changed");
        }
        for (address, len) in given.lock().unwrap().iter() {
            prop_assert!(*len > 0 && address % PAGE == 0 && len % PAGE == 0, "{address:#x}+{len:#x}");
            prop_assert!(memory.check_range(GuestAddress(*address), *len as usize), "{address:#x}+{len:#x}");
        }
        if !device.interrupt.needs_reset() {
            let roles = queues::roles(features, |_| true);
            for ((ring, volley), role) in rings.iter().zip(&volleys).zip(roles) {
                let expected = if role.is_some() { volley.available() } else { 0 };
                prop_assert_eq!(ring.used(), expected);
            }
        }
        device.reset();
    }

    /// Buffers of the right shape, so that the properties reach what is behind the checks of the shape.
    #[test]
    fn no_page_number_gives_back_what_is_not_ram(numbers in vec(number(), 1..2048)) {
        let memory = memory();
        let (mut device, given) = device(&everything());
        let ring = Ring::several(&memory, QUEUES).swap_remove(0);
        for (index, number) in (0..).zip(&numbers) {
            memory.write_obj(*number, GuestAddress(DATA + 4 * index)).unwrap();
        }
        ring.describe(0, (DATA, 4 * numbers.len() as u32, 0, 0));
        ring.set_available(1);
        let queues = vec![Some(ring.queue())];
        device.activate(Activation { memory: memory.clone(), queues, features: RING_BITS }).unwrap();
        device.serve(0);
        let given = given.lock().unwrap();
        // In order, apart from each other, and just the pages that were named.
        prop_assert!(given.windows(2).all(|two| two[0].0 + two[0].1 < two[1].0));
        let mut pages: Vec<u64> = numbers.iter().take(pages::MAX_PFNS).map(|number| u64::from(*number) * PAGE).collect();
        pages.retain(|page| memory.check_range(GuestAddress(*page), PAGE as usize));
        pages.sort_unstable();
        pages.dedup();
        let returned: Vec<u64> = given.iter().flat_map(|(address, len)| (*address..address + len).step_by(PAGE as usize)).collect();
        prop_assert_eq!(returned, pages);
        prop_assert_eq!(ring.used(), 1);
    }
}

const RING_BITS: u64 = super::super::RING_FEATURES;

/// All of guest memory: each page's address and bytes.
fn contents(memory: &GuestMemory) -> Vec<(u64, Vec<u8>)> {
    let pages = (0..0x18_0000).chain(0x20_0000..MEMORY_END);
    let pages = pages.step_by(PAGE as usize);
    let bytes = |page| {
        let mut bytes = vec![0; PAGE as usize];
        memory.read_slice(&mut bytes, GuestAddress(page)).unwrap();
        (page, bytes)
    };
    pages.map(bytes).collect()
}

/// The addresses at which two contents differ.
fn changes(before: &[(u64, Vec<u8>)], after: &[(u64, Vec<u8>)]) -> Vec<u64> {
    let pages = before.iter().zip(after);
    let changed = pages.filter(|(before, after)| before != after);
    let bytes = changed.flat_map(|((page, before), (_, after))| {
        (*page..)
            .zip(before.iter().zip(after))
            .filter(|(_, (a, b))| a != b)
    });
    bytes.map(|(address, _)| address).collect()
}
