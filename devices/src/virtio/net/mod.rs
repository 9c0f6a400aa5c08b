//! virtio-net: a network interface (VIRTIO 1.2, 5.1).
//!
//! ```text
//! vCPU ── kick ──> device thread: tx ring ─ header checked ─ writev ──> tap
//!                                    └─ Station: answered here
//! vCPU <── interrupt ── device thread: rx ring <─ readv ─────────────── tap
//! ```
//!
//! Frames go straight between guest memory and the host's end, which is a [`Link`]. What is taken from the rings is
//! given back before a call of the device returns: so nothing is in flight when it is paused, and nothing of it writes
//! to guest memory between calls, which the sharing of that memory relies on. A frame is kept here only where the
//! guest's buffers are too few for it.
//!
//! The descriptors of the link are waited for by their edges: a frame that the guest has no buffers for wakes the
//! device once, and again when there are buffers.

mod config_space;
mod control;
mod event_handler;
mod features;
mod header;
#[cfg(test)]
mod hostile;
mod link;
mod metrics;
#[cfg(test)]
mod mock;
mod persist;
mod receive;
mod rx;
mod rx_ring;
mod scatter;
mod send;
mod station;
mod tap;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_queue::{Error, Queue};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;
use zerocopy::IntoBytes;

use self::config_space::ConfigSpace;
pub use self::features::Offloads;
use self::features::{GUEST_OFFLOADS, Offered, has};
pub use self::link::Link;
pub use self::metrics::NetMetrics;
pub use self::persist::NetState;
use self::rx::Rx;
use self::rx_ring::RxRing;
pub use self::station::Station;
pub use self::tap::{LONGEST_NAME, Tap, TapError, is_interface_name};
use super::{ActivateError, Activation, Interrupt, RingPosition, VirtioDevice, read_config_bytes};
use crate::GuestMemory;
use crate::lifecycle::{Device, DeviceKind, MetricsGroup, StateKey, persist_by_type};
use crate::metrics::{Metric, add};
use crate::rate_limiter::{LimitsUpdate, RateLimiter, RateLimits};

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// The index of the control queue where there is one pair (5.1.2).
const CONTROL_OF_ONE_PAIR: usize = 2;

/// What is the same of all devices of this kind.
pub(crate) const KIND: DeviceKind = DeviceKind {
    name: "virtio-net",
    state: StateKey::ById("network"),
    metrics: Some(MetricsGroup {
        name: "net",
        label: Some("interface"),
    }),
};

/// What a network device is made of.
pub struct NetConfig {
    /// The host's end.
    pub link: Box<dyn Link>,
    /// The address that the guest is given.
    pub mac: [u8; 6],
    /// The MTU that the guest is given; its own where absent.
    pub mtu: Option<u16>,
    /// What limits frames to the guest, and those of it to the network.
    pub limits: NetLimits,
    /// Who answers some of the guest's frames in this process.
    pub station: Option<Box<dyn Station>>,
}

/// What limits a network device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetLimits {
    /// Frames to the guest.
    pub rx: RateLimits,
    /// Frames of the guest.
    pub tx: RateLimits,
}

struct Limiters {
    rx: RateLimiter,
    tx: RateLimiter,
}

/// A pair of queues.
struct Pair {
    rx: Rx,
    tx: Queue,
}

/// The device while a driver uses it.
struct Active {
    memory: GuestMemory,
    features: u64,
    /// By index; `None` for pairs that the driver has not made ready.
    pairs: Vec<Option<Pair>>,
    control: Option<Queue>,
    /// How many pairs the driver uses, from the first on.
    serving: u16,
    /// The features of [`GUEST_OFFLOADS`] that are on.
    offloads: u64,
}

/// What a restored device goes on with once it is activated.
#[derive(Clone, Copy)]
struct Restored {
    serving: u16,
    offloads: u64,
}

/// A station, and what wakes the device thread for it.
struct Answers {
    station: Box<dyn Station>,
    timer: TimerFd,
    is_armed: bool,
}

/// Called when the host could not reach the guest memory of a frame (`EFAULT`).
type OnFault = dyn Fn() + Send + Sync;

/// The device.
pub struct VirtioNet {
    interrupt: Arc<Interrupt>,
    kicks: Vec<EventFd>,
    queue_sizes: Vec<u16>,
    link: Box<dyn Link>,
    answers: Option<Answers>,
    limiters: Limiters,
    config: ConfigSpace,
    mtu: Option<u16>,
    offered: u64,
    active: Option<Active>,
    restored: Option<Restored>,
    /// It was restored and has not gone on since: the network may not know where the guest is.
    is_elsewhere: bool,
    paused: bool,
    metrics: Arc<NetMetrics>,
    on_fault: Option<Arc<OnFault>>,
}

impl VirtioNet {
    /// A device that interrupts through `interrupt`.
    ///
    /// # Errors
    /// Where the host has no file descriptor left.
    pub fn new(config: NetConfig, interrupt: Arc<Interrupt>) -> io::Result<Self> {
        let NetConfig {
            link,
            mac,
            mtu,
            limits,
            station,
        } = config;
        let pairs = link.pairs().max(1);
        let mut queue_sizes = vec![QUEUE_SIZE; usize::from(pairs) * 2];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let kicks = queue_sizes
            .iter()
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<Result<_, _>>()?;
        let offered = Offered {
            mtu: mtu.is_some(),
            several_pairs: pairs > 1,
            uso: link.has_uso(),
        };
        let answers = station
            .map(|station| {
                Ok::<_, io::Error>(Answers {
                    station,
                    timer: TimerFd::new()?,
                    is_armed: false,
                })
            })
            .transpose()?;
        Ok(Self {
            interrupt,
            kicks,
            queue_sizes,
            config: ConfigSpace::new(mac, pairs, mtu),
            mtu,
            offered: offered.features(),
            link,
            answers,
            limiters: Limiters {
                rx: RateLimiter::new(limits.rx)?,
                tx: RateLimiter::new(limits.tx)?,
            },
            active: None,
            restored: None,
            is_elsewhere: false,
            paused: false,
            metrics: Arc::default(),
            on_fault: None,
        })
    }

    /// Has `on_fault` called for each frame whose guest memory the host cannot reach.
    pub fn on_fault(&mut self, on_fault: Arc<OnFault>) {
        self.on_fault = Some(on_fault);
    }

    /// Changes its limits.
    ///
    /// # Errors
    /// Where the host has no file descriptor left.
    pub fn limit(&mut self, rx: LimitsUpdate, tx: LimitsUpdate) -> io::Result<()> {
        self.limiters.rx.update(rx)?;
        self.limiters.tx.update(tx)?;
        // The device thread watches timers that are new.
        self.kick_all();
        Ok(())
    }

    fn max_pairs(&self) -> u16 {
        (self.kicks.len() / 2) as u16
    }

    /// The index of the control queue (5.1.2).
    fn control_index(&self, features: u64) -> usize {
        if has(features, VIRTIO_NET_F_MQ) {
            usize::from(self.max_pairs()) * 2
        } else {
            CONTROL_OF_ONE_PAIR
        }
    }

    /// Makes the device thread look at a queue.
    fn kick(&self, queue: usize) {
        if let Some(kick) = self.kicks.get(queue)
            && let Err(error) = kick.write(1)
        {
            // Only a counter that is full refuses, and then it is readable already.
            tracing::debug!(error = %report::chain(&error), "virtio-net kick");
        }
    }

    /// Makes the device thread look at all queues.
    fn kick_all(&self) {
        for queue in 0..self.kicks.len() {
            self.kick(queue);
        }
    }

    /// Stops until the driver resets the device (2.1.2).
    fn fail(&mut self, error: &Error) {
        crate::limited!(warn, error = %report::chain(&error), "virtio-net: the driver broke a ring; the device needs a reset");
        add(&self.metrics.failures, 1);
        self.stop();
        self.interrupt.fail();
    }

    /// Gives up guest memory, and what was kept for the guest.
    fn stop(&mut self) {
        self.active = None;
        if let Some(answers) = &mut self.answers {
            answers.station.reset();
            answers.disarm();
        }
        // The host's stack does not wait for a guest that does not read.
        if let Err(error) = self.link.set_offloads(Offloads::default()) {
            tracing::debug!(error = %report::chain(&error), "virtio-net offloads");
        }
    }

    /// Serves a queue on the device thread.
    fn serve(&mut self, queue: usize) {
        let Some(active) = &self.active else {
            return;
        };
        if self.paused {
            return;
        }
        let pair = (queue / 2) as u16;
        let served = if queue == self.control_index(active.features) {
            self.serve_control()
        } else if queue.is_multiple_of(2) {
            self.receive(pair)
        } else {
            // What was sent to the station is answered at once.
            self.send(pair)
                .and_then(|answered| if answered { self.receive(0) } else { Ok(()) })
        };
        if let Err(error) = served {
            self.fail(&error);
        }
    }

    fn fault(&self, error: &io::Error) {
        if error.raw_os_error() == Some(libc::EFAULT)
            && let Some(on_fault) = &self.on_fault
        {
            on_fault();
        }
    }
}

impl Device for VirtioNet {
    persist_by_type!(KIND);

    fn pause(&mut self) {
        self.paused = true;
    }

    fn resume(&mut self) {
        self.paused = false;
        self.kick_all();
        self.interrupt.raise_restored();
        let can_announce = self
            .active
            .as_ref()
            .is_some_and(|active| has(active.features, VIRTIO_NET_F_GUEST_ANNOUNCE));
        if std::mem::take(&mut self.is_elsewhere) && can_announce {
            self.config.set_announces(true);
            self.interrupt.signal_config_change();
        }
    }

    fn reset(&mut self) {
        self.restored = None;
        self.is_elsewhere = false;
        self.config.set_announces(false);
        self.stop();
    }

    fn metrics(&self) -> Vec<Metric> {
        self.metrics.describe()
    }
}

impl VirtioDevice for VirtioNet {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.offered
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
        read_config_bytes(self.config.as_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            memory,
            queues,
            features,
        } = activation;
        super::check_none_in_flight(queues.iter().flatten())?;
        let control_index = self.control_index(features);
        let pairs = if has(features, VIRTIO_NET_F_MQ) {
            self.max_pairs()
        } else {
            1
        };
        let mut queues = queues.into_iter();
        let mut taken = Vec::new();
        for _ in 0..pairs {
            let (rx, tx) = (queues.next().flatten(), queues.next().flatten());
            let mergeable = has(features, VIRTIO_NET_F_MRG_RXBUF);
            taken.push(rx.zip(tx).map(|(rx, tx)| Pair {
                rx: Rx::new(RxRing::new(rx), mergeable),
                tx,
            }));
        }
        if !matches!(taken.first(), Some(Some(_))) {
            return Err(ActivateError::NotReady);
        }
        // Behind the pairs, wherever these end.
        debug_assert_eq!(control_index, usize::from(pairs) * 2);
        let control = queues.next().flatten();
        let control = control.filter(|_| has(features, VIRTIO_NET_F_CTRL_VQ));
        let Restored { serving, offloads } = self.restored.take().unwrap_or(Restored {
            serving: 1,
            offloads: u64::MAX,
        });
        let offloads = offloads & features & GUEST_OFFLOADS;
        let serving = serving.min(pairs);
        let host = |what| move |source| ActivateError::Host { what, source };
        self.link
            .set_offloads(Offloads::of(offloads))
            .map_err(host("the offloads of the tap"))?;
        self.link
            .use_pairs(serving)
            .map_err(host("the queues of the tap"))?;
        self.active = Some(Active {
            memory,
            features,
            pairs: taken,
            control,
            serving,
            offloads,
        });
        self.kick_all();
        Ok(())
    }

    fn ring_positions(&self) -> Vec<Option<RingPosition>> {
        let Some(active) = &self.active else {
            return Vec::new();
        };
        let pairs = active.pairs.iter().flat_map(|pair| {
            let position = |of: fn(&Pair) -> RingPosition| pair.as_ref().map(of);
            [
                position(|pair| pair.rx.position()),
                position(|pair| RingPosition::of(&pair.tx)),
            ]
        });
        pairs
            .chain([active.control.as_ref().map(RingPosition::of)])
            .collect()
    }
}
