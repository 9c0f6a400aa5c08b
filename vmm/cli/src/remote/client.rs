//! One request after the other to the daemon's socket.

use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};

use super::RemoteError;
use daemon::serve::CONSOLE_PROTOCOL;

/// A client of a daemon.
pub(super) struct Client {
    socket: PathBuf,
    runtime: Runtime,
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn http(error: impl Into<Failure>) -> RemoteError {
    RemoteError::Http(error.into())
}

fn refusal(status: StatusCode, body: &[u8]) -> RemoteError {
    let told = serde_json::from_slice::<Value>(body).unwrap_or_default();
    let message = match told.get("fault_message").and_then(Value::as_str) {
        Some(message) => message.to_owned(),
        None => format!("refused with {status}"),
    };
    RemoteError::Refused(status, message)
}

impl Client {
    /// A client of the daemon at `socket`.
    pub(super) fn new(socket: &Path) -> Result<Self, RemoteError> {
        let runtime = Builder::new_current_thread().enable_all().build();
        Ok(Self {
            socket: socket.to_owned(),
            runtime: runtime.map_err(RemoteError::Host)?,
        })
    }

    async fn connect(&self) -> Result<TokioIo<UnixStream>, RemoteError> {
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.map_err(|source| RemoteError::Connect {
            socket: self.socket.display().to_string(),
            source,
        })?;
        Ok(TokioIo::new(stream))
    }

    /// A request, and the JSON that it is answered; `null` where there is nothing to say.
    pub(super) fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, RemoteError> {
        self.runtime.block_on(async {
            let (mut sender, connection) = http1::handshake(self.connect().await?)
                .await
                .map_err(http)?;
            tokio::spawn(connection);
            let request = Request::builder()
                .method(method)
                .uri(path)
                .header(HOST, "localhost");
            let body = body.map(Value::to_string).unwrap_or_default();
            let request = request.header(CONTENT_TYPE, "application/json");
            let request = request.body(Full::new(Bytes::from(body))).map_err(http)?;
            let response = sender.send_request(request).await.map_err(http)?;
            let status = response.status();
            let body = response
                .into_body()
                .collect()
                .await
                .map_err(http)?
                .to_bytes();
            if !status.is_success() {
                return Err(refusal(status, &body));
            }
            if body.is_empty() {
                return Ok(Value::Null);
            }
            serde_json::from_slice(&body).map_err(http)
        })
    }

    /// The line of a guest's console, and what has come of it already.
    pub(super) fn console(&self, id: &str) -> Result<(StdStream, Bytes), RemoteError> {
        self.runtime.block_on(async {
            let (mut sender, connection) = http1::handshake(self.connect().await?)
                .await
                .map_err(http)?;
            tokio::spawn(connection.with_upgrades());
            let request = Request::get(format!("/vms/{}/console", super::escaped(id)))
                .header(HOST, "localhost")
                .header(CONNECTION, "upgrade")
                .header(UPGRADE, CONSOLE_PROTOCOL)
                .body(Full::new(Bytes::new()))
                .map_err(http)?;
            let response = sender.send_request(request).await.map_err(http)?;
            let status = response.status();
            if status != StatusCode::SWITCHING_PROTOCOLS {
                let body = response.into_body().collect().await.map_err(http)?;
                return Err(refusal(status, &body.to_bytes()));
            }
            let upgraded = hyper::upgrade::on(response).await.map_err(http)?;
            let parts = upgraded
                .downcast::<TokioIo<UnixStream>>()
                .map_err(|_| http("the connection is another's"))?;
            let into_std = |stream: UnixStream| -> io::Result<StdStream> {
                let stream = stream.into_std()?;
                stream.set_nonblocking(false)?;
                Ok(stream)
            };
            let stream = into_std(parts.io.into_inner()).map_err(RemoteError::Host)?;
            Ok((stream, parts.read_buf))
        })
    }
}
