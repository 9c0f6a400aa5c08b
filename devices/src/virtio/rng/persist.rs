//! An entropy device, saved and restored.

use serde::{Deserialize, Serialize};

use super::{KIND, VirtioRng};
use crate::lifecycle::Device;
use crate::persist::RestoreError;
use crate::rate_limiter::RateLimiterState;

/// The device remembers no more than its ring, which the transport has, and what its rate limiter has left. What it
/// gave before the guest was saved and what it gives after is new each time, also to each of several guests that are
/// restored from one state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngState {
    /// What the rate limiter has left.
    #[serde(default, skip_serializing_if = "RateLimiterState::is_empty")]
    pub rate_limiter: RateLimiterState,
}

impl VirtioRng {
    /// What the device remembers; see [`crate::persist`].
    pub(crate) fn save_state(&self) -> RngState {
        RngState {
            rate_limiter: self.limiter.save_state(),
        }
    }

    /// The device is paused from then on, until [`Device::resume`].
    ///
    /// # Errors
    /// `InUse`, `Invalid`.
    pub(crate) fn restore_state(&mut self, state: &RngState) -> Result<(), RestoreError> {
        if self.active.is_some() {
            return Err(RestoreError::InUse { device: KIND.name });
        }
        self.limiter.restore_state(KIND.name, &state.rate_limiter)?;
        self.pause();
        Ok(())
    }
}
