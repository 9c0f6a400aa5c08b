//! The serial console of a guest.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, Request, State as Of};
use axum::http::StatusCode;
use axum::response::Response;
use hyper::upgrade::OnUpgrade;

use super::request::{Context, Handled, raw};
use crate::serve::console;
use crate::serve::fault::{Fault, FaultBody};

/// The output of a guest's serial console: the last of it, and then what comes. With `Upgrade: coppice-console`, the
/// connection becomes the serial line.
#[utoipa::path(get, path = "/vms/{id}/console", tag = "guests", params(("id" = String, Path)), responses(
    (status = 200, content_type = "application/octet-stream", description = "A stream, to the end of the guest."),
    (status = 101, description = "The connection is the line."),
    (status = 404, body = FaultBody), (status = 409, body = FaultBody)))]
pub(in crate::serve) async fn console_output(
    Of(daemon): Context,
    Path(id): Path<String>,
    request: Request,
) -> Handled<Response> {
    let (mut head, _) = request.into_parts();
    let upgrade = head.extensions.remove::<OnUpgrade>();
    console::output(daemon.vm(&id)?, &head.headers, upgrade).await
}

/// Gives the guest something to read on its serial console.
#[utoipa::path(put, path = "/vms/{id}/console", tag = "guests", params(("id" = String, Path)),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"), responses(
    (status = 204), (status = 400, body = FaultBody), (status = 404, body = FaultBody), (status = 409, body = FaultBody),
    (status = 413, body = FaultBody)))]
pub(in crate::serve) async fn console_input(
    Of(daemon): Context,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Handled<StatusCode> {
    let (vm, body) = (daemon.vm(&id)?, raw(body)?);
    if body.is_empty() {
        let text = "there is nothing to give the guest".to_owned();
        return Err(Fault::Body(StatusCode::BAD_REQUEST, text));
    }
    console::input(vm, body).await?;
    Ok(StatusCode::NO_CONTENT)
}
