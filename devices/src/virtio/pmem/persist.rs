//! A pmem device, saved and restored.
//!
//! The memory itself is guest memory, and not the device's to save.

use serde::{Deserialize, Serialize};

use super::{KIND, VirtioPmem};
use crate::lifecycle::Device;
use crate::persist::{RestoreError, check_same};
use crate::rate_limiter::RateLimiterState;

/// Where the guest knows the memory to be, and how often it may flush it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemState {
    /// Its first address.
    pub start: u64,
    /// Its length in bytes.
    pub size: u64,
    /// What the rate limiter has left.
    #[serde(default, skip_serializing_if = "RateLimiterState::is_empty")]
    pub rate_limiter: RateLimiterState,
}

impl VirtioPmem {
    /// Where the guest knows the memory to be. For a device that is paused: every flush has been answered then; see
    /// [`crate::persist`].
    pub(crate) fn save_state(&self) -> PmemState {
        PmemState {
            start: self.config.start.get(),
            size: self.config.size.get(),
            rate_limiter: self.limiter.save_state(),
        }
    }

    /// Makes sure that the guest finds the memory where it was. The device is paused from then on, until
    /// [`Device::resume`].
    ///
    /// # Errors
    /// [`RestoreError`]: `InUse`, `Mismatch`.
    pub(crate) fn restore_state(&mut self, state: &PmemState) -> Result<(), RestoreError> {
        if self.active.is_some() {
            return Err(RestoreError::InUse { device: KIND.name });
        }
        let now = self.save_state();
        let address = |at| format!("{at:#x}");
        let (saved, start) = (address(state.start), address(now.start));
        check_same(KIND.name, "the memory's address", &saved, &start)?;
        check_same(KIND.name, "the memory's size", &state.size, &now.size)?;
        self.limiter.restore_state(KIND.name, &state.rate_limiter)?;
        self.pause();
        Ok(())
    }
}
