//! An entropy device, saved and restored.

use serde::{Deserialize, Serialize};

use super::{NAME, VirtioRng};
use crate::persist::RestoreError;

/// Nothing: the device remembers no more than its ring, which the transport has. What it gave before the guest was saved and what it gives
/// after is new each time, also to each of several guests that are restored from one state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngState {}

impl VirtioRng {
    /// What the device remembers; see [`crate::persist`].
    pub fn save(&self) -> RngState {
        RngState {}
    }

    /// The device is paused from then on, until [`VirtioRng::resume`].
    ///
    /// # Errors
    /// `InUse`.
    pub fn restore(&mut self, state: &RngState) -> Result<(), RestoreError> {
        let RngState {} = state;
        if self.active.is_some() {
            return Err(RestoreError::InUse { device: NAME });
        }
        self.pause();
        Ok(())
    }
}
