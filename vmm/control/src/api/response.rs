//! What is answered to a request: the body of a response, or the fault for which the request is refused.

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use machine::PageNameError;

use crate::control::ControlError;
use crate::metrics;

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error("Request payload is larger than the limit of {0} bytes.")]
    TooLong(usize),
    #[error("The body of the request cannot be read")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("Invalid request method and/or path: {0} {1:.200}.")]
    Unknown(Method, String),
    #[error("{0} request cannot have a body.")]
    NeedlessBody(Method),
    #[error("Empty {0} request.")]
    NoBody(Method),
    #[error("An error occurred when deserializing the json body of a request")]
    Json(#[from] serde_json::Error),
    #[error("The metrics cannot be written")]
    Metrics(#[from] std::fmt::Error),
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
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::TooLong(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Body(_)
            | Self::Unknown(..)
            | Self::NeedlessBody(_)
            | Self::NoBody(_)
            | Self::Json(_)
            | Self::Metrics(_)
            | Self::NoId
            | Self::OtherId
            | Self::Page(_)
            | Self::Control(_) => StatusCode::BAD_REQUEST,
        }
    }
}

/// The body of a response.
pub(super) enum Content {
    Empty,
    Json(Value),
    Metrics(String),
}

pub(super) fn response(status: StatusCode, content: Content) -> Response<Full<Bytes>> {
    let (body, kind) = match content {
        Content::Empty => (String::new(), None),
        Content::Json(value) => (value.to_string(), Some("application/json")),
        Content::Metrics(text) => (text, Some(metrics::CONTENT_TYPE)),
    };
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    if let Some(kind) = kind {
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    }
    response
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

pub(super) fn to_json(value: impl Serialize) -> Result<Content, Fault> {
    Ok(Content::Json(serde_json::to_value(value)?))
}
