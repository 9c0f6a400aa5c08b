//! The guest's own API: its requests are passed on to the guest's process. What the daemon has to know of their outcome
//! is recorded on the way.

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

use super::request::{Context, Handled, raw};
use crate::serve::daemon::Daemon;
use crate::serve::fault::Fault;
use crate::serve::lifecycle::UNREADABLE;
use crate::serve::proxy;
use crate::serve::record::State;
use crate::serve::task::detached;
use crate::serve::vm::Vm;
use config::{DeviceId, MachineConfig};
use control::api::{DiskEffect, GuestOperation, LifeEffect, Reservation, find_operation};

/// The RAM and vCPUs that a guest would have after a request to its own API.
fn sizes(vm: &Vm, body: &[u8]) -> (u32, u8) {
    let asked: Value = serde_json::from_slice(body).unwrap_or_default();
    let number = |field| asked.get(field).and_then(Value::as_u64);
    let now = vm.now();
    let ram = number("mem_size_mib").and_then(|ram| u32::try_from(ram).ok());
    let vcpus = number("vcpu_count").and_then(|vcpus| u8::try_from(vcpus).ok());
    (ram.unwrap_or(now.ram_mib), vcpus.unwrap_or(now.vcpus))
}

/// The guest in a path that continues behind its name.
#[derive(Deserialize)]
pub(super) struct Guest {
    id: String,
}

/// All other paths below a guest are its own API: Firecracker's, as `coppice run --api-sock` has it.
pub(super) async fn guest(
    Of(daemon): Context,
    Path(Guest { id }): Path<Guest>,
    method: Method,
    OriginalUri(uri): OriginalUri,
    body: Result<Bytes, BytesRejection>,
) -> Handled<Response> {
    let (vm, body) = (daemon.vm(&id)?, raw(body)?);
    if vm.state() == State::Unreadable && method != Method::GET {
        return Err(Fault::WrongState {
            id,
            state: State::Unreadable,
            advice: UNREADABLE,
        });
    }
    if body.len() > config::limits::MAX_BODY {
        return Err(Fault::Body(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("longer than {} bytes", config::limits::MAX_BODY),
        ));
    }
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let path = path.strip_prefix("/vms/").unwrap_or(path);
    let path = path.find('/').map_or("/", |at| &path[at..]).to_owned();
    detached(pass_on(daemon, vm, method, path, body)).await
}

async fn pass_on(
    daemon: Arc<Daemon>,
    vm: Arc<Vm>,
    method: Method,
    path: String,
    mut body: Bytes,
) -> Handled<Response> {
    let place = path.split('?').next().unwrap_or_default();
    // What is no operation changes nothing: the guest's process refuses it.
    let operation = find_operation(method.as_str(), place);
    let life = operation.map_or(LifeEffect::None, |(operation, _)| operation.life);
    if life == LifeEffect::Loads {
        return Err(Fault::LoadsTemplates);
    }
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let word = |field| asked.get(field).and_then(Value::as_str);
    let is_start = life == LifeEffect::CanStart
        && word("action_type") == Some("InstanceStart")
        && matches!(vm.state(), State::NotStarted | State::Starting);
    if is_start && daemon.start_if_waiting(&vm).await? {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let kept = operation.filter(|(operation, _)| operation.is_kept());
    let disk = operation.map_or(DiskEffect::None, |(operation, _)| operation.disk);
    let _reconfiguring = if kept.is_some() || disk != DiskEffect::None {
        Some(vm.reconfiguring.lock().await)
    } else {
        None
    };
    let reservation = operation
        .map(|(operation, _)| operation.reservation)
        .filter(|_| vm.state() == State::NotStarted);
    // The daemon gives out the CIDs, as no two guests may have the same.
    let cid_before = (reservation == Some(Reservation::Cid)).then(|| vm.now().cid);
    if cid_before.is_some()
        && let Some(completed) = daemon.complete_vsock(&vm, &body)?
    {
        body = completed.into();
    }
    // More RAM is admitted before the guest gets it, and given back where it does not.
    let before = (reservation == Some(Reservation::Memory)).then(|| {
        let now = vm.now();
        (now.ram_mib, now.vcpus)
    });
    let (ram_mib, vcpus) = sizes(&vm, &body);
    let can_be = MachineConfig {
        mem_size_mib: ram_mib,
        vcpu_count: vcpus,
        ..MachineConfig::default()
    };
    // A wrong size is not admitted, as the guest's process refuses it.
    if before.is_some() && can_be.validate().is_ok() {
        daemon.admit_change(&vm, ram_mib, vcpus, |_| ())?;
    }
    // Worked out first, as the operator's request is what counts, and not what the guest's process makes of it.
    let proposed = kept.map(|kept| daemon.propose(&vm, kept, &body));
    // What is wrong otherwise, the guest's process refuses.
    let interfaces_before = match (&proposed, reservation) {
        (Some(Ok(proposed)), Some(Reservation::Network)) => {
            Some(daemon.plan_interfaces(&vm, proposed)?)
        }
        _ => None,
    };
    let child = word("path_on_host").map(|path| vm.folder.join(path));
    let request = Request {
        method,
        path: &path,
        operation,
        body,
    };
    let passed_on = pass_on_with_disks(&daemon, &vm, request, child).await;
    let status = passed_on.as_ref().ok().map(|response| response.status);
    let done = status.is_some_and(|status| status.is_success());
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
    // Also where the process has not answered: the change may have been made.
    let may_be_done = done || status.is_none();
    if let Some(proposed) = proposed.filter(|_| may_be_done) {
        daemon.accept(&vm, proposed?).await?;
    }
    if let Some(before) = interfaces_before {
        daemon.settle_interfaces(&vm, &before, may_be_done);
    }
    let response = passed_on?;
    let state = match word("state") {
        Some("Paused") => Some(State::Paused),
        Some("Resumed") => Some(State::Running),
        _ => None,
    };
    if let Some(state) = state.filter(|_| done && life == LifeEffect::ChangesState) {
        daemon.observe(&vm, state);
        daemon.save(&vm).await;
    }
    let mut to_caller = Response::new(Body::from(response.body));
    *to_caller.status_mut() = response.status;
    if let Some(content) = response.content {
        to_caller.headers_mut().insert(CONTENT_TYPE, content);
    }
    Ok(to_caller)
}

/// A request that is passed on.
struct Request<'a> {
    method: Method,
    path: &'a str,
    /// What is asked, if that is known, and the name in the path.
    operation: Option<(&'static GuestOperation, &'a str)>,
    body: Bytes,
}

/// Passes a request on, and records which disks the guest has after it: a `child` of its disk, or what a commit leaves.
async fn pass_on_with_disks(
    daemon: &Arc<Daemon>,
    vm: &Arc<Vm>,
    request: Request<'_>,
    child: Option<PathBuf>,
) -> Handled<proxy::GuestResponse> {
    let Request {
        method,
        path,
        operation,
        body,
    } = request;
    let changes = method != Method::GET;
    // The guest's disk becomes the parent of the child, and must not be written to when the guest boots again.
    let of_disk = |effect| {
        let (_, name) = operation.filter(|(operation, _)| operation.disk == effect)?;
        Some(DeviceId::new(name))
    };
    let pmem = of_disk(DiskEffect::PmemChild).transpose()?;
    let drive = of_disk(DiskEffect::DriveChild).transpose()?;
    let child = drive.or(pmem.clone()).zip(child);
    if let Some(pmem) = pmem.filter(|_| child.is_some()) {
        daemon.expect_own_name(vm, &pmem)?;
    }
    if let Some((drive, path)) = &child {
        daemon.begin_child(vm, drive, path).await?;
    }
    let committed = of_disk(DiskEffect::Merge).transpose()?;
    let before_commit = match &committed {
        Some(drive) => daemon.begin_commit(vm, drive).await?,
        None => None,
    };
    let patience = if changes { proxy::ACTION } else { proxy::LOOK };
    let asked = proxy::ask(vm, method, path, body, patience).await;
    let done = asked
        .as_ref()
        .ok()
        .map(|response| response.status.is_success());
    if let Some((drive, path)) = &child {
        daemon.end_child(vm, drive, path, done).await;
    }
    if let Some(drive) = &committed {
        daemon.follow_commit(vm, drive, before_commit, done).await;
    }
    asked
}
