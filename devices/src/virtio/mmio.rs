//! The virtio-mmio transport (VIRTIO 1.2, 4.2): registers, the status state machine, and the rings' addresses.

use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::{ActivateError, Activation, Interrupt, VirtioDevice};
use crate::GuestMemory;
use crate::bus::BusDevice;
use crate::lifecycle::{Device, DeviceKind, StateKey, persist_by_type};
use crate::lock;

mod persist;

pub use self::persist::{QueueState, TransportState};

/// The transport. Its registers are saved behind the state of its device, in the order of the devices' addresses.
pub(crate) const KIND: DeviceKind =
    DeviceKind::unmetered("virtio-mmio transport", StateKey::InOrder("transports"));

/// `QueueNotify`: where to register the ioeventfds, with the queue's index as value.
pub const QUEUE_NOTIFY: u64 = 0x50;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"COPP");

/// Register offsets (4.2.2, table 4.1).
mod register {
    pub const MAGIC_VALUE: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHM_LEN_LOW: u64 = 0xb0;
    pub const SHM_BASE_HIGH: u64 = 0xbc;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// Bits of `Status` (2.1).
mod status {
    use super::{
        VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
        VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    };
    pub const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
    pub const DRIVER: u32 = ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
    pub const FEATURES_OK: u32 = DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
    pub const DRIVER_OK: u32 = FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;
    pub const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
    pub const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
}

/// A queue as the driver describes it; nothing of it is trusted before `DRIVER_OK`.
#[derive(Clone, Copy, Debug, Default)]
struct QueueRegisters {
    size: u16,
    ready: bool,
    /// Descriptor table, available ring (driver area), used ring (device area): guest physical addresses.
    desc: u64,
    driver: u64,
    device: u64,
}

/// The register window of a device.
pub struct MmioTransport {
    device: Arc<Mutex<dyn VirtioDevice>>,
    interrupt: Arc<Interrupt>,
    memory: GuestMemory,
    offered: u64,
    accepted: u64,
    max_sizes: Vec<u16>,
    queues: Vec<QueueRegisters>,
    /// Without `DEVICE_NEEDS_RESET`, which is the interrupt's.
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
}

/// What a device can work with: features that it offers, and virtio 1 (4.2.3.1.1, 6.1).
fn are_features_ok(accepted: u64, offered: u64) -> bool {
    accepted & !offered == 0 && accepted & (1 << VIRTIO_F_VERSION_1) != 0
}

/// Replaces the lower or the upper half of a 64-bit register.
fn set_half(register: &mut u64, high: bool, value: u32) {
    let shift = if high { 32 } else { 0 };
    *register = (*register & !(u64::from(u32::MAX) << shift)) | (u64::from(value) << shift);
}

impl MmioTransport {
    /// Size of the register window in bytes.
    pub const SIZE: u64 = 0x1000;

    /// A transport for `device`, whose rings lie in `memory`.
    pub fn new(device: Arc<Mutex<dyn VirtioDevice>>, memory: GuestMemory) -> Self {
        let (interrupt, offered, max_sizes) = {
            let device = lock(&*device);
            (
                device.interrupt().clone(),
                device.features(),
                device.queue_max_sizes().to_vec(),
            )
        };
        let queues = max_sizes
            .iter()
            .map(|size| QueueRegisters {
                size: *size,
                ..Default::default()
            })
            .collect();
        Self {
            device,
            interrupt,
            memory,
            offered,
            accepted: 0,
            max_sizes,
            queues,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
        }
    }

    fn status(&self) -> u32 {
        self.status
            | if self.interrupt.needs_reset() {
                status::NEEDS_RESET
            } else {
                0
            }
    }

    fn reset_all(&mut self) {
        lock(&*self.device).reset();
        self.interrupt.reset();
        self.accepted = 0;
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        for (queue, size) in self.queues.iter_mut().zip(&self.max_sizes) {
            *queue = QueueRegisters {
                size: *size,
                ..Default::default()
            };
        }
    }

    /// The driver writes `Status`: it sets one more bit, gives up, or resets (3.1.1). All else is ignored.
    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset_all();
        }
        // A driver that has given up begins again with a reset (2.1.1).
        if (self.status | value) & status::FAILED != 0 {
            self.status |= status::FAILED;
            return;
        }
        let wanted = value & !status::NEEDS_RESET;
        let step = match (self.status, wanted) {
            (0, status::ACKNOWLEDGE) | (status::ACKNOWLEDGE, status::DRIVER) => true,
            (status::DRIVER, status::FEATURES_OK) => self.features_are_ok(),
            (status::FEATURES_OK, status::DRIVER_OK) => {
                self.activate();
                true
            }
            _ => false,
        };
        if step {
            self.status = wanted;
        }
    }

    fn features_are_ok(&self) -> bool {
        are_features_ok(self.accepted, self.offered)
    }

    fn activate(&mut self) {
        let rings: Result<Vec<_>, _> = self
            .queues
            .iter()
            .map(|registers| self.ring(registers, self.accepted))
            .collect();
        let activated = match rings {
            Ok(queues) => {
                let activation = Activation {
                    memory: self.memory.clone(),
                    queues,
                    features: self.accepted,
                };
                lock(&*self.device).activate(activation)
            }
            Err(error) => Err(ActivateError::Ring(error)),
        };
        if let Err(error) = activated {
            crate::limited!(warn, error = %report::chain(&error), "a virtio device cannot start");
            self.interrupt.fail();
        }
    }

    /// The ring the driver described; `None` where it made none ready.
    fn ring(
        &self,
        registers: &QueueRegisters,
        features: u64,
    ) -> Result<Option<Queue>, virtio_queue::Error> {
        if !registers.ready {
            return Ok(None);
        }
        let mut queue = Queue::new(registers.size)?;
        queue.try_set_desc_table_address(GuestAddress(registers.desc))?;
        queue.try_set_avail_ring_address(GuestAddress(registers.driver))?;
        queue.try_set_used_ring_address(GuestAddress(registers.device))?;
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        queue.set_ready(true);
        if queue.is_valid(&self.memory) {
            Ok(Some(queue))
        } else {
            Err(virtio_queue::Error::InvalidChain)
        }
    }

    /// The selected queue, where the driver may set it up now (4.2.3.2: before `DRIVER_OK`).
    fn configurable_queue(&mut self) -> Option<&mut QueueRegisters> {
        if self.status != status::FEATURES_OK {
            return None;
        }
        self.queues.get_mut(usize::try_from(self.queue_sel).ok()?)
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = usize::try_from(self.queue_sel)
            .ok()
            .and_then(|index| self.queues.get(index));
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => lock(&*self.device).device_id(),
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => match self.device_features_sel {
                0 => self.offered as u32,
                1 => (self.offered >> 32) as u32,
                _ => 0,
            },
            register::QUEUE_NUM_MAX => usize::try_from(self.queue_sel)
                .ok()
                .and_then(|index| self.max_sizes.get(index))
                .map_or(0, |size| u32::from(*size)),
            register::QUEUE_READY => queue.map_or(0, |queue| queue.ready.into()),
            register::INTERRUPT_STATUS => self.interrupt.status(),
            register::STATUS => self.status(),
            // There is no shared memory region: its length, and so its base, is all ones (4.2.2).
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => self.interrupt.config_generation(),
            // Registers that only the driver writes, and those of features that are not offered.
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES if self.status == status::DRIVER => {
                match self.driver_features_sel {
                    0 => set_half(&mut self.accepted, false, value),
                    1 => set_half(&mut self.accepted, true, value),
                    _ => {}
                }
            }
            register::QUEUE_SEL => self.queue_sel = value,
            register::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            register::STATUS => self.set_status(value),
            QUEUE_NOTIFY => self.notify(value),
            _ => self.write_queue_register(offset, value),
        }
    }

    fn write_queue_register(&mut self, offset: u64, value: u32) {
        let max = usize::try_from(self.queue_sel)
            .ok()
            .and_then(|index| self.max_sizes.get(index).copied());
        let Some(queue) = self.configurable_queue() else {
            return;
        };
        match offset {
            // A size that is none (2.7: a power of two, up to the maximum) leaves the queue as it was.
            register::QUEUE_NUM => {
                if let Some(size) = u16::try_from(value)
                    .ok()
                    .filter(|size| size.is_power_of_two() && Some(*size) <= max)
                {
                    queue.size = size;
                }
            }
            register::QUEUE_READY => queue.ready = value == 1,
            register::QUEUE_DESC_LOW => set_half(&mut queue.desc, false, value),
            register::QUEUE_DESC_HIGH => set_half(&mut queue.desc, true, value),
            register::QUEUE_DRIVER_LOW => set_half(&mut queue.driver, false, value),
            register::QUEUE_DRIVER_HIGH => set_half(&mut queue.driver, true, value),
            register::QUEUE_DEVICE_LOW => set_half(&mut queue.device, false, value),
            register::QUEUE_DEVICE_HIGH => set_half(&mut queue.device, true, value),
            _ => {}
        }
    }

    /// A notification that no ioeventfd took.
    fn notify(&self, queue: u32) {
        if let Ok(queue) = usize::try_from(queue) {
            lock(&*self.device).notified(queue);
        }
    }
}

impl Device for MmioTransport {
    persist_by_type!(KIND);

    /// Nothing: the device has a [`Device::resume`] of its own, and raises the interrupt that was pending.
    fn resume(&mut self) {}

    fn reset(&mut self) {
        self.reset_all();
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(config_offset) = offset.checked_sub(register::CONFIG) {
            return lock(&*self.device).read_config(config_offset, data);
        }
        data.fill(0);
        // Registers are read and written whole (4.2.2.2).
        if let (Ok(data), 0) = (<&mut [u8; 4]>::try_from(data), offset % 4) {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(config_offset) = offset.checked_sub(register::CONFIG) {
            // 4.2.3.1: the driver writes the configuration once the device knows its features.
            if self.status & status::FEATURES_OK == status::FEATURES_OK {
                lock(&*self.device).write_config(config_offset, data);
            }
        } else if let (Ok(data), 0) = (<[u8; 4]>::try_from(data), offset % 4) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

#[cfg(test)]
mod tests;
