//! What carries out an operation: it reads the body, locks the guest for as long as the operation takes, and answers.

use std::marker::PhantomData;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use utoipa::ToSchema;

use super::context::Context;
use super::description::{Answer, RequestBody, Schema};
use super::response::{Content, Fault, parse, to_json};
use config::ConfiguredDevice;

/// Carries out an operation, and says what it takes and answers.
pub(super) trait Handler: Sync {
    /// Carries out a request with the name in its path and its body.
    fn run(&self, context: &Context, name: &str, body: &[u8]) -> Result<Content, Fault>;

    fn body(&self) -> Option<RequestBody> {
        None
    }

    fn answer(&self) -> Answer {
        Answer::Nothing
    }
}

/// Answers with something.
pub(super) struct Answers<T>(pub(super) fn(&Context, &str) -> Result<T, Fault>);

impl<T: Serialize + ToSchema> Handler for Answers<T> {
    fn run(&self, context: &Context, name: &str, _: &[u8]) -> Result<Content, Fault> {
        to_json((self.0)(context, name)?)
    }

    fn answer(&self) -> Answer {
        Answer::Json(Schema::of::<T>())
    }
}

/// Changes something by a body.
pub(super) struct Takes<T>(pub(super) fn(&Context, &str, T) -> Result<(), Fault>);

impl<T: DeserializeOwned + ToSchema> Handler for Takes<T> {
    fn run(&self, context: &Context, name: &str, body: &[u8]) -> Result<Content, Fault> {
        (self.0)(context, name, parse(body)?)?;
        Ok(Content::Empty)
    }

    fn body(&self) -> Option<RequestBody> {
        Some(RequestBody::required::<T>())
    }
}

/// Changes something by a body, or as its type's default says where there is none.
pub(super) struct MayTake<T>(pub(super) fn(&Context, T) -> Result<(), Fault>);

impl<T: DeserializeOwned + Default + ToSchema> Handler for MayTake<T> {
    fn run(&self, context: &Context, _: &str, body: &[u8]) -> Result<Content, Fault> {
        let asked = match body {
            [] => T::default(),
            body => parse(body)?,
        };
        (self.0)(context, asked)?;
        Ok(Content::Empty)
    }

    fn body(&self) -> Option<RequestBody> {
        Some(RequestBody::optional::<T>())
    }
}

/// Changes something by the fields of an object that a type describes but does not read.
pub(super) struct TakesFields<T>(
    pub(super) fn(&Context, Value) -> Result<(), Fault>,
    pub(super) PhantomData<fn() -> T>,
);

impl<T: ToSchema> Handler for TakesFields<T> {
    fn run(&self, context: &Context, _: &str, body: &[u8]) -> Result<Content, Fault> {
        (self.0)(context, parse(body)?)?;
        Ok(Content::Empty)
    }

    fn body(&self) -> Option<RequestBody> {
        Some(RequestBody::required::<T>())
    }
}

/// Answers with an object that a type describes but does not write.
pub(super) struct AnswersFields<T>(
    pub(super) fn(&Context) -> Result<Value, Fault>,
    pub(super) PhantomData<fn() -> T>,
);

impl<T: ToSchema> Handler for AnswersFields<T> {
    fn run(&self, context: &Context, _: &str, _: &[u8]) -> Result<Content, Fault> {
        to_json((self.0)(context)?)
    }

    fn answer(&self) -> Answer {
        Answer::Json(Schema::of::<T>())
    }
}

/// Adds a device, whose name is that in the path.
pub(super) struct AddsDevice<D>(pub(super) PhantomData<fn() -> D>);

impl<D: ConfiguredDevice + DeserializeOwned> AddsDevice<D> {
    /// The device of a request.
    pub(super) fn device(name: &str, body: &[u8]) -> Result<D, Fault> {
        let device: D = parse(body)?;
        if device.id().unwrap_or_default() != name {
            return Err(Fault::OtherId);
        }
        Ok(device)
    }
}

impl<D: ConfiguredDevice + DeserializeOwned + ToSchema> Handler for AddsDevice<D> {
    fn run(&self, context: &Context, name: &str, body: &[u8]) -> Result<Content, Fault> {
        let device = Self::device(name, body)?;
        context.control().set_device(device)?;
        Ok(Content::Empty)
    }

    fn body(&self) -> Option<RequestBody> {
        Some(RequestBody::required::<D>())
    }
}

/// Answers with the counters.
pub(super) struct AnswersMetrics;

impl Handler for AnswersMetrics {
    fn run(&self, context: &Context, _: &str, _: &[u8]) -> Result<Content, Fault> {
        let scrape = context.control().scrape();
        Ok(Content::Metrics(scrape.encode()?))
    }

    fn answer(&self) -> Answer {
        Answer::Metrics
    }
}
