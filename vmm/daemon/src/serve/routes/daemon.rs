//! The daemon itself: what happens, its counters, its health, its document.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::extract::State as Of;
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast::error::RecvError;
use utoipa::ToSchema;

use super::request::{Query, flag};
use super::{Answer, Context, SHOWN};
use crate::serve::events::{Event, EventKind};
use crate::serve::fault::{Fault, FaultBody};
use crate::serve::{metrics as counters, openapi, proxy};
use control::metrics::CONTENT_TYPE as OPENMETRICS;
use host::procfs;

/// Guests that are asked for their counters.
const ASKED: usize = 256;

/// The query of metrics.
#[derive(Default, Deserialize, utoipa::IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::serve) struct Which {
    /// With the counters of this guest's own process.
    #[param(required = false)]
    vm: Option<String>,
    /// With the counters of all guests' processes, of 256 at most.
    #[serde(deserialize_with = "flag")]
    // Nothing, true or false.
    #[param(required = false, value_type = String, example = "true")]
    guests: bool,
}

/// That the daemon serves.
#[derive(Serialize, ToSchema)]
pub(in crate::serve) struct Health {
    /// `ok`.
    status: &'static str,
    /// Its version.
    version: &'static str,
    /// Guests.
    vms: usize,
}

/// What happens, as server-sent events. `Last-Event-ID` asks for what has happened since; 0 for all that is kept.
#[utoipa::path(get, path = "/events", tag = "daemon",
    params(("Last-Event-ID" = Option<u64>, Header, description = "The last event that was seen.")), responses(
    (status = 200, content_type = "text/event-stream", body = Event, description = "A stream without an end.")))]
pub(in crate::serve) async fn events(Of(daemon): Context, headers: HeaderMap) -> impl IntoResponse {
    let last = headers
        .get("last-event-id")
        .and_then(|last| last.to_str().ok()?.parse().ok());
    let (kept, receiver) = daemon.events.listen(last);
    let stream = stream::unfold(Some((kept.into_iter(), receiver)), |listening| async {
        let (mut kept, mut receiver) = listening?;
        let event = match kept.next() {
            Some(event) => event,
            None => match receiver.recv().await {
                Ok(event) => event,
                // Too slow: it comes back, and says what it has seen.
                Err(RecvError::Lagged(_) | RecvError::Closed) => return None,
            },
        };
        let told = sse::Event::default()
            .id(event.id.to_string())
            .event(event.kind.name())
            .json_data(&event)
            .unwrap_or_default();
        // Nothing comes after the end, which is not to be held up.
        let goes_on = event.kind != EventKind::DaemonStopping;
        Some((
            Ok::<_, Infallible>(told),
            goes_on.then_some((kept, receiver)),
        ))
    });
    Sse::new(stream).keep_alive(KeepAlive::new().interval(Duration::from_secs(15)))
}

/// Counters for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "daemon", params(Which), responses(
    (status = 200, content_type = "application/openmetrics-text", body = String),
    (status = 400, body = FaultBody), (status = 404, body = FaultBody)))]
pub(in crate::serve) async fn metrics(
    Of(daemon): Context,
    Query(which): Query<Which>,
) -> Answer<Response> {
    daemon.measure(SHOWN).await;
    let asked = match (&which.vm, which.guests) {
        (Some(id), _) => vec![daemon.vm(id)?],
        (None, true) => daemon.all().into_iter().take(ASKED).collect(),
        (None, false) => Vec::new(),
    };
    let mut joined = counters::Joined::default();
    let told = proxy::ask_each(asked, counters::of_guest).await;
    let told: BTreeMap<_, _> = told.into_iter().collect();
    for (id, text) in &told {
        joined.add(id, text);
    }
    let vms = daemon.all();
    let mut vms = vms
        .iter()
        .map(|vm| vm.status(true, false))
        .collect::<Vec<_>>();
    if let Some(id) = &which.vm {
        vms.retain(|vm| vm.id == *id);
    }
    let own = procfs::memory(std::process::id()).ok();
    let own = daemon.metrics.encode(vms, own);
    let own = own.map_err(|error| Fault::Internal(error.to_string()))?;
    let content = [(CONTENT_TYPE, HeaderValue::from_static(OPENMETRICS))];
    Ok((content, joined.after(&own)).into_response())
}

/// Whether the daemon serves.
#[utoipa::path(get, path = "/healthz", tag = "daemon", responses((status = 200, body = Health)))]
pub(in crate::serve) async fn health(Of(daemon): Context) -> Json<Health> {
    Json(Health {
        status: "ok",
        version: env!("CARGO_PKG_VERSION"),
        vms: daemon.vms().len(),
    })
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "daemon", responses((status = 200, body = Object)))]
pub(in crate::serve) async fn openapi_json() -> Answer<Response> {
    let text = openapi::document().map_err(Fault::Json)?;
    let content = [(CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    Ok((content, text).into_response())
}
