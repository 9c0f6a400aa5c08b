//! Requests, and what is answered to them.
//!
//! As with Firecracker: 200 with JSON, or 204, for what was done; 400 with a `fault_message` for what was not, also for unknown paths and
//! methods; 413 for a body that is too long.

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use parking_lot::MutexGuard;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{Context, operations};
use config::limits::MAX_BODY;
use config::operations::{GuestOperation, OperationKind, RequestBody, segments_of};
use host::report::chain;

use crate::control::{Control, ControlError};
use crate::metrics::{self, count};
use machine::PageNameError;

/// A request that is not done.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error("Request payload is larger than the limit of {MAX_BODY} bytes.")]
    TooLong,
    #[error("The body of the request cannot be read: {0}.")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error("Invalid request method and/or path: {0} {1:.200}.")]
    Unknown(Method, String),
    #[error("{0} request cannot have a body.")]
    NeedlessBody(Method),
    #[error("Empty {0} request.")]
    NoBody(Method),
    #[error("An error occurred when deserializing the json body of a request: {0}.")]
    Json(#[from] serde_json::Error),
    #[error("The metrics cannot be written: {0}.")]
    Metrics(#[from] std::fmt::Error),
    #[error("{0:?} has no handler: this is a defect of Coppice.")]
    NoHandler(OperationKind),
    #[error("The ID cannot be empty.")]
    NoId,
    #[error("The id from the path does not match the id from the body!")]
    OtherId,
    #[error(transparent)]
    Page(#[from] PageNameError),
    #[error(transparent)]
    Control(#[from] ControlError),
}

impl Fault {
    fn status(&self) -> StatusCode {
        match self {
            Self::TooLong => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Body(_)
            | Self::Unknown(..)
            | Self::NeedlessBody(_)
            | Self::NoBody(_)
            | Self::Json(_)
            | Self::Metrics(_)
            | Self::NoHandler(_)
            | Self::NoId
            | Self::OtherId
            | Self::Page(_)
            | Self::Control(_) => StatusCode::BAD_REQUEST,
        }
    }
}

/// What is answered to a request that is done.
pub(super) enum Answer {
    Done,
    Json(Value),
    Metrics(String),
}

fn response(status: StatusCode, answer: Answer) -> Response<Full<Bytes>> {
    let (body, content) = match answer {
        Answer::Done => (String::new(), None),
        Answer::Json(value) => (value.to_string(), Some("application/json")),
        Answer::Metrics(text) => (text, Some(metrics::CONTENT_TYPE)),
    };
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    if let Some(content) = content {
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static(content));
    }
    response
}

/// Does what `request` asks for.
pub(super) async fn answer(context: &Context, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let counters = &context.metrics;
    match head.method {
        Method::GET => count(&counters.get),
        Method::PUT => count(&counters.put),
        Method::PATCH => count(&counters.patch),
        _ => {}
    }
    let path = head.uri.path();
    let done = match read(body).await {
        Ok(body) => route(context, &head.method, path, &body),
        Err(fault) => Err(fault),
    };
    match done {
        Ok(answer) => {
            tracing::info!(method = %head.method, path, "REST request done");
            let status = match answer {
                Answer::Done => StatusCode::NO_CONTENT,
                Answer::Json(_) | Answer::Metrics(_) => StatusCode::OK,
            };
            response(status, answer)
        }
        Err(fault) => {
            count(&counters.failures);
            tracing::info!(method = %head.method, path, fault = %chain(&fault), "REST request refused");
            response(
                fault.status(),
                Answer::Json(json!({"fault_message": chain(&fault).to_string()})),
            )
        }
    }
}

async fn read(body: Incoming) -> Result<Bytes, Fault> {
    // A length that is told is refused before any of it is read.
    if body.size_hint().lower() > MAX_BODY as u64 {
        return Err(Fault::TooLong);
    }
    match Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(Fault::TooLong),
        Err(error) => Err(Fault::Body(error)),
    }
}

pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    Ok(parse_object(body)?)
}

/// Parses an object of JSON. An array of its fields, which serde would take for one, is none.
///
/// # Errors
/// Where it is not of the expected shape.
pub fn parse_object<T: DeserializeOwned>(body: &[u8]) -> serde_json::Result<T> {
    let parsed = serde_json::from_slice(body)?;
    if body.trim_ascii_start().starts_with(b"[") {
        return Err(serde::de::Error::custom("expected an object, not an array"));
    }
    Ok(parsed)
}

pub(super) fn tell(value: impl Serialize) -> Result<Answer, Fault> {
    Ok(Answer::Json(serde_json::to_value(value)?))
}

/// The guest. Its lock is taken only once a request has been read and understood, and held for that request alone.
pub(super) fn control(context: &Context) -> MutexGuard<'_, Control> {
    context.control.lock()
}

fn route(context: &Context, method: &Method, path: &str, body: &[u8]) -> Result<Answer, Fault> {
    let found = GuestOperation::find(method.as_str(), path);
    let needs_body = found.is_none_or(|(operation, _)| operation.body == RequestBody::Required);
    match *method {
        Method::GET if !body.is_empty() => return Err(Fault::NeedlessBody(method.clone())),
        Method::PUT | Method::PATCH if body.is_empty() && needs_body => {
            return Err(Fault::NoBody(method.clone()));
        }
        _ => {}
    }
    if let Some((operation, id)) = found {
        return operations::carry_out(operation.kind, context, id, body);
    }
    let segments: Vec<&str> = segments_of(path).collect();
    match segments[..] {
        ["drives" | "pmem"] if matches!(*method, Method::PUT | Method::PATCH) => Err(Fault::NoId),
        _ => Err(Fault::Unknown(method.clone(), path.to_owned())),
    }
}
