//! From a request to the operation that carries it out.
//!
//! As with Firecracker: 200 with JSON, or 204, for a request that is carried out; 400 with a `fault_message` for one
//! that is refused, also for unknown paths and methods; 413 for a body that is too long.

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::StatusCode;
use hyper::body::{Body, Bytes, Incoming};
use hyper::{Method, Request, Response};
use serde_json::json;

use super::context::Context;
use super::operation::segments_of;
use super::operations::find_operation;
use super::response::{Content, Fault, response};
use host::report::chain;

use crate::metrics::count;

/// Carries out a request.
pub(super) async fn respond(
    context: &Context,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let counters = &context.metrics;
    match head.method {
        Method::GET => count(&counters.get),
        Method::PUT => count(&counters.put),
        Method::PATCH => count(&counters.patch),
        _ => {}
    }
    let path = head.uri.path();
    let done = match read(body, context.longest_body).await {
        Ok(body) => route(context, &head.method, path, &body),
        Err(fault) => Err(fault),
    };
    match done {
        Ok(content) => {
            tracing::info!(method = %head.method, path, "REST request done");
            let status = match content {
                Content::Empty => StatusCode::NO_CONTENT,
                Content::Json(_) | Content::Metrics(_) => StatusCode::OK,
            };
            response(status, content)
        }
        Err(fault) => {
            count(&counters.failures);
            tracing::info!(method = %head.method, path, fault = %chain(&fault), "REST request refused");
            response(
                fault.status(),
                Content::Json(json!({"fault_message": chain(&fault).to_string()})),
            )
        }
    }
}

async fn read(body: Incoming, longest: usize) -> Result<Bytes, Fault> {
    // A body whose head says that it is too long is refused before any of it is read.
    if body.size_hint().lower() > longest as u64 {
        return Err(Fault::TooLong(longest));
    }
    match Limited::new(body, longest).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(Fault::TooLong(longest)),
        Err(error) => Err(Fault::Body(error)),
    }
}

fn route(context: &Context, method: &Method, path: &str, body: &[u8]) -> Result<Content, Fault> {
    let found = find_operation(method.as_str(), path);
    let needs_body =
        found.is_none_or(|(operation, _)| operation.body().is_some_and(|body| body.is_required));
    match *method {
        Method::GET if !body.is_empty() => return Err(Fault::NeedlessBody(method.clone())),
        Method::PUT | Method::PATCH if body.is_empty() && needs_body => {
            return Err(Fault::NoBody(method.clone()));
        }
        _ => {}
    }
    if let Some((operation, id)) = found {
        return operation.handler.run(context, id, body);
    }
    let segments: Vec<&str> = segments_of(path).collect();
    match segments[..] {
        ["drives" | "pmem"] if matches!(*method, Method::PUT | Method::PATCH) => Err(Fault::NoId),
        _ => Err(Fault::Unknown(method.clone(), path.to_owned())),
    }
}
