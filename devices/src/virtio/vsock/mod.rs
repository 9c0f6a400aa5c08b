//! virtio-vsock: sockets between a guest and its host (VIRTIO 1.2, 5.10).
//!
//! ```text
//! guest                                 this process                              host
//! AF_VSOCK ── tx ring ──> VirtioVsock ── Table: Connection ── Host: Unix sockets ── programs
//!          <── rx ring ──                      └── Service: answered here
//! ```
//!
//! There are stream sockets. A packet of the guest is looked at as a whole, in however many buffers it lies, and either
//! belongs to a connection or is answered with a reset; what of it the host does not take is kept, as far as the guest
//! was given room. To the guest goes what it has room for, read from the host's sockets just then, so nothing is kept
//! in that direction.
//!
//! What a guest can have this process keep is bounded: by the pool of the table, and by the number of resets that wait
//! for room in the rx ring. Where those are too many, no further packet is taken off the tx ring until the guest has
//! given room (5.10.6.1.2 allows that).
//!
//! Buffers of the rings are parsed here, and not by the crate `virtio-vsock`: that takes a packet's payload for one
//! buffer, and Linux sends more.

mod connection;
mod event_handler;
mod host;
#[cfg(test)]
mod hostile;
mod metrics;
#[cfg(test)]
mod mock;
mod packet;
mod persist;
mod serve;
mod table;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use self::host::Host;
pub use self::metrics::VsockMetrics;
use self::packet::Header;
pub use self::persist::VsockState;
use self::table::Table;
use super::{
    ActivateError, Activation, Interrupt, RING_FEATURES, RingPosition, VirtioDevice,
    read_config_bytes,
};
use crate::GuestMemory;
use crate::lifecycle::{Device, DeviceKind, MetricsGroup, StateKey, persist_by_type};
use crate::metrics::{Metric, add};
use crate::service::Service;

/// Linux fills the rx ring with buffers of 4 KiB of its own.
const QUEUE_SIZE: u16 = 64;
/// Queues: rx, tx, event (5.10.2).
const QUEUES: usize = 3;
/// What is the same of all devices of this kind.
pub(crate) const KIND: DeviceKind = DeviceKind {
    name: "virtio-vsock",
    state: StateKey::One("vsock"),
    metrics: Some(MetricsGroup {
        name: "vsock",
        label: None,
    }),
};

/// What a vsock device is made of.
pub struct VsockConfig<'a> {
    /// The guest's context identifier, beyond those that are reserved (0 to 2, and 2^32 - 1).
    pub guest_cid: u32,
    /// Where programs of the host connect to.
    pub listener: UnixListener,
    /// The path of that; those that the guest connects to lie beside it.
    pub path: &'a Path,
    /// A port of the host that is answered here, and by whom.
    pub service: Option<(u32, Arc<dyn Service>)>,
}

/// The device while a driver uses it.
struct Active {
    memory: GuestMemory,
    rx: Queue,
    tx: Queue,
    /// A driver may go without events.
    event: Option<Queue>,
}

/// The device.
pub struct VirtioVsock {
    interrupt: Arc<Interrupt>,
    kicks: Vec<EventFd>,
    guest_cid: u64,
    host: Host,
    service: Option<(u32, Arc<dyn Service>)>,
    table: Table,
    /// Packets that belong to no connection any more.
    replies: VecDeque<Header>,
    /// The driver is to be told that connections are gone which it had before.
    owes_reset: bool,
    active: Option<Active>,
    paused: bool,
    metrics: Arc<VsockMetrics>,
}

impl VirtioVsock {
    /// A device that interrupts through `interrupt`.
    ///
    /// # Errors
    /// Where the host has no file descriptor left.
    pub fn new(config: VsockConfig<'_>, interrupt: Arc<Interrupt>) -> io::Result<Self> {
        let kicks = (0..QUEUES)
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<Result<_, _>>()?;
        let metrics = Arc::<VsockMetrics>::default();
        Ok(Self {
            interrupt,
            kicks,
            guest_cid: config.guest_cid.into(),
            host: Host::new(config.listener, config.path)?,
            service: config.service,
            table: Table::new(metrics.clone()),
            replies: VecDeque::new(),
            owes_reset: false,
            active: None,
            paused: false,
            metrics,
        })
    }

    /// Makes the device thread look at all queues.
    fn kick(&self) {
        if let Some(kick) = self.kicks.first()
            && let Err(error) = kick.write(1)
        {
            // Only a counter that is full refuses, and then it is readable already.
            tracing::debug!(error = %report::chain(&error), "virtio-vsock kick");
        }
    }

    /// Ends all connections. The host's programs see them closed.
    fn forget(&mut self) {
        self.active = None;
        self.table.clear();
        self.replies.clear();
    }

    /// Stops until the driver resets the device (2.1.2).
    fn fail(&mut self, error: &virtio_queue::Error) {
        crate::limited!(warn, error = %report::chain(&error), "virtio-vsock: the driver broke a ring; the device needs a reset");
        add(&self.metrics.failures, 1);
        self.forget();
        self.interrupt.fail();
    }
}

impl Device for VirtioVsock {
    persist_by_type!(KIND);

    fn pause(&mut self) {
        self.paused = true;
    }

    fn resume(&mut self) {
        self.paused = false;
        self.kick();
        self.interrupt.raise_restored();
    }

    fn reset(&mut self) {
        self.forget();
        // A driver that begins anew asks for its context identifier.
        self.owes_reset = false;
    }

    fn metrics(&self) -> Vec<Metric> {
        self.metrics.describe()
    }
}

impl VirtioDevice for VirtioVsock {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        // Where no socket type is agreed on, there are streams (5.10.3).
        RING_FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut queues = activation.queues.into_iter();
        let mut queue = || queues.next().flatten();
        let (rx, tx, event) = (queue(), queue(), queue());
        let (Some(rx), Some(tx)) = (rx, tx) else {
            return Err(ActivateError::NotReady);
        };
        super::check_none_in_flight([&rx, &tx].into_iter().chain(&event))?;
        self.active = Some(Active {
            memory: activation.memory,
            rx,
            tx,
            event,
        });
        self.kick();
        Ok(())
    }

    fn ring_positions(&self) -> Vec<Option<RingPosition>> {
        let Some(active) = &self.active else {
            return Vec::new();
        };
        let queues = [Some(&active.rx), Some(&active.tx), active.event.as_ref()];
        queues.map(|queue| queue.map(RingPosition::of)).to_vec()
    }
}
