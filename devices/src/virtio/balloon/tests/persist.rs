//! A balloon that is saved and restored: the statistics buffer that it keeps, its run of hinting, and forged states.

use super::*;
use crate::persist::{RestoreError, through_json};

const STATISTICS_QUEUE: usize = 2;
const HINTING_QUEUE: usize = 3;

type Change = fn(&mut BalloonDeviceState);

/// Saves the driver's device, and lets the driver go on with another.
fn move_on(driver: &mut Driver<'_>) {
    driver.device.pause();
    let state = through_json(&driver.device.save_state());
    let positions = driver.device.ring_positions();
    let (mut restored, given) = device(&BalloonConfig {
        target_pages: 1,
        statistics_interval: 9,
        ..everything()
    });
    restored.restore_state(&state).unwrap();
    let queues = driver.rings.iter().zip(positions).map(|(ring, position)| {
        let mut queue = ring.queue();
        position.unwrap().set(&mut queue);
        Some(queue)
    });
    let activation = Activation {
        memory: driver.memory.clone(),
        queues: queues.collect(),
        features: driver.device.features(),
    };
    restored.activate(activation).unwrap();
    assert_eq!(restored.save_state(), state);
    restored.resume();
    driver.device = restored;
    driver.given = given;
    driver.look();
}

#[test]
fn a_restored_balloon_has_its_size_its_statistics_and_the_buffer_for_more() {
    let memory = memory();
    let mut driver = Driver::with_everything(&memory);
    driver.device.set_target(77);
    driver.device.write_config(4, &5u32.to_le_bytes());
    driver.send_pfns(INFLATE, &[pfn(0)]);
    driver.send_statistics(STATISTICS_QUEUE, &[(4, 123)]);
    assert_eq!(driver.used(STATISTICS_QUEUE), 0, "it is kept");
    move_on(&mut driver);
    assert_eq!((driver.config(0), driver.config(4)), (77, 5));
    assert_eq!(driver.value("free_memory"), Some(123));
    assert_eq!(driver.device.statistics_interval, 1);
    driver.device.ask_for_statistics();
    assert_eq!(driver.used(STATISTICS_QUEUE), 1, "it is asked for the next");
    driver.send_statistics(STATISTICS_QUEUE, &[(4, 456)]);
    assert_eq!(driver.value("free_memory"), Some(456));
    driver.send_pfns(INFLATE, &[pfn(1)]);
    assert_eq!(driver.given(), [(FREE + 4096, 4096)]);
    assert_eq!(driver.used(INFLATE), 2);
}

#[test]
fn a_run_of_hinting_goes_on_in_the_restored_balloon() {
    let memory = memory();
    let mut driver = Driver::with_everything(&memory);
    driver.device.start_hinting(true).unwrap();
    driver.send_bytes(HINTING_QUEUE, &2u32.to_le_bytes());
    move_on(&mut driver);
    assert_eq!(driver.config(8), 2);
    driver.send(HINTING_QUEUE, &[(FREE, 4096, WRITE)]);
    assert_eq!(driver.given(), [(FREE, 4096)]);
    driver.send_bytes(HINTING_QUEUE, &0u32.to_le_bytes());
    assert_eq!(driver.config(8), 1, "done");
    driver.device.start_hinting(true).unwrap();
    assert_eq!(driver.config(8), 3, "no number is used again");
}

#[test]
fn a_state_that_no_balloon_can_have_is_refused_by_the_name_of_its_field() {
    let (mut balloon, _) = device(&everything());
    let good = balloon.save_state();
    let changes: [(&str, Change); 5] = [
        ("statistics was off", |state| state.statistics_interval = 0),
        ("statistics buffer", |state| {
            state.statistics_buffer = Some(QUEUE_SIZE);
        }),
        ("last run of hinting", |state| state.hinting.last = 1),
        ("run of hinting", |state| state.hinting.host = 2),
        ("run of hinting", |state| {
            state.hinting.last = 3;
            state.hinting.host = u32::MAX;
        }),
    ];
    for (field, change) in changes {
        let mut bad = good.clone();
        change(&mut bad);
        let error = balloon.restore_state(&bad).unwrap_err();
        assert!(error.to_string().contains(field), "{field}: {error}");
        assert_eq!(balloon.save_state(), good);
    }
    let (mut plain, _) = device(&BalloonConfig::default());
    let mut state = plain.save_state();
    state.hinting.last = 2;
    plain.restore_state(&state).unwrap_err();
    state.hinting.last = 0;
    state.statistics_buffer = Some(0);
    plain.restore_state(&state).unwrap_err();
    let memory = memory();
    let mut driver = Driver::with_everything(&memory);
    let error = driver.device.restore_state(&good).unwrap_err();
    assert!(matches!(error, RestoreError::InUse { .. }));
}

#[test]
fn rings_that_say_otherwise_than_the_state_what_the_balloon_keeps_are_refused() {
    let memory = memory();
    for (kept, queue, held, is_right) in [
        (None, STATISTICS_QUEUE, 0, true),
        (Some(3), STATISTICS_QUEUE, 1, true),
        (None, STATISTICS_QUEUE, 1, false),
        (Some(3), STATISTICS_QUEUE, 0, false),
        (Some(RING_SIZE), STATISTICS_QUEUE, 1, false),
        (Some(3), STATISTICS_QUEUE, 2, false),
        (Some(3), INFLATE, 1, false),
        (None, DEFLATE, 1, false),
    ] {
        let (mut balloon, _) = device(&everything());
        let state = BalloonDeviceState {
            statistics_buffer: kept,
            ..balloon.save_state()
        };
        balloon.restore_state(&state).unwrap();
        let rings = Ring::several(&memory, QUEUES).into_iter().enumerate();
        let queues = rings.map(|(index, ring)| {
            let mut ring = ring.queue();
            let next_avail = if index == queue { held } else { 0 };
            let next_used = 0;
            RingPosition {
                next_avail,
                next_used,
            }
            .set(&mut ring);
            Some(ring)
        });
        let activation = Activation {
            memory: memory.clone(),
            queues: queues.collect(),
            features: balloon.features(),
        };
        let activated = balloon.activate(activation);
        assert_eq!(activated.is_ok(), is_right, "{kept:?} {queue} {held}");
    }
}
