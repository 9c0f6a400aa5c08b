//! Kernels, initial RAM disks and disks by name.

use axum::Json;
use axum::extract::{Path, State as Of};
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::request::{Context, Handled, JsonBody};
use crate::serve::events::EventKind;
use crate::serve::fault::{Fault, FaultBody};
use crate::serve::images::{Image, NamedImage};
use crate::serve::task::{blocking, detached};

/// All images.
#[derive(Serialize, ToSchema)]
pub(in crate::serve) struct ImageList {
    /// By name.
    images: Vec<NamedImage>,
}

/// All images: files that a guest's configuration can name as `image:NAME`.
#[utoipa::path(get, path = "/images", tag = "images", responses((status = 200, body = ImageList)))]
pub(in crate::serve) async fn images(Of(daemon): Context) -> Json<ImageList> {
    let images = daemon.images().list();
    Json(ImageList { images })
}

/// An image.
#[utoipa::path(get, path = "/images/{name}", tag = "images", params(("name" = String, Path)), responses(
    (status = 200, body = NamedImage), (status = 404, body = FaultBody)))]
pub(in crate::serve) async fn image(
    Of(daemon): Context,
    Path(name): Path<String>,
) -> Handled<Json<NamedImage>> {
    Ok(Json(daemon.images().get(&name)?))
}

/// Registers an image. Guests that use the one of that name before keep its file until they are started anew.
#[utoipa::path(put, path = "/images/{name}", tag = "images", params(("name" = String, Path)),
    request_body = Image, responses(
    (status = 204), (status = 400, body = FaultBody), (status = 413, body = FaultBody)))]
pub(in crate::serve) async fn put_image(
    Of(daemon): Context,
    Path(name): Path<String>,
    JsonBody(image): JsonBody<Image>,
) -> Handled<StatusCode> {
    let file = daemon.store.images();
    let (image_name, events) = (name.clone(), daemon.clone());
    detached(async move {
        blocking(move || {
            image.check()?;
            daemon.images().put(&file, &name, image)
        })
        .await?
    })
    .await?;
    let text = Some(format!("image {image_name}"));
    events.events.tell(EventKind::ImageAdded, None, text);
    Ok(StatusCode::NO_CONTENT)
}

/// Removes an image that no guest uses from the register. The file stays.
#[utoipa::path(delete, path = "/images/{name}", tag = "images", params(("name" = String, Path)), responses(
    (status = 204), (status = 404, body = FaultBody), (status = 409, body = FaultBody)))]
pub(in crate::serve) async fn delete_image(
    Of(daemon): Context,
    Path(name): Path<String>,
) -> Handled<StatusCode> {
    let file = daemon.store.images();
    let (image_name, events) = (name.clone(), daemon.clone());
    detached(async move {
        blocking(move || {
            let mut images = daemon.images();
            let user = daemon
                .vms()
                .values()
                .find_map(|vm| vm.may_use_image(&name).then(|| vm.id.clone()));
            match user {
                Some(vm) => Err(Fault::ImageUsed { image: name, vm }),
                None => images.remove(&file, &name),
            }
        })
        .await?
    })
    .await?;
    let text = Some(format!("image {image_name}"));
    events.events.tell(EventKind::ImageRemoved, None, text);
    Ok(StatusCode::NO_CONTENT)
}
