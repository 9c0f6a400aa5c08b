//! A block device that is saved and restored, over the same disk and over others.

use virtio_queue::QueueT;

use super::*;
use crate::persist::{RestoreError, through_json};

type Change = fn(&mut FileDisk, &mut BlockConfig);

fn with(change: impl FnOnce(&mut FileDisk, &mut BlockConfig)) -> VirtioBlock {
    let disk = FileDisk::new(false, SectorSize::B512);
    let mut config = BlockConfig {
        disk: disk.clone(),
        serial: "coppice".into(),
        queues: 1,
        queue_size: QUEUE_SIZE,
        engine: EngineKind::Worker,
    };
    let mut changed = FileDisk::new(false, SectorSize::B512);
    change(Arc::get_mut(&mut changed).unwrap(), &mut config);
    config.disk = changed;
    let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    VirtioBlock::new(config, Arc::new(Interrupt::new(irqfd))).unwrap()
}

#[test]
fn a_load_takes_the_disk_that_the_guest_had_and_refuses_any_other() {
    let state = through_json(&with(|_, _| {}).save_state());
    let mut same = with(|_, _| {});
    same.restore_state(&state).unwrap();
    assert!(same.paused);
    assert_eq!(same.save_state(), state);
    let others: [(Change, &str); 7] = [
        (
            |disk, _| disk.geometry.size *= 2,
            "the disk's capacity was 2048 sectors when the guest was saved, and is 4096 sectors now",
        ),
        (
            |disk, _| disk.geometry.read_only = true,
            "the disk was writable when the guest was saved, and is read-only now",
        ),
        (
            |disk, _| disk.geometry.logical_sector = SectorSize::B4096,
            "the disk's logical block size was 512 when the guest was saved, and is 4096 now",
        ),
        (
            |disk, _| disk.geometry.physical_sector = SectorSize::B512,
            "the disk's physical block size was 4096 when the guest was saved, and is 512 now",
        ),
        (
            |_, config| config.queues = 2,
            "the number of queues was 1 when the guest was saved, and is 2 now",
        ),
        (
            |_, config| config.queue_size = 32,
            "the queue size was 16 when the guest was saved, and is 32 now",
        ),
        (
            |_, config| config.serial = "other".into(),
            "the serial number was \"coppice\" when the guest was saved, and is \"other\" now",
        ),
    ];
    for (change, message) in others {
        let error = with(change).restore_state(&state).unwrap_err();
        assert!(matches!(error, RestoreError::Mismatch { .. }));
        assert_eq!(error.to_string(), format!("virtio-blk: {message}"));
    }
}

#[test]
fn a_disk_that_has_grown_under_the_guest_is_saved_with_its_new_capacity() {
    let mut device = with(|_, _| {});
    let mut larger = FileDisk::new(false, SectorSize::B512);
    Arc::get_mut(&mut larger).unwrap().geometry.size = 2 * DISK_SIZE;
    device.replace_disk(larger).unwrap();
    with(|disk, _| disk.geometry.size *= 2)
        .restore_state(&device.save_state())
        .unwrap();
}

#[test]
fn a_device_in_use_and_rings_with_requests_under_way_are_refused() {
    let memory = memory();
    let mut device = with(|_, _| {});
    let state = device.save_state();
    let ring = MockSplitQueue::new(&memory, QUEUE_SIZE);
    let mut queue: Queue = ring.create_queue().unwrap();
    queue.set_next_avail(1);
    let activation = Activation {
        memory: memory.clone(),
        queues: vec![Some(queue)],
        features: RING_FEATURES,
    };
    device.activate(activation).unwrap_err();
    activate(&mut device, &memory, ring.create_queue().unwrap(), true);
    let error = device.restore_state(&state).unwrap_err();
    assert!(matches!(error, RestoreError::InUse { .. }));
}

#[test]
fn the_state_of_a_device_without_limits_is_what_it_was_before_there_were_any() {
    let state = with(|_, _| {}).save_state();
    let json = serde_json::to_value(&state).unwrap();
    assert_eq!(json.get("rate_limiter"), None);
    let read: BlockState = serde_json::from_value(json).unwrap();
    with(|_, _| {}).restore_state(&read).unwrap();
}
