//! The balloon: memory that a guest gives back.

use devices::virtio::balloon::BalloonConfig as Device;
use serde::{Deserialize, Serialize};

use super::{ConfigError, DeviceConfig, MachineConfig};

/// Pages of 4 KiB in a MiB.
pub const PAGES_PER_MIB: u32 = 256;

/// Firecracker's `balloon`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// Memory that the guest gives back, in MiB; no more than it has.
    pub amount_mib: u32,
    /// The guest takes memory out of the balloon rather than run out of it.
    pub deflate_on_oom: bool,
    /// Seconds between two reports of statistics; no statistics where 0.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// The guest names its free pages when the host starts a run of hinting.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// The guest reports its free pages all the time.
    #[serde(default)]
    pub free_page_reporting: bool,
}

impl BalloonConfig {
    /// A balloon of size 0 with free page reporting.
    pub fn reporting() -> Self {
        Self {
            free_page_reporting: true,
            ..Self::default()
        }
    }

    /// The target size of the balloon, in pages of 4 KiB.
    pub fn target_pages(&self) -> u32 {
        // A guest has no more pages than 32 bits can count, because page numbers have 32 bits.
        self.amount_mib.saturating_mul(PAGES_PER_MIB)
    }
}

impl DeviceConfig for BalloonConfig {
    fn field(&self) -> &'static str {
        "balloon"
    }

    fn validate(&self, machine: &MachineConfig) -> Result<(), ConfigError> {
        let memory = machine.mem_size_mib;
        if self.amount_mib > memory {
            return Err(ConfigError::invalid(
                "balloon.amount_mib",
                &self.amount_mib,
                format!("{memory}, which the guest has, or less"),
            ));
        }
        Ok(())
    }
}

impl From<BalloonConfig> for Device {
    fn from(config: BalloonConfig) -> Self {
        Self {
            target_pages: config.target_pages(),
            deflate_on_oom: config.deflate_on_oom,
            statistics_interval: config.stats_polling_interval_s,
            hinting: config.free_page_hinting,
            reporting: config.free_page_reporting,
        }
    }
}

/// The fields of a balloon that can change while its guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// Its new size in MiB.
    pub amount_mib: u32,
}

/// Another interval for the statistics of a balloon that has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatisticsUpdate {
    /// The interval in seconds.
    pub stats_polling_interval_s: u16,
}

/// How a run of free page hinting is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HintingStart {
    /// The guest may use the reported pages again as soon as it has reported all of them.
    #[serde(default = "acknowledged")]
    pub acknowledge_on_stop: bool,
}

const fn acknowledged() -> bool {
    true
}

impl Default for HintingStart {
    fn default() -> Self {
        Self {
            acknowledge_on_stop: acknowledged(),
        }
    }
}
