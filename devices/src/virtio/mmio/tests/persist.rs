//! A transport that is saved and restored.

use proptest::collection::vec;

use super::*;
use crate::persist::{RestoreError, through_json};
use crate::virtio::{INTERRUPT_CONFIG_CHANGE, INTERRUPT_USED_BUFFER};

/// A driver whose device serves both queues, and is some way into the second.
fn running() -> Driver {
    let mut driver = Driver::new();
    driver.negotiate();
    driver.set_up_queue(0, 0x1_0000);
    driver.set_up_queue(1, 0x2_0000);
    driver.status(status::DRIVER_OK);
    let mut device = driver.device.lock().unwrap();
    let ring = device.rings[1].as_mut().unwrap();
    ring.set_next_avail(0xffff);
    ring.set_next_used(0xfffe);
    drop(device);
    driver
}

fn restored(state: &TransportState) -> Driver {
    let mut driver = Driver::new();
    driver
        .transport
        .restore_state(&through_json(state))
        .unwrap();
    driver
}

#[test]
fn a_device_in_use_goes_on_with_its_rings_where_they_were() {
    let saved = running().transport.save_state();
    let mut driver = restored(&saved);
    assert_eq!(driver.transport.save_state(), saved);
    assert_eq!(driver.read(register::STATUS), status::DRIVER_OK);
    let mut device = driver.device.lock().unwrap();
    assert_eq!(device.active, Some((vec![true, true], RING_FEATURES)));
    assert_eq!(device.resets, 0);
    assert_eq!(device.interrupt.status(), 0);
    let ring = device.rings[1].as_mut().unwrap();
    assert_eq!((ring.next_avail(), ring.next_used()), (0xffff, 0xfffe));
    assert_eq!((ring.size(), ring.desc_table()), (16, 0x2_0000));
    assert!(ring.event_idx_enabled());
    drop(device);
    assert_eq!(driver.status(0), 0);
    driver.negotiate();
}

#[test]
fn a_driver_can_go_on_from_each_step_of_its_start() {
    type Step = fn(&mut Driver);
    let steps: [Step; 6] = [
        |driver| driver.write(register::STATUS, status::ACKNOWLEDGE),
        |driver| driver.write(register::STATUS, status::DRIVER),
        |driver| {
            driver.accept(RING_FEATURES);
            driver.write(register::DEVICE_FEATURES_SEL, 1);
        },
        |driver| driver.write(register::STATUS, status::FEATURES_OK),
        |driver| driver.set_up_queue(1, 0x1_0000),
        |driver| driver.write(register::STATUS, status::DRIVER_OK),
    ];
    let mut driver = Driver::new();
    for step in steps {
        driver = restored(&driver.transport.save_state());
        step(&mut driver);
    }
    assert_eq!(driver.read(register::STATUS), status::DRIVER_OK);
    let active = driver.device.lock().unwrap().active.clone();
    assert_eq!(active, Some((vec![false, true], RING_FEATURES)));
}

#[test]
fn a_device_that_needs_a_reset_is_not_started_but_still_needs_it() {
    let mut driver = Driver::new();
    driver.negotiate();
    driver.set_up_queue(0, 0x10_0000);
    driver.status(status::DRIVER_OK);
    let mut driver = restored(&driver.transport.save_state());
    assert_eq!(
        driver.read(register::STATUS),
        status::DRIVER_OK | status::NEEDS_RESET
    );
    assert_eq!(driver.device.lock().unwrap().active, None);
    assert_eq!(driver.status(0), 0);
    driver.negotiate();
}

#[test]
fn a_driver_that_gave_up_on_a_device_has_it_given_up_still() {
    let mut driver = running();
    driver.status(status::DRIVER_OK | status::FAILED);
    let saved = driver.transport.save_state();
    let mut driver = restored(&saved);
    assert_eq!(driver.transport.save_state(), saved);
    assert_eq!(
        driver.read(register::STATUS),
        status::DRIVER_OK | status::FAILED
    );
}

#[test]
fn a_pending_interrupt_is_raised_once_when_the_device_goes_on() {
    let driver = running();
    let interrupt = driver.device.lock().unwrap().interrupt.clone();
    interrupt.signal_used();
    interrupt.signal_config_change();
    let pending = driver.transport.save_state();
    let mut driver = restored(&pending);
    let interrupt = driver.device.lock().unwrap().interrupt.clone();
    assert!(interrupt.irqfd().read().is_err(), "not before");
    interrupt.raise_restored();
    assert_eq!(interrupt.irqfd().read().unwrap(), 1);
    interrupt.raise_restored();
    assert!(interrupt.irqfd().read().is_err(), "once");
    let both = INTERRUPT_USED_BUFFER | INTERRUPT_CONFIG_CHANGE;
    assert_eq!(driver.read(register::INTERRUPT_STATUS), both);
    assert_eq!(driver.read(register::CONFIG_GENERATION), 1);
    let quiet = TransportState {
        interrupt_status: 0,
        ..pending
    };
    let interrupt = restored(&quiet).transport.interrupt.clone();
    interrupt.raise_restored();
    assert!(interrupt.irqfd().read().is_err());
}

#[test]
fn a_transport_in_use_is_not_restored() {
    let mut driver = running();
    let state = driver.transport.save_state();
    let error = driver.transport.restore_state(&state).unwrap_err();
    assert!(matches!(error, RestoreError::InUse { .. }));
}

#[test]
fn a_state_that_no_transport_can_have_is_refused_by_the_name_of_its_field() {
    type Change = fn(&mut TransportState);
    let changes: [(&str, Change); 24] = [
        ("device ID", |state| state.device_id = 2),
        ("offered features", |state| {
            state.offered_features |= 1 << 63;
        }),
        ("accepted features", |state| state.accepted_features |= 2),
        ("accepted features", |state| state.accepted_features = 0),
        ("accepted features", |state| state.offered_features = 0),
        ("status", |state| state.status = status::NEEDS_RESET),
        ("status", |state| state.status = 2),
        ("status", |state| state.status = u32::MAX),
        ("interrupt status", |state| state.interrupt_status = 4),
        ("number of queues", |state| state.queues.truncate(1)),
        ("number of queues", |state| {
            state.queues.push(state.queues[0].clone());
        }),
        ("largest queue size", |state| state.queues[0].max_size = 512),
        ("size of queue 1", |state| state.queues[1].size = 0),
        ("size of queue 1", |state| state.queues[1].size = 3),
        ("size of queue 1", |state| state.queues[1].size = 128),
        ("descriptor table", |state| state.queues[0].desc_table += 8),
        ("descriptor table", |state| {
            state.queues[1].desc_table = u64::MAX - 15;
        }),
        ("descriptor table of queue 1", |state| {
            state.queues[1].desc_table = 0xf_ff10;
        }),
        ("available ring", |state| state.queues[0].avail_ring = 1),
        ("available ring", |state| {
            state.queues[0].avail_ring = u64::MAX - 1;
        }),
        ("used ring", |state| state.queues[0].used_ring = 2),
        ("used ring", |state| state.queues[0].used_ring = 0x10_0000),
        ("next buffer", |state| state.queues[1].next_used = 0),
        ("next buffer of queue 0", |state| {
            state.queues[0].ready = false;
            state.queues[0].next_avail = 1;
        }),
    ];
    let good = running().transport.save_state();
    for (field, change) in changes {
        let mut bad = good.clone();
        change(&mut bad);
        let mut driver = Driver::new();
        let untouched = driver.transport.save_state();
        let error = driver.transport.restore_state(&bad).unwrap_err();
        assert!(error.to_string().contains(field), "{field}: {error}");
        assert_eq!(driver.transport.save_state(), untouched, "{field}");
        assert_eq!(driver.device.lock().unwrap().active, None);
    }
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        (0u64..0x20).prop_map(|page| page << 16),
        0..0x10_0010u64,
        u64::MAX - 0x100..=u64::MAX,
    ]
}

fn hostile_queue() -> impl Strategy<Value = QueueState> {
    (
        prop_oneof![Just(256u16), Just(64), any::<u16>()],
        prop_oneof![Just(16u16), Just(1), Just(64), any::<u16>()],
        any::<bool>(),
        (address(), address(), address()),
        prop_oneof![Just((0, 0)), any::<(u16, u16)>()],
    )
        .prop_map(|(max_size, size, ready, rings, position)| QueueState {
            max_size,
            size,
            ready,
            desc_table: rings.0,
            avail_ring: rings.1,
            used_ring: rings.2,
            next_avail: position.0,
            next_used: position.1,
        })
}

proptest! {
    #[test]
    fn whatever_is_restored_is_a_step_of_the_protocol_with_rings_in_memory(
        offered in prop_oneof![Just(RING_FEATURES | 1), any::<u64>()],
        accepted in prop_oneof![Just(RING_FEATURES), any::<u64>()],
        status in prop_oneof![Just(15u32), Just(11), any::<u32>()],
        needs_reset: bool,
        interrupt_status in 0..5u32,
        mut queues in vec(hostile_queue(), 1..4),
        honest_sizes: bool,
    ) {
        if honest_sizes {
            for (queue, size) in queues.iter_mut().zip([256, 64]) {
                queue.max_size = size;
                queue.size = 16;
            }
        }
        let state = TransportState {
            device_id: 42,
            offered_features: offered,
            accepted_features: accepted,
            status,
            needs_reset,
            interrupt_status,
            config_generation: u32::MAX,
            device_features_sel: u32::MAX,
            driver_features_sel: u32::MAX,
            queue_sel: u32::MAX,
            queues,
        };
        let mut driver = Driver::new();
        if driver.transport.restore_state(&state).is_ok() {
            prop_assert_eq!(driver.transport.save_state().status, status);
            let device = driver.device.lock().unwrap();
            prop_assert_eq!(device.active.is_some(), status & 15 == 15 && !needs_reset);
            for ring in device.rings.iter().flatten() {
                prop_assert!(ring.is_valid(&driver.transport.memory));
            }
            drop(device);
            driver.transport.interrupt.raise_restored();
            driver.read(register::QUEUE_READY);
            prop_assert_eq!(driver.status(0), 0);
            driver.negotiate();
        }
    }
}
