//! The `OpenAPI` document, made from the code.

#[cfg(test)]
mod reference;

use axum::http::header::{CONTENT_TYPE, HeaderValue};
use axum::response::{IntoResponse, Response};
use utoipa::OpenApi;

use super::request::Handled;
use super::{console, daemon, images, networks, sharers, templates, vms};
use crate::serve::fault::Fault;
use crate::serve::guest_api;

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
        networks::networks,
        daemon::health,
        openapi_json,
    )
)]
struct Document;

/// The document, as JSON.
fn document() -> serde_json::Result<String> {
    let mut document = Document::openapi();
    guest_api::add_to(&mut document);
    document.to_json()
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
    use control::api::GUEST_OPERATIONS;

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

    #[test]
    fn the_document_has_what_a_guest_serves_and_nothing_else() {
        let document: Value = serde_json::from_str(&document().unwrap()).unwrap();
        let mut documented = BTreeSet::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            for (method, operation) in methods.as_object().unwrap() {
                if operation["tags"][0] == guest_api::TAG {
                    let below = path.strip_prefix("/vms/{id}").unwrap();
                    documented.insert((method.to_uppercase(), below.to_owned()));
                }
            }
        }
        let served = GUEST_OPERATIONS.iter();
        let served = served
            .map(|known| (known.method.as_str().to_owned(), known.path.to_owned()))
            .collect();
        assert_eq!(documented, served);
    }

    #[test]
    fn what_the_document_refers_to_is_there_and_no_two_operations_have_a_name() {
        fn references(value: &Value, found: &mut BTreeSet<String>) {
            match value {
                Value::Object(fields) => {
                    for (field, value) in fields {
                        match value.as_str() {
                            Some(path) if field == "$ref" => drop(found.insert(path.to_owned())),
                            Some(_) | None => references(value, found),
                        }
                    }
                }
                Value::Array(values) => values.iter().for_each(|value| references(value, found)),
                _ => {}
            }
        }
        let document: Value = serde_json::from_str(&document().unwrap()).unwrap();
        let mut found = BTreeSet::new();
        references(&document, &mut found);
        assert!(found.len() > 20);
        for path in found {
            let pointer = path.trim_start_matches('#');
            assert!(document.pointer(pointer).is_some(), "{path}");
        }
        let mut names = BTreeSet::new();
        for methods in document["paths"].as_object().unwrap().values() {
            for operation in methods.as_object().unwrap().values() {
                let name = operation["operationId"].as_str().unwrap();
                assert!(names.insert(name.to_owned()), "{name}");
            }
        }
    }
}
