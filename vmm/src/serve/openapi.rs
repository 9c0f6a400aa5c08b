//! The `OpenAPI` document, made from the code.

use utoipa::OpenApi;

use super::{guest_api as guest, routes};

/// The document of all that the socket serves.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Coppice",
        description = "Coppice's host daemon: many guests, by one Unix socket. Below /vms/{id}/ is the whole API of a single guest as well, which is Firecracker's (coppice run --api-sock).",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    paths(
        routes::list,
        routes::create,
        routes::show,
        routes::delete,
        routes::start,
        routes::stop,
        routes::pause,
        routes::resume,
        routes::console_output,
        routes::console_input,
        guest::info,
        guest::version,
        guest::config,
        guest::machine,
        guest::set_machine,
        guest::update_machine,
        guest::boot_source,
        guest::set_drive,
        guest::update_drive,
        guest::set_pmem,
        guest::entropy,
        guest::serial,
        guest::sharing,
        guest::shared,
        guest::balloon,
        guest::set_balloon,
        guest::update_balloon,
        guest::actions,
        guest::state,
        guest::counters,
        routes::images,
        routes::image,
        routes::put_image,
        routes::delete_image,
        routes::templates,
        routes::template,
        routes::create_template,
        routes::delete_template,
        routes::events,
        routes::metrics,
        routes::health,
        routes::openapi_json,
    )
)]
struct Document;

/// The document, as JSON.
///
/// # Errors
/// Where it cannot be JSON.
pub fn document() -> serde_json::Result<String> {
    Document::openapi().to_json()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

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
}
