//! A balloon, saved and restored.
//!
//! Which pages are in the balloon only the guest knows: the device has their number, as the driver reports it.

use serde::{Deserialize, Serialize};

use super::config_space::{F_FREE_PAGE_HINT, F_STATS_VQ, bit};
use super::hinting::{Command, Hinting};
use super::statistics::{STATISTICS, Values};
use super::{KIND, QUEUE_SIZE, VirtioBalloon};
use crate::lifecycle::Device;
use crate::persist::{RestoreError, check_same, invalid};

/// What a balloon has, and where it is in what it asks of the driver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonDeviceState {
    /// `num_pages`: pages of 4 KiB that the balloon is to have.
    pub target_pages: u32,
    /// `actual`: pages that it has, as the driver says.
    pub actual_pages: u32,
    /// Seconds from one set of statistics to the next; 0 where there are none.
    pub statistics_interval: u16,
    /// What the driver has sent last, by tag.
    pub statistics: [Option<u64>; STATISTICS.len()],
    /// Head of the statistics buffer that the device keeps.
    pub statistics_buffer: Option<u16>,
    /// The run of hinting.
    pub hinting: HintingState,
}

/// Where a run of hinting is, in the numbers of `free_page_hint_cmd_id`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HintingState {
    /// The last run's number; 0 where there was none.
    pub last: u32,
    /// What the host wants.
    pub host: u32,
    /// What the driver sent last.
    pub guest: Option<u32>,
    /// Whether the driver may free its blocks as soon as it has sent all.
    pub acknowledge: bool,
}

impl HintingState {
    fn of(hinting: &Hinting) -> Self {
        Self {
            last: hinting.last,
            host: hinting.host.into(),
            guest: hinting.guest.map(u32::from),
            acknowledge: hinting.acknowledge,
        }
    }

    /// # Errors
    /// Where the run that the host wants is not the last, or has a number that no run has.
    fn restored(&self) -> Result<Hinting, RestoreError> {
        let host = Command::from(self.host);
        if self.last == 1 {
            let reason = "no run has this number";
            return Err(invalid(
                KIND.name,
                "the last run of hinting",
                self.last,
                reason,
            ));
        }
        match host {
            Command::Run(run) if run != self.last => {
                let reason = "it is not the last run";
                Err(invalid(KIND.name, "the run of hinting", run, reason))
            }
            Command::Run(_) | Command::Stop | Command::Done => Ok(Hinting {
                last: self.last,
                host,
                guest: self.guest.map(Command::from),
                acknowledge: self.acknowledge,
            }),
        }
    }
}

impl VirtioBalloon {
    /// The device's state. For a device that is paused; see [`crate::persist`].
    pub(crate) fn save_state(&self) -> BalloonDeviceState {
        let active = self.active.as_ref();
        BalloonDeviceState {
            target_pages: self.config.num_pages.get(),
            actual_pages: self.config.actual.get(),
            statistics_interval: self.statistics_interval,
            statistics: self.values.0,
            statistics_buffer: active.and_then(|active| active.statistics_buffer),
            hinting: HintingState::of(&self.hinting),
        }
    }

    /// Takes over the state; the target and the interval of the statistics are as they were, whatever this device was
    /// made with. It is paused from then on, until [`Device::resume`].
    ///
    /// # Errors
    /// [`RestoreError`]; the device is then as it was.
    pub(crate) fn restore_state(&mut self, state: &BalloonDeviceState) -> Result<(), RestoreError> {
        if self.active.is_some() {
            return Err(RestoreError::InUse { device: KIND.name });
        }
        let on_or_off = |is_on| if is_on { "on" } else { "off" };
        let has_statistics = self.features & bit(F_STATS_VQ) != 0;
        let had_statistics = on_or_off(state.statistics_interval != 0);
        check_same(
            KIND.name,
            "the balloon's statistics",
            had_statistics,
            on_or_off(has_statistics),
        )?;
        if let Some(head) = state.statistics_buffer
            && (!has_statistics || head >= QUEUE_SIZE)
        {
            let reason = "no queue for statistics has such a buffer";
            return Err(invalid(KIND.name, "the statistics buffer", head, reason));
        }
        let has_hinting = self.features & bit(F_FREE_PAGE_HINT) != 0;
        if !has_hinting && state.hinting != HintingState::default() {
            let (value, reason) = (state.hinting.host, "the balloon has no hinting");
            return Err(invalid(KIND.name, "the run of hinting", value, reason));
        }
        self.hinting = state.hinting.restored()?;
        self.config.num_pages = state.target_pages.into();
        self.config.actual = state.actual_pages.into();
        self.config.free_page_hint_cmd_id = u32::from(self.hinting.host).into();
        self.statistics_interval = state.statistics_interval;
        self.values = Values(state.statistics);
        self.restored_buffer = state.statistics_buffer;
        self.pause();
        Ok(())
    }
}
