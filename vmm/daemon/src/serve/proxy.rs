//! What the daemon asks the process of a guest, over that guest's own socket.
//!
//! Each exchange has a connection of its own, a limit on what comes back, and an end: a process that hangs costs its callers their
//! patience, and nobody else anything.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::http::header::{CONTENT_TYPE, HOST, HeaderValue};
use axum::http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::fault::Fault;
use super::status::State;
use super::vm::Vm;

/// Longest answer in bytes.
const MAX_ANSWER: usize = 4 << 20;
/// How long an answer may take that needs no more than a look.
pub const LOOK: Duration = Duration::from_secs(5);
/// How long an answer may take that has the guest do something, such as start.
pub const ACTION: Duration = Duration::from_mins(2);

/// What came back.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: StatusCode,
    /// What the body is.
    pub content: Option<HeaderValue>,
    /// The body.
    pub body: Bytes,
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Connects to a socket of a guest, and to no other: the folder is the guest's to write to, and what it has put in the place of the socket is
/// not followed.
///
/// # Errors
/// What the host says.
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
) -> Result<Answer, Failure> {
    let stream = connect(socket).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, "localhost")
        .body(Full::new(body))?;
    let mut answer = std::pin::pin!(async {
        let response = sender.send_request(request).await?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_ANSWER).collect().await?;
        Ok::<_, Failure>(Answer {
            status: head.status,
            content: head.headers.get(CONTENT_TYPE).cloned(),
            body: body.to_bytes(),
        })
    });
    tokio::select! {
        biased;
        answer = &mut answer => answer,
        // The connection moves the bytes; where it ends first, it has told why to the exchange.
        _ = connection => answer.await,
    }
}

/// Asks by a socket.
async fn ask_socket(
    socket: &Path,
    method: Method,
    path: &str,
    body: Bytes,
    patience: Duration,
) -> Result<Answer, Option<Failure>> {
    match timeout(patience, exchange(socket, method, path, body)).await {
        Ok(answer) => answer.map_err(Some),
        Err(_) => Err(None),
    }
}

/// Asks the process of a guest.
///
/// # Errors
/// `WrongState` where there is no process, `Busy`, `Silent`, `Unreachable`.
pub async fn ask(
    vm: &Vm,
    method: Method,
    path: &str,
    body: Bytes,
    patience: Duration,
) -> Result<Answer, Fault> {
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
    let asked = ask_socket(&vm.api_socket(), method, path, body, patience).await;
    asked.map_err(|failure| match failure {
        Some(failure) => Fault::Unreachable(vm.id.clone(), failure.to_string()),
        None => Fault::Silent(vm.id.clone()),
    })
}

/// Guests that are asked at once.
const AT_ONCE: usize = 16;

/// What many guests answer, few at a time and in no order; none of those that do not.
pub async fn ask_each<T, F>(vms: Vec<Arc<Vm>>, ask: impl Fn(Arc<Vm>) -> F) -> Vec<T>
where
    T: Send + 'static,
    F: Future<Output = Option<T>> + Send + 'static,
{
    let (mut waiting, mut told) = (vms.into_iter(), Vec::new());
    let mut tasks: JoinSet<_> = waiting.by_ref().take(AT_ONCE).map(&ask).collect();
    while let Some(done) = tasks.join_next().await {
        told.extend(done.ok().flatten());
        if let Some(vm) = waiting.next() {
            tasks.spawn(ask(vm));
        }
    }
    told
}

/// What a guest's process says of the guest.
pub async fn state(socket: &Path, patience: Duration) -> Option<State> {
    let asked = ask_socket(socket, Method::GET, "/", Bytes::new(), patience).await;
    let info: Value = serde_json::from_slice(&asked.ok()?.body).ok()?;
    match info.get("state")?.as_str()? {
        "Not started" => Some(State::NotStarted),
        "Running" => Some(State::Running),
        "Paused" => Some(State::Paused),
        _ => None,
    }
}

/// Has a guest do something, where all there is to say is that it is done.
///
/// # Errors
/// `Guest` where it refuses, and those of [`ask`].
pub async fn act(vm: &Vm, method: Method, path: &str, body: &Value) -> Result<(), Fault> {
    let body = Bytes::from(body.to_string());
    let answer = ask(vm, method, path, body, ACTION).await?;
    if answer.status.is_success() {
        return Ok(());
    }
    Err(refusal(&answer))
}

/// What a guest's process says against a request.
pub fn refusal(answer: &Answer) -> Fault {
    let told = serde_json::from_slice::<Value>(&answer.body).ok();
    let message = told
        .as_ref()
        .and_then(|told| told.get("fault_message")?.as_str())
        .unwrap_or("the guest's process refuses");
    Fault::Guest(answer.status, message.to_owned())
}
