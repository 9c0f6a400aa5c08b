//! The guest's own API, which is passed on to its process.

use std::path::PathBuf;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{OriginalUri, Path, State as Of};
use axum::http::header::CONTENT_TYPE;
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::Value;

use super::request::raw;
use super::{Answer, Context};
use crate::serve::fault::Fault;
use crate::serve::status::State;
use crate::serve::templates::expect_own_name;
use crate::serve::told::is_kept;
use crate::serve::vm::Vm;
use crate::serve::{Daemon, proxy};
use config::MachineConfig;

/// What the paths of requests about disks begin with.
const DISKS: [&str; 2] = ["drives/", "pmem/"];

/// What a request to the guest's own API would make of its RAM and vCPUs.
fn sizes(vm: &Vm, body: &[u8]) -> (u32, u8) {
    let asked: Value = serde_json::from_slice(body).unwrap_or_default();
    let number = |field| asked.get(field).and_then(Value::as_u64);
    let now = vm.now();
    let ram = number("mem_size_mib").and_then(|ram| u32::try_from(ram).ok());
    let vcpus = number("vcpu_count").and_then(|vcpus| u8::try_from(vcpus).ok());
    (ram.unwrap_or(now.ram_mib), vcpus.unwrap_or(now.vcpus))
}

/// The guest in a path that goes on behind it.
#[derive(Deserialize)]
pub(super) struct Guest {
    id: String,
}

/// Everything else below a guest is its own API: Firecracker's, as `coppice run --api-sock` has it.
pub(super) async fn guest(
    Of(daemon): Context,
    Path(Guest { id }): Path<Guest>,
    method: Method,
    OriginalUri(uri): OriginalUri,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Response> {
    let (vm, body) = (daemon.vm(&id)?, raw(body)?);
    if body.len() > config::limits::MAX_BODY {
        return Err(Fault::Body(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("longer than {} bytes", config::limits::MAX_BODY),
        ));
    }
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let path = path.strip_prefix("/vms/").unwrap_or(path);
    let path = path.find('/').map_or("/", |at| &path[at..]).to_owned();
    Daemon::detached(pass_on(daemon, vm, method, path, body)).await
}

async fn pass_on(
    daemon: Arc<Daemon>,
    vm: Arc<Vm>,
    method: Method,
    path: String,
    mut body: Bytes,
) -> Answer<Response> {
    let changes = method != Method::GET;
    let place = path.split('?').next().unwrap_or_default().trim_matches('/');
    if changes && place == "snapshot/load" {
        return Err(Fault::LoadsTemplates);
    }
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let word = |field| asked.get(field).and_then(Value::as_str);
    let is_start = method == Method::PUT
        && place == "actions"
        && word("action_type") == Some("InstanceStart")
        && matches!(vm.state(), State::NotStarted | State::Starting);
    if is_start && daemon.start_if_waiting(&vm).await? {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let is_kept = changes && is_kept(place);
    let _telling = if is_kept || changes && DISKS.iter().any(|kind| place.starts_with(kind)) {
        Some(vm.telling.lock().await)
    } else {
        None
    };
    let waits = changes && vm.state() == State::NotStarted;
    // What the guest has among the others is the daemon's to say.
    let cid_before = (waits && place == "vsock").then(|| vm.now().cid);
    if cid_before.is_some()
        && method == Method::PUT
        && let Some(completed) = daemon.complete_vsock(&vm, &body)?
    {
        body = completed.into();
    }
    // Room for more RAM has to be there before the guest may have it.
    let before = (waits && place == "machine-config").then(|| {
        let now = vm.now();
        (now.ram_mib, now.vcpus)
    });
    let (ram_mib, vcpus) = sizes(&vm, &body);
    let can_be = MachineConfig {
        mem_size_mib: ram_mib,
        vcpu_count: vcpus,
        ..MachineConfig::default()
    };
    // What cannot be is the guest's to refuse.
    if before.is_some() && can_be.validate().is_ok() {
        daemon.admit_change(&vm, ram_mib, vcpus, |_| ())?;
    }
    let child = word("path_on_host").map(|path| vm.folder.join(path));
    let request = Request {
        method,
        path: &path,
        place,
        body,
    };
    let answer = pass_on_with_disks(&daemon, &vm, request, child).await;
    let told = answer.as_ref().ok().map(|answer| answer.status);
    let done = told.is_some_and(|status| status.is_success());
    if !done {
        vm.change(|now| {
            if let Some(cid) = cid_before {
                now.cid = cid;
            }
            if let Some((ram_mib, vcpus)) = before {
                (now.ram_mib, now.vcpus) = (ram_mib, vcpus);
            }
        });
    }
    // Also where the process has not said whether it is done.
    if is_kept && (done || told.is_none()) && vm.now().process.is_some() {
        daemon.keep_told(&vm).await;
    }
    let answer = answer?;
    let state = match (place, word("state")) {
        ("vm", Some("Paused")) => Some(State::Paused),
        ("vm", Some("Resumed")) => Some(State::Running),
        _ => None,
    };
    if let Some(state) = state.filter(|_| done && changes) {
        daemon.observe(&vm, state);
        daemon.save(&vm).await;
    }
    let mut response = Response::new(Body::from(answer.body));
    *response.status_mut() = answer.status;
    if let Some(content) = answer.content {
        response.headers_mut().insert(CONTENT_TYPE, content);
    }
    Ok(response)
}

/// A request that is passed on.
struct Request<'a> {
    method: Method,
    path: &'a str,
    /// The path, without slashes around it and without a query.
    place: &'a str,
    body: Bytes,
}

/// Passes a request on, and notes which disks a guest has come to by it: a `child`, or by a commit.
async fn pass_on_with_disks(
    daemon: &Arc<Daemon>,
    vm: &Arc<Vm>,
    request: Request<'_>,
    child: Option<PathBuf>,
) -> Answer<proxy::Answer> {
    let Request {
        method,
        path,
        place,
        body,
    } = request;
    let changes = method != Method::GET;
    // What is its disk is the parent of another then, and must not be written to when the guest starts anew.
    let mut kinds = DISKS.iter();
    let drive = kinds.find_map(|kind| place.strip_prefix(kind)?.strip_suffix("/snapshot"));
    let child = drive.filter(|_| changes).zip(child);
    if let Some((pmem, _)) = &child
        && place.starts_with("pmem/")
    {
        expect_own_name(vm, pmem).await?;
    }
    if let Some((drive, path)) = &child {
        daemon.begin_child(vm, drive, path).await?;
    }
    let committed = place
        .strip_prefix("drives/")
        .and_then(|rest| rest.strip_suffix("/commit"))
        .filter(|_| changes);
    let before_commit = match committed {
        Some(drive) => daemon.begin_commit(vm, drive).await?,
        None => None,
    };
    let patience = if changes { proxy::ACTION } else { proxy::LOOK };
    let answer = proxy::ask(vm, method, path, body, patience).await;
    let done = answer
        .as_ref()
        .ok()
        .map(|answer| answer.status.is_success());
    if let Some((drive, path)) = &child {
        daemon.end_child(vm, drive, path, done).await;
    }
    if let Some(drive) = committed {
        daemon.follow_commit(vm, drive, before_commit, done).await;
    }
    answer
}
