//! virtio-blk: a disk (VIRTIO 1.2, 5.2).
//!
//! ```text
//! vCPU ── kick ──> device thread: ring ─ request ─> storage::io ── completion ──> ring ── interrupt ──> vCPU
//! ```
//!
//! The device thread alone takes requests from the rings. The others (`activate`, `reset`, [`VirtioBlock::pause`] and
//! so on) run on any thread, under the device's mutex, and at most wait for the requests in flight. From a ring no more
//! requests are taken than it has descriptors, however often the driver makes one available, so that a guest cannot
//! grow the host's memory. What the rate limiter refuses stays in its ring, and no ring is looked at until the
//! limiter's timer ends.

mod buffer;
mod config_space;
mod event_handler;
#[cfg(test)]
mod hostile;
mod metrics;
mod persist;
mod request;
mod ring;
mod ring_fault;
mod sharing;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use storage::io::{Completion, DiskQueue, EngineKind};
use storage::{Disk, Geometry};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use self::buffer::{Operation, RequestInFlight};
use self::config_space::{ConfigSpace, bit};
pub use self::metrics::BlockMetrics;
pub use self::persist::BlockState;
use self::request::{Command, ID_LEN, Rules};
use self::ring::{Next, Ring};
use self::ring_fault::RingFault;
pub use self::sharing::DriveSharing;
use super::chain;
use super::{ActivateError, Activation, Interrupt, RingPosition, VirtioDevice};
use crate::GuestMemory;
use crate::lifecycle::{Device, DeviceKind, MetricsGroup, StateKey, persist_by_type};
use crate::metrics::{Metric, add};
use crate::rate_limiter::{LimitsUpdate, RateLimiter};

/// What is the same of all devices of this kind.
pub(crate) const KIND: DeviceKind = DeviceKind {
    name: "virtio-blk",
    state: StateKey::ById("drives"),
    metrics: Some(MetricsGroup {
        name: "block",
        label: Some("drive"),
    }),
};

/// What a block device is made of.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    /// The disk. Its geometry says whether the device is read-only.
    pub disk: Arc<dyn Disk>,
    /// The serial number; the guest sees its first 20 bytes.
    pub serial: String,
    /// Number of request queues, at least 1.
    pub queues: u16,
    /// Largest size of each queue, a power of two from 4 to 256.
    pub queue_size: u16,
    /// How bytes are moved.
    pub engine: EngineKind,
}

/// A block device cannot be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// It needs a queue.
    #[error("a block device with {0} queues: expected at least 1")]
    Queues(u16),
    /// The queue size is none.
    #[error("a block device with queues of {0}: expected a power of two from 4 to 256")]
    QueueSize(u16),
    /// The host has no event for a queue: mostly no file descriptor is left.
    #[error("no event for a queue of the device")]
    Event(#[source] io::Error),
    /// The host refused the I/O engine that was asked for.
    #[error("the device's I/O engine cannot be started")]
    Engine(#[source] io::Error),
    /// The driver knows the disk as another kind than the new one is.
    #[error("the new disk {0}, unlike the one it is to replace")]
    Replacement(&'static str),
}

/// Called when the host could not reach the guest memory of a request (`EFAULT`).
pub type OnFault = dyn Fn() + Send + Sync;

/// The device while a driver uses it.
struct Active {
    memory: Arc<GuestMemory>,
    rings: Vec<Option<Ring>>,
    write_through: bool,
}

/// The device.
pub struct VirtioBlock {
    interrupt: Arc<Interrupt>,
    kicks: Vec<EventFd>,
    queue_sizes: Vec<u16>,
    config: ConfigSpace,
    features: u64,
    serial: [u8; ID_LEN],
    disk: DiskQueue<RequestInFlight>,
    active: Option<Active>,
    paused: bool,
    limiter: RateLimiter,
    /// The queue that is served first when the limiter's timer ends, so that each has its turn.
    turn: usize,
    metrics: Arc<BlockMetrics>,
    sharing: Option<Arc<DriveSharing>>,
    on_fault: Option<Arc<OnFault>>,
}

impl VirtioBlock {
    /// A device that interrupts through `interrupt`.
    ///
    /// # Errors
    /// [`BlockError`], except `Replacement`.
    pub fn new(config: BlockConfig, interrupt: Arc<Interrupt>) -> Result<Self, BlockError> {
        let BlockConfig {
            disk,
            serial,
            queues,
            queue_size,
            engine,
        } = config;
        if queues == 0 {
            return Err(BlockError::Queues(queues));
        }
        if !queue_size.is_power_of_two() || !(4..=256).contains(&queue_size) {
            return Err(BlockError::QueueSize(queue_size));
        }
        let mut padded = [0; ID_LEN];
        for (to, from) in padded.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let kicks = (0..queues)
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<Result<_, _>>()
            .map_err(BlockError::Event)?;
        let geometry = disk.geometry();
        Ok(Self {
            interrupt,
            kicks,
            queue_sizes: vec![queue_size; queues.into()],
            config: ConfigSpace::new(&geometry, queues, queue_size),
            features: config_space::features(geometry.read_only, queues),
            serial: padded,
            disk: DiskQueue::new(disk, engine).map_err(BlockError::Engine)?,
            active: None,
            paused: false,
            limiter: RateLimiter::default(),
            turn: 0,
            metrics: Arc::default(),
            sharing: None,
            on_fault: None,
        })
    }

    /// Lets the guest share what it reads from files that do not change, or from now on no more. Waits for requests in
    /// flight.
    pub fn share(&mut self, sharing: Option<Arc<DriveSharing>>) {
        self.disk.drain();
        self.finish();
        self.sharing = sharing;
    }

    /// How reads are shared.
    pub fn sharing(&self) -> Option<&Arc<DriveSharing>> {
        self.sharing.as_ref()
    }

    /// Has `on_fault` called for each request whose guest memory the host cannot reach, before the driver gets the
    /// error.
    pub fn on_fault(&mut self, on_fault: Arc<OnFault>) {
        self.on_fault = Some(on_fault);
    }

    /// Changes what the device does at most: bytes of reads and writes, and requests of any kind.
    ///
    /// # Errors
    /// Where the host has no descriptor left for a timer. Then nothing is changed.
    pub fn update_limits(&mut self, update: LimitsUpdate) -> io::Result<()> {
        self.limiter.update(update)?;
        (0..self.kicks.len()).for_each(|queue| self.kick(queue));
        Ok(())
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<dyn Disk> {
        self.disk.disk()
    }

    /// Replaces the disk, for example by a larger one, and notifies the driver. Waits for requests in flight.
    ///
    /// # Errors
    /// `Replacement` where the disk differs in what the driver has been promised: sector size, and being writable.
    pub fn replace_disk(&mut self, disk: Arc<dyn Disk>) -> Result<(), BlockError> {
        let old = self.disk.disk().geometry();
        self.install_disk(disk, &old)
    }

    /// Replaces the disk by one that `change` makes of it, while no request is in flight.
    ///
    /// # Errors
    /// Those of `change`, and those of [`VirtioBlock::replace_disk`]. Then the device keeps its disk.
    pub fn change_disk<E: From<BlockError>>(
        &mut self,
        change: impl FnOnce(&Arc<dyn Disk>) -> Result<Arc<dyn Disk>, E>,
    ) -> Result<(), E> {
        let old = self.disk.disk().geometry();
        self.disk.drain();
        self.finish();
        let disk = change(self.disk.disk())?;
        Ok(self.install_disk(disk, &old)?)
    }

    fn install_disk(&mut self, disk: Arc<dyn Disk>, old: &Geometry) -> Result<(), BlockError> {
        let new = disk.geometry();
        if new.logical_sector != old.logical_sector {
            return Err(BlockError::Replacement("has another sector size"));
        }
        if new.read_only != old.read_only {
            return Err(BlockError::Replacement(if new.read_only {
                "is read-only"
            } else {
                "is writable"
            }));
        }
        let queue_size = self.queue_sizes.first().copied().unwrap_or_default();
        self.config = ConfigSpace::new(&new, self.queue_sizes.len() as u16, queue_size);
        self.disk.replace_disk(disk);
        self.finish();
        self.interrupt.signal_config_change();
        Ok(())
    }

    /// Makes the device thread look at a queue.
    fn kick(&self, queue: usize) {
        if let Some(kick) = self.kicks.get(queue)
            && let Err(error) = kick.write(1)
        {
            // Only a counter that is full refuses, and then it is readable already.
            tracing::debug!(error = %report::chain(&error), "virtio-blk kick");
        }
    }

    /// Takes the requests of a queue, and ends those that are done already.
    fn serve(&mut self, queue: usize) {
        if self.paused || self.limiter.is_blocked() {
            return;
        }
        if let Err(error) = self.take(queue) {
            return self.fail(&error);
        }
        self.disk.kick();
        self.finish();
    }

    /// Serves all queues after their wait for the rate limiter.
    fn serve_throttled(&mut self) {
        if !self.limiter.on_timer() {
            return;
        }
        add(&self.metrics.limiter_events, 1);
        let (first, count) = (self.turn, self.kicks.len());
        for queue in (first..count).chain(0..first.min(count)) {
            self.serve(queue);
        }
    }

    /// Takes at most a queue's worth of requests.
    fn take(&mut self, queue: usize) -> Result<(), RingFault> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let Some(ring) = active.rings.get_mut(queue).and_then(Option::as_mut) else {
            return Ok(());
        };
        let geometry = self.disk.disk().geometry();
        let rules = Rules {
            geometry: &geometry,
            queue_size: ring.size(),
            write_through: active.write_through,
        };
        for taken in 0..ring.size() {
            let mut throttle = |ring: &mut Ring, place| {
                add(&self.metrics.throttled, 1);
                // A queue that has had a turn lets the next one go first.
                self.turn = (queue + usize::from(taken > 0)) % self.queue_sizes.len().max(1);
                ring.put_back(&active.memory, place)
            };
            let (place, mut chain) = match ring.next(&active.memory)? {
                Next::Chain(place, chain) => (place, chain),
                Next::Outside(place, status) => {
                    if !self.limiter.consume(0, 1) {
                        return throttle(ring, place);
                    }
                    add(&self.metrics.errors, 1);
                    ring.finish(&active.memory, place, status, (VIRTIO_BLK_S_IOERR as u8, 0))?;
                    continue;
                }
                Next::Empty | Next::Full => return Ok(()),
            };
            // Without a status byte the device cannot report anything to the driver.
            let status = request::take_status(&mut chain).ok_or(RingFault::NoStatus)?;
            let command = request::parse(&active.memory, chain, &rules);
            let bytes = command.as_ref().map_or(0, Command::bandwidth);
            if !self.limiter.consume(bytes, 1) {
                return throttle(ring, place);
            }
            let ended = match command {
                Ok(Command::GetId(segments)) => {
                    let written = chain::write(&active.memory, &segments, &self.serial)?;
                    let whole = chain::total_len(&segments) == u64::from(written);
                    // What lies between the serial number and the status is not written, so not counted.
                    (VIRTIO_BLK_S_OK as u8, written + u32::from(whole))
                }
                Ok(Command::Disk {
                    request,
                    operation,
                    data,
                }) => {
                    let origin = (queue, place);
                    let in_flight =
                        RequestInFlight::new(&active.memory, data, origin, status, operation)?;
                    let in_flight = in_flight.shared_by(self.sharing.as_ref());
                    self.disk.submit(request, in_flight);
                    continue;
                }
                Err(refusal) => {
                    add(&self.metrics.errors, 1);
                    (refusal.status(), 0)
                }
            };
            ring.finish(&active.memory, place, status, ended)?;
        }
        // The turn is over, and there may be more.
        self.kick(queue);
        Ok(())
    }

    /// Gives back to the driver the requests that the disk has ended.
    fn finish(&mut self) {
        if let Err(error) = self.try_finish() {
            self.fail(&error);
        }
    }

    fn try_finish(&mut self) -> Result<(), RingFault> {
        while let Some(Completion { buffer, result }) = self.disk.completion() {
            let (queue, ended) = (buffer.queue, self.ended(&buffer, result));
            let Some(active) = &mut self.active else {
                continue;
            };
            let Some(ring) = active.rings.get_mut(queue).and_then(Option::as_mut) else {
                continue;
            };
            if buffer.complete(ring, ended)? {
                // There was no room for more; now there is.
                self.kick(queue);
            }
        }
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let mut interrupt = false;
        for ring in active.rings.iter_mut().flatten() {
            interrupt |= ring.take_interrupt(&active.memory)?;
        }
        if interrupt {
            self.interrupt.signal_used();
        }
        Ok(())
    }

    /// The status byte and the count of bytes written for a request that the disk has ended.
    fn ended(
        &self,
        request: &RequestInFlight,
        result: Result<(), storage::io::IoError>,
    ) -> (u8, u32) {
        let metrics = &self.metrics;
        let len = u64::from(request.len);
        if let Err(error) = result {
            if let storage::io::IoError::Transfer { source, .. } = &error
                && source.raw_os_error() == Some(libc::EFAULT)
                && let Some(on_fault) = &self.on_fault
            {
                on_fault();
            }
            crate::limited!(warn, error = %report::chain(&error), operation = ?request.operation, "virtio-blk request");
            add(&metrics.errors, 1);
            // Of a read it is unknown how much was written; the driver may rely on what is counted (2.7.8.2).
            let written = u32::from(request.operation != Operation::Read);
            return (VIRTIO_BLK_S_IOERR as u8, written);
        }
        let written = match request.operation {
            Operation::Read => {
                request.note_copies();
                add(&metrics.reads, 1);
                add(&metrics.read_bytes, len);
                metrics.read_latency.record(request.begun.elapsed());
                request.len.saturating_add(1)
            }
            Operation::Write => {
                add(&metrics.writes, 1);
                add(&metrics.written_bytes, len);
                metrics.write_latency.record(request.begun.elapsed());
                1
            }
            Operation::Flush => {
                add(&metrics.flushes, 1);
                metrics.flush_latency.record(request.begun.elapsed());
                1
            }
            Operation::Discard => {
                add(&metrics.discards, 1);
                1
            }
        };
        (VIRTIO_BLK_S_OK as u8, written)
    }

    /// Stops until the driver resets the device (2.1.2): it has broken the protocol in a way that no status byte can
    /// report.
    fn fail(&mut self, error: &RingFault) {
        crate::limited!(warn, error = %report::chain(&error), "virtio-blk: the driver broke a ring; the device needs a reset");
        add(&self.metrics.failures, 1);
        self.stop();
        self.interrupt.fail();
    }

    /// Gives up guest memory.
    fn stop(&mut self) {
        self.active = None;
        self.disk.drain();
        while self.disk.completion().is_some() {}
    }
}

impl Device for VirtioBlock {
    persist_by_type!(KIND);

    fn pause(&mut self) {
        self.paused = true;
        self.disk.drain();
        self.finish();
    }

    fn resume(&mut self) {
        self.paused = false;
        // Served by the device thread: the kernel ends the I/O of a thread that ends.
        (0..self.kicks.len()).for_each(|queue| self.kick(queue));
        self.interrupt.raise_restored();
    }

    fn reset(&mut self) {
        self.stop();
    }

    fn metrics(&self) -> Vec<Metric> {
        self.metrics.describe()
    }
}

impl VirtioDevice for VirtioBlock {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            memory,
            queues,
            features,
        } = activation;
        if queues.iter().all(Option::is_none) {
            return Err(ActivateError::NotReady);
        }
        super::check_none_in_flight(queues.iter().flatten())?;
        self.active = Some(Active {
            memory: Arc::new(memory),
            rings: queues
                .into_iter()
                .map(|queue| queue.map(Ring::new))
                .collect(),
            write_through: features & bit(VIRTIO_BLK_F_FLUSH) == 0,
        });
        Ok(())
    }

    fn ring_positions(&self) -> Vec<Option<RingPosition>> {
        let rings = self.active.iter().flat_map(|active| &active.rings);
        rings
            .map(|ring| ring.as_ref().map(Ring::position))
            .collect()
    }

    fn is_writing(&self, address: GuestAddress, len: u64) -> bool {
        self.disk
            .in_flight()
            .any(|request| request.is_writing(address, len))
    }
}
