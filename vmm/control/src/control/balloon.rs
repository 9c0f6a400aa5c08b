//! The balloon of a guest.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use devices::lock;
use devices::virtio::balloon::{BalloonState, STATISTICS, VirtioBalloon};
use serde::Serialize;

use super::{Control, ControlError};
use config::{
    BalloonConfig, BalloonStatisticsUpdate, BalloonUpdate, HintingStart, PAGES_PER_MIB, VmConfig,
};

/// What `GET /balloon/hinting/status` answers: the numbers of `free_page_hint_cmd_id`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct HintingState {
    /// What the host wants: 0 nothing, 1 that the guest uses the hinted pages again, else the number of a run.
    pub host_cmd: u32,
    /// What the guest sent last: 0 where it has hinted all, else the number of a run.
    pub guest_cmd: Option<u32>,
}

/// What `GET /balloon/statistics` answers: the balloon's sizes, and what the guest says of its memory, by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct BalloonStatistics(BTreeMap<String, u64>);

fn statistics(state: &BalloonState) -> BalloonStatistics {
    let BalloonState {
        target_pages,
        actual_pages,
        values,
    } = state;
    let sizes = [
        ("target_pages", *target_pages),
        ("actual_pages", *actual_pages),
        ("target_mib", target_pages / PAGES_PER_MIB),
        ("actual_mib", actual_pages / PAGES_PER_MIB),
    ];
    let sizes = sizes.map(|(name, size)| (name.to_owned(), u64::from(size)));
    let mut statistics = BTreeMap::from(sizes);
    for (name, value) in STATISTICS.iter().zip(values.0) {
        if let Some(value) = value {
            statistics.insert((*name).to_owned(), value);
        }
    }
    BalloonStatistics(statistics)
}

impl Control {
    /// `GET /balloon`.
    ///
    /// # Errors
    /// `NoBalloon`.
    pub fn balloon(&self) -> Result<BalloonConfig, ControlError> {
        self.config.balloon.ok_or(ControlError::NoBalloon)
    }

    /// The balloon of a started guest.
    fn device(&mut self) -> Result<Arc<Mutex<VirtioBalloon>>, ControlError> {
        self.guest()?.0.balloon().ok_or(ControlError::NoBalloon)
    }

    /// `PATCH /balloon`: asks the guest for a balloon of another size.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `NoBalloon`, `Config`.
    pub fn update_balloon(&mut self, update: BalloonUpdate) -> Result<(), ControlError> {
        // It has to be there, also for an update that is wrong.
        self.device()?;
        let balloon = BalloonConfig {
            amount_mib: update.amount_mib,
            ..self.balloon()?
        };
        let config = VmConfig {
            balloon: Some(balloon),
            ..self.config.clone()
        };
        config.validate()?;
        lock(&*self.device()?).set_target(balloon.target_pages());
        self.config = config;
        Ok(())
    }

    /// `GET /balloon/statistics`.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `NoBalloon`, `Balloon` where it has none.
    pub fn balloon_statistics(&mut self) -> Result<BalloonStatistics, ControlError> {
        Ok(statistics(&lock(&*self.device()?).state()?))
    }

    /// `PATCH /balloon/statistics`: asks for them more or less often.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `NoBalloon`, `Balloon` where that would turn them on or off.
    pub fn update_balloon_statistics(
        &mut self,
        update: BalloonStatisticsUpdate,
    ) -> Result<(), ControlError> {
        let seconds = update.stats_polling_interval_s;
        lock(&*self.device()?).set_statistics_interval(seconds)?;
        if let Some(balloon) = &mut self.config.balloon {
            balloon.stats_polling_interval_s = seconds;
        }
        Ok(())
    }

    /// `PATCH /balloon/hinting/start`.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `NoBalloon`, `Balloon` where the balloon has no hinting, or no driver.
    pub fn start_hinting(&mut self, start: HintingStart) -> Result<(), ControlError> {
        Ok(lock(&*self.device()?).start_hinting(start.acknowledge_on_stop)?)
    }

    /// `PATCH /balloon/hinting/stop`.
    ///
    /// # Errors
    /// As [`Control::start_hinting`].
    pub fn stop_hinting(&mut self) -> Result<(), ControlError> {
        Ok(lock(&*self.device()?).stop_hinting()?)
    }

    /// `GET /balloon/hinting/status`.
    ///
    /// # Errors
    /// As [`Control::start_hinting`], but a driver is not needed.
    pub fn hinting(&mut self) -> Result<HintingState, ControlError> {
        let status = lock(&*self.device()?).hinting_status()?;
        Ok(HintingState {
            host_cmd: status.host,
            guest_cmd: status.guest,
        })
    }
}
