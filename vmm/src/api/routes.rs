//! Requests, and what is answered to them.
//!
//! As with Firecracker: 200 with JSON, or 204, for what was done; 400 with a `fault_message` for what was not, also for unknown paths and
//! methods; 413 for a body that is too long.

use std::path::PathBuf;
use std::sync::{MutexGuard, PoisonError};

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Context, balloon};
use crate::config::{DriveConfig, DriveUpdate, PmemConfig, VmConfig};
use crate::control::{Control, ControlError};
use crate::metrics::{self, count};
use crate::snapshot::{CreateSnapshot, LoadSnapshot};

/// Longest body of a request in bytes; Firecracker's default.
pub const MAX_BODY: usize = 51200;

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
    #[error("The ID cannot be empty.")]
    NoId,
    #[error("The id from the path does not match the id from the body!")]
    OtherId,
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
            | Self::NoId
            | Self::OtherId
            | Self::Control(_) => StatusCode::BAD_REQUEST,
        }
    }
}

/// The body of `PUT /actions`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Action {
    action_type: ActionType,
}

#[derive(Clone, Copy, Deserialize)]
enum ActionType {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
}

/// The body of `PUT /drives/{id}/snapshot`: the new file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Snapshot {
    path_on_host: PathBuf,
}

/// The body of `PUT /drives/{id}/resize`: the size in bytes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resize {
    size: u64,
}

/// The body of `PUT /drives/{id}/compact`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Compact {
    #[serde(default)]
    find_zeros: bool,
}

/// The body of `PUT /drives/{id}/commit`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Commit {}

/// The body of `PUT /drives/{id}/job`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JobUpdate {
    state: JobState,
}

#[derive(Clone, Copy, Deserialize)]
enum JobState {
    Cancelled,
}

/// The body of `PATCH /vm`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VmUpdate {
    state: VmState,
}

#[derive(Clone, Copy, Deserialize)]
enum VmState {
    Paused,
    Resumed,
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
            tracing::info!(method = %head.method, path, %fault, "REST request refused");
            response(
                fault.status(),
                Answer::Json(json!({"fault_message": fault.to_string()})),
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
    context
        .control
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

fn route(context: &Context, method: &Method, path: &str, body: &[u8]) -> Result<Answer, Fault> {
    let segments: Vec<&str> = path.trim_start_matches('/').split_terminator('/').collect();
    let unknown = || Fault::Unknown(method.clone(), path.to_owned());
    match *method {
        Method::GET if !body.is_empty() => Err(Fault::NeedlessBody(method.clone())),
        Method::GET => match segments[..] {
            [] => tell(control(context).instance_info()),
            ["version"] => tell(json!({"firecracker_version": env!("CARGO_PKG_VERSION")})),
            ["machine-config"] => tell(&control(context).config().machine_config),
            ["metrics"] => {
                let scrape = control(context).scrape();
                Ok(Answer::Metrics(scrape.encode()?))
            }
            ["vm", "sharing"] => tell(control(context).sharing()?),
            ["vm", "jail"] => tell(control(context).jail()),
            ["vm", "config"] => tell(control(context).config()),
            ["drives", id, "job"] => tell(control(context).job(id)?),
            ["balloon", ref path @ ..] => balloon::get(context, path, unknown),
            _ => Err(unknown()),
        },
        Method::PATCH if body.is_empty() && balloon::needs_no_body(&segments) => {
            patch(context, &segments, body, unknown).map(|()| Answer::Done)
        }
        Method::PUT | Method::PATCH if body.is_empty() => Err(Fault::NoBody(method.clone())),
        Method::PUT => put(context, &segments, body, unknown).map(|()| Answer::Done),
        Method::PATCH => patch(context, &segments, body, unknown).map(|()| Answer::Done),
        _ => Err(unknown()),
    }
}

fn put(
    context: &Context,
    segments: &[&str],
    body: &[u8],
    unknown: impl Fn() -> Fault,
) -> Result<(), Fault> {
    match *segments {
        ["boot-source"] => {
            let boot_source = parse(body)?;
            control(context).set_boot_source(boot_source)?;
        }
        ["drives" | "pmem"] => return Err(Fault::NoId),
        ["drives", id] => {
            let drive: DriveConfig = parse(body)?;
            if drive.drive_id != id {
                return Err(Fault::OtherId);
            }
            control(context).set_drive(drive)?;
        }
        ["drives", id, "snapshot"] => {
            let Snapshot { path_on_host } = parse(body)?;
            control(context).snapshot_drive(id, &path_on_host)?;
        }
        ["drives", id, "resize"] => {
            let Resize { size } = parse(body)?;
            control(context).resize_drive(id, size)?;
        }
        ["drives", id, "compact"] => {
            let Compact { find_zeros } = parse(body)?;
            control(context).compact_drive(id, find_zeros)?;
        }
        ["drives", id, "commit"] => {
            let Commit {} = parse(body)?;
            control(context).commit_drive(id)?;
        }
        ["drives", id, "job"] => {
            let JobUpdate {
                state: JobState::Cancelled,
            } = parse(body)?;
            control(context).cancel_job(id)?;
        }
        ["pmem", id] => {
            let pmem: PmemConfig = parse(body)?;
            if pmem.id != id {
                return Err(Fault::OtherId);
            }
            control(context).set_pmem(pmem)?;
        }
        ["machine-config"] => {
            let machine = parse(body)?;
            control(context).set_machine_config(machine)?;
        }
        ["entropy"] => {
            let entropy = parse(body)?;
            control(context).set_entropy(entropy)?;
        }
        ["sharing"] => {
            let sharing = parse(body)?;
            control(context).set_sharing(sharing)?;
        }
        ["balloon"] => {
            let balloon = parse(body)?;
            control(context).set_balloon(balloon)?;
        }
        ["serial"] => {
            let serial = parse(body)?;
            control(context).set_serial(serial)?;
        }
        ["logger"] => {
            let logger = parse(body)?;
            control(context).set_logger(&logger)?;
        }
        ["metrics"] => {
            let metrics = parse(body)?;
            control(context).set_metrics(&metrics)?;
        }
        ["snapshot", "create"] => {
            let request: CreateSnapshot = parse(body)?;
            control(context).create_snapshot(&request)?;
        }
        ["snapshot", "load"] => {
            let request: LoadSnapshot = parse(body)?;
            let launch = |config: &VmConfig, origin| (context.launch)(config, origin);
            control(context).load_snapshot(&request, launch)?;
        }
        ["actions"] => {
            let Action { action_type } = parse(body)?;
            match action_type {
                ActionType::InstanceStart => {
                    control(context).start(|config, origin| (context.launch)(config, origin))?;
                }
                ActionType::SendCtrlAltDel => control(context).send_ctrl_alt_del()?,
                ActionType::FlushMetrics => control(context).flush_metrics()?,
            }
        }
        _ => return Err(unknown()),
    }
    Ok(())
}

fn patch(
    context: &Context,
    segments: &[&str],
    body: &[u8],
    unknown: impl Fn() -> Fault,
) -> Result<(), Fault> {
    match *segments {
        ["drives"] => return Err(Fault::NoId),
        ["drives", id] => {
            let update: DriveUpdate = parse(body)?;
            if update.drive_id != id {
                return Err(Fault::OtherId);
            }
            control(context).update_drive(&update)?;
        }
        ["machine-config"] => {
            let update: Value = parse(body)?;
            control(context).update_machine_config(&update)?;
        }
        ["balloon", ref path @ ..] => return balloon::patch(context, path, body, unknown),
        ["vm"] => {
            let VmUpdate { state } = parse(body)?;
            match state {
                VmState::Paused => control(context).pause()?,
                VmState::Resumed => control(context).resume()?,
            }
        }
        _ => return Err(unknown()),
    }
    Ok(())
}
