//! The `OpenAPI` document, made from the code.

#[cfg(test)]
mod reference;

use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::response::{IntoResponse, Response};
use utoipa::OpenApi;

use super::request::Handled;
use super::{console, daemon, images, sharers, templates, vms};
use crate::serve::fault::Fault;
use crate::serve::guest_api as guest;

/// The document of all that the socket serves.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Coppice",
        description = "Coppice's host daemon: many guests, by one Unix socket. Below /vms/{id}/ is the whole API of a single guest as well, which is Firecracker's (coppice run --api-sock).",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    paths(
        vms::list,
        vms::create,
        vms::show,
        vms::delete,
        vms::start,
        vms::stop,
        vms::pause,
        vms::resume,
        console::console_output,
        console::console_input,
        guest::info,
        guest::version,
        guest::config,
        guest::machine,
        guest::set_machine,
        guest::update_machine,
        guest::boot_source,
        guest::set_drive,
        guest::update_drive,
        guest::snapshot_drive,
        guest::resize_drive,
        guest::compact_drive,
        guest::commit_drive,
        guest::drive_parent,
        guest::drive_job,
        guest::cancel_drive_job,
        guest::set_pmem,
        guest::snapshot_pmem,
        guest::entropy,
        guest::vsock,
        guest::mmds,
        guest::set_mmds,
        guest::update_mmds,
        guest::mmds_config,
        guest::serial,
        guest::logger,
        guest::set_metrics,
        guest::sharing,
        guest::shared,
        guest::page,
        guest::pages_of_file,
        guest::jail,
        guest::balloon,
        guest::set_balloon,
        guest::update_balloon,
        guest::balloon_statistics,
        guest::update_balloon_statistics,
        guest::start_hinting,
        guest::stop_hinting,
        guest::hinting,
        guest::create_snapshot,
        guest::actions,
        guest::state,
        guest::counters,
        guest::load_snapshot,
        images::images,
        images::image,
        images::put_image,
        images::delete_image,
        templates::templates,
        templates::template,
        templates::create_template,
        templates::delete_template,
        daemon::events,
        daemon::metrics,
        sharers::sharers,
        daemon::health,
        openapi_json,
    )
)]
struct Document;

/// The document, as JSON.
fn document() -> serde_json::Result<String> {
    Document::openapi().to_json()
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "daemon", responses((status = 200, body = Object)))]
pub(in crate::serve) async fn openapi_json() -> Handled<Response> {
    let text = document().map_err(Fault::Json)?;
    let content = [(CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    Ok((content, text).into_response())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;
    use config::operations::GUEST_OPERATIONS;

    #[test]
    fn the_document_has_the_bodies_of_requests_and_of_refusals() {
        let document: Value = serde_json::from_str(&document().unwrap()).unwrap();
        let schemas = &document["components"]["schemas"];
        for schema in [
            "VmSpec",
            "VmStatus",
            "VmConfig",
            "DriveConfig",
            "Image",
            "Event",
            "FaultBody",
        ] {
            assert!(schemas[schema].is_object(), "{schema}");
        }
        assert_eq!(schemas["VmSpec"]["additionalProperties"], false);
        let config = &schemas["VmConfig"]["properties"];
        assert!(config["boot-source"].is_object(), "{config}");
        let refused = &document["paths"]["/vms"]["post"]["responses"]["507"];
        assert!(refused["content"]["application/json"]["schema"].is_object());
    }
    /// Paths without the names of what is in braces, which do not matter.
    fn without_names(path: &str) -> String {
        let parts = path.split('/').map(|part| match part.as_bytes() {
            [b'{', .., b'}'] => "{}",
            _ => part,
        });
        parts.collect::<Vec<_>>().join("/")
    }

    #[test]
    fn the_document_has_what_a_guest_serves_and_nothing_else() {
        let document: Value = serde_json::from_str(&document().unwrap()).unwrap();
        let mut documented = BTreeSet::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            for (method, operation) in methods.as_object().unwrap() {
                if operation["tags"][0] == "the guest's own API" {
                    let below = path.strip_prefix("/vms/{id}").unwrap();
                    documented.insert((method.to_uppercase(), without_names(below)));
                }
            }
        }
        let served = GUEST_OPERATIONS.iter();
        let served = served
            .map(|known| (known.method.as_str().to_owned(), without_names(known.path)))
            .collect();
        assert_eq!(documented, served);
    }
}
