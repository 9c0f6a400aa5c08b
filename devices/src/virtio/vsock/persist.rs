//! A vsock device, saved and restored.

use serde::{Deserialize, Serialize};

use super::{KIND, VirtioVsock};
use crate::lifecycle::Device;
use crate::persist::RestoreError;

/// Nothing: connections are of the process that has them, and a guest that goes on elsewhere is told that they are gone. Its context identifier is
/// what its new device is made with, and may be another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {}

impl VirtioVsock {
    /// What the device remembers; see [`crate::persist`].
    #[expect(
        clippy::unused_self,
        reason = "it is called as that of the other devices is"
    )]
    pub(crate) fn save_state(&self) -> VsockState {
        VsockState {}
    }

    /// The device is paused from then on, until [`Device::resume`]; then it tells the driver that its connections are gone (VIRTIO 1.2,
    /// 5.10.6.7), at which the driver asks for its context identifier again.
    ///
    /// # Errors
    /// `InUse`.
    pub(crate) fn restore_state(&mut self, state: &VsockState) -> Result<(), RestoreError> {
        let VsockState {} = state;
        if self.active.is_some() {
            return Err(RestoreError::InUse { device: KIND.name });
        }
        self.pause();
        self.owes_reset = true;
        Ok(())
    }
}
