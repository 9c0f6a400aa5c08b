use proptest::prelude::*;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::lifecycle::{DeviceState, SaveError};
use crate::persist::RestoreError;
use crate::virtio::{RING_FEATURES, RingPosition};

mod persist;

/// Remembers what the transport did to it.
struct Probe {
    interrupt: Arc<Interrupt>,
    kicks: [EventFd; 2],
    active: Option<(Vec<bool>, u64)>,
    /// The rings it was activated with.
    rings: Vec<Option<Queue>>,
    resets: usize,
}

impl Device for Probe {
    fn kind(&self) -> &'static DeviceKind {
        const { &DeviceKind::unmetered("probe", StateKey::Nothing) }
    }

    fn resume(&mut self) {}

    fn save(&self) -> Result<DeviceState, SaveError> {
        Ok(DeviceState::Null)
    }

    fn restore(&mut self, _: &DeviceState) -> Result<(), RestoreError> {
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.rings.clear();
        self.resets += 1;
    }
}

impl VirtioDevice for Probe {
    fn device_id(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        RING_FEATURES | 1
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }
    fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn write_config(&mut self, _: u64, _: &[u8]) {}
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert!(self.active.is_none(), "activated twice");
        self.active = Some((
            activation.queues.iter().map(Option::is_some).collect(),
            activation.features,
        ));
        self.rings = activation.queues;
        Ok(())
    }
    fn ring_positions(&self) -> Vec<Option<RingPosition>> {
        let rings = self.rings.iter();
        rings
            .map(|ring| ring.as_ref().map(RingPosition::of))
            .collect()
    }
}

struct Driver {
    transport: MmioTransport,
    device: Arc<Mutex<Probe>>,
}

impl Driver {
    fn new() -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let device = Arc::new(Mutex::new(Probe {
            interrupt: Arc::new(Interrupt::new(event())),
            kicks: [event(), event()],
            active: None,
            rings: Vec::new(),
            resets: 0,
        }));
        Self {
            transport: MmioTransport::new(device.clone(), memory),
            device,
        }
    }
    fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }
    fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }
    fn status(&mut self, value: u32) -> u32 {
        self.write(register::STATUS, value);
        self.read(register::STATUS)
    }
    fn accept(&mut self, features: u64) {
        for sel in 0..2u32 {
            self.write(register::DRIVER_FEATURES_SEL, sel);
            self.write(register::DRIVER_FEATURES, (features >> (32 * sel)) as u32);
        }
    }
    fn negotiate(&mut self) {
        self.status(status::ACKNOWLEDGE);
        self.status(status::DRIVER);
        self.accept(RING_FEATURES);
        assert_eq!(self.status(status::FEATURES_OK), status::FEATURES_OK);
    }
    fn set_up_queue(&mut self, index: u32, base: u32) {
        self.write(register::QUEUE_SEL, index);
        self.write(register::QUEUE_NUM, 16);
        self.write(register::QUEUE_DESC_LOW, base);
        self.write(register::QUEUE_DRIVER_LOW, base + 0x1000);
        self.write(register::QUEUE_DEVICE_LOW, base + 0x2000);
        self.write(register::QUEUE_READY, 1);
    }
}

#[test]
fn the_device_is_identified() {
    let mut driver = Driver::new();
    let identity = [
        register::MAGIC_VALUE,
        register::VERSION,
        register::DEVICE_ID,
    ]
    .map(|r| driver.read(r));
    assert_eq!(identity, [0x7472_6976, 2, 42]);
    let mut byte = [0];
    driver.transport.read(register::MAGIC_VALUE, &mut byte);
    assert_eq!(byte, [0], "registers are read whole");
    let mut config = [0; 2];
    driver.transport.read(register::CONFIG + 6, &mut config);
    assert_eq!(config, [6, 6]);
    assert_eq!(driver.read(register::SHM_LEN_LOW), u32::MAX);
}

#[test]
fn a_driver_that_keeps_the_order_gets_its_device() {
    let mut driver = Driver::new();
    driver.negotiate();
    driver.set_up_queue(1, 0x1_0000);
    assert_eq!(driver.read(register::QUEUE_READY), 1);
    assert_eq!(driver.status(status::DRIVER_OK), status::DRIVER_OK);
    assert_eq!(
        driver.device.lock().unwrap().active,
        Some((vec![false, true], RING_FEATURES))
    );
    driver.write(QUEUE_NOTIFY, 1);
    assert!(driver.device.lock().unwrap().kicks[1].read().is_ok());
    assert_eq!(driver.status(0), 0);
    assert_eq!(driver.device.lock().unwrap().active, None);
    assert_eq!(driver.read(register::QUEUE_READY), 0);
}

#[test]
fn steps_out_of_order_are_ignored() {
    let mut driver = Driver::new();
    assert_eq!(driver.status(status::DRIVER_OK), 0);
    driver.status(status::ACKNOWLEDGE);
    assert_eq!(driver.status(status::FEATURES_OK), status::ACKNOWLEDGE);
    driver.status(status::DRIVER);
    driver.write(register::QUEUE_READY, 1);
    assert_eq!(
        driver.read(register::QUEUE_READY),
        0,
        "no queue before FEATURES_OK"
    );
    assert_eq!(
        driver.status(status::ACKNOWLEDGE),
        status::DRIVER,
        "a status bit is never taken back"
    );
    assert_eq!(
        driver.status(status::DRIVER | status::FAILED),
        status::DRIVER | status::FAILED
    );
    assert_eq!(
        driver.status(status::FEATURES_OK),
        status::DRIVER | status::FAILED,
        "a driver that gave up starts anew"
    );
    assert_eq!(driver.status(0), 0);
    driver.negotiate();
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for features in [
        RING_FEATURES | 2,
        RING_FEATURES & !(1 << VIRTIO_F_VERSION_1),
        0,
    ] {
        let mut driver = Driver::new();
        driver.status(status::ACKNOWLEDGE);
        driver.status(status::DRIVER);
        driver.accept(features);
        assert_eq!(
            driver.status(status::FEATURES_OK),
            status::DRIVER,
            "{features:#x}"
        );
    }
}

#[test]
fn a_ring_outside_memory_leaves_a_device_that_needs_a_reset() {
    for (register, value) in [
        (register::QUEUE_DESC_LOW, 0x10_0000),
        (register::QUEUE_DESC_HIGH, 1),
        (register::QUEUE_DRIVER_HIGH, u32::MAX),
        (register::QUEUE_DEVICE_LOW, 0xf_fff8),
        (register::QUEUE_DESC_LOW, 0x1_0001),
    ] {
        let mut driver = Driver::new();
        driver.negotiate();
        driver.set_up_queue(0, 0x1_0000);
        driver.write(register, value);
        assert_eq!(
            driver.status(status::DRIVER_OK),
            status::DRIVER_OK | status::NEEDS_RESET
        );
        assert_eq!(
            driver.read(register::INTERRUPT_STATUS),
            super::super::INTERRUPT_CONFIG_CHANGE
        );
        assert_eq!(driver.device.lock().unwrap().active, None);
        assert_eq!(driver.status(0), 0);
    }
}

#[test]
fn queue_sizes_are_powers_of_two_up_to_the_maximum() {
    let mut driver = Driver::new();
    driver.negotiate();
    driver.write(register::QUEUE_SEL, 1);
    assert_eq!(driver.read(register::QUEUE_NUM_MAX), 64);
    for (size, kept) in [(32, 32), (128, 64), (3, 64), (0, 64), (0x1_0010, 64)] {
        driver.transport.queues[1].size = 64;
        driver.write(register::QUEUE_NUM, size);
        assert_eq!(driver.transport.queues[1].size, kept);
    }
    driver.write(register::QUEUE_SEL, 2);
    assert_eq!(
        driver.read(register::QUEUE_NUM_MAX),
        0,
        "a queue that is not there"
    );
}

proptest! {
    #[test]
    fn any_sequence_of_accesses_keeps_the_status_a_step_of_the_protocol(
        accesses in prop::collection::vec(
            (prop_oneof![0..0x120u64, Just(register::STATUS), Just(register::DRIVER_FEATURES)],
             prop_oneof![any::<u32>(), Just(1), Just(3), Just(11), Just(15)],
             prop_oneof![Just(4usize), 1..9usize], any::<bool>()),
            0..200)
    ) {
        let mut driver = Driver::new();
        for (offset, value, width, is_write) in accesses {
            let mut data = [0; 8];
            data[..4].copy_from_slice(&value.to_le_bytes());
            if is_write {
                driver.transport.write(offset, &data[..width]);
            } else {
                driver.transport.read(offset, &mut data[..width]);
            }
            let status = driver.transport.status & !status::FAILED;
            let steps = [0, status::ACKNOWLEDGE, status::DRIVER, status::FEATURES_OK, status::DRIVER_OK];
            prop_assert!(steps.contains(&status), "{status:#x}");
            if status & status::FEATURES_OK == status::FEATURES_OK {
                prop_assert!(driver.transport.features_are_ok());
            }
        }
    }
}
