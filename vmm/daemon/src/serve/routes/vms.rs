//! Guests: made, looked at, started, stopped, deleted.

use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Extension, Path, State as Of};
use axum::http::StatusCode;
use axum::http::header::{HeaderValue, LOCATION};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::networks;
use super::request::{Context, Handled, JsonBody, Query, SHOWN, flag, raw, uid};
use crate::serve::fault::{Fault, FaultBody};
use crate::serve::peer::Caller;
use crate::serve::record::{State, VmSpec};
use crate::serve::status::VmStatus;
use crate::serve::task::detached;
use crate::serve::vm::Vm;
use crate::serve::web::PageGuest;
use control::api;

/// Longest time that a guest may be given to shut down, in s.
const LONGEST_STOP: u64 = 3600;

/// The query of requests for the status of guests.
#[derive(Default, Deserialize, utoipa::IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::serve) struct StatsQuery {
    /// With the memory and the CPU time of each.
    #[serde(deserialize_with = "flag")]
    // Nothing, true or false.
    #[param(required = false, value_type = String, example = "true")]
    stats: bool,
}

/// The query of the deletion of a guest.
#[derive(Default, Deserialize, utoipa::IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::serve) struct DeleteQuery {
    /// For how many seconds the guest may take to shut down by itself, before its process is ended.
    #[param(required = false, maximum = 3600)]
    timeout_s: u64,
}

/// The body of `POST /vms/{id}/stop`.
#[derive(Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(in crate::serve) struct Stop {
    /// For how many seconds the guest may take to shut down by itself, before its process is ended.
    #[schema(maximum = 3600, default = 10)]
    timeout_s: u64,
}

impl Default for Stop {
    fn default() -> Self {
        Self { timeout_s: 10 }
    }
}

/// All guests.
#[derive(Serialize, ToSchema)]
pub(in crate::serve) struct VmList {
    /// By name.
    vms: Vec<VmStatus>,
}

/// The time that a guest has to shut down by itself.
fn grace(timeout_s: u64) -> Handled<Duration> {
    if timeout_s > LONGEST_STOP {
        return Err(Fault::Invalid {
            field: "timeout_s",
            value: timeout_s.to_string(),
            expected: "an hour or less",
        });
    }
    Ok(Duration::from_secs(timeout_s))
}

/// All guests, as the daemon knows them. Their processes are not asked.
#[utoipa::path(get, path = "/vms", tag = "guests", params(StatsQuery), responses(
    (status = 200, body = VmList), (status = 400, body = FaultBody)))]
pub(in crate::serve) async fn list(
    Of(daemon): Context,
    Query(query): Query<StatsQuery>,
) -> Json<VmList> {
    if query.stats {
        daemon.measure(SHOWN).await;
    }
    let vms = daemon.all();
    let vms = vms.iter().map(|vm| vm.status(query.stats, false));
    let mut vms: Vec<_> = vms.collect();
    if query.stats {
        networks::count(&daemon, &mut vms).await;
    }
    Json(VmList { vms })
}

/// All guests, as the page shows them.
#[derive(Serialize)]
pub(in crate::serve) struct PageList {
    vms: Vec<PageGuest>,
}

/// As [`list`], without what the page does not show.
pub(in crate::serve) async fn list_for_page(
    context: Context,
    query: Query<StatsQuery>,
) -> Json<PageList> {
    let Json(VmList { vms }) = list(context, query).await;
    let vms = vms.into_iter().map(PageGuest::from).collect();
    Json(PageList { vms })
}

/// Makes a guest. A second request that is the same finds the guest that the first has made.
#[utoipa::path(post, path = "/vms", tag = "guests", request_body = VmSpec, responses(
    (status = 201, body = VmStatus, description = "It is made."),
    (status = 200, body = VmStatus, description = "It was there, made in the same way."),
    (status = 400, body = FaultBody), (status = 404, body = FaultBody, description = "There is no such image or template."),
    (status = 409, body = FaultBody, description = "It is there, made in another way."),
    (status = 413, body = FaultBody),
    (status = 422, body = FaultBody, description = "It could not start."),
    (status = 507, body = FaultBody, description = "There is no room for it.")))]
pub(in crate::serve) async fn create(
    Of(daemon): Context,
    Extension(caller): Extension<Caller>,
    JsonBody(spec): JsonBody<VmSpec>,
) -> Handled<Response> {
    let uid = uid(caller)?;
    let (begun, is_clone) = (Instant::now(), spec.template.is_some());
    // Counted in the detached operation, as the caller may have gone before the guest is made.
    let made = async move {
        let (vm, new) = daemon.clone().create(spec, uid).await?;
        if new && vm.state() == State::Running {
            daemon.metrics.made(is_clone, begun.elapsed());
        }
        Ok((vm, new))
    };
    let (vm, new) = detached(made).await?;
    let status = if new {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    let location = HeaderValue::from_str(&format!("/vms/{}", vm.id));
    let location = location.map_err(|error| Fault::Internal(error.into()))?;
    Ok((status, [(LOCATION, location)], Json(vm.status(false, true))).into_response())
}

/// A guest, as the daemon knows it. Its process is not asked.
#[utoipa::path(get, path = "/vms/{id}", tag = "guests", params(("id" = String, Path), StatsQuery), responses(
    (status = 200, body = VmStatus), (status = 400, body = FaultBody), (status = 404, body = FaultBody)))]
pub(in crate::serve) async fn show(
    Of(daemon): Context,
    Path(id): Path<String>,
    Query(query): Query<StatsQuery>,
) -> Handled<Json<VmStatus>> {
    let vm = daemon.vm(&id)?;
    if query.stats {
        daemon.measure(SHOWN).await;
    }
    let mut status = [vm.status(query.stats, true)];
    networks::count(&daemon, &mut status).await;
    let [status] = status;
    Ok(Json(status))
}

/// Ends a guest, and removes all that is left of it.
#[utoipa::path(delete, path = "/vms/{id}", tag = "guests", params(("id" = String, Path), DeleteQuery), responses(
    (status = 204), (status = 400, body = FaultBody), (status = 404, body = FaultBody), (status = 504, body = FaultBody)))]
pub(in crate::serve) async fn delete(
    Of(daemon): Context,
    Path(id): Path<String>,
    Query(query): Query<DeleteQuery>,
) -> Handled<StatusCode> {
    let (vm, grace) = (daemon.vm(&id)?, grace(query.timeout_s)?);
    detached(daemon.delete(vm, grace)).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn status(vm: &Vm) -> Json<VmStatus> {
    Json(vm.status(false, false))
}

/// Starts a guest that waits or that has ended, as it was made, or configured since. One that runs stays as it is.
#[utoipa::path(post, path = "/vms/{id}/start", tag = "guests", params(("id" = String, Path)), responses(
    (status = 200, body = VmStatus), (status = 400, body = FaultBody), (status = 404, body = FaultBody),
    (status = 409, body = FaultBody), (status = 422, body = FaultBody), (status = 507, body = FaultBody)))]
pub(in crate::serve) async fn start(
    Of(daemon): Context,
    Path(id): Path<String>,
) -> Handled<Json<VmStatus>> {
    let vm = daemon.vm(&id)?;
    Ok(status(&*detached(daemon.start(vm)).await?))
}

/// Ends a guest: by Ctrl-Alt-Del, after `timeout_s` by SIGTERM, with its disks closed, and by force 5 s later. The
/// guest can be started again.
#[utoipa::path(post, path = "/vms/{id}/stop", tag = "guests", params(("id" = String, Path)),
    request_body = Option<Stop>, responses(
    (status = 200, body = VmStatus), (status = 400, body = FaultBody), (status = 404, body = FaultBody),
    (status = 413, body = FaultBody), (status = 504, body = FaultBody)))]
pub(in crate::serve) async fn stop(
    Of(daemon): Context,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Handled<Json<VmStatus>> {
    let body = raw(body)?;
    let stop = if body.is_empty() {
        Stop::default()
    } else {
        api::parse_object::<Option<Stop>>(&body)?.unwrap_or_default()
    };
    let (vm, grace) = (daemon.vm(&id)?, grace(stop.timeout_s)?);
    Ok(status(&*detached(daemon.stop(vm, grace)).await?))
}

/// Stops the vCPUs of a guest.
#[utoipa::path(post, path = "/vms/{id}/pause", tag = "guests", params(("id" = String, Path)), responses(
    (status = 200, body = VmStatus), (status = 400, body = FaultBody), (status = 404, body = FaultBody),
    (status = 409, body = FaultBody)))]
pub(in crate::serve) async fn pause(
    Of(daemon): Context,
    Path(id): Path<String>,
) -> Handled<Json<VmStatus>> {
    let vm = daemon.vm(&id)?;
    Ok(status(&*detached(daemon.pause(vm, State::Paused)).await?))
}

/// Lets the vCPUs of a guest run on.
#[utoipa::path(post, path = "/vms/{id}/resume", tag = "guests", params(("id" = String, Path)), responses(
    (status = 200, body = VmStatus), (status = 400, body = FaultBody), (status = 404, body = FaultBody),
    (status = 409, body = FaultBody)))]
pub(in crate::serve) async fn resume(
    Of(daemon): Context,
    Path(id): Path<String>,
) -> Handled<Json<VmStatus>> {
    let vm = daemon.vm(&id)?;
    Ok(status(&*detached(daemon.pause(vm, State::Running)).await?))
}
