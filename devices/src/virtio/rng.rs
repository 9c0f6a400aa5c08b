//! virtio-rng: entropy from the host's kernel (VIRTIO 1.2, 5.4).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{self, Chain};
use super::{ActivateError, Activation, Interrupt, RING_FEATURES, RingPosition, VirtioDevice};
use crate::GuestMemory;
use crate::lifecycle::{Device, DeviceKind, MetricsGroup, StateKey, persist_by_type};
use crate::metrics::{Metric, Unit};

mod persist;

pub use self::persist::RngState;

const QUEUE_SIZE: u16 = 64;
/// What is the same of all devices of this kind.
pub(crate) const KIND: DeviceKind = DeviceKind {
    name: "virtio-rng",
    state: StateKey::One("entropy"),
    metrics: Some(MetricsGroup {
        name: "entropy",
        label: None,
    }),
};
/// Most bytes for one buffer: a driver asks again for more, and the device thread is free in between.
const MAX_BYTES: usize = 4096;

/// What the device has done since it was made.
#[derive(Debug, Default)]
pub struct RngMetrics {
    /// Bytes given.
    pub bytes: AtomicU64,
    /// Buffers that could not be filled, and rings that broke.
    pub failures: AtomicU64,
}

impl RngMetrics {
    /// The values at this moment.
    pub fn describe(&self) -> Vec<Metric> {
        vec![
            Metric::counter(
                "entropy",
                "Random bytes that the guest was given",
                &self.bytes,
            )
            .unit(Unit::Bytes)
            .field("entropy_bytes"),
            Metric::counter(
                "entropy_failures",
                "Buffers that could not be filled, and rings that broke",
                &self.failures,
            )
            .field("entropy_event_fails"),
        ]
    }
}

struct Active {
    memory: GuestMemory,
    queue: Queue,
}

/// The device.
pub struct VirtioRng {
    interrupt: Arc<Interrupt>,
    kick: [EventFd; 1],
    active: Option<Active>,
    paused: bool,
    metrics: Arc<RngMetrics>,
}

impl VirtioRng {
    /// A device that interrupts through `interrupt`.
    ///
    /// # Errors
    /// Where the host has no file descriptor left.
    pub fn new(interrupt: Arc<Interrupt>) -> std::io::Result<Self> {
        Ok(Self {
            interrupt,
            kick: [EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?],
            active: None,
            paused: false,
            metrics: Arc::default(),
        })
    }

    fn serve(&mut self) {
        if self.paused {
            return;
        }
        let Some(active) = &mut self.active else {
            return;
        };
        match fill(active, &self.metrics) {
            Ok(Served { interrupt, more }) => {
                if interrupt {
                    self.interrupt.signal_used();
                }
                if more && let Err(error) = self.kick[0].write(1) {
                    tracing::debug!(error = %report::chain(&error), "virtio-rng kick");
                }
            }
            Err(error) => {
                crate::limited!(warn, error = %report::chain(&error), "virtio-rng: the driver broke the ring; the device needs a reset");
                self.metrics.failures.fetch_add(1, Ordering::Relaxed);
                self.active = None;
                self.interrupt.fail();
            }
        }
    }
}

struct Served {
    interrupt: bool,
    /// Buffers are left: the turn was over.
    more: bool,
}

/// Fills at most a queue's worth of buffers.
fn fill(active: &mut Active, metrics: &RngMetrics) -> Result<Served, virtio_queue::Error> {
    let Active { memory, queue } = active;
    let memory = &*memory;
    let mut used = false;
    for _ in 0..queue.size() {
        let Some(descriptors) = queue.iter(memory)?.next() else {
            if queue.enable_notification(memory)? {
                continue;
            }
            return Ok(Served {
                // Where nothing was used, the driver would find nothing at its interrupt.
                interrupt: used && queue.needs_notification(memory)?,
                more: false,
            });
        };
        let head = descriptors.head_index();
        let written = Chain::walk(&descriptors, queue.size())
            .ok()
            .and_then(|chain| entropy(memory, &chain))
            .unwrap_or_else(|| {
                metrics.failures.fetch_add(1, Ordering::Relaxed);
                0
            });
        metrics.bytes.fetch_add(written.into(), Ordering::Relaxed);
        queue.add_used(memory, head, written)?;
        used = true;
    }
    Ok(Served {
        interrupt: used && queue.needs_notification(memory)?,
        more: true,
    })
}

fn entropy(memory: &GuestMemory, chain: &Chain) -> Option<u32> {
    let mut bytes = [0; MAX_BYTES];
    let wanted = chain::total_len(&chain.writable).min(MAX_BYTES as u64) as usize;
    let bytes = &mut bytes[..wanted];
    let given = rustix::rand::getrandom(&mut *bytes, rustix::rand::GetRandomFlags::empty()).ok()?;
    chain::write(memory, &chain.writable, &bytes[..given]).ok()
}

impl Device for VirtioRng {
    persist_by_type!(KIND);

    fn pause(&mut self) {
        self.paused = true;
    }

    fn resume(&mut self) {
        self.paused = false;
        self.serve();
        self.interrupt.raise_restored();
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn metrics(&self) -> Vec<Metric> {
        self.metrics.describe()
    }
}

impl VirtioDevice for VirtioRng {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn kicks(&self) -> &[EventFd] {
        &self.kick
    }

    fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Some(queue) = activation.queues.into_iter().next().flatten() else {
            return Err(ActivateError::NotReady);
        };
        super::check_none_in_flight(std::iter::once(&queue))?;
        self.active = Some(Active {
            memory: activation.memory,
            queue,
        });
        Ok(())
    }

    fn ring_positions(&self) -> Vec<Option<RingPosition>> {
        let position = |active: &Active| RingPosition::of(&active.queue);
        vec![self.active.as_ref().map(position)]
    }
}

impl MutEventSubscriber for VirtioRng {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        // The counter says only that there was a kick.
        let _ = self.kick[0].read();
        self.serve();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.kick[0], EventSet::IN)) {
            crate::limited!(error, ?error, "virtio-rng cannot wait for its queue");
        }
    }
}

#[cfg(test)]
mod tests {
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const WRITE: u16 = 2;

    fn rng() -> VirtioRng {
        let interrupt = Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        VirtioRng::new(Arc::new(interrupt)).unwrap()
    }

    fn activate(rng: &mut VirtioRng, memory: &GuestMemory, queue: Queue) {
        let activation = Activation {
            memory: memory.clone(),
            queues: vec![Some(queue)],
            features: RING_FEATURES,
        };
        rng.activate(activation).unwrap();
    }

    #[test]
    fn buffers_are_filled_and_the_driver_is_notified() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let ring = MockSplitQueue::new(&memory, 16);
        ring.build_desc_chain(&[RawDescriptor::from(Descriptor::new(0x8_0000, 64, WRITE, 0))])
            .unwrap();
        let mut rng = rng();
        activate(&mut rng, &memory, ring.create_queue().unwrap());
        rng.serve();
        let filled: [u8; 32] = memory.read_obj(GuestAddress(0x8_0000)).unwrap();
        assert_ne!(filled, [0; 32]);
        assert_eq!(rng.interrupt.status(), super::super::INTERRUPT_USED_BUFFER);
        assert_eq!(rng.metrics.bytes.load(Ordering::Relaxed), 64);
    }

    #[test]
    fn a_paused_device_waits_and_a_resumed_one_catches_up() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let ring = MockSplitQueue::new(&memory, 16);
        ring.build_desc_chain(&[RawDescriptor::from(Descriptor::new(0x8_0000, 64, WRITE, 0))])
            .unwrap();
        let mut rng = rng();
        activate(&mut rng, &memory, ring.create_queue().unwrap());
        rng.pause();
        rng.serve();
        assert_eq!(rng.metrics.bytes.load(Ordering::Relaxed), 0);
        rng.resume();
        assert_eq!(rng.metrics.bytes.load(Ordering::Relaxed), 64);
    }

    #[test]
    fn a_kick_of_an_empty_ring_is_not_answered() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let mut queue: Queue = MockSplitQueue::new(&memory, 16).create_queue().unwrap();
        queue.set_event_idx(false);
        let mut rng = rng();
        activate(&mut rng, &memory, queue);
        rng.serve();
        assert_eq!(rng.interrupt.status(), 0);
    }

    #[test]
    fn a_jump_of_the_available_index_fails_the_device_until_reset() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let ring = MockSplitQueue::new(&memory, 16);
        let queue: Queue = ring.create_queue().unwrap();
        memory
            .write_obj(17u16, GuestAddress(queue.avail_ring() + 2))
            .unwrap();
        let mut rng = rng();
        activate(&mut rng, &memory, queue);
        rng.serve();
        assert!(rng.interrupt.needs_reset());
        rng.reset();
        rng.interrupt.reset();
        assert!(!rng.interrupt.needs_reset());
    }
}
