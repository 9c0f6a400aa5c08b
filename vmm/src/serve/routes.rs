//! Requests, and what is answered to them.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{
    DefaultBodyLimit, Extension, FromRequest, FromRequestParts, OriginalUri, Path, Request,
    State as Of,
};
use axum::http::header::{CONTENT_TYPE, HeaderValue, LOCATION};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::middleware::{self, Next};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::stream;
use hyper::upgrade::OnUpgrade;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinSet;
use utoipa::ToSchema;

use super::events::{Event, EventKind};
use super::fault::{Fault, FaultBody};
use super::images::{Image, NamedImage};
use super::lifecycle::{Manner, blocking};
use super::peer::Caller;
use super::spec::VmSpec;
use super::status::{State, VmStatus};
use super::templates::{Template, TemplateSpec};
use super::vm::Vm;
use super::{Daemon, console, metrics, openapi, page, proxy};
use crate::config::{MAX_FILE_SIZE, MachineConfig};
use crate::metrics::CONTENT_TYPE as OPENMETRICS;
use crate::{api, procfs};

/// How old a measure may be that is shown.
const SHOWN: Duration = Duration::from_secs(2);
/// Guests that are asked for their counters at once, and in all.
const ASKED_AT_ONCE: usize = 16;
const ASKED: usize = 256;
/// Longest time that a guest may be given to shut down, in s.
const LONGEST_STOP: u64 = 3600;

type Answer<T> = Result<T, Fault>;
type Context = Of<Arc<Daemon>>;

/// A body of JSON.
pub(super) struct Asked<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Asked<T> {
    type Rejection = Fault;

    async fn from_request(request: Request, state: &S) -> Answer<Self> {
        let body = raw(Bytes::from_request(request, state).await)?;
        Ok(Self(api::parse_object(&body)?))
    }
}

fn raw(body: Result<Bytes, BytesRejection>) -> Answer<Bytes> {
    body.map_err(|rejection| Fault::Body(rejection.status(), rejection.body_text()))
}

/// A query.
pub(super) struct Query<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Fault;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Answer<Self> {
        let query = axum::extract::Query::<T>::from_request_parts(parts, state).await;
        let query = query.map_err(|rejection| Fault::Query(rejection.body_text()))?;
        Ok(Self(query.0))
    }
}

/// `?word`, `?word=true` or `?word=false`.
fn flag<'de, D: serde::Deserializer<'de>>(from: D) -> Result<bool, D::Error> {
    match String::deserialize(from)?.as_str() {
        "" | "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(serde::de::Error::custom("neither true nor false")),
    }
}

/// The query of a look at guests.
#[derive(Default, Deserialize, utoipa::IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Look {
    /// With the memory and the CPU time of each.
    #[serde(deserialize_with = "flag")]
    // Nothing, true or false.
    #[param(required = false, value_type = String, example = "true")]
    stats: bool,
}

/// The query of the end of a guest.
#[derive(Default, Deserialize, utoipa::IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct End {
    /// For how many seconds the guest may take to shut down by itself, before its process is ended.
    #[param(required = false, maximum = 3600)]
    timeout_s: u64,
}

/// The query of metrics.
#[derive(Default, Deserialize, utoipa::IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Which {
    /// With the counters of this guest's own process.
    #[param(required = false)]
    vm: Option<String>,
    /// With the counters of all guests' processes, of 256 at most.
    #[serde(deserialize_with = "flag")]
    // Nothing, true or false.
    #[param(required = false, value_type = String, example = "true")]
    guests: bool,
}

/// The body of `POST /vms/{id}/stop`.
#[derive(Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Stop {
    /// For how many seconds the guest may take to shut down by itself, before its process is ended.
    #[schema(maximum = 3600, default = 10)]
    timeout_s: u64,
}

impl Default for Stop {
    fn default() -> Self {
        Self { timeout_s: 10 }
    }
}

/// All guests.
#[derive(Serialize, ToSchema)]
pub(super) struct VmList {
    /// By name.
    vms: Vec<VmStatus>,
}

/// All images.
#[derive(Serialize, ToSchema)]
pub(super) struct ImageList {
    /// By name.
    images: Vec<NamedImage>,
}

/// That the daemon serves.
#[derive(Serialize, ToSchema)]
pub(super) struct Health {
    /// `ok`.
    status: &'static str,
    /// Its version.
    version: &'static str,
    /// Guests.
    vms: usize,
}

fn manner(timeout_s: u64) -> Answer<Manner> {
    if timeout_s > LONGEST_STOP {
        return Err(Fault::Invalid {
            field: "timeout_s",
            value: timeout_s.to_string(),
            expected: "an hour or less",
        });
    }
    Ok(Manner {
        patience: Duration::from_secs(timeout_s),
    })
}

fn uid(caller: Caller) -> Answer<u32> {
    match caller {
        Caller::User(uid) => Ok(uid),
        Caller::Web => Err(Fault::ReadOnly),
    }
}

/// All guests, as the daemon knows them. No guest is asked anything.
#[utoipa::path(get, path = "/vms", tag = "guests", params(Look), responses(
    (status = 200, body = VmList), (status = 400, body = FaultBody)))]
pub(super) async fn list(Of(daemon): Context, Query(look): Query<Look>) -> Json<VmList> {
    if look.stats {
        daemon.measure(SHOWN).await;
    }
    let vms = daemon.all();
    let vms = vms.iter().map(|vm| vm.status(look.stats, false));
    Json(VmList { vms: vms.collect() })
}

/// Makes a guest. Made twice in the same way, it is there once.
#[utoipa::path(post, path = "/vms", tag = "guests", request_body = VmSpec, responses(
    (status = 201, body = VmStatus, description = "It is made."),
    (status = 200, body = VmStatus, description = "It was there, made in the same way."),
    (status = 400, body = FaultBody), (status = 404, body = FaultBody, description = "There is no such image or template."),
    (status = 409, body = FaultBody, description = "It is there, made in another way."),
    (status = 413, body = FaultBody),
    (status = 422, body = FaultBody, description = "It could not start."),
    (status = 507, body = FaultBody, description = "There is no room for it.")))]
pub(super) async fn create(
    Of(daemon): Context,
    Extension(caller): Extension<Caller>,
    Asked(spec): Asked<VmSpec>,
) -> Answer<Response> {
    let uid = uid(caller)?;
    let (vm, new) = Daemon::detached(daemon.create(spec, uid)).await?;
    let status = if new {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    let location = HeaderValue::from_str(&format!("/vms/{}", vm.id));
    let location = location.map_err(|error| Fault::Internal(error.to_string()))?;
    Ok((status, [(LOCATION, location)], Json(vm.status(false, true))).into_response())
}

/// A guest, as the daemon knows it. It is not asked.
#[utoipa::path(get, path = "/vms/{id}", tag = "guests", params(("id" = String, Path), Look), responses(
    (status = 200, body = VmStatus), (status = 400, body = FaultBody), (status = 404, body = FaultBody)))]
pub(super) async fn show(
    Of(daemon): Context,
    Path(id): Path<String>,
    Query(look): Query<Look>,
) -> Answer<Json<VmStatus>> {
    let vm = daemon.vm(&id)?;
    if look.stats {
        daemon.measure(SHOWN).await;
    }
    Ok(Json(vm.status(look.stats, true)))
}

/// Ends a guest, and removes all that is left of it.
#[utoipa::path(delete, path = "/vms/{id}", tag = "guests", params(("id" = String, Path), End), responses(
    (status = 204), (status = 400, body = FaultBody), (status = 404, body = FaultBody), (status = 504, body = FaultBody)))]
pub(super) async fn delete(
    Of(daemon): Context,
    Path(id): Path<String>,
    Query(end): Query<End>,
) -> Answer<StatusCode> {
    let (vm, manner) = (daemon.vm(&id)?, manner(end.timeout_s)?);
    Daemon::detached(daemon.delete(vm, manner)).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn told(vm: &Vm) -> Json<VmStatus> {
    Json(vm.status(false, false))
}

/// Starts a guest that waits or that has ended. One that runs goes on running.
#[utoipa::path(post, path = "/vms/{id}/start", tag = "guests", params(("id" = String, Path)), responses(
    (status = 200, body = VmStatus), (status = 400, body = FaultBody), (status = 404, body = FaultBody),
    (status = 409, body = FaultBody), (status = 422, body = FaultBody), (status = 507, body = FaultBody)))]
pub(super) async fn start(Of(daemon): Context, Path(id): Path<String>) -> Answer<Json<VmStatus>> {
    let vm = daemon.vm(&id)?;
    Ok(told(&*Daemon::detached(daemon.start(vm)).await?))
}

/// Ends a guest: by Ctrl-Alt-Del, after `timeout_s` by SIGTERM, with its disks closed, and by force 5 s later. The guest can be started again.
#[utoipa::path(post, path = "/vms/{id}/stop", tag = "guests", params(("id" = String, Path)),
    request_body = Option<Stop>, responses(
    (status = 200, body = VmStatus), (status = 400, body = FaultBody), (status = 404, body = FaultBody),
    (status = 413, body = FaultBody), (status = 504, body = FaultBody)))]
pub(super) async fn stop(
    Of(daemon): Context,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Json<VmStatus>> {
    let body = raw(body)?;
    let stop = if body.is_empty() {
        Stop::default()
    } else {
        api::parse_object::<Option<Stop>>(&body)?.unwrap_or_default()
    };
    let (vm, manner) = (daemon.vm(&id)?, manner(stop.timeout_s)?);
    Ok(told(&*Daemon::detached(daemon.stop(vm, manner)).await?))
}

/// Has the vCPUs of a guest stand still.
#[utoipa::path(post, path = "/vms/{id}/pause", tag = "guests", params(("id" = String, Path)), responses(
    (status = 200, body = VmStatus), (status = 400, body = FaultBody), (status = 404, body = FaultBody),
    (status = 409, body = FaultBody)))]
pub(super) async fn pause(Of(daemon): Context, Path(id): Path<String>) -> Answer<Json<VmStatus>> {
    let vm = daemon.vm(&id)?;
    Ok(told(
        &*Daemon::detached(daemon.pause(vm, State::Paused)).await?,
    ))
}

/// Lets the vCPUs of a guest go on.
#[utoipa::path(post, path = "/vms/{id}/resume", tag = "guests", params(("id" = String, Path)), responses(
    (status = 200, body = VmStatus), (status = 400, body = FaultBody), (status = 404, body = FaultBody),
    (status = 409, body = FaultBody)))]
pub(super) async fn resume(Of(daemon): Context, Path(id): Path<String>) -> Answer<Json<VmStatus>> {
    let vm = daemon.vm(&id)?;
    Ok(told(
        &*Daemon::detached(daemon.pause(vm, State::Running)).await?,
    ))
}

/// The output of a guest's serial console: the last of it, and then what comes. With `Upgrade: coppice-console`, the line itself.
#[utoipa::path(get, path = "/vms/{id}/console", tag = "guests", params(("id" = String, Path)), responses(
    (status = 200, content_type = "application/octet-stream", description = "A stream, to the end of the guest."),
    (status = 101, description = "The connection is the line."),
    (status = 404, body = FaultBody), (status = 409, body = FaultBody)))]
pub(super) async fn console_output(
    Of(daemon): Context,
    Path(id): Path<String>,
    request: Request,
) -> Answer<Response> {
    let (mut head, _) = request.into_parts();
    let upgrade = head.extensions.remove::<OnUpgrade>();
    console::output(daemon.vm(&id)?, &head.headers, upgrade).await
}

/// Gives the guest something to read on its serial console.
#[utoipa::path(put, path = "/vms/{id}/console", tag = "guests", params(("id" = String, Path)),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"), responses(
    (status = 204), (status = 400, body = FaultBody), (status = 404, body = FaultBody), (status = 409, body = FaultBody),
    (status = 413, body = FaultBody)))]
pub(super) async fn console_input(
    Of(daemon): Context,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Answer<StatusCode> {
    let (vm, body) = (daemon.vm(&id)?, raw(body)?);
    if body.is_empty() {
        let text = "there is nothing to give the guest".to_owned();
        return Err(Fault::Body(StatusCode::BAD_REQUEST, text));
    }
    console::input(vm, body).await?;
    Ok(StatusCode::NO_CONTENT)
}

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
struct Guest {
    id: String,
}

/// Everything else below a guest is its own API: Firecracker's, as `coppice run --api-sock` has it.
async fn guest(
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
    let drive = place
        .strip_prefix("drives/")
        .and_then(|rest| rest.strip_suffix("/snapshot"));
    let child = drive.filter(|_| changes).zip(word("path_on_host"));
    let child = child.map(|(drive, path)| (drive, vm.folder.join(path)));
    if let Some((drive, path)) = &child {
        daemon.begin_child(&vm, drive, path).await?;
    }
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

/// All images: files that a guest's configuration can name as `image:NAME`.
#[utoipa::path(get, path = "/images", tag = "images", responses((status = 200, body = ImageList)))]
pub(super) async fn images(Of(daemon): Context) -> Json<ImageList> {
    let images = daemon.images().list();
    Json(ImageList { images })
}

/// An image.
#[utoipa::path(get, path = "/images/{name}", tag = "images", params(("name" = String, Path)), responses(
    (status = 200, body = NamedImage), (status = 404, body = FaultBody)))]
pub(super) async fn image(
    Of(daemon): Context,
    Path(name): Path<String>,
) -> Answer<Json<NamedImage>> {
    Ok(Json(daemon.images().get(&name)?))
}

/// Registers an image. Guests that use the one of that name before keep its file until they are started anew.
#[utoipa::path(put, path = "/images/{name}", tag = "images", params(("name" = String, Path)),
    request_body = Image, responses(
    (status = 204), (status = 400, body = FaultBody), (status = 413, body = FaultBody)))]
pub(super) async fn put_image(
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
pub(super) async fn delete_image(
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

/// Templates, which guests are cloned from.
#[utoipa::path(get, path = "/templates", tag = "templates", responses((status = 200, body = Vec<Template>)))]
pub(super) async fn templates(Of(daemon): Context) -> Json<Vec<Template>> {
    Json(daemon.templates().list())
}

/// A template.
#[utoipa::path(get, path = "/templates/{id}", tag = "templates", params(("id" = String, Path)), responses(
    (status = 200, body = Template), (status = 404, body = FaultBody)))]
pub(super) async fn template(
    Of(daemon): Context,
    Path(id): Path<String>,
) -> Answer<Json<Template>> {
    Ok(Json(daemon.templates().get(&id)?))
}

/// Makes a template of a guest, which stands still meanwhile and goes on.
#[utoipa::path(post, path = "/templates", tag = "templates", request_body = TemplateSpec, responses(
    (status = 201, body = Template), (status = 400, body = FaultBody), (status = 404, body = FaultBody),
    (status = 409, body = FaultBody), (status = 507, body = FaultBody)))]
pub(super) async fn create_template(
    Of(daemon): Context,
    Extension(caller): Extension<Caller>,
    Asked(spec): Asked<TemplateSpec>,
) -> Answer<Response> {
    let uid = uid(caller)?;
    let template = Daemon::detached(daemon.create_template(spec, uid)).await?;
    Ok((StatusCode::CREATED, Json(template)).into_response())
}

/// Deletes a template that nothing was made of, or nothing that is left.
#[utoipa::path(delete, path = "/templates/{id}", tag = "templates", params(("id" = String, Path)), responses(
    (status = 204), (status = 404, body = FaultBody), (status = 409, body = FaultBody)))]
pub(super) async fn delete_template(
    Of(daemon): Context,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    Daemon::detached(daemon.delete_template(id)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What happens, as server-sent events. `Last-Event-ID` asks for what has happened since; 0 for all that is kept.
#[utoipa::path(get, path = "/events", tag = "daemon",
    params(("Last-Event-ID" = Option<u64>, Header, description = "The last event that was seen.")), responses(
    (status = 200, content_type = "text/event-stream", body = Event, description = "A stream without an end.")))]
pub(super) async fn events(Of(daemon): Context, headers: HeaderMap) -> impl IntoResponse {
    let last = headers
        .get("last-event-id")
        .and_then(|last| last.to_str().ok()?.parse().ok());
    let (kept, receiver) = daemon.events.listen(last);
    let stream = stream::unfold(Some((kept.into_iter(), receiver)), |listening| async {
        let (mut kept, mut receiver) = listening?;
        let event = match kept.next() {
            Some(event) => event,
            None => match receiver.recv().await {
                Ok(event) => event,
                // Too slow: it comes back, and says what it has seen.
                Err(RecvError::Lagged(_) | RecvError::Closed) => return None,
            },
        };
        let told = sse::Event::default()
            .id(event.id.to_string())
            .event(event.kind.name())
            .json_data(&event)
            .unwrap_or_default();
        // Nothing comes after the end, which is not to be held up.
        let goes_on = event.kind != EventKind::DaemonStopping;
        Some((
            Ok::<_, Infallible>(told),
            goes_on.then_some((kept, receiver)),
        ))
    });
    Sse::new(stream).keep_alive(KeepAlive::new().interval(Duration::from_secs(15)))
}

/// Counters for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "daemon", params(Which), responses(
    (status = 200, content_type = "application/openmetrics-text", body = String),
    (status = 400, body = FaultBody), (status = 404, body = FaultBody)))]
pub(super) async fn metrics(Of(daemon): Context, Query(which): Query<Which>) -> Answer<Response> {
    daemon.measure(SHOWN).await;
    let asked = match (&which.vm, which.guests) {
        (Some(id), _) => vec![daemon.vm(id)?],
        (None, true) => daemon.all().into_iter().take(ASKED).collect(),
        (None, false) => Vec::new(),
    };
    let mut joined = metrics::Joined::default();
    let (mut waiting, mut told) = (asked.into_iter(), BTreeMap::new());
    let mut tasks: JoinSet<_> = waiting
        .by_ref()
        .take(ASKED_AT_ONCE)
        .map(metrics::of_guest)
        .collect();
    while let Some(done) = tasks.join_next().await {
        if let Ok(Some((id, text))) = done {
            told.insert(id, text);
        }
        if let Some(vm) = waiting.next() {
            tasks.spawn(metrics::of_guest(vm));
        }
    }
    for (id, text) in &told {
        joined.add(id, text);
    }
    let vms = daemon.all();
    let mut vms = vms
        .iter()
        .map(|vm| vm.status(true, false))
        .collect::<Vec<_>>();
    if let Some(id) = &which.vm {
        vms.retain(|vm| vm.id == *id);
    }
    let own = procfs::memory(std::process::id()).ok();
    let own = daemon.metrics.encode(vms, own);
    let own = own.map_err(|error| Fault::Internal(error.to_string()))?;
    let content = [(CONTENT_TYPE, HeaderValue::from_static(OPENMETRICS))];
    Ok((content, joined.after(&own)).into_response())
}

/// Whether the daemon serves.
#[utoipa::path(get, path = "/healthz", tag = "daemon", responses((status = 200, body = Health)))]
pub(super) async fn health(Of(daemon): Context) -> Json<Health> {
    Json(Health {
        status: "ok",
        version: env!("CARGO_PKG_VERSION"),
        vms: daemon.vms().len(),
    })
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "daemon", responses((status = 200, body = Object)))]
pub(super) async fn openapi_json() -> Answer<Response> {
    let text = openapi::document().map_err(Fault::Json)?;
    let content = [(CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    Ok((content, text).into_response())
}

async fn nothing(method: Method, uri: Uri) -> Fault {
    Fault::NoPath(method, uri.path().to_owned())
}

async fn other_method(method: Method, uri: Uri) -> Fault {
    Fault::Method(method, uri.path().to_owned())
}

async fn counted(Of(daemon): Context, request: Request, next: Next) -> Response {
    let (method, begun) = (request.method().clone(), Instant::now());
    let path = request.uri().path().to_owned();
    let response = next.run(request).await;
    let (code, took) = (response.status().as_u16(), begun.elapsed());
    daemon.metrics.answered(&method, code, took);
    tracing::debug!(%method, path, code, ?took, "request");
    response
}

fn finished(router: Router<Arc<Daemon>>, daemon: Arc<Daemon>) -> Router {
    router
        .fallback(nothing)
        .method_not_allowed_fallback(other_method)
        .layer(DefaultBodyLimit::max(MAX_FILE_SIZE as usize))
        .layer(middleware::from_fn_with_state(daemon.clone(), counted))
        .with_state(daemon)
}

/// What only looks.
fn looks() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/", get(page::page))
        .route("/healthz", get(health))
        .route("/openapi.json", get(openapi_json))
        .route("/metrics", get(metrics))
}

/// What the address for reading serves.
pub fn read_only(daemon: Arc<Daemon>) -> Router {
    let router = looks()
        .route("/vms", get(list))
        .route("/vms/{id}", get(show));
    finished(router, daemon)
}

/// What the socket serves.
pub fn all(daemon: Arc<Daemon>) -> Router {
    let router = looks()
        .route("/vms", get(list).post(create))
        .route("/vms/{id}", get(show).delete(delete))
        .route("/vms/{id}/start", post(start))
        .route("/vms/{id}/stop", post(stop))
        .route("/vms/{id}/pause", post(pause))
        .route("/vms/{id}/resume", post(resume))
        .route("/vms/{id}/console", get(console_output).put(console_input))
        .route("/vms/{id}/", get(guest))
        .route("/vms/{id}/{*path}", get(guest).put(guest).patch(guest))
        .route("/images", get(images))
        .route(
            "/images/{name}",
            get(image).put(put_image).delete(delete_image),
        )
        .route("/templates", get(templates).post(create_template))
        .route("/templates/{id}", get(template).delete(delete_template))
        .route("/events", get(events));
    finished(router, daemon)
}
