//! virtio 1.2: the device model that the transport and the devices share.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod mmio;
#[cfg(test)]
mod mock_ring;
pub mod net;
pub mod pmem;
mod ring_position;
pub mod rng;
pub mod vsock;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

pub use crate::activate_error::ActivateError;
pub use ring_position::RingPosition;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;
use crate::lifecycle::Device;

/// What every device offers: virtio 1, and the ring features that the queues here have.
pub const RING_FEATURES: u64 =
    (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_INDIRECT_DESC) | (1 << VIRTIO_RING_F_EVENT_IDX);

/// `VIRTIO_MMIO_INT_VRING`: a device used a buffer (VIRTIO 1.2, 4.2.2 `InterruptStatus`).
pub const INTERRUPT_USED_BUFFER: u32 = 1;
/// `VIRTIO_MMIO_INT_CONFIG`: the configuration changed.
pub const INTERRUPT_CONFIG_CHANGE: u32 = 2;

/// The interrupt line of a device, shared by its transport (which the driver asks for the cause) and its queues.
#[derive(Debug)]
pub struct Interrupt {
    /// Bits of `InterruptStatus` that the driver has not acknowledged.
    status: AtomicU32,
    /// `ConfigGeneration`.
    config_generation: AtomicU32,
    needs_reset: AtomicBool,
    /// The causes are from a saved state: whether the VM has delivered their interrupt is not known.
    restored: AtomicBool,
    /// An irqfd of the VM: a write raises the device's GSI.
    irqfd: EventFd,
}

impl Interrupt {
    /// An interrupt that raises the GSI behind `irqfd`.
    pub fn new(irqfd: EventFd) -> Self {
        Self {
            status: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            restored: AtomicBool::new(false),
            irqfd,
        }
    }

    /// The eventfd to register as irqfd.
    pub fn irqfd(&self) -> &EventFd {
        &self.irqfd
    }

    /// The bits not acknowledged yet.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver acknowledged `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Forgets every pending cause: the device was reset.
    pub fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    /// The value of `ConfigGeneration`.
    pub fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::SeqCst)
    }

    /// The device is broken until the driver resets it (VIRTIO 1.2, 2.1 `DEVICE_NEEDS_RESET`).
    pub fn fail(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.signal_config_change();
    }

    /// Whether the device waits for a reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Tells the driver that a queue has used buffers.
    pub fn signal_used(&self) {
        self.raise(INTERRUPT_USED_BUFFER);
    }

    /// Tells the driver that the configuration space or the status changed.
    pub fn signal_config_change(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
        self.raise(INTERRUPT_CONFIG_CHANGE);
    }

    /// Takes over what was saved. The line is raised when the device goes on, not before: the VM may not have its
    /// interrupt controllers yet.
    fn restore(&self, status: u32, config_generation: u32, needs_reset: bool) {
        self.status.store(status, Ordering::SeqCst);
        self.config_generation
            .store(config_generation, Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
        self.restored.store(true, Ordering::SeqCst);
    }

    /// Raises the line again, once, for the causes that were pending in a restored state. The VM may have delivered the
    /// interrupt already; then the driver gets a second one, at which it finds nothing new.
    fn raise_restored(&self) {
        if self.restored.swap(false, Ordering::SeqCst) && self.status() != 0 {
            self.raise_line();
        }
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.raise_line();
    }

    fn raise_line(&self) {
        if let Err(error) = self.irqfd.write(1) {
            // The counter of an irqfd is drained by the kernel; a failed write means the VM is gone.
            tracing::debug!(error = %report::chain(&error), "irqfd write");
        }
    }
}

/// Reads a configuration space that consists of `bytes`: fills `data` with those from `offset`; those past the end are
/// zero.
fn read_config_bytes(bytes: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| bytes.get(offset..))
        .unwrap_or_default();
    data.fill(0);
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}

/// What a device gets when the driver sets `DRIVER_OK`.
#[derive(Debug)]
pub struct Activation {
    /// Guest physical memory.
    pub memory: GuestMemory,
    /// The rings that the driver made ready, checked to lie in guest memory, by index; the others are `None`.
    pub queues: Vec<Option<Queue>>,
    /// The features both sides agreed on.
    pub features: u64,
}

/// Refuses rings with requests in flight: a device has ended all of them before it was saved, and a driver that has
/// just set the rings up has yet to offer any.
fn check_none_in_flight<'a>(
    mut queues: impl Iterator<Item = &'a Queue>,
) -> Result<(), ActivateError> {
    if queues.any(|queue| RingPosition::of(queue).in_flight() != 0) {
        return Err(ActivateError::InFlight);
    }
    Ok(())
}

/// A virtio device behind a transport.
///
/// The transport calls these on vCPU threads, under the device's mutex. After `activate` the device serves its queues
/// on the device thread, when their kicks become readable. A kick of a device that is not active means nothing. The
/// driver's write of 0 to `Status` is a [`Device::reset`]: the device forgets its queues.
///
/// The queues of an activation may have been in use: those of a device that is [restored](crate::persist) begin where
/// the saved device was.
pub trait VirtioDevice: Device {
    /// The device ID (VIRTIO 1.2, chapter 5).
    fn device_id(&self) -> u32;

    /// All feature bits the device offers, `VIRTIO_F_VERSION_1` and the ring features included.
    fn features(&self) -> u64;

    /// The largest size of each queue, a power of two up to 256 (`QueueNumMax`).
    fn queue_max_sizes(&self) -> &[u16];

    /// An ioeventfd for each queue: readable when the driver notifies the queue.
    fn kicks(&self) -> &[EventFd];

    /// Whether the driver's notifications of a queue have to be served before the driver goes on. The queue is then not
    /// to have an ioeventfd, so that each of them comes to [`VirtioDevice::notified`].
    fn is_synchronous(&self, _queue: usize) -> bool {
        false
    }

    /// The driver notified a queue, and no ioeventfd took it: wakes the device thread.
    fn notified(&mut self, queue: usize) {
        if let Some(kick) = self.kicks().get(queue)
            && let Err(error) = kick.write(1)
        {
            tracing::debug!(error = %report::chain(&error), "virtio kick");
        }
    }

    /// The interrupt line, which the transport asks for causes.
    fn interrupt(&self) -> &Arc<Interrupt>;

    /// Reads the configuration space; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space; writes to read-only fields or past its end have no effect.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver set `DRIVER_OK`: starts to serve the queues.
    ///
    /// # Errors
    /// Where the device cannot serve; the device is then as after `reset`.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// How far each ring is, by index; `None` for one that the device does not serve. Only of a paused device does this
    /// say all there is to say: it has no request in flight.
    fn ring_positions(&self) -> Vec<Option<RingPosition>>;

    /// Whether a request under way will write to a range of guest memory: first address, length in bytes. Between calls
    /// of the device, nothing else of it writes there.
    fn is_writing(&self, address: GuestAddress, len: u64) -> bool {
        let _ = (address, len);
        false
    }
}
