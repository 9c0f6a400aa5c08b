//! What a change of a guest's settings comes to, worked out from the request alone: so that the daemon has the settings
//! with which it starts the guest again from its operator, and never from the guest's process.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::handler::AddsDevice;
use super::response::{Fault, parse};
use crate::control::ControlError;
use crate::mmds::Mmds;
use config::{ConfigError, ConfiguredDevice, VmConfig};

/// The settings of a guest that outlive its process.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GuestSettings {
    /// Its configuration.
    pub config: VmConfig,
    /// Its metadata.
    pub metadata: Map<String, Value>,
}

/// Why a request cannot be applied to settings.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct SettingsError(#[from] Fault);

/// Applies a request to settings.
pub(super) trait Keep: Sync {
    /// Applies a request with the name in its path and its body. The settings are of no use where it fails.
    fn apply(&self, settings: &mut GuestSettings, name: &str, body: &[u8]) -> Result<(), Fault>;
}

/// Changes the configuration by a body.
pub(super) struct Sets<T>(pub(super) fn(&mut VmConfig, T) -> Result<(), ConfigError>);

impl<T: DeserializeOwned> Keep for Sets<T> {
    fn apply(&self, settings: &mut GuestSettings, _: &str, body: &[u8]) -> Result<(), Fault> {
        let asked = parse(body)?;
        (self.0)(&mut settings.config, asked).map_err(ControlError::from)?;
        Ok(())
    }
}

/// Changes a device of the configuration, whose name is that in the path, by a body.
pub(super) struct SetsNamed<T>(pub(super) fn(&mut VmConfig, &str, T) -> Result<(), Fault>);

impl<T: DeserializeOwned> Keep for SetsNamed<T> {
    fn apply(&self, settings: &mut GuestSettings, name: &str, body: &[u8]) -> Result<(), Fault> {
        (self.0)(&mut settings.config, name, parse(body)?)
    }
}

impl<D: ConfiguredDevice + DeserializeOwned> Keep for AddsDevice<D> {
    fn apply(&self, settings: &mut GuestSettings, name: &str, body: &[u8]) -> Result<(), Fault> {
        let device = Self::device(name, body)?;
        device.store(&mut settings.config);
        Ok(())
    }
}

/// Changes the metadata by a body, in the way that the store of a guest's process does.
pub(super) struct SetsMetadata(pub(super) fn(&Mmds, Value) -> Result<(), ControlError>);

impl Keep for SetsMetadata {
    fn apply(&self, settings: &mut GuestSettings, _: &str, body: &[u8]) -> Result<(), Fault> {
        let store = Mmds::holding(std::mem::take(&mut settings.metadata));
        (self.0)(&store, parse(body)?)?;
        settings.metadata = store.into_object();
        Ok(())
    }
}
