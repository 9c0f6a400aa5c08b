//! The entropy device.

use serde::{Deserialize, Serialize};

use super::{ConfigError, DeviceConfig, MachineConfig, RateLimiterConfig};

/// Firecracker's entropy device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EntropyConfig {
    /// Limits buffers that it fills, and their bytes; nothing where absent.
    #[serde(default, deserialize_with = "crate::object::optional")]
    pub rate_limiter: Option<RateLimiterConfig>,
}

impl DeviceConfig for EntropyConfig {
    fn field(&self) -> &'static str {
        "entropy"
    }

    fn validate(&self, _: &MachineConfig) -> Result<(), ConfigError> {
        Ok(())
    }
}
