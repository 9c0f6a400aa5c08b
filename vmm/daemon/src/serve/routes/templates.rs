//! Requests about templates: saved guests, of which others are clones.

use axum::Json;
use axum::extract::{Extension, Path, State as Of};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::request::{Context, Handled, JsonBody, uid};
use crate::serve::fault::FaultBody;
use crate::serve::peer::Caller;
use crate::serve::task::detached;
use crate::serve::templates::{Template, TemplateSpec};

/// Templates, which guests are cloned from.
#[utoipa::path(get, path = "/templates", tag = "templates", responses((status = 200, body = Vec<Template>)))]
pub(in crate::serve) async fn templates(Of(daemon): Context) -> Json<Vec<Template>> {
    Json(daemon.templates().list())
}

/// A template.
#[utoipa::path(get, path = "/templates/{id}", tag = "templates", params(("id" = String, Path)), responses(
    (status = 200, body = Template), (status = 404, body = FaultBody)))]
pub(in crate::serve) async fn template(
    Of(daemon): Context,
    Path(id): Path<String>,
) -> Handled<Json<Template>> {
    Ok(Json(daemon.templates().get(&id)?))
}

/// Makes a template of a guest, which is paused meanwhile.
#[utoipa::path(post, path = "/templates", tag = "templates", request_body = TemplateSpec, responses(
    (status = 201, body = Template), (status = 400, body = FaultBody), (status = 404, body = FaultBody),
    (status = 409, body = FaultBody), (status = 507, body = FaultBody)))]
pub(in crate::serve) async fn create_template(
    Of(daemon): Context,
    Extension(caller): Extension<Caller>,
    JsonBody(spec): JsonBody<TemplateSpec>,
) -> Handled<Response> {
    let uid = uid(caller)?;
    let template = detached(daemon.create_template(spec, uid)).await?;
    Ok((StatusCode::CREATED, Json(template)).into_response())
}

/// Deletes a template of which no guest, and no other template, is left.
#[utoipa::path(delete, path = "/templates/{id}", tag = "templates", params(("id" = String, Path)), responses(
    (status = 204), (status = 404, body = FaultBody), (status = 409, body = FaultBody)))]
pub(in crate::serve) async fn delete_template(
    Of(daemon): Context,
    Path(id): Path<String>,
) -> Handled<StatusCode> {
    detached(daemon.delete_template(id)).await?;
    Ok(StatusCode::NO_CONTENT)
}
