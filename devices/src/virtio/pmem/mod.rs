//! virtio-pmem: memory that keeps what is written to it (VIRTIO 1.2, 5.19).
//!
//! ```text
//! vCPU ── kick ──> device thread: ring ─ flush ─> flusher thread ── event ──> ring ── interrupt ──> vCPU
//! ```
//!
//! The guest reads and writes the memory itself, without this device: here it only learns where that lies, and asks for
//! what it wrote to be made durable. A [`Backing`] does that; memory that keeps nothing has none, and a flush of it
//! succeeds at once.
//!
//! A flush blocks, so it runs on a thread of its own, one at a time. Requests that come in meanwhile wait for the next
//! one, which they share: what they ask for may have been written after the present one looked. The device thread alone
//! takes requests from the ring, never more than it has descriptors; the others (`activate`, `reset`,
//! [`VirtioPmem::pause`] and so on) run on any thread, under the device's mutex.
//!
//! A rate limiter counts flushes, each with all the requests that share it, and the bytes that they write to the disk.
//! How many these are is known only after a flush, so that they are charged then, and the next flush waits. What it
//! refuses stays in the ring.

mod event_handler;
mod flusher;
#[cfg(test)]
mod hostile;
mod metrics;
mod persist;
mod request;
mod ring_fault;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::little_endian::U64;
use zerocopy::{Immutable, IntoBytes};

pub use self::flusher::{Backing, FlushError};
use self::flusher::{Flusher, Outcome};
pub use self::metrics::{MappingFigures, PmemMetrics};
pub use self::persist::PmemState;
use self::request::{Command, Response, ResponseCode};
use self::ring_fault::RingFault;
use super::chain::Chain;
use super::{
    ActivateError, Activation, Interrupt, RING_FEATURES, RingPosition, VirtioDevice,
    read_config_bytes,
};
use crate::GuestMemory;
use crate::lifecycle::{Device, DeviceKind, MetricsGroup, StateKey, persist_by_type};
use crate::metrics::{Metric, add};
use crate::rate_limiter::{LimitsUpdate, RateLimiter};

const QUEUE_SIZE: u16 = 64;
/// What is the same of all devices of this kind.
pub(crate) const KIND: DeviceKind = DeviceKind {
    name: "virtio-pmem",
    state: StateKey::ById("pmem"),
    metrics: Some(MetricsGroup {
        name: "pmem",
        label: Some("pmem"),
    }),
};

/// What a pmem device is made of.
#[derive(Clone)]
pub struct PmemConfig {
    /// Where the memory lies, guest physical.
    pub start: u64,
    /// Its length in bytes.
    pub size: u64,
    /// What makes durable what the guest writes; `None` where the memory is forgotten at the end.
    pub backing: Option<Arc<dyn Backing>>,
    /// What the memory is made of.
    pub mapping: MappingFigures,
}

/// `struct virtio_pmem_config` (5.19.4).
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
struct ConfigSpace {
    start: U64,
    size: U64,
}

/// The device while a driver uses it.
struct Active {
    memory: GuestMemory,
    queue: Queue,
    /// Whether requests were given back that the driver may not know of.
    used: bool,
}

impl Active {
    fn respond(&mut self, response: &Response, code: ResponseCode) -> Result<(), RingFault> {
        let written = response.write(&self.memory, code)?;
        self.queue
            .add_used(&self.memory, response.head(), written)?;
        self.used = true;
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was given back since the last call.
    fn take_interrupt(&mut self) -> Result<bool, RingFault> {
        if !std::mem::take(&mut self.used) {
            return Ok(false);
        }
        Ok(self.queue.needs_notification(&self.memory)?)
    }
}

/// The device.
pub struct VirtioPmem {
    interrupt: Arc<Interrupt>,
    kick: [EventFd; 1],
    config: ConfigSpace,
    flusher: Option<Flusher>,
    active: Option<Active>,
    /// Requests for which a flush has yet to begin.
    waiting: Vec<Response>,
    /// Requests that are responded to when the flush in progress ends.
    covered: Vec<Response>,
    /// Whether a look for more was put off because of those two.
    stalled: bool,
    paused: bool,
    limiter: RateLimiter,
    mapping: MappingFigures,
    metrics: Arc<PmemMetrics>,
}

impl VirtioPmem {
    /// A device that interrupts through `interrupt`.
    ///
    /// # Errors
    /// Where the host has no file descriptor left.
    pub fn new(config: PmemConfig, interrupt: Arc<Interrupt>) -> io::Result<Self> {
        let PmemConfig {
            start,
            size,
            backing,
            mapping,
        } = config;
        Ok(Self {
            interrupt,
            kick: [EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?],
            config: ConfigSpace {
                start: start.into(),
                size: size.into(),
            },
            flusher: backing.map(Flusher::new).transpose()?,
            active: None,
            waiting: Vec::new(),
            covered: Vec::new(),
            stalled: false,
            paused: false,
            limiter: RateLimiter::default(),
            mapping,
            metrics: Arc::default(),
        })
    }

    /// Changes what the device does at most: bytes that flushes write, and flushes.
    ///
    /// # Errors
    /// Where the host has no descriptor left for a timer. Then nothing is changed.
    pub fn update_limits(&mut self, update: LimitsUpdate) -> io::Result<()> {
        self.limiter.update(update)?;
        self.kick();
        Ok(())
    }

    /// Makes the device thread look at the queue.
    fn kick(&self) {
        if let Err(error) = self.kick[0].write(1) {
            // Only a counter that is full refuses, and then it is readable already.
            tracing::debug!(error = %report::chain(&error), "virtio-pmem kick");
        }
    }

    fn serve(&mut self) {
        if self.paused || self.limiter.is_blocked() {
            return;
        }
        if let Err(error) = self.take().and_then(|()| self.notify()) {
            return self.fail(&error);
        }
        self.start_flush();
    }

    /// Takes at most a queue's worth of requests.
    fn take(&mut self) -> Result<(), RingFault> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let size = active.queue.size();
        for _ in 0..size {
            // An honest driver has no more in flight than descriptors, but nothing keeps it from making one available
            // again and again.
            if self.waiting.len() + self.covered.len() >= usize::from(size) {
                self.stalled = true;
                return Ok(());
            }
            let mut descriptors = active.queue.iter(&active.memory)?.next();
            if descriptors.is_none() && active.queue.enable_notification(&active.memory)? {
                // One came in between.
                descriptors = active.queue.iter(&active.memory)?.next();
            }
            let Some(descriptors) = descriptors else {
                return Ok(());
            };
            let chain = Chain::walk(&descriptors, size)?;
            let (command, response) = request::parse(&active.memory, chain)?;
            let is_shared = command == Command::Flush && !self.waiting.is_empty();
            if !is_shared && !self.limiter.consume(0, 1) {
                add(&self.metrics.throttled, 1);
                active.queue.go_to_previous_position();
                return Ok(active.queue.disable_notification(&active.memory)?);
            }
            match command {
                Command::Flush if self.flusher.is_some() => self.waiting.push(response),
                Command::Flush => {
                    add(&self.metrics.flushes, 1);
                    active.respond(&response, ResponseCode::Done)?;
                }
                Command::Unknown => {
                    add(&self.metrics.errors, 1);
                    active.respond(&response, ResponseCode::Failed)?;
                }
            }
        }
        // The turn is over, and there may be more.
        self.kick();
        Ok(())
    }

    /// Begins a flush for the requests that wait for one, unless one is in progress.
    fn start_flush(&mut self) {
        let Some(flusher) = &mut self.flusher else {
            return;
        };
        if self.waiting.is_empty() || flusher.is_running() {
            return;
        }
        self.covered = std::mem::take(&mut self.waiting);
        if let Err(error) = flusher.begin() {
            self.finish(Err(error.into()));
        }
    }

    /// The flush in progress has ended.
    fn finish(&mut self, outcome: Outcome) {
        let code = match outcome {
            Ok(bytes) => {
                add(&self.metrics.flushes, 1);
                add(&self.metrics.written_bytes, bytes);
                self.limiter.charge(bytes, 0);
                ResponseCode::Done
            }
            Err(error) => {
                crate::limited!(warn, error = %report::chain(&*error), "virtio-pmem flush");
                add(&self.metrics.errors, 1);
                ResponseCode::Failed
            }
        };
        let covered = std::mem::take(&mut self.covered);
        // They are none where the driver has reset the device meanwhile.
        if let Some(active) = &mut self.active
            && let Err(error) = covered
                .iter()
                .try_for_each(|response| active.respond(response, code))
        {
            return self.fail(&error);
        }
        if let Err(error) = self.notify() {
            return self.fail(&error);
        }
        if std::mem::take(&mut self.stalled) {
            self.kick();
        }
    }

    /// Interrupts the driver for what was given back.
    fn notify(&mut self) -> Result<(), RingFault> {
        if let Some(active) = &mut self.active
            && active.take_interrupt()?
        {
            self.interrupt.signal_used();
        }
        Ok(())
    }

    /// Waits for the flush in progress, and for the one that requests wait for.
    fn drain(&mut self) {
        loop {
            self.start_flush();
            let Some(outcome) = self.flusher.as_mut().and_then(Flusher::wait) else {
                return;
            };
            self.finish(outcome);
        }
    }

    /// Stops until the driver resets the device (2.1.2): it has broken the protocol in a way that no response can
    /// report.
    fn fail(&mut self, error: &RingFault) {
        crate::limited!(warn, error = %report::chain(&error), "virtio-pmem: the driver broke the ring; the device needs a reset");
        add(&self.metrics.failures, 1);
        self.stop();
        self.interrupt.fail();
    }

    /// Gives up guest memory. A flush in progress ends, but no request waits for it any more; the flusher has no access
    /// to the ring.
    fn stop(&mut self) {
        self.active = None;
        self.waiting.clear();
        self.covered.clear();
        self.stalled = false;
    }
}

impl Device for VirtioPmem {
    persist_by_type!(KIND);

    fn pause(&mut self) {
        self.paused = true;
        self.drain();
    }

    fn resume(&mut self) {
        self.paused = false;
        self.kick();
        self.interrupt.raise_restored();
    }

    fn reset(&mut self) {
        self.stop();
    }

    fn metrics(&self) -> Vec<Metric> {
        let mut metrics = self.metrics.describe();
        metrics.extend(self.mapping.describe());
        metrics
    }
}

impl VirtioDevice for VirtioPmem {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_PMEM
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

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(self.config.as_bytes(), offset, data);
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
            used: false,
        });
        Ok(())
    }

    fn ring_positions(&self) -> Vec<Option<RingPosition>> {
        let position = |active: &Active| RingPosition::of(&active.queue);
        vec![self.active.as_ref().map(position)]
    }
}
