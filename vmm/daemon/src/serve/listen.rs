//! Connections to the daemon: their callers are identified, their number is limited, and they are closed at the end.

use std::convert::Infallible;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::response::IntoResponse;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{sleep, timeout};

use super::daemon::Daemon;
use super::events::EventKind;
use super::fault::Fault;
use super::peer::Caller;
use host::report::chain;

/// Connections at the same time. Further ones wait.
const MAX_CONNECTIONS: u32 = 512;
/// How long the head of a request may take to arrive, and so how long a connection may be idle.
const HEAD: Duration = Duration::from_mins(1);
/// Most bytes of the head of a request, and most bytes that wait to be written.
const BUFFER: usize = 16 << 10;
/// How long the end of the daemon waits for responses to be written.
const FINISH: Duration = Duration::from_secs(3);

/// Limits the number of connections, and closes them when the daemon ends.
#[derive(Clone)]
pub struct Connections {
    places: Arc<Semaphore>,
    over: watch::Receiver<bool>,
}

fn builder() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(BUFFER);
    builder
}

impl Connections {
    /// No connections yet. `true` from the sender ends them all.
    pub fn new() -> (Self, watch::Sender<bool>) {
        let (sender, over) = watch::channel(false);
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS as usize));
        (Self { places, over }, sender)
    }

    async fn place(&self) -> Option<OwnedSemaphorePermit> {
        let mut over = self.over.clone();
        tokio::select! {
            place = self.places.clone().acquire_owned() => place.ok(),
            _ = over.wait_for(|over| *over) => None,
        }
    }

    /// Waits, but not for long, until all requests have their responses.
    pub async fn finish(&self) {
        if timeout(FINISH, self.places.acquire_many(MAX_CONNECTIONS))
            .await
            .is_err()
        {
            tracing::info!("connections are cut");
        }
    }

    fn serve(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        router: Router,
        caller: Caller,
        place: OwnedSemaphorePermit,
    ) {
        let mut over = self.over.clone();
        tokio::spawn(async move {
            let _place = place;
            let router = TowerToHyperService::new(router);
            let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
                request.extensions_mut().insert(caller);
                hyper::service::Service::call(&router, request.map(axum::body::Body::new))
            });
            let connection = builder()
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades();
            let mut connection = std::pin::pin!(connection);
            let over = async move {
                // Dropped, as its value is a lock on the channel.
                drop(over.wait_for(|over| *over).await);
            };
            let ended = tokio::select! {
                ended = &mut connection => ended,
                () = over => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!(error = %chain(&error), "a connection ended");
            }
        });
    }

    /// Refuses the first request of a caller who may not call, and closes the connection.
    fn turn_away(
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        uid: u32,
        place: OwnedSemaphorePermit,
    ) {
        tokio::spawn(async move {
            let _place = place;
            let refuse = service_fn(move |_: Request<hyper::body::Incoming>| async move {
                Ok::<_, Infallible>(Fault::Forbidden(uid).into_response())
            });
            let connection = builder()
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), refuse);
            // With a short deadline, as the connection takes one of the places.
            let _ = timeout(FINISH, connection).await;
        });
    }

    /// Serves the socket until the daemon ends.
    pub async fn unix(self, daemon: Arc<Daemon>, listener: UnixListener, router: Router) {
        while let Some(place) = self.place().await {
            let mut over = self.over.clone();
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = over.wait_for(|over| *over) => return,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    pause_after(&error).await;
                    continue;
                }
            };
            match stream.peer_cred() {
                Ok(peer)
                    if daemon
                        .allowed
                        .admits(peer.uid(), peer.gid(), stream.as_fd()) =>
                {
                    self.serve(stream, router.clone(), Caller::User(peer.uid()), place);
                }
                Ok(peer) => {
                    daemon.metrics.turned_away();
                    let text = format!(
                        "user {} (process {:?}) may not call",
                        peer.uid(),
                        peer.pid()
                    );
                    daemon
                        .events
                        .tell(EventKind::CallerRefused, None, Some(text));
                    Self::turn_away(stream, peer.uid(), place);
                }
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "a caller cannot be identified");
                }
            }
        }
    }

    /// Serves the address for reading until the daemon ends.
    pub async fn web(self, listener: TcpListener, router: Router) {
        while let Some(place) = self.place().await {
            let mut over = self.over.clone();
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = over.wait_for(|over| *over) => return,
            };
            match accepted {
                Ok((stream, _)) => self.serve(stream, router.clone(), Caller::Web, place),
                Err(error) => pause_after(&error).await,
            }
        }
    }
}

async fn pause_after(error: &std::io::Error) {
    tracing::warn!(error = %chain(error), "a connection cannot be accepted");
    // Most likely the daemon is out of descriptors, and only time brings one back: without a pause this would be a busy
    // loop.
    sleep(Duration::from_millis(100)).await;
}
