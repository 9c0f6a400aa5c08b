//! The other end of the socket: what one `coppice` asks of another.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::pin;
use std::task::Poll;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use rustix::event::Timespec;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::de::DeserializeOwned;

use super::polled::{self, Stream};

/// How long an answer may take: a guest that is stopped must not hold up who asks.
const PATIENCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 500_000_000,
};
/// Longest answer in bytes.
const MAX_ANSWER: usize = 1 << 20;

/// Why a request has no usable response.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No process listens on the socket, or too many clients wait for it.
    #[error(transparent)]
    Socket(#[from] io::Error),
    /// The response is not HTTP, or it broke off.
    #[error(transparent)]
    Http(#[from] hyper::Error),
    /// Not a path.
    #[error(transparent)]
    Request(#[from] hyper::http::Error),
    /// The answer cannot be read.
    #[error("the answer cannot be read")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The connection was closed before the answer.
    #[error("the connection was closed without an answer")]
    Closed,
    /// No answer in time.
    #[error("no answer within half a second")]
    Silent,
    /// The request was refused.
    #[error("refused with {0}")]
    Refused(StatusCode),
    /// The answer is not what was expected.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

async fn ask(stream: Stream, path: &str) -> Result<(StatusCode, Bytes), ClientError> {
    let (mut sender, connection) = http1::handshake(stream).await?;
    let request = Request::get(path)
        .header(HOST, "localhost")
        .body(Empty::<Bytes>::new())?;
    let mut exchange = pin!(async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect();
        let body = body.await.map_err(ClientError::Body)?;
        Ok((status, body.to_bytes()))
    });
    let mut connection = pin!(connection);
    // The connection moves the bytes of the exchange, and has to be polled beside it.
    poll_fn(|context| {
        let moved = connection.as_mut().poll(context);
        match (exchange.as_mut().poll(context), moved) {
            (Poll::Ready(done), _) => Poll::Ready(done),
            (Poll::Pending, Poll::Ready(Ok(()))) => Poll::Ready(Err(ClientError::Closed)),
            (Poll::Pending, Poll::Ready(Err(error))) => Poll::Ready(Err(error.into())),
            (Poll::Pending, Poll::Pending) => Poll::Pending,
        }
    })
    .await
}

/// A connection that does not wait: a full backlog is an error at once.
fn connected(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// What `GET path` is answered on a REST socket.
///
/// # Errors
/// [`ClientError`].
pub fn get<T: DeserializeOwned>(socket: &Path, path: &str) -> Result<T, ClientError> {
    let socket = connected(socket)?;
    let waiting = socket.try_clone()?;
    let (stream, interest) = Stream::new(socket);
    let answer = polled::run(
        ask(stream, path),
        waiting.as_fd(),
        &interest,
        &PATIENCE,
        || (),
    );
    match answer.ok_or(ClientError::Silent)?? {
        (StatusCode::OK, body) => Ok(serde_json::from_slice(&body)?),
        (status, _) => Err(ClientError::Refused(status)),
    }
}
