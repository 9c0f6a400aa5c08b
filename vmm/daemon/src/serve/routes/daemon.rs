//! Requests about the daemon itself: its events, its metrics and its health.

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

use super::networks;
use super::request::{Context, Handled, Query, SHOWN, flag};
use crate::serve::events::{Event, EventKind};
use crate::serve::fault::{Fault, FaultBody};
use crate::serve::guest_metrics::{Joined, of_guest};
use crate::serve::metrics::NetworkFigures;
use crate::serve::proxy;
use control::metrics::CONTENT_TYPE as OPENMETRICS;
use host::procfs;

/// Most guests that are asked for their counters.
const ASKED: usize = 256;

/// The query of metrics.
#[derive(Default, Deserialize, utoipa::IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::serve) struct MetricsQuery {
    /// With the counters of this guest's own process.
    #[param(required = false)]
    vm: Option<String>,
    /// With the counters of all guests' processes, of 256 at most.
    #[serde(deserialize_with = "flag")]
    // Nothing, true or false.
    #[param(required = false, value_type = String, example = "true")]
    guests: bool,
}

/// The health of the daemon, which serves if it answers at all.
#[derive(Serialize, ToSchema)]
pub(in crate::serve) struct Health {
    /// `ok`.
    status: &'static str,
    /// Its version.
    version: &'static str,
    /// Guests.
    vms: usize,
}

/// What happens, as server-sent events. `Last-Event-ID` asks for the events after that one; 0 for all that are kept.
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
                // A listener that was too slow is cut off. It comes back, and says which event it has seen last.
                Err(RecvError::Lagged(_) | RecvError::Closed) => return None,
            },
        };
        let sent = sse::Event::default()
            .id(event.id.to_string())
            .event(event.kind.name())
            .json_data(&event)
            .unwrap_or_default();
        // The stream ends with this event, as it would hold up the end of the daemon.
        let continues = event.kind != EventKind::DaemonStopping;
        Some((
            Ok::<_, Infallible>(sent),
            continues.then_some((kept, receiver)),
        ))
    });
    Sse::new(stream).keep_alive(KeepAlive::new().interval(Duration::from_secs(15)))
}

/// Counters for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "daemon", params(MetricsQuery), responses(
    (status = 200, content_type = "application/openmetrics-text", body = String),
    (status = 400, body = FaultBody), (status = 404, body = FaultBody)))]
pub(in crate::serve) async fn metrics(
    Of(daemon): Context,
    Query(query): Query<MetricsQuery>,
) -> Handled<Response> {
    daemon.measure(SHOWN).await;
    let asked = match (&query.vm, query.guests) {
        (Some(id), _) => vec![daemon.vm(id)?],
        (None, true) => daemon.all().into_iter().take(ASKED).collect(),
        (None, false) => Vec::new(),
    };
    let mut joined = Joined::default();
    let texts = proxy::ask_each(asked, of_guest).await;
    let texts: BTreeMap<_, _> = texts.into_iter().collect();
    for (id, text) in &texts {
        daemon.metrics.samples_left_out(joined.add(id, text));
    }
    let vms = daemon.all();
    let mut vms = vms
        .iter()
        .map(|vm| vm.status(true, false))
        .collect::<Vec<_>>();
    networks::count(&daemon, &mut vms).await;
    let networks = NetworkFigures {
        networks: daemon.networks.all(&vms),
        repairs: daemon.networks.repairs(),
    };
    if let Some(id) = &query.vm {
        vms.retain(|vm| vm.id == *id);
    }
    let own = procfs::memory(std::process::id()).ok();
    let own = daemon.metrics.encode(vms, networks, own);
    let own = own.map_err(|error| Fault::Internal(error.into()))?;
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
