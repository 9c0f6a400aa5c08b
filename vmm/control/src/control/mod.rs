//! The life of a guest as its user sees it: configured, started, paused, resumed.
//!
//! ```text
//! NotStarted ── start ──> Running <── pause / resume ──> Paused
//!  (configure)               └───────── end ──────────────┘
//! ```
//!
//! Every request either takes effect in full or changes nothing. A [`Control`] stands behind a mutex: the threads of
//! the REST socket call it, and the main thread when it starts and ends the guest.

mod balloon;
mod drive;
mod error;
mod guest;
mod limits;
mod metadata;
mod network;
mod output;
mod scrape;
mod times;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use crate::logging::Log;
use crate::metrics::{self, ApiMetrics, MetricsFile};
use crate::mmds::Mmds;
use config::{BootSourceConfig, ConfigError, ConfiguredDevice, MetricsConfig, VmConfig};
use config::{CreateSnapshot, LoadSnapshot};
use host::report::chain;
use jail::JailReport;
use machine::snapshot::{Loading, SnapshotFiles};
use machine::{Address, FilePage, FilePageReport, PageReport, SharingReport};

pub use balloon::{BalloonStatistics, HintingState};
pub(crate) use drive::{updated_drive, updated_pmem};
pub use error::ControlError;
pub use guest::{Guest, LaunchError, Origin};
pub use limits::PayloadLimits;
pub(crate) use network::updated_interface;

use times::Times;

/// What `GET /` answers about the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct InstanceInfo {
    /// Always `Coppice`.
    pub app_name: &'static str,
    /// Name of the guest, as `--id` gave it.
    pub id: String,
    /// `Not started`, `Running` or `Paused`.
    pub state: State,
    /// Version of Coppice.
    pub vmm_version: &'static str,
}

/// Where a guest is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[schema(as = InstanceState)]
pub enum State {
    /// It can be configured.
    #[serde(rename = "Not started")]
    NotStarted,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still.
    Paused,
}

enum Life {
    NotStarted,
    Started { guest: Box<dyn Guest>, paused: bool },
    Ended,
}

/// A guest and what was asked for it.
pub struct Control {
    id: String,
    config: VmConfig,
    life: Life,
    log: Log,
    api: Arc<ApiMetrics>,
    metrics: Option<MetricsFile>,
    /// The layers of the jail that the process has entered.
    jail: JailReport,
    /// The files that commits have given to drives, as far as the configuration has them.
    noted: BTreeMap<String, PathBuf>,
    times: Times,
    mmds: Arc<Mmds>,
    longest_body: usize,
}

fn open_metrics(config: &MetricsConfig) -> Result<MetricsFile, ControlError> {
    MetricsFile::open(&config.metrics_path).map_err(ControlError::Metrics)
}

impl Control {
    /// A guest that is not configured.
    pub fn new(log: Log, api: Arc<ApiMetrics>) -> Self {
        Self {
            id: "anonymous-instance".to_owned(),
            config: VmConfig::default(),
            life: Life::NotStarted,
            log,
            api,
            metrics: None,
            jail: JailReport::default(),
            noted: BTreeMap::new(),
            times: Times::default(),
            mmds: Arc::default(),
            longest_body: PayloadLimits::default().body,
        }
    }

    /// Sets how much is taken of clients. The metadata that there are go.
    pub fn set_limits(&mut self, limits: PayloadLimits) {
        self.mmds = Arc::new(Mmds::with_limit(limits.metadata));
        self.longest_body = limits.body;
    }

    /// The longest body of a REST request, in bytes.
    pub fn longest_body(&self) -> usize {
        self.longest_body
    }

    /// Gives the guest a name.
    pub fn set_id(&mut self, id: String) {
        self.id = id;
    }

    /// The guest is started without a request: its time counts from the start of the process.
    pub fn count_from(&mut self, process: Instant) {
        self.times.count_from(process);
    }

    /// Takes a whole configuration in place of the one there is.
    ///
    /// # Errors
    /// `AfterStart`, `Ended`, `Config`, `Log`, `Metrics`.
    pub fn configure(&mut self, config: VmConfig) -> Result<(), ControlError> {
        self.not_started()?;
        config.validate()?;
        config.check_files()?;
        let metrics = config.metrics.as_ref().map(open_metrics).transpose()?;
        if let Some(logger) = &config.logger {
            self.log.configure(logger)?;
        }
        self.metrics = metrics;
        self.config = config;
        Ok(())
    }

    /// The process has been jailed.
    pub fn confined(&mut self, report: JailReport) {
        self.jail = report;
    }

    /// What `GET /vm/jail` answers.
    pub fn jail(&self) -> &JailReport {
        &self.jail
    }

    /// What `GET /` answers.
    pub fn instance_info(&self) -> InstanceInfo {
        let state = match &self.life {
            Life::NotStarted | Life::Ended => State::NotStarted,
            Life::Started { paused: false, .. } => State::Running,
            Life::Started { paused: true, .. } => State::Paused,
        };
        InstanceInfo {
            app_name: "Coppice",
            id: self.id.clone(),
            state,
            vmm_version: env!("CARGO_PKG_VERSION"),
        }
    }

    /// All that is configured.
    pub fn config(&mut self) -> &VmConfig {
        self.note_commits();
        &self.config
    }

    fn not_started(&self) -> Result<(), ControlError> {
        match &self.life {
            Life::NotStarted => Ok(()),
            Life::Started { .. } => Err(ControlError::AfterStart),
            Life::Ended => Err(ControlError::Ended),
        }
    }

    fn guest(&mut self) -> Result<(&mut dyn Guest, &mut bool), ControlError> {
        match &mut self.life {
            Life::Started { guest, paused } => Ok((guest.as_mut(), paused)),
            Life::NotStarted => Err(ControlError::BeforeStart),
            Life::Ended => Err(ControlError::Ended),
        }
    }

    /// Stores a configuration that `change` makes of the present one, if all of it is valid: `PUT /sharing` and all
    /// that has no effect but this.
    ///
    /// # Errors
    /// `AfterStart`, `Ended`, `Config`.
    pub fn change_config(
        &mut self,
        change: impl FnOnce(&mut VmConfig) -> Result<(), ConfigError>,
    ) -> Result<(), ControlError> {
        self.not_started()?;
        let mut config = self.config.clone();
        change(&mut config)?;
        config.validate()?;
        self.config = config;
        Ok(())
    }

    /// `PUT /boot-source`.
    ///
    /// # Errors
    /// `AfterStart`, `Ended`, `Config`.
    pub fn set_boot_source(&mut self, boot_source: BootSourceConfig) -> Result<(), ControlError> {
        self.not_started()?;
        boot_source.validate()?;
        boot_source.check_files()?;
        self.change_config(|config| {
            config.boot_source = Some(boot_source);
            Ok(())
        })
    }

    /// Adds a device, or replaces the one of the same name: `PUT /drives/{id}`, `/entropy` and the others of a
    /// [`ConfiguredDevice`].
    ///
    /// # Errors
    /// `AfterStart`, `Ended`, `Config`.
    pub fn set_device(&mut self, device: impl ConfiguredDevice) -> Result<(), ControlError> {
        self.not_started()?;
        device.validate(&self.config.machine_config)?;
        device.check_files()?;
        self.change_config(|config| {
            device.store(config);
            Ok(())
        })
    }

    /// `GET /vm/sharing`: what of the guest's memory is shared.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `Machine`.
    pub fn sharing(&mut self) -> Result<SharingReport, ControlError> {
        Ok(self.guest()?.0.sharing()?)
    }

    /// `GET /vm/sharing/pages/{address}`: what backs a page of the guest.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn page(&mut self, address: Address) -> Result<PageReport, ControlError> {
        Ok(self.guest()?.0.page(address)?)
    }

    /// `GET /vm/sharing/files/{page}`: the guest's pages that a page of a file backs.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn pages_of(&mut self, page: FilePage) -> Result<FilePageReport, ControlError> {
        Ok(self.guest()?.0.pages_of(page))
    }

    /// `InstanceStart`: `launch` builds the guest and lets it run.
    ///
    /// # Errors
    /// `AfterStart`, `Ended`, `Launch`; the guest can be configured and started again then.
    pub fn start(
        &mut self,
        launch: impl FnOnce(&VmConfig, Origin) -> Result<Box<dyn Guest>, LaunchError>,
    ) -> Result<(), ControlError> {
        self.not_started()?;
        let asked = self.times.asked();
        let guest = launch(&self.config, Origin::Kernel)?;
        self.times.boots(asked);
        self.life = Life::Started {
            guest,
            paused: false,
        };
        Ok(())
    }

    /// `PATCH /vm` to `Paused`. A paused guest stays paused.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`.
    pub fn pause(&mut self) -> Result<(), ControlError> {
        let (guest, paused) = self.guest()?;
        if !*paused {
            guest.pause();
            *paused = true;
        }
        Ok(())
    }

    /// `PATCH /vm` to `Resumed`. A running guest goes on running.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`.
    pub fn resume(&mut self) -> Result<(), ControlError> {
        let (guest, paused) = self.guest()?;
        if *paused {
            guest.resume();
            *paused = false;
        }
        Ok(())
    }

    /// `PUT /snapshot/create`.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `NotPaused`, `Snapshot`; the guest can go on all the same.
    pub fn create_snapshot(&mut self, request: &CreateSnapshot) -> Result<(), ControlError> {
        self.guest()?;
        self.note_commits();
        let mut config = self.config.clone();
        // The snapshot may be loaded by a process in another folder.
        config.make_paths_absolute()?;
        match self.guest()? {
            (_, false) => Err(ControlError::NotPaused),
            (guest, true) => Ok(guest.snapshot(request, &config)?),
        }
    }

    /// `PUT /snapshot/load`: `launch` builds the guest, which stands still then.
    ///
    /// # Errors
    /// `AfterStart`, `Ended`, `Configured`, `Snapshot`, `Config`, `Launch`; another can be loaded then.
    pub fn load_snapshot(
        &mut self,
        request: &LoadSnapshot,
        launch: impl FnOnce(&VmConfig, Origin) -> Result<Box<dyn Guest>, LaunchError>,
    ) -> Result<(), ControlError> {
        self.unconfigured()?;
        // The time of a restore includes reading the snapshot.
        let asked = Instant::now();
        let loading = SnapshotFiles::open(request)?.read()?;
        self.load_since(asked, loading, request.resume_vm, launch)
    }

    fn unconfigured(&self) -> Result<(), ControlError> {
        self.not_started()?;
        match self.config.of_a_guest() {
            Some(field) => Err(ControlError::Configured(field)),
            None => Ok(()),
        }
    }

    /// As [`Control::load_snapshot`], of a snapshot that has been read.
    ///
    /// # Errors
    /// As [`Control::load_snapshot`].
    pub fn load(
        &mut self,
        loading: Loading,
        resume: bool,
        launch: impl FnOnce(&VmConfig, Origin) -> Result<Box<dyn Guest>, LaunchError>,
    ) -> Result<(), ControlError> {
        self.unconfigured()?;
        let asked = self.times.asked();
        self.load_since(asked, loading, resume, launch)
    }

    fn load_since(
        &mut self,
        asked: Instant,
        loading: Loading,
        resume: bool,
        launch: impl FnOnce(&VmConfig, Origin) -> Result<Box<dyn Guest>, LaunchError>,
    ) -> Result<(), ControlError> {
        let own = &self.config;
        let config = VmConfig {
            serial: own.serial.clone(),
            logger: own.logger.clone(),
            metrics: own.metrics.clone(),
            ..loading.config().clone()
        };
        config.validate()?;
        config.check_devices()?;
        let mut guest = launch(&config, Origin::Snapshot(Box::new(loading)))?;
        if resume {
            guest.resume();
        }
        self.times.restored(asked);
        self.life = Life::Started {
            guest,
            paused: !resume,
        };
        self.config = config;
        Ok(())
    }

    /// `SendCtrlAltDel`.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `Machine`.
    pub fn send_ctrl_alt_del(&mut self) -> Result<(), ControlError> {
        Ok(self.guest()?.0.send_ctrl_alt_del()?)
    }

    /// Ends the guest: stops it, closes its disks and writes the last metrics. Every later request is refused.
    pub fn end(&mut self) {
        let guest = match std::mem::replace(&mut self.life, Life::Ended) {
            Life::Started { guest, .. } => guest,
            Life::NotStarted | Life::Ended => return,
        };
        let devices = guest.metrics();
        guest.shutdown();
        if let Some(file) = &mut self.metrics
            && let Err(error) = file.write(&metrics::snapshot(&self.api, Some(&devices)))
        {
            tracing::warn!(error = %chain(&error), "the last metrics cannot be written");
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
