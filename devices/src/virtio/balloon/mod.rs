//! virtio-balloon: memory that a guest does without goes back to the host (VIRTIO 1.2, 5.5).
//!
//! ```text
//! inflated, hinted or reported pages ── ring ──> VirtioBalloon ── GiveBack ──> the host has them again
//! ```
//!
//! The balloon itself is pages that the guest has set aside because the host asked for so many. Hints are free pages of
//! one moment, which the host asks for too; reports are free pages that the driver names all the time. All go back at
//! once. To take a page again, the guest only has to touch it, so a buffer of pages to deflate is given back as it
//! came.
//!
//! A guest keeps off pages that it inflates or reports until the device has used the buffer, so those are served by the
//! device thread. A hinted page it may use again at any time (5.5.6.5.1), and giving it back then would destroy what is
//! in it. Linux lets go of a hinted block after it has notified the device, not before; so the notifications of the
//! hinting queue have no ioeventfd, and a block is given back while the vCPU that hints it stands in its notification.

mod config;
mod config_space;
mod event_handler;
mod hinting;
#[cfg(test)]
mod hostile;
mod metrics;
#[cfg(test)]
mod mock;
mod pages;
mod persist;
mod queues;
mod serve;
mod statistics;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

pub use self::config::BalloonConfig;
use self::config_space::{ConfigSpace, F_FREE_PAGE_HINT, bit};
use self::hinting::{Command, Hinting};
pub use self::metrics::{BalloonMetrics, Returned};
pub use self::pages::GiveBack;
pub use self::persist::{BalloonDeviceState, HintingState};
use self::queues::{FIRST_OPTIONAL, QUEUES, Role};
use self::statistics::Timer;
pub use self::statistics::{STATISTICS, Values};
use super::{ActivateError, Activation, Interrupt, RingPosition, VirtioDevice};
use crate::GuestMemory;
use crate::lifecycle::{Device, DeviceKind, MetricsGroup, StateKey, persist_by_type};
use crate::metrics::{Metric, add};

/// Linux reports up to 32 pages in one chain, and needs a descriptor for each.
const QUEUE_SIZE: u16 = 64;
/// What is the same of all devices of this kind.
pub(crate) const KIND: DeviceKind = DeviceKind {
    name: "virtio-balloon",
    state: StateKey::One("balloon"),
    metrics: Some(MetricsGroup {
        name: "balloon",
        label: None,
    }),
};

/// A balloon device cannot do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// It was made without statistics.
    #[error("the balloon has no statistics: it was set up with stats_polling_interval_s 0")]
    StatisticsOff,
    /// The driver has learned at its start whether there are statistics.
    #[error("statistics of the balloon cannot be turned on or off after the start")]
    StatisticsSwitch,
    /// It was made without hinting.
    #[error("the balloon has no free page hinting")]
    HintingOff,
    /// No driver uses the device, or it does not know of hinting.
    #[error("the guest has no driver for the balloon that hints")]
    NoDriver,
}

/// What a device has and is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonState {
    /// Pages of 4 KiB that the balloon is to have.
    pub target_pages: u32,
    /// Pages that it has, as the driver says.
    pub actual_pages: u32,
    /// What the driver has sent last.
    pub values: Values,
}

/// Where a run of hinting is, in the numbers of `free_page_hint_cmd_id`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HintingStatus {
    /// What the host wants: 0 nothing, 1 that the driver frees what it has hinted, else a run's number.
    pub host: u32,
    /// What the driver sent last: 0 where it has hinted all, else a run's number.
    pub guest: Option<u32>,
}

/// The device while a driver uses it.
struct Active {
    memory: GuestMemory,
    queues: [Option<(Role, Queue)>; QUEUES],
    features: u64,
    /// The statistics buffer that the device keeps, until it wants another.
    statistics_buffer: Option<u16>,
}

/// The device.
pub struct VirtioBalloon {
    interrupt: Arc<Interrupt>,
    kicks: Vec<EventFd>,
    features: u64,
    config: ConfigSpace,
    give_back: GiveBack,
    timer: Timer,
    statistics_interval: u16,
    values: Values,
    hinting: Hinting,
    /// The statistics buffer that a saved device kept, until this device is activated with the ring of that buffer.
    restored_buffer: Option<u16>,
    active: Option<Active>,
    paused: bool,
    metrics: Arc<BalloonMetrics>,
}

impl VirtioBalloon {
    /// A device that gives memory back by `give_back` and interrupts through `interrupt`.
    ///
    /// # Errors
    /// Where the host has no file descriptor left.
    pub fn new(
        config: &BalloonConfig,
        give_back: GiveBack,
        interrupt: Arc<Interrupt>,
    ) -> io::Result<Self> {
        let kicks = (0..QUEUES)
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            interrupt,
            kicks,
            features: config_space::features(config),
            config: ConfigSpace {
                num_pages: config.target_pages.into(),
                ..ConfigSpace::default()
            },
            give_back,
            timer: Timer::new()?,
            statistics_interval: config.statistics_interval,
            values: Values::default(),
            hinting: Hinting::default(),
            restored_buffer: None,
            active: None,
            paused: false,
            metrics: Arc::default(),
        })
    }

    /// Asks the guest for a balloon of so many pages of 4 KiB. A driver that starts later finds it.
    pub fn set_target(&mut self, pages: u32) {
        self.config.num_pages = pages.into();
        self.interrupt.signal_config_change();
    }

    /// The balloon's size, and what is known of the guest's memory.
    ///
    /// # Errors
    /// `StatisticsOff`.
    pub fn state(&self) -> Result<BalloonState, BalloonError> {
        if self.statistics_interval == 0 {
            return Err(BalloonError::StatisticsOff);
        }
        Ok(BalloonState {
            target_pages: self.config.num_pages.get(),
            actual_pages: self.config.actual.get(),
            values: self.values,
        })
    }

    /// Asks for statistics now, and every so many seconds.
    ///
    /// # Errors
    /// `StatisticsSwitch` where that is 0 and was not before, or the other way round.
    pub fn set_statistics_interval(&mut self, seconds: u16) -> Result<(), BalloonError> {
        if seconds == self.statistics_interval {
            return Ok(());
        }
        if seconds == 0 || self.statistics_interval == 0 {
            return Err(BalloonError::StatisticsSwitch);
        }
        self.statistics_interval = seconds;
        self.ask_for_statistics();
        self.set_timer();
        Ok(())
    }

    /// Begins a run of hinting. With `acknowledge`, the driver may use again what it has hinted as soon as it has
    /// hinted all; else only after [`VirtioBalloon::stop_hinting`].
    ///
    /// # Errors
    /// `HintingOff`, `NoDriver`.
    pub fn start_hinting(&mut self, acknowledge: bool) -> Result<(), BalloonError> {
        self.check_hinting()?;
        self.hinting.start(acknowledge);
        self.publish_hinting();
        Ok(())
    }

    /// Ends a run of hinting: the driver may use again what it has hinted.
    ///
    /// # Errors
    /// `HintingOff`, `NoDriver`.
    pub fn stop_hinting(&mut self) -> Result<(), BalloonError> {
        self.check_hinting()?;
        self.hinting.host = Command::Done;
        self.publish_hinting();
        Ok(())
    }

    /// Where a run of hinting is.
    ///
    /// # Errors
    /// `HintingOff`.
    pub fn hinting_status(&self) -> Result<HintingStatus, BalloonError> {
        if !self.has_hinting() {
            return Err(BalloonError::HintingOff);
        }
        Ok(HintingStatus {
            host: self.hinting.host.into(),
            guest: self.hinting.guest.map(u32::from),
        })
    }

    fn has_hinting(&self) -> bool {
        self.features & bit(F_FREE_PAGE_HINT) != 0
    }

    fn check_hinting(&self) -> Result<(), BalloonError> {
        if !self.has_hinting() {
            return Err(BalloonError::HintingOff);
        }
        match &self.active {
            Some(active) if active.features & bit(F_FREE_PAGE_HINT) != 0 => Ok(()),
            Some(_) | None => Err(BalloonError::NoDriver),
        }
    }

    /// Shows the driver in its configuration space what the host wants of it, and interrupts it.
    fn publish_hinting(&mut self) {
        self.config.free_page_hint_cmd_id = u32::from(self.hinting.host).into();
        self.interrupt.signal_config_change();
    }

    /// Makes the device thread look at a queue.
    fn kick(&self, queue: usize) {
        if let Some(kick) = self.kicks.get(queue)
            && let Err(error) = kick.write(1)
        {
            // Only a counter that is full refuses, and then it is readable already.
            tracing::debug!(error = %report::chain(&error), "virtio-balloon kick");
        }
    }

    /// The timer runs while there is a driver that sends statistics.
    fn set_timer(&self) {
        let has_queue = self.active.as_ref().is_some_and(|active| {
            let mut queues = active.queues.iter().flatten();
            queues.any(|(role, _)| *role == Role::Statistics)
        });
        self.timer.set(if has_queue {
            self.statistics_interval
        } else {
            0
        });
    }

    /// Stops until the driver resets the device (2.1.2).
    fn fail(&mut self, error: &virtio_queue::Error) {
        crate::limited!(warn, error = %report::chain(&error), "virtio-balloon: the driver broke a ring; the device needs a reset");
        add(&self.metrics.failures, 1);
        self.active = None;
        self.set_timer();
        self.interrupt.fail();
    }
}

impl Device for VirtioBalloon {
    persist_by_type!(KIND);

    fn pause(&mut self) {
        self.paused = true;
    }

    fn resume(&mut self) {
        self.paused = false;
        (0..QUEUES).for_each(|queue| self.kick(queue));
        self.interrupt.raise_restored();
    }

    fn reset(&mut self) {
        self.active = None;
        self.restored_buffer = None;
        self.set_timer();
        self.config.actual = 0.into();
        self.values = Values::default();
        self.hinting.reset();
        self.config.free_page_hint_cmd_id = u32::from(self.hinting.host).into();
    }

    fn metrics(&self) -> Vec<Metric> {
        self.metrics.describe()
    }
}

impl VirtioDevice for VirtioBalloon {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    fn is_synchronous(&self, queue: usize) -> bool {
        // Which of them is for hints is known only when a driver uses the device.
        self.has_hinting() && queue >= FIRST_OPTIONAL
    }

    fn notified(&mut self, queue: usize) {
        let role = self
            .active
            .as_ref()
            .and_then(|active| active.queues.get(queue)?.as_ref())
            .map(|(role, _)| *role);
        match role {
            Some(Role::Hinting) => self.serve(queue),
            Some(Role::Inflate | Role::Deflate | Role::Statistics | Role::Reporting) | None => {
                self.kick(queue);
            }
        }
    }

    fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            memory,
            queues,
            features,
        } = activation;
        if queues.iter().all(Option::is_none) {
            return Err(ActivateError::NotReady);
        }
        let mut ready = queues.into_iter();
        let mut ready: [Option<Queue>; QUEUES] = std::array::from_fn(|_| ready.next().flatten());
        let roles = queues::roles(features, |queue| {
            ready.get(queue).is_some_and(Option::is_some)
        });
        let queues: [_; QUEUES] =
            std::array::from_fn(|queue| Some((roles[queue]?, ready[queue].take()?)));
        let restored = self.restored_buffer.take();
        let statistics_buffer = queues::kept_buffer(restored, queues.iter().flatten())?;
        self.active = Some(Active {
            memory,
            queues,
            features,
            statistics_buffer,
        });
        self.set_timer();
        // Linux puts its first statistics into their queue, and notifies it, before it says that it is ready.
        (0..QUEUES).for_each(|queue| self.kick(queue));
        Ok(())
    }

    fn ring_positions(&self) -> Vec<Option<RingPosition>> {
        let queues = self.active.iter().flat_map(|active| &active.queues);
        queues
            .map(|queue| queue.as_ref().map(|(_, queue)| RingPosition::of(queue)))
            .collect()
    }
}
