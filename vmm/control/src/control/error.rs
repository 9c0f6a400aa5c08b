//! Why a request about a guest is refused.

use std::io;

use config::ConfigError;
use devices::virtio::balloon::BalloonError;
use host::report::chain;
use machine::MachineError;
use machine::snapshot::SnapshotError;

use super::guest::LaunchError;
use crate::logging::LogError;
use crate::mmds::MmdsError;

/// A request that is refused. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The configuration cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file that the process, in its jail, cannot open.
    #[error(
        "{} (the guest is in a jail: what it is told of later has to be given by --jail allow=PATH, or to lie in its own folder of the daemon)",
        chain(.0)
    )]
    Jailed(ConfigError),
    /// Only a guest that has not started can be configured.
    #[error("The requested operation is not supported after starting the microVM.")]
    AfterStart,
    /// Only a started guest can do it.
    #[error("The requested operation is not supported before starting the microVM.")]
    BeforeStart,
    /// The guest has come to its end, and so does the process.
    #[error("The guest has ended.")]
    Ended,
    /// There is no drive of that name.
    #[error("there is no drive {0}")]
    NoDrive(String),
    /// The guest has no balloon.
    #[error("there is no balloon")]
    NoBalloon,
    /// The metadata cannot be.
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
    /// A guest that something is configured for cannot be loaded.
    #[error(
        "a snapshot brings its own {0}: load it before anything but logger, metrics and serial is configured"
    )]
    Configured(&'static str),
    /// A snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The log cannot be changed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The metrics cannot be written.
    #[error("metrics.metrics_path")]
    Metrics(#[source] io::Error),
}
