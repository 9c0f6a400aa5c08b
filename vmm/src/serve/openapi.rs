//! The OpenAPI document, made from the code.

use utoipa::OpenApi;

use super::routes;

/// Coppice's host daemon: many guests, by one Unix socket.
///
/// Below `/vms/{id}/` is also the whole API of a single guest, which is Firecracker's (`coppice run --api-sock`).
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Coppice",
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
        routes::images,
        routes::image,
        routes::put_image,
        routes::delete_image,
        routes::templates,
        routes::create_template,
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
