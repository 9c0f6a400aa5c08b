//! The entropy device.

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::{ConfigError, DeviceConfig, MachineConfig};

/// The entropy device. It has nothing to set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EntropyConfig {
    /// Not supported: refused unless `null`.
    #[serde(default, skip_serializing)]
    #[schema(ignore)]
    pub rate_limiter: Option<IgnoredAny>,
}

impl DeviceConfig for EntropyConfig {
    fn field(&self) -> &'static str {
        "entropy"
    }

    fn validate(&self, _: &MachineConfig) -> Result<(), ConfigError> {
        match self.rate_limiter {
            Some(IgnoredAny) => Err(ConfigError::Unsupported {
                field: "entropy.rate_limiter",
            }),
            None => Ok(()),
        }
    }
}
