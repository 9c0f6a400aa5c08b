//! The guest's own API, which is passed on to its process.

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{OriginalUri, Path, State as Of};
use axum::http::header::CONTENT_TYPE;
use axum::http::{Method, StatusCode};
use axum::response::Response;
use serde::Deserialize;
use serde_json::Value;

use super::request::raw;
use super::{Answer, Context};
use crate::api;
use crate::config::MachineConfig;
use crate::serve::fault::Fault;
use crate::serve::status::State;
use crate::serve::templates::expect_own_name;
use crate::serve::vm::Vm;
use crate::serve::{Daemon, proxy};

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
    if body.len() > api::MAX_BODY {
        return Err(Fault::Body(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("longer than {} bytes", api::MAX_BODY),
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
    body: Bytes,
) -> Answer<Response> {
    let changes = method != Method::GET;
    let place = path.split('?').next().unwrap_or_default().trim_matches('/');
    if changes && place == "snapshot/load" {
        return Err(Fault::LoadsTemplates);
    }
    // Room for more RAM has to be there before the guest may have it.
    let before =
        (changes && place == "machine-config" && vm.state() == State::NotStarted).then(|| {
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
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let word = |field| asked.get(field).and_then(Value::as_str);
    // What is its disk is the parent of another then, and must not be written to when the guest starts anew.
    let drive = ["drives/", "pmem/"]
        .into_iter()
        .find_map(|kind| place.strip_prefix(kind)?.strip_suffix("/snapshot"));
    let child = drive.filter(|_| changes).zip(word("path_on_host"));
    let child = child.map(|(drive, path)| (drive, vm.folder.join(path)));
    if let Some((pmem, _)) = &child
        && place.starts_with("pmem/")
    {
        expect_own_name(&vm, pmem).await?;
    }
    if let Some((drive, path)) = &child {
        daemon.begin_child(&vm, drive, path).await?;
    }
    let committed = place
        .strip_prefix("drives/")
        .and_then(|rest| rest.strip_suffix("/commit"))
        .filter(|_| changes);
    let before_commit = match committed {
        Some(drive) => daemon.begin_commit(&vm, drive).await?,
        None => None,
    };
    let patience = if changes { proxy::ACTION } else { proxy::LOOK };
    let answer = proxy::ask(&vm, method, &path, body.clone(), patience).await;
    let told = answer.as_ref().ok().map(|answer| answer.status);
    let done = told.is_some_and(|status| status.is_success());
    if let (false, Some((ram_mib, vcpus))) = (done, before) {
        vm.change(|now| (now.ram_mib, now.vcpus) = (ram_mib, vcpus));
    }
    if let Some((drive, path)) = &child {
        daemon.end_child(&vm, drive, path, told.map(|_| done)).await;
    }
    if let Some(drive) = committed {
        let accepted = told.map(|_| done);
        daemon
            .follow_commit(&vm, drive, before_commit, accepted)
            .await;
    }
    let answer = answer?;
    if done && before.is_some() {
        daemon.limit_again(&vm).await;
    }
    if done && changes {
        let state = match (place, word("state"), word("action_type")) {
            ("vm", Some("Paused"), _) => Some(State::Paused),
            ("vm", Some("Resumed"), _) | ("actions", _, Some("InstanceStart")) => {
                Some(State::Running)
            }
            _ => None,
        };
        if let Some(state) = state {
            daemon.observe(&vm, state);
            daemon.save(&vm).await;
        }
    }
    let mut response = Response::new(Body::from(answer.body));
    *response.status_mut() = answer.status;
    if let Some(content) = answer.content {
        response.headers_mut().insert(CONTENT_TYPE, content);
    }
    Ok(response)
}
