//! The parts of a request: its body, its query, and its caller.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, FromRequestParts, Request, State as Of};
use axum::http::request::Parts;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::serve::daemon::Daemon;
use crate::serve::fault::Fault;
use crate::serve::peer::Caller;
use control::api;

/// How old the measured memory of guests may be where it is shown.
pub(super) const SHOWN: Duration = Duration::from_secs(2);

/// The response to a request, or why there is none.
pub(super) type Handled<T> = Result<T, Fault>;
/// The daemon, as a function that handles a request gets it.
pub(super) type Context = Of<Arc<Daemon>>;

/// A body of JSON.
pub(in crate::serve) struct JsonBody<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = Fault;

    async fn from_request(request: Request, state: &S) -> Handled<Self> {
        let body = raw(Bytes::from_request(request, state).await)?;
        Ok(Self(api::parse_object(&body)?))
    }
}

pub(super) fn raw(body: Result<Bytes, BytesRejection>) -> Handled<Bytes> {
    body.map_err(|rejection| Fault::Body(rejection.status(), rejection.body_text()))
}

/// A query.
pub(in crate::serve) struct Query<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Fault;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Handled<Self> {
        let query = axum::extract::Query::<T>::from_request_parts(parts, state).await;
        let query = query.map_err(|rejection| Fault::Query(rejection.body_text()))?;
        Ok(Self(query.0))
    }
}

/// `?word`, `?word=true` or `?word=false`.
pub(super) fn flag<'de, D: serde::Deserializer<'de>>(from: D) -> Result<bool, D::Error> {
    match String::deserialize(from)?.as_str() {
        "" | "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(serde::de::Error::custom("neither true nor false")),
    }
}

pub(super) fn uid(caller: Caller) -> Handled<u32> {
    match caller {
        Caller::User(uid) => Ok(uid),
        Caller::Web(_) => Err(Fault::ReadOnly),
    }
}
