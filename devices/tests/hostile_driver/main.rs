//! A driver that means harm, at the registers and in the rings, before whole devices.
//!
//! Whatever it does, the device does not panic, hang or touch memory that is not its to touch, it answers by the
//! protocol, and after a reset it serves a driver that behaves.

#![allow(clippy::unwrap_used, reason = "these are tests")]

mod log;
mod malice;
mod restored;
mod stack;

use devices::virtio::balloon::VirtioBalloon;
use devices::virtio::block::VirtioBlock;
use devices::virtio::pmem::VirtioPmem;
use devices::virtio::rng::VirtioRng;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use self::malice::{Action, QUEUE_SIZE, Volley, action, perform, volley};
use self::stack::{
    DRIVER_OK, EVENT_IDX, INDIRECT_DESC, NEEDS_RESET, Rings, Stack, Subject, VERSION_1, changes,
    register, snapshot,
};

fn survives<D: Subject>(actions: Vec<Action>) -> Result<(), TestCaseError> {
    let mut stack = Stack::<D>::new();
    // Half of what a random driver does is for nothing without a device that runs.
    perform(&mut stack, Action::Start);
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

fn writes_only_what_is_offered<D: Subject>(
    volleys: Vec<Volley>,
    features: u64,
) -> Result<(), TestCaseError> {
    let mut stack = Stack::<D>::new();
    let rings = Rings::APART;
    stack.start(VERSION_1 | features, QUEUE_SIZE, rings);
    // Flags, index, elements and `avail_event`.
    let used_ring = rings.device..rings.device + 4 + 8 * u64::from(QUEUE_SIZE) + 2;
    let mut available = 0u16;
    for volley in volleys {
        let (index, offered) = volley.load(&stack, rings, available);
        available = index;
        let before = snapshot(&stack.memory);

        stack.kick(0);

        for address in changes(&before, &snapshot(&stack.memory)) {
            let allowed = used_ring.contains(&address)
                || offered.iter().any(|range| range.contains(&address));
            prop_assert!(allowed, "{address:#x} has changed");
        }
        let used = stack.used_index(rings);
        let status = stack.read(register::STATUS);
        prop_assert!(
            status == DRIVER_OK && used == available || status == DRIVER_OK | NEEDS_RESET,
            "status {status:#x}, used {used} of {available}"
        );
        if status != DRIVER_OK {
            stack.start(VERSION_1 | features, QUEUE_SIZE, rings);
            prop_assert_eq!(stack.read(register::STATUS), DRIVER_OK);
            available = 0;
        }
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
    fn the_balloon_survives_any_driver(actions in vec(action(), 0..80)) {
        survives::<VirtioBalloon>(actions)?;
    }

    #[test]
    fn the_balloon_writes_only_what_is_offered(
        volleys in vec(volley(), 1..6),
        features in select(vec![0, EVENT_IDX, INDIRECT_DESC | EVENT_IDX]),
    ) {
        writes_only_what_is_offered::<VirtioBalloon>(volleys, features)?;
    }

    #[test]
    fn the_pmem_device_survives_any_driver(actions in vec(action(), 0..80)) {
        survives::<VirtioPmem>(actions)?;
    }

    #[test]
    fn the_entropy_device_writes_only_what_is_offered(
        volleys in vec(volley(), 1..6),
        features in select(vec![0, EVENT_IDX, INDIRECT_DESC | EVENT_IDX]),
    ) {
        writes_only_what_is_offered::<VirtioRng>(volleys, features)?;
    }

    #[test]
    fn the_block_device_writes_only_what_is_offered(
        volleys in vec(volley(), 1..6),
        features in select(vec![0, EVENT_IDX, INDIRECT_DESC | EVENT_IDX]),
    ) {
        writes_only_what_is_offered::<VirtioBlock>(volleys, features)?;
    }

    #[test]
    fn the_pmem_device_writes_only_what_is_offered(
        volleys in vec(volley(), 1..6),
        features in select(vec![0, EVENT_IDX, INDIRECT_DESC | EVENT_IDX]),
    ) {
        writes_only_what_is_offered::<VirtioPmem>(volleys, features)?;
    }
}
