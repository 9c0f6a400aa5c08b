//! Connections: who they are of, how many there are, and their end.

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

use super::Daemon;
use super::events::EventKind;
use super::fault::Fault;
use super::peer::Caller;

/// Connections at the same time. Further ones wait.
const MAX_CONNECTIONS: u32 = 512;
/// How long the head of a request may take, and a connection say nothing.
const HEAD: Duration = Duration::from_mins(1);
/// Most bytes of a head, and of what waits to be written.
const BUFFER: usize = 16 << 10;
/// How long the end waits for answers.
const FINISH: Duration = Duration::from_secs(3);

/// The places of connections, and the word that it is over.
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
    /// None yet. The sender says when it is over.
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

    /// Waits, but not for long, until all have been answered.
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
                // Its answer holds a lock.
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
                tracing::debug!(%error, "a connection ended");
            }
        });
    }

    /// Answers the first request of a caller who may not.
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
            // Who has no business here gets no time either.
            let _ = timeout(FINISH, connection).await;
        });
    }

    /// Serves the socket, until it is over.
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
                    out_of_descriptors(&error).await;
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
                Err(error) => tracing::warn!(%error, "a caller cannot be told"),
            }
        }
    }

    /// Serves the address for reading, until it is over.
    pub async fn web(self, listener: TcpListener, router: Router) {
        while let Some(place) = self.place().await {
            let mut over = self.over.clone();
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = over.wait_for(|over| *over) => return,
            };
            match accepted {
                Ok((stream, _)) => self.serve(stream, router.clone(), Caller::Web, place),
                Err(error) => out_of_descriptors(&error).await,
            }
        }
    }
}

async fn out_of_descriptors(error: &std::io::Error) {
    tracing::warn!(%error, "a connection cannot be accepted");
    // Most likely there is no descriptor left: it takes time for one to come back.
    sleep(Duration::from_millis(100)).await;
}
