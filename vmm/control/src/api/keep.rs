//! What a change of a guest's settings comes to, worked out from the request alone: so that the daemon has the settings
//! with which it starts the guest again from its operator, and never from the guest's process.

use std::marker::PhantomData;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::context::Context;
use super::description::RequestBody;
use super::handler::{AddsDevice, Handler};
use super::response::{Content, Fault, parse};
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

/// Changes the configuration by a body: the same in the guest's process, before the start, and in settings.
pub(super) struct Sets<T>(pub(super) fn(&mut VmConfig, T) -> Result<(), ConfigError>);

impl<T: DeserializeOwned + ToSchema> Handler for Sets<T> {
    fn run(&self, context: &Context, _: &str, body: &[u8]) -> Result<Content, Fault> {
        let asked = parse(body)?;
        let mut control = context.control();
        control.change_config(|config| (self.0)(config, asked))?;
        Ok(Content::Empty)
    }

    fn body(&self) -> Option<RequestBody> {
        Some(RequestBody::required::<T>())
    }
}

impl<T: DeserializeOwned> Keep for Sets<T> {
    fn apply(&self, settings: &mut GuestSettings, _: &str, body: &[u8]) -> Result<(), Fault> {
        let asked = parse(body)?;
        (self.0)(&mut settings.config, asked).map_err(ControlError::from)?;
        Ok(())
    }
}

/// As [`Sets`], by the fields of an object that a type describes but does not read.
pub(super) struct SetsFields<T>(
    pub(super) fn(&mut VmConfig, &Value) -> Result<(), ConfigError>,
    pub(super) PhantomData<fn() -> T>,
);

impl<T: ToSchema> Handler for SetsFields<T> {
    fn run(&self, context: &Context, _: &str, body: &[u8]) -> Result<Content, Fault> {
        let asked = parse(body)?;
        let mut control = context.control();
        control.change_config(|config| (self.0)(config, &asked))?;
        Ok(Content::Empty)
    }

    fn body(&self) -> Option<RequestBody> {
        Some(RequestBody::required::<T>())
    }
}

impl<T> Keep for SetsFields<T> {
    fn apply(&self, settings: &mut GuestSettings, _: &str, body: &[u8]) -> Result<(), Fault> {
        let asked = parse(body)?;
        (self.0)(&mut settings.config, &asked).map_err(ControlError::from)?;
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
