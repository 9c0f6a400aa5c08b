//! Which guests share a page of a file.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State as Of;
use axum::http::Method;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::request::Query;
use super::{Answer, Context};
use crate::serve::fault::{Fault, FaultBody};
use crate::serve::lifecycle::blocking;
use crate::serve::proxy;
use crate::serve::vm::Vm;
use machine::FilePageReport;

/// The query of who shares a page.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(in crate::serve) struct Page {
    /// The file, by any name that it has on this host.
    #[param(value_type = String)]
    path: PathBuf,
    /// A byte of the page.
    #[serde(default)]
    #[param(required = false)]
    offset: u64,
}

/// A guest that has a page of a file.
#[derive(Serialize, ToSchema)]
pub(in crate::serve) struct Sharer {
    /// The guest.
    id: String,
    /// Guest physical addresses of its pages that the file's page backs, or may come to back.
    addresses: Vec<u64>,
}

/// The guests that have a page of a file.
#[derive(Serialize, ToSchema)]
pub(in crate::serve) struct Sharers {
    /// Those that have, by id.
    guests: Vec<Sharer>,
    /// Guests that were asked and answered.
    answered: usize,
}

/// Which guests have a page of a file. All that have a process are asked.
#[utoipa::path(get, path = "/sharers", tag = "daemon", params(Page), responses(
    (status = 200, body = Sharers), (status = 400, body = FaultBody)))]
pub(in crate::serve) async fn sharers(
    Of(daemon): Context,
    Query(Page { path, offset }): Query<Page>,
) -> Answer<Json<Sharers>> {
    let name = path.display().to_string();
    let found = blocking(move || std::fs::metadata(path)).await?;
    let file = found.map_err(|error| Fault::Query(format!("path: {name}: {error}")))?;
    let page = format!("/vm/sharing/files/{}-{}-{offset}", file.dev(), file.ino());
    let ask = |vm: Arc<Vm>| {
        let page = page.clone();
        async move {
            let answer = proxy::ask(&vm, Method::GET, &page, Bytes::new(), proxy::LOOK).await;
            let answer = answer.ok().filter(|answer| answer.status.is_success())?;
            let report: FilePageReport = serde_json::from_slice(&answer.body).ok()?;
            Some((vm.id.clone(), report.addresses))
        }
    };
    let told = proxy::ask_each(daemon.all(), ask).await;
    let answered = told.len();
    let mut guests: Vec<_> = told
        .into_iter()
        .filter(|(_, addresses)| !addresses.is_empty())
        .map(|(id, addresses)| Sharer { id, addresses })
        .collect();
    guests.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(Json(Sharers { guests, answered }))
}
