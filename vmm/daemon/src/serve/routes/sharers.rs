//! Which guests share a page of a file.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Json;
use axum::extract::State as Of;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::request::{Context, Handled, Query};
use crate::serve::fault::{Fault, FaultBody};
use crate::serve::proxy;
use crate::serve::task::blocking;
use crate::serve::vm::Vm;
use machine::FilePageReport;

/// Longest report of a guest in bytes: with thousands of addresses. The reports of all guests are there at once.
const LONGEST_REPORT: usize = 128 << 10;

/// The query for the guests that share a page.
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
) -> Handled<Json<Sharers>> {
    let name = path.display().to_string();
    let found = blocking(move || std::fs::metadata(path)).await?;
    let file = found.map_err(|source| Fault::QueryFile { name, source })?;
    let page = format!("/vm/sharing/files/{}-{}-{offset}", file.dev(), file.ino());
    let ask = |vm: Arc<Vm>| {
        let page = page.clone();
        async move {
            let report: FilePageReport = proxy::get(&vm, &page, LONGEST_REPORT).await.ok()?;
            Some((vm.id.clone(), report.addresses))
        }
    };
    let reports = proxy::ask_each(daemon.all(), ask).await;
    let answered = reports.len();
    let mut guests: Vec<_> = reports
        .into_iter()
        .filter(|(_, addresses)| !addresses.is_empty())
        .map(|(id, addresses)| Sharer { id, addresses })
        .collect();
    guests.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(Json(Sharers { guests, answered }))
}
