//! A guest that is saved and goes on elsewhere, and states that somebody has written to.

use devices::virtio::balloon::VirtioBalloon;
use devices::virtio::block::VirtioBlock;
use devices::virtio::pmem::VirtioPmem;
use devices::virtio::rng::VirtioRng;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::Value;

use super::stack::{Saved, Stack, Subject, register};

fn serves_on<D: Subject>() {
    let mut stack = Stack::<D>::new();
    stack.start_honestly();
    for count in (1..20).step_by(2) {
        stack.offer_honestly(count);
        stack.kick(0);
        assert!(stack.has_served(count), "request {count}");
        assert!(stack.was_interrupted());
        // The driver has not answered that interrupt, and nobody sees its next kick.
        let saved = stack.saved();
        stack.offer_honestly(count + 1);

        stack = Stack::restored(&stack.memory, &saved.through_json()).unwrap();
        assert!(!stack.was_interrupted(), "not before it goes on");
        stack.device().resume();
        assert!(stack.was_interrupted(), "it was pending");
        assert_eq!(stack.read(register::INTERRUPT_STATUS), 1);
        stack.turns();
        assert!(stack.has_served(count + 1), "request {}", count + 1);
        stack.write(register::INTERRUPT_ACK, 1);
        stack.was_interrupted();
    }
}

#[test]
fn a_restored_entropy_device_serves_on() {
    serves_on::<VirtioRng>();
}

#[test]
fn a_restored_block_device_serves_on() {
    serves_on::<VirtioBlock>();
}

#[test]
fn a_restored_balloon_serves_on() {
    serves_on::<VirtioBalloon>();
}

#[test]
fn a_restored_pmem_device_serves_on() {
    serves_on::<VirtioPmem>();
}

/// One value of a state, by its place among all, and what is written over it.
type Forgery = (usize, Value);

fn forgery() -> impl Strategy<Value = Forgery> {
    let value = prop_oneof![
        4 => prop_oneof![0u64..20, any::<u64>(), (0u32..64).prop_map(|bit| 1 << bit), Just(0xffff), Just(0xffff_ffff)]
            .prop_map(Value::from),
        2 => (0u64..0x60).prop_map(|page| (page << 12).into()),
        1 => any::<bool>().prop_map(Value::from),
        1 => Just(Value::Null),
    ];
    (any::<usize>(), value)
}

fn leaves<'a>(value: &'a mut Value, out: &mut Vec<&'a mut Value>) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| leaves(item, out)),
        Value::Object(fields) => fields.values_mut().for_each(|field| leaves(field, out)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => out.push(value),
    }
}

/// The state with values written over.
fn forged(state: &Value, forgeries: &[Forgery]) -> Value {
    let mut state = state.clone();
    for (place, value) in forgeries {
        let mut leaves_of_state = Vec::new();
        leaves(&mut state, &mut leaves_of_state);
        let count = leaves_of_state.len().max(1);
        if let Some(leaf) = leaves_of_state.into_iter().nth(place % count) {
            *leaf = value.clone();
        }
    }
    state
}

fn survives_a_forged_state<D: Subject>(
    transport: &[Forgery],
    device: &[Forgery],
) -> Result<(), TestCaseError> {
    let mut stack = Stack::<D>::new();
    stack.start_honestly();
    stack.offer_honestly(1);
    stack.kick(0);
    stack.offer_honestly(2);
    let saved = stack.saved();
    let forged = Saved {
        device: forged(&saved.device, device),
        transport: forged(&saved.transport, transport),
    };
    if let Ok(mut restored) = Stack::<D>::restored(&stack.memory, &forged) {
        restored.device().resume();
        restored.turns();
        for queue in 0..5 {
            restored.kick(queue);
        }
        restored.go_on_elsewhere();
        prop_assert!(restored.serves_an_honest_driver());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_entropy_device_survives_any_state(transport in vec(forgery(), 0..4), device in vec(forgery(), 0..2)) {
        survives_a_forged_state::<VirtioRng>(&transport, &device)?;
    }

    #[test]
    fn the_block_device_survives_any_state(transport in vec(forgery(), 0..4), device in vec(forgery(), 0..2)) {
        survives_a_forged_state::<VirtioBlock>(&transport, &device)?;
    }

    #[test]
    fn the_balloon_survives_any_state(transport in vec(forgery(), 0..3), device in vec(forgery(), 0..3)) {
        survives_a_forged_state::<VirtioBalloon>(&transport, &device)?;
    }

    #[test]
    fn the_pmem_device_survives_any_state(transport in vec(forgery(), 0..4), device in vec(forgery(), 0..2)) {
        survives_a_forged_state::<VirtioPmem>(&transport, &device)?;
    }
}
