//! The metadata that the guest can read about itself.

use std::sync::Arc;

use serde_json::Value;

use super::{Control, ControlError};
use crate::mmds::Mmds;

impl Control {
    /// The guest's metadata, which its vsock device answers with.
    pub fn mmds(&self) -> &Arc<Mmds> {
        &self.mmds
    }

    /// `PUT /mmds`, before the start and after it.
    ///
    /// # Errors
    /// `Mmds`.
    pub fn set_metadata(&mut self, metadata: Value) -> Result<(), ControlError> {
        Ok(self.mmds.put(metadata)?)
    }

    /// `PATCH /mmds`, before the start and after it.
    ///
    /// # Errors
    /// `Mmds`.
    pub fn update_metadata(&mut self, patch: Value) -> Result<(), ControlError> {
        Ok(self.mmds.patch(patch)?)
    }
}
