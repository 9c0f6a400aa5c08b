//! Which request goes to which function.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State as Of};
use axum::http::{Method, Uri};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};

use super::guest::guest;
use super::request::Context;
use super::{console, daemon, images, networks, openapi, sharers, templates, vms};
use crate::serve::daemon::Daemon;
use crate::serve::fault::Fault;
use crate::serve::page;
use crate::serve::web::{WebOptions, only_known_hosts};
use config::MAX_FILE_SIZE;

async fn no_path(method: Method, uri: Uri) -> Fault {
    Fault::NoPath(method, uri.path().to_owned())
}

async fn other_method(method: Method, uri: Uri) -> Fault {
    Fault::Method(method, uri.path().to_owned())
}

async fn counted(Of(daemon): Context, request: Request, next: Next) -> Response {
    let (method, begun) = (request.method().clone(), Instant::now());
    let path = request.uri().path().to_owned();
    let response = next.run(request).await;
    let (code, took) = (response.status().as_u16(), begun.elapsed());
    daemon.metrics.answered(&method, code, took);
    tracing::debug!(%method, path, code, ?took, "request");
    response
}

fn finished(router: Router<Arc<Daemon>>, daemon: Arc<Daemon>) -> Router {
    router
        .fallback(no_path)
        .method_not_allowed_fallback(other_method)
        .layer(DefaultBodyLimit::max(MAX_FILE_SIZE as usize))
        .layer(middleware::from_fn_with_state(daemon.clone(), counted))
        .with_state(daemon)
}

/// The paths that change nothing and are served at both addresses.
fn reading() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/", get(page::page))
        .route("/healthz", get(daemon::health))
        .route("/openapi.json", get(openapi::openapi_json))
        .route("/metrics", get(daemon::metrics))
}

/// The paths that the address for reading serves.
pub fn read_only(daemon: Arc<Daemon>, web: &WebOptions) -> Router {
    let router = if web.all {
        reading()
            .route("/vms", get(vms::list))
            .route("/vms/{id}", get(vms::show))
    } else {
        Router::new()
            .route("/", get(page::page))
            .route("/vms", get(vms::list_for_page))
    };
    let hosts: Arc<[String]> = web.hosts.clone().into();
    finished(router, daemon).layer(middleware::from_fn_with_state(hosts, only_known_hosts))
}

/// The paths that the socket serves.
pub fn all(daemon: Arc<Daemon>) -> Router {
    let router = reading()
        .route("/vms", get(vms::list).post(vms::create))
        .route("/vms/{id}", get(vms::show).delete(vms::delete))
        .route("/vms/{id}/start", post(vms::start))
        .route("/vms/{id}/stop", post(vms::stop))
        .route("/vms/{id}/pause", post(vms::pause))
        .route("/vms/{id}/resume", post(vms::resume))
        .route(
            "/vms/{id}/console",
            get(console::console_output).put(console::console_input),
        )
        .route("/vms/{id}/", get(guest))
        .route("/vms/{id}/{*path}", get(guest).put(guest).patch(guest))
        .route("/images", get(images::images))
        .route(
            "/images/{name}",
            get(images::image)
                .put(images::put_image)
                .delete(images::delete_image),
        )
        .route(
            "/templates",
            get(templates::templates).post(templates::create_template),
        )
        .route(
            "/templates/{id}",
            get(templates::template).delete(templates::delete_template),
        )
        .route("/networks", get(networks::networks))
        .route("/events", get(daemon::events))
        .route("/sharers", get(sharers::sharers));
    finished(router, daemon)
}
