//! How a guest shares memory with others.

use memshare::ShareMode;
use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::error::check_id;

/// How a guest shares memory. Not in Firecracker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SharingConfig {
    /// Which pages are shared.
    #[serde(default)]
    #[schema(value_type = String)]
    pub mode: ShareMode,
    /// The part of a core that the merger may use on average, in percent, 1 to 100.
    #[serde(default = "cpu_percent")]
    pub cpu_percent: u8,
    /// Contiguous reads of at least so many KiB are placed without a copy. Where absent, all reads are copied, and
    /// merged later.
    #[serde(default)]
    pub place_kib: Option<u32>,
    /// The guest shares with guests of this domain alone: 1 to 64 letters, digits and underscores. Guests without a
    /// domain are in one together.
    #[serde(default)]
    pub domain: Option<String>,
}

const fn cpu_percent() -> u8 {
    5
}

impl Default for SharingConfig {
    fn default() -> Self {
        Self {
            mode: ShareMode::default(),
            cpu_percent: cpu_percent(),
            place_kib: None,
            domain: None,
        }
    }
}

impl SharingConfig {
    /// Checks the fields.
    ///
    /// # Errors
    /// `Invalid`.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if let Some(domain) = &self.domain {
            check_id("sharing.domain", domain)?;
        }
        if (1..=100).contains(&self.cpu_percent) {
            Ok(())
        } else {
            Err(ConfigError::invalid(
                "sharing.cpu_percent",
                &self.cpu_percent,
                "1 to 100",
            ))
        }
    }
}
