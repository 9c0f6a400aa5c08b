//! The serial console of a guest over HTTP.
//!
//! `GET` streams the output: the last of it, and then what comes. `PUT` gives the guest its body to read. `GET` with
//! `Upgrade: coppice-console` makes the connection the serial line, in both directions. The bytes are the guest's: they
//! are passed on, and never interpreted.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header::{CONNECTION, CONTENT_TYPE, HeaderValue, UPGRADE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy, sink, split};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::fault::Fault;
use super::proxy;
use super::vm::Vm;
use control::api::CONSOLE_PROTOCOL as PROTOCOL;
use host::report::chain;

/// Longest piece of output that is sent at once, in bytes.
const CHUNK: usize = 4096;
/// How long the guest's process may take to read its input.
const PATIENCE: Duration = Duration::from_secs(2);

async fn connect(vm: &Vm) -> Result<UnixStream, Fault> {
    let state = {
        let now = vm.now();
        now.process.is_none().then_some(now.state)
    };
    if let Some(state) = state {
        return Err(Fault::WrongState {
            id: vm.id.clone(),
            state,
            advice: "it has a console while it has a process",
        });
    }
    match timeout(proxy::LOOK, proxy::connect(&vm.console_socket())).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(Fault::Unreachable {
            id: vm.id.clone(),
            source: error.into(),
        }),
        Err(_) => Err(Fault::Silent(vm.id.clone())),
    }
}

/// The serial line of a guest, by its process `pid`. When a guest starts, the process that it was configured in is
/// replaced by another; the line then continues with that one.
struct Line {
    vm: Arc<Vm>,
    pid: Option<u32>,
    stream: UnixStream,
}

fn pid(vm: &Vm) -> Option<u32> {
    vm.now().process.as_ref().map(|process| process.pid)
}

impl Line {
    async fn new(vm: Arc<Vm>) -> Result<Self, Fault> {
        let pid = pid(&vm);
        let stream = connect(&vm).await?;
        Ok(Self { vm, pid, stream })
    }

    /// Called when the connection has ended: connects to the process that has taken the place of the former one.
    /// `false` where there is none.
    async fn reconnect(&mut self) -> bool {
        let is_replaced = self.vm.now().pending.start;
        if !is_replaced && pid(&self.vm) == self.pid {
            return false;
        }
        self.vm.until(|now| !now.pending.start).await;
        let pid = pid(&self.vm);
        match connect(&self.vm).await {
            Ok(stream) if pid.is_some() && pid != self.pid => {
                (self.pid, self.stream) = (pid, stream);
                true
            }
            Ok(_) | Err(_) => false,
        }
    }
}

/// Joins the serial line to a connection that is not HTTP any more.
async fn attach(upgrade: OnUpgrade, mut line: Line) {
    let client = match upgrade.await {
        Ok(upgraded) => TokioIo::new(upgraded),
        Err(error) => {
            tracing::debug!(error = %chain(&error), "a console client left");
            return;
        }
    };
    let (mut from_client, mut to_client) = split(client);
    loop {
        let (mut from_guest, mut to_guest) = line.stream.split();
        // Ends when the guest's process does, or when the client has closed the connection.
        let has_left = tokio::select! {
            read = copy(&mut from_guest, &mut to_client) => read.is_err(),
            written = copy(&mut from_client, &mut to_guest) => written.is_ok(),
        };
        if has_left || !line.reconnect().await {
            break;
        }
    }
    // So that the client sees the end.
    let _ = to_client.shutdown().await;
}

/// `GET`.
pub async fn output(
    vm: Arc<Vm>,
    headers: &HeaderMap,
    upgrade: Option<OnUpgrade>,
) -> Result<Response, Fault> {
    let line = Line::new(vm).await?;
    let wanted = headers.get(UPGRADE);
    if wanted.is_some_and(|wanted| wanted.as_bytes().eq_ignore_ascii_case(PROTOCOL.as_bytes()))
        && let Some(upgrade) = upgrade
    {
        tokio::spawn(attach(upgrade, line));
        let headers = [
            (CONNECTION, HeaderValue::from_static("upgrade")),
            (UPGRADE, HeaderValue::from_static(PROTOCOL)),
        ];
        return Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response());
    }
    let chunks = stream::unfold(line, |mut line| async move {
        let mut chunk = vec![0; CHUNK];
        loop {
            match line.stream.read(&mut chunk).await {
                Ok(0) if line.reconnect().await => {}
                Ok(0) => return None,
                Ok(len) => {
                    chunk.truncate(len);
                    return Some((Ok(Bytes::from(chunk)), line));
                }
                Err(error) => return Some((Err(error), line)),
            }
        }
    });
    let content = (
        CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    Ok(([content], Body::from_stream(chunks)).into_response())
}

/// `PUT`.
pub async fn input(vm: Arc<Vm>, bytes: Bytes) -> Result<(), Fault> {
    let mut guest = connect(&vm).await?;
    let given = async {
        let (mut from_guest, mut to_guest) = guest.split();
        let reading = async {
            // The guest's process closes the connection when it has read all.
            copy(&mut from_guest, &mut sink()).await
        };
        let writing = async {
            to_guest.write_all(&bytes).await?;
            to_guest.shutdown().await
        };
        let (read, written) = tokio::join!(reading, writing);
        read.and(written)
    };
    match timeout(PATIENCE, given).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Fault::Unreachable {
            id: vm.id.clone(),
            source: error.into(),
        }),
        Err(_) => Err(Fault::Silent(vm.id.clone())),
    }
}
