//! Kernels, initial RAM disks and disks by name.

use axum::Json;
use axum::extract::{Path, State as Of};
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::request::Asked;
use super::{Answer, Context};
use crate::serve::Daemon;
use crate::serve::events::EventKind;
use crate::serve::fault::{Fault, FaultBody};
use crate::serve::images::{Image, NamedImage};
use crate::serve::lifecycle::blocking;

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
) -> Answer<Json<NamedImage>> {
    Ok(Json(daemon.images().get(&name)?))
}

/// Registers an image. Guests that use the one of that name before keep its file until they are started anew.
#[utoipa::path(put, path = "/images/{name}", tag = "images", params(("name" = String, Path)),
    request_body = Image, responses(
    (status = 204), (status = 400, body = FaultBody), (status = 413, body = FaultBody)))]
pub(in crate::serve) async fn put_image(
    Of(daemon): Context,
    Path(name): Path<String>,
    Asked(image): Asked<Image>,
) -> Answer<StatusCode> {
    let file = daemon.store.images();
    let (told, events) = (name.clone(), daemon.clone());
    Daemon::detached(async move {
        blocking(move || {
            image.check()?;
            daemon.images().put(&file, &name, image)
        })
        .await?
    })
    .await?;
    let text = Some(format!("image {told}"));
    events.events.tell(EventKind::ImageAdded, None, text);
    Ok(StatusCode::NO_CONTENT)
}

/// Forgets an image that no guest uses. The file stays.
#[utoipa::path(delete, path = "/images/{name}", tag = "images", params(("name" = String, Path)), responses(
    (status = 204), (status = 404, body = FaultBody), (status = 409, body = FaultBody)))]
pub(in crate::serve) async fn delete_image(
    Of(daemon): Context,
    Path(name): Path<String>,
) -> Answer<StatusCode> {
    let file = daemon.store.images();
    let (told, events) = (name.clone(), daemon.clone());
    Daemon::detached(async move {
        blocking(move || {
            let mut images = daemon.images();
            let user = daemon
                .vms()
                .values()
                .find_map(|vm| vm.now().images.contains(&name).then(|| vm.id.clone()));
            match user {
                Some(vm) => Err(Fault::ImageUsed { image: name, vm }),
                None => images.remove(&file, &name),
            }
        })
        .await?
    })
    .await?;
    let text = Some(format!("image {told}"));
    events.events.tell(EventKind::ImageRemoved, None, text);
    Ok(StatusCode::NO_CONTENT)
}
