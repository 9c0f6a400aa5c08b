//! virtio-rng: entropy from the host's kernel (VIRTIO 1.2, 5.4).

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{self, Chain};
use super::{ActivateError, Activation, Interrupt, RING_FEATURES, RingPosition, VirtioDevice};
use crate::GuestMemory;
use crate::lifecycle::{Device, DeviceKind, MetricsGroup, StateKey, persist_by_type};
use crate::metrics::{Metric, Unit, add};
use crate::rate_limiter::{LimitsUpdate, RateLimiter};

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

/// The data of the events that wake the device thread.
const KICK: u32 = 0;
const TIMER: u32 = 1;

/// What the device has done since it was made.
#[derive(Debug, Default)]
pub struct RngMetrics {
    /// Bytes given.
    pub bytes: AtomicU64,
    /// Buffers that could not be filled, and rings that broke.
    pub failures: AtomicU64,
    /// Times that the rate limiter had buffers wait.
    pub throttled: AtomicU64,
    /// Times that such a wait ended.
    pub limiter_events: AtomicU64,
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
            Metric::counter(
                "entropy_throttled",
                "Times that the rate limiter had buffers wait",
                &self.throttled,
            )
            .field("entropy_rate_limiter_throttled"),
            Metric::counter(
                "entropy_limiter_events",
                "Times that a wait for the rate limiter ended",
                &self.limiter_events,
            )
            .field("rate_limiter_event_count"),
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
    limiter: RateLimiter,
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
            limiter: RateLimiter::default(),
            metrics: Arc::default(),
        })
    }

    /// Changes what the device does at most: bytes that it gives, and buffers.
    ///
    /// # Errors
    /// Where the host has no descriptor left for a timer. Then nothing is changed.
    pub fn update_limits(&mut self, update: LimitsUpdate) -> std::io::Result<()> {
        self.limiter.update(update)?;
        self.kick();
        Ok(())
    }

    /// Makes the device thread look at the queue.
    fn kick(&self) {
        if let Err(error) = self.kick[0].write(1) {
            // Only a counter that is full refuses, and then it is readable already.
            tracing::debug!(error = %report::chain(&error), "virtio-rng kick");
        }
    }

    fn serve(&mut self) {
        if self.paused || self.limiter.is_blocked() {
            return;
        }
        let Some(active) = &mut self.active else {
            return;
        };
        match fill(active, &mut self.limiter, &self.metrics) {
            Ok(Served { interrupt, more }) => {
                if interrupt {
                    self.interrupt.signal_used();
                }
                if more {
                    self.kick();
                }
            }
            Err(error) => {
                crate::limited!(warn, error = %report::chain(&error), "virtio-rng: the driver broke the ring; the device needs a reset");
                add(&self.metrics.failures, 1);
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

/// Fills at most a queue's worth of buffers, and leaves in the ring those that the rate limiter refuses.
fn fill(
    active: &mut Active,
    limiter: &mut RateLimiter,
    metrics: &RngMetrics,
) -> Result<Served, virtio_queue::Error> {
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
        let chain = Chain::walk(&descriptors, queue.size());
        let wanted = chain.as_ref().map_or(0, wanted);
        if !limiter.consume(wanted as u64, 1) {
            add(&metrics.throttled, 1);
            queue.go_to_previous_position();
            queue.disable_notification(memory)?;
            return Ok(Served {
                interrupt: used && queue.needs_notification(memory)?,
                more: false,
            });
        }
        let written = chain
            .ok()
            .and_then(|chain| entropy(memory, &chain, wanted))
            .unwrap_or_else(|| {
                add(&metrics.failures, 1);
                0
            });
        limiter.restore((wanted as u64).saturating_sub(written.into()), 0);
        add(&metrics.bytes, written.into());
        queue.add_used(memory, head, written)?;
        used = true;
    }
    Ok(Served {
        interrupt: used && queue.needs_notification(memory)?,
        more: true,
    })
}

/// How many bytes a buffer is given, [`MAX_BYTES`] at most.
fn wanted(chain: &Chain) -> usize {
    chain::total_len(&chain.writable).min(MAX_BYTES as u64) as usize
}

fn entropy(memory: &GuestMemory, chain: &Chain, wanted: usize) -> Option<u32> {
    let mut bytes = [0; MAX_BYTES];
    let bytes = bytes.get_mut(..wanted)?;
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
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        self.limiter.watch(ops, TIMER);
        if events.data() == TIMER {
            if self.limiter.on_timer() {
                add(&self.metrics.limiter_events, 1);
                self.serve();
            }
            return;
        }
        // The counter says only that there was a kick.
        let _ = self.kick[0].read();
        self.serve();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.limiter.watch(ops, TIMER);
        if let Err(error) = ops.add(Events::with_data(&self.kick[0], KICK, EventSet::IN)) {
            crate::limited!(error, ?error, "virtio-rng cannot wait for its queue");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::persist::through_json;
    use crate::rate_limiter::RateLimits;
    use crate::rate_limiter::mock::{VirtualTimer, bucket};

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
    fn a_buffer_beyond_the_limit_stays_in_the_ring_until_its_bytes_are_there() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let ring = MockSplitQueue::new(&memory, 16);
        let buffer =
            |index: u64| RawDescriptor::from(Descriptor::new(0x8_0000 + 64 * index, 64, WRITE, 0));
        ring.build_multiple_desc_chains(&[buffer(0), buffer(1), buffer(2)])
            .unwrap();
        let timer = VirtualTimer::default();
        let limits = RateLimits {
            bandwidth: bucket(64, 0, 1000),
            ops: bucket(10, 0, 1000),
        };
        let new = rng;
        let mut rng = new();
        rng.limiter = RateLimiter::with_timer(limits, timer.clone());
        activate(&mut rng, &memory, ring.create_queue().unwrap());
        let given = |rng: &VirtioRng| rng.metrics.bytes.load(Ordering::Relaxed);
        for _ in 0..3 {
            rng.serve();
            assert_eq!(given(&rng), 64);
        }
        assert_eq!(rng.metrics.throttled.load(Ordering::Relaxed), 1);
        timer.advance_to_end();
        assert!(rng.limiter.on_timer());
        rng.serve();
        assert_eq!(given(&rng), 128);
        rng.pause();
        let state = through_json(&rng.save_state());
        let mut restored = new();
        restored.limiter = RateLimiter::with_timer(limits, timer.clone());
        restored.restore_state(&state).unwrap();
        let mut queue: Queue = ring.create_queue().unwrap();
        rng.ring_positions()[0].unwrap().set(&mut queue);
        activate(&mut restored, &memory, queue);
        restored.resume();
        assert_eq!(
            given(&restored),
            0,
            "the bytes are not there after a snapshot either"
        );
        timer.advance_to_end();
        assert!(restored.limiter.on_timer());
        restored.serve();
        assert_eq!(given(&restored), 64);
        let hostile =
            r#"{"rate_limiter": {"ops": {"tokens": 11, "debt": 0, "one_time_burst": 0}}}"#;
        let mut refusing = new();
        refusing.limiter = RateLimiter::with_timer(limits, timer);
        refusing
            .restore_state(&serde_json::from_str(hostile).unwrap())
            .unwrap_err();
        refusing
            .restore_state(&serde_json::from_str("{}").unwrap())
            .unwrap();
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
