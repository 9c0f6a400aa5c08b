//! A pmem device that is saved and restored.

use super::*;
use crate::persist::{RestoreError, through_json};

#[test]
fn memory_that_is_elsewhere_or_of_another_size_is_refused() {
    let state = through_json(&device(None).save_state());
    let mut same = device(None);
    same.restore_state(&state).unwrap();
    assert!(same.paused);
    for (other, message) in [
        (
            PmemState { start: 0, ..state },
            "virtio-pmem: the memory's address was 0x0 when the guest was saved, and is 0x100000000 now",
        ),
        (
            PmemState { size: 1, ..state },
            "virtio-pmem: the memory's size was 1 when the guest was saved, and is 67108864 now",
        ),
    ] {
        let error = device(None).restore_state(&other).unwrap_err();
        assert_eq!(error.to_string(), message);
    }
    let memory = memory();
    let driver = Driver::new(&memory, device(None));
    let error = driver.device().restore_state(&state).unwrap_err();
    assert!(matches!(error, RestoreError::InUse { .. }));
}

#[test]
fn a_saved_device_has_answered_the_flushes_under_way() {
    let memory = memory();
    let mut driver = Driver::new(&memory, device(Some(Arc::new(Counting::default()))));
    driver.request(0, 0);
    driver.request(1, 0);
    driver.turn();
    let mut device = driver.device();
    device.pause();
    let positions = device.ring_positions();
    assert_eq!(positions[0].map(RingPosition::in_flight), Some(0));
    assert_eq!(positions[0].map(|ring| ring.next_used), Some(2));
}
