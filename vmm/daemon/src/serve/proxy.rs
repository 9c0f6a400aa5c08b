//! Requests to the process of a guest, over that guest's own socket.
//!
//! Each exchange has a connection of its own, a limit on the length of the response, and a deadline: a process that
//! hangs holds up its own callers until that deadline, and no other guest's.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::header::{CONTENT_TYPE, HOST, HeaderValue};
use axum::http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::fault::{Failure, Fault};
use super::record::State;
use super::vm::{Now, Vm};
use host::printable::printable;
use host::report::chain;

/// Longest response in bytes, and longest head of one; longest response that tells the state of a guest.
const MAX_RESPONSE: usize = 4 << 20;
const MAX_HEAD: usize = 16 << 10;
const MAX_STATE: usize = 16 << 10;
/// Longest reason for a refusal, and why a response is wrong, in characters.
const LONGEST_REFUSAL: usize = 4096;
/// Deadline of a request that only reads.
pub const LOOK: Duration = Duration::from_secs(5);
/// Deadline of a request that has the guest do something, such as start.
pub const ACTION: Duration = Duration::from_mins(2);
/// Between two requests to a process that did not answer the first.
const RETRY: Duration = Duration::from_millis(50);

/// The response of a guest's process.
#[derive(Debug)]
pub struct GuestResponse {
    /// The status code.
    pub status: StatusCode,
    /// The type of the body.
    pub content: Option<HeaderValue>,
    /// The body.
    pub body: Bytes,
}

/// Connects to a socket of a guest, and to no other: the guest may write to its folder, so that a link in the place of
/// the socket is not followed.
///
/// # Errors
/// The host's error.
pub async fn connect(socket: &Path) -> io::Result<UnixStream> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = open(socket, flags, Mode::empty())?;
    if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::Socket {
        return Err(io::Error::other("it is no socket"));
    }
    UnixStream::connect(format!("/proc/self/fd/{}", file.as_raw_fd())).await
}

async fn exchange(
    socket: &Path,
    method: Method,
    path: &str,
    body: Bytes,
    longest: usize,
) -> Result<GuestResponse, Failure> {
    let stream = connect(socket).await?;
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        .handshake(TokioIo::new(stream))
        .await?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, "localhost")
        .body(Full::new(body))?;
    let mut exchanged = std::pin::pin!(async {
        let response = sender.send_request(request).await?;
        let (head, body) = response.into_parts();
        let status = head.status;
        // No operation of a guest answers otherwise, and a caller may not have a meaning for it.
        if !(status.is_success() || status.is_client_error() || status.is_server_error()) {
            return Err(format!("it answers by the status {}", status.as_u16()).into());
        }
        let body = Limited::new(body, longest).collect().await?;
        Ok::<_, Failure>(GuestResponse {
            status,
            content: head.headers.get(CONTENT_TYPE).cloned(),
            body: body.to_bytes(),
        })
    });
    tokio::select! {
        biased;
        done = &mut exchanged => done,
        // The connection moves the bytes. Where it ends first, the exchange fails with the reason for that.
        _ = connection => exchanged.await,
    }
}

/// Sends a request to a socket; `None` as the error where the deadline has passed.
async fn ask_socket(
    socket: &Path,
    method: Method,
    path: &str,
    body: Bytes,
    (patience, longest): (Duration, usize),
) -> Result<GuestResponse, Option<Failure>> {
    match timeout(patience, exchange(socket, method, path, body, longest)).await {
        Ok(done) => done.map_err(Some),
        Err(_) => Err(None),
    }
}

/// Sends a request to the process of a guest, and waits for the response, but not longer than `patience`.
///
/// # Errors
/// `WrongState` where there is no process, `Busy`, `Silent`, `Unreachable`.
pub async fn ask(
    vm: &Vm,
    method: Method,
    path: &str,
    body: Bytes,
    patience: Duration,
) -> Result<GuestResponse, Fault> {
    ask_for(vm, method, path, body, patience, MAX_RESPONSE).await
}

/// As [`ask`], for a response of at most `longest` bytes.
///
/// # Errors
/// Those of [`ask`].
pub async fn ask_for(
    vm: &Vm,
    method: Method,
    path: &str,
    body: Bytes,
    patience: Duration,
    longest: usize,
) -> Result<GuestResponse, Fault> {
    let no_process = || {
        let now = vm.now();
        now.process.is_none().then_some(now.state)
    };
    if let Some(state) = no_process() {
        return Err(Fault::WrongState {
            id: vm.id.clone(),
            state,
            advice: "start it first",
        });
    }
    let place = timeout(LOOK, vm.requests.acquire()).await;
    let Ok(Ok(_place)) = place else {
        return Err(Fault::Busy(vm.id.clone()));
    };
    let asked = ask_socket(&vm.api_socket(), method, path, body, (patience, longest)).await;
    asked.map_err(|failure| match failure {
        Some(source) => Fault::Unreachable {
            id: vm.id.clone(),
            source,
        },
        None => Fault::Silent(vm.id.clone()),
    })
}

/// As [`ask`], and again until the process answers; `None` where it has ended, or is about to be ended.
///
/// # Errors
/// Those of [`ask`], where it does not answer for as long as an action may take.
pub async fn ask_until_answered(
    vm: &Vm,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<Option<GuestResponse>, Fault> {
    let gone = |now: &Now| now.process.is_none() || now.state == State::Deleting;
    let begun = Instant::now();
    loop {
        let asked = tokio::select! {
            biased;
            () = vm.until(gone) => return Ok(None),
            asked = ask(vm, method.clone(), path, body.clone(), ACTION) => asked,
        };
        match asked {
            Ok(response) => return Ok(Some(response)),
            Err(fault) if begun.elapsed() >= ACTION => return Err(fault),
            // It may have been killed a moment ago, and the daemon learns that soon.
            Err(_) => sleep(RETRY).await,
        }
    }
}

/// The response of a guest's process to a `GET`, as a `T`, which has at most `longest` bytes.
///
/// # Errors
/// `Guest` where it refuses, `Unreachable` where it answers something else, and those of [`ask`].
pub async fn get<T: DeserializeOwned>(vm: &Vm, path: &str, longest: usize) -> Result<T, Fault> {
    let response = ask_for(vm, Method::GET, path, Bytes::new(), LOOK, longest).await?;
    if !response.status.is_success() {
        return Err(refusal(&response));
    }
    parse(vm, &response)
}

/// What is in the response of a guest's process.
///
/// # Errors
/// `Unreachable`, where it is something else. The reason has words of the process, and so a limit, and nothing in it is
/// a command to a terminal.
pub fn parse<T: DeserializeOwned>(vm: &Vm, response: &GuestResponse) -> Result<T, Fault> {
    serde_json::from_slice(&response.body).map_err(|error| Fault::Unreachable {
        id: vm.id.clone(),
        source: shown(&chain(&error).to_string()).into(),
    })
}

/// A text of a guest's process, as it is shown.
fn shown(text: &str) -> String {
    let text: String = text.chars().take(LONGEST_REFUSAL).collect();
    printable(&text).into_owned()
}

/// The body of a refusal. What else is in it is not kept: a list of numbers would take many times its own length.
#[derive(Deserialize)]
struct Refusal {
    fault_message: String,
}

/// Guests that are asked at the same time.
const AT_ONCE: usize = 16;

/// Asks many guests, a few at a time, and gives their responses in no order; nothing of those that do not answer.
pub async fn ask_each<T, F>(vms: Vec<Arc<Vm>>, ask: impl Fn(Arc<Vm>) -> F) -> Vec<T>
where
    T: Send + 'static,
    F: Future<Output = Option<T>> + Send + 'static,
{
    let (mut waiting, mut answered) = (vms.into_iter(), Vec::new());
    let mut tasks: JoinSet<_> = waiting.by_ref().take(AT_ONCE).map(&ask).collect();
    while let Some(done) = tasks.join_next().await {
        answered.extend(done.ok().flatten());
        if let Some(vm) = waiting.next() {
            tasks.spawn(ask(vm));
        }
    }
    answered
}

/// The state of the guest that its process reports.
pub async fn state(socket: &Path, patience: Duration) -> Option<State> {
    let asked = ask_socket(
        socket,
        Method::GET,
        "/",
        Bytes::new(),
        (patience, MAX_STATE),
    )
    .await;
    let info: Value = serde_json::from_slice(&asked.ok()?.body).ok()?;
    match info.get("state")?.as_str()? {
        "Not started" => Some(State::NotStarted),
        "Running" => Some(State::Running),
        "Paused" => Some(State::Paused),
        _ => None,
    }
}

/// Has a guest do something that has no result but that it is done.
///
/// # Errors
/// `Guest` where it refuses, and those of [`ask`].
pub async fn act(vm: &Vm, method: Method, path: &str, body: &Value) -> Result<(), Fault> {
    let body = Bytes::from(body.to_string());
    let response = ask(vm, method, path, body, ACTION).await?;
    if response.status.is_success() {
        return Ok(());
    }
    Err(refusal(&response))
}

/// The reason of a guest's process for refusing a request.
pub fn refusal(response: &GuestResponse) -> Fault {
    let refusal = serde_json::from_slice::<Refusal>(&response.body);
    let message = match &refusal {
        Ok(refusal) => &refusal.fault_message,
        Err(_) => "the guest's process refuses",
    };
    Fault::Guest(response.status, shown(message))
}
