//! Why a request about a guest is refused.

use std::io;

use config::ConfigError;
use devices::virtio::balloon::BalloonError;
use machine::MachineError;
use machine::snapshot::SnapshotError;

use super::guest::LaunchError;
use crate::logging::LogError;
use crate::mmds::MmdsError;

/// A request that is refused. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The configuration is not valid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The process cannot open a file from inside its jail.
    #[error(
        "the guest is in a jail: a file that is configured later has to be given by --jail allow=PATH, or to lie in the guest's own folder of the daemon"
    )]
    Jailed(#[source] ConfigError),
    /// Only a guest that has not started can be configured.
    #[error("The requested operation is not supported after starting the microVM.")]
    AfterStart,
    /// Only a started guest can do it.
    #[error("The requested operation is not supported before starting the microVM.")]
    BeforeStart,
    /// The guest has ended, and the process is about to.
    #[error("The guest has ended.")]
    Ended,
    /// There is no drive of that name.
    #[error("there is no drive {0}")]
    NoDrive(String),
    /// There is no network interface of that name.
    #[error("there is no network interface {0}")]
    NoInterface(String),
    /// The guest has no balloon.
    #[error("there is no balloon")]
    NoBalloon,
    /// The metadata are not valid.
    #[error(transparent)]
    Mmds(#[from] MmdsError),
    /// The balloon refuses.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// The guest cannot start.
    #[error("the guest cannot start")]
    Launch(#[from] LaunchError),
    /// The running guest refuses.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A guest that runs cannot be saved.
    #[error("the guest runs: pause it before you save it")]
    NotPaused,
    /// A snapshot cannot be loaded where something of the guest is configured already.
    #[error(
        "a snapshot brings its own {0}: load it before anything but logger, metrics and serial is configured"
    )]
    Configured(&'static str),
    /// The snapshot cannot be made or loaded.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The log cannot be changed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The metrics cannot be written.
    #[error("metrics.metrics_path")]
    Metrics(#[source] io::Error),
}
