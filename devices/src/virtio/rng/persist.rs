//! An entropy device, saved and restored.

use serde::{Deserialize, Serialize};

use super::{KIND, VirtioRng};
use crate::lifecycle::Device;
use crate::persist::RestoreError;

/// Nothing: the device remembers no more than its ring, which the transport has. What it gave before the guest was saved and what it gives
/// after is new each time, also to each of several guests that are restored from one state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngState {}

impl VirtioRng {
    /// What the device remembers; see [`crate::persist`].
    #[expect(
        clippy::unused_self,
        reason = "it is called as that of the other devices is"
    )]
    pub(crate) fn save_state(&self) -> RngState {
        RngState {}
    }

    /// The device is paused from then on, until [`Device::resume`].
    ///
    /// # Errors
    /// `InUse`.
    pub(crate) fn restore_state(&mut self, state: &RngState) -> Result<(), RestoreError> {
        let RngState {} = state;
        if self.active.is_some() {
            return Err(RestoreError::InUse { device: KIND.name });
        }
        self.pause();
        Ok(())
    }
}
