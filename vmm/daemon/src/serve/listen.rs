//! Connections to the daemon: their callers are identified, their number is limited, and they are closed at the end.
//!
//! | deadline | |
//! |---|---|
//! | the head of a request, and so an idle connection | [`Timeouts::head`] |
//! | the body of a request | [`Timeouts::body`] |
//! | a write that the peer does not take | [`Timeouts::write`], unless the connection is the line to a console |

use std::convert::Infallible;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::process::geteuid;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{sleep, timeout};

use super::daemon::Daemon;
use super::events::EventKind;
use super::fault::Fault;
use super::peer::Caller;
use super::quota::{FreePlace, Most, Peer, Place, Quota};
use super::stream::{Connection, TimedBody, Upgraded};
use host::report::chain;

/// Connections to the socket at the same time. Further ones wait, or are refused where their user has too many.
const SOCKET: Most = Most {
    all: 512,
    others: 384,
    each: 128,
};
/// Connections to the address for reading, in the same way.
const WEB: Most = Most {
    all: 64,
    others: 64,
    each: 32,
};
/// Connections that are being refused at the same time. Further ones are closed without a word.
const REFUSED: usize = 16;
/// Connections that are being served: more than there are places.
const SERVED: u32 = 1 << 16;
/// Most bytes of the head of a request, and most bytes that wait to be written.
const BUFFER: usize = 16 << 10;
/// How long the end of the daemon waits for responses to be written.
const FINISH: Duration = Duration::from_secs(3);

/// How long a peer may take.
#[derive(Clone, Copy, Debug)]
struct Timeouts {
    /// For the head of a request, and so how long a connection may be idle.
    head: Duration,
    /// For the body of a request.
    body: Duration,
    /// For taking anything of what is written to it.
    write: Duration,
}

const OF_SOCKET: Timeouts = Timeouts {
    head: Duration::from_mins(1),
    body: Duration::from_secs(30),
    write: Duration::from_secs(30),
};
const OF_WEB: Timeouts = Timeouts {
    head: Duration::from_secs(15),
    body: Duration::from_secs(5),
    write: Duration::from_secs(10),
};

/// Closes connections when the daemon ends.
#[derive(Clone)]
pub struct Connections {
    served: Arc<Semaphore>,
    over: watch::Receiver<bool>,
}

/// The connections of one listener.
struct Listening {
    connections: Connections,
    quota: Arc<Quota>,
    timeouts: Timeouts,
    refused: Arc<Semaphore>,
    router: Router,
}

impl Connections {
    /// No connections yet. `true` from the sender ends them all.
    pub fn new() -> (Self, watch::Sender<bool>) {
        let (sender, over) = watch::channel(false);
        let served = Arc::new(Semaphore::new(SERVED as usize));
        (Self { served, over }, sender)
    }

    /// Waits, but not for long, until all requests have their responses.
    pub async fn finish(&self) {
        let served = self.served.acquire_many(SERVED);
        if timeout(FINISH, served).await.is_err() {
            tracing::info!("connections are cut");
        }
    }

    /// What `wanted` gives; `None` where the daemon ends first.
    async fn unless_over<T>(&self, wanted: impl Future<Output = T>) -> Option<T> {
        let mut over = self.over.clone();
        tokio::select! {
            given = wanted => Some(given),
            _ = over.wait_for(|over| *over) => None,
        }
    }

    fn listening(self, most: Most, timeouts: Timeouts, router: Router) -> Listening {
        Listening {
            connections: self,
            quota: Quota::new(most),
            timeouts,
            refused: Arc::new(Semaphore::new(REFUSED)),
            router,
        }
    }

    /// Serves the socket until the daemon ends.
    pub async fn unix(self, daemon: Arc<Daemon>, listener: UnixListener, router: Router) {
        let listening = self.listening(SOCKET, OF_SOCKET, router);
        let accept = || async { Ok(listener.accept().await?.0) };
        while let Some((place, stream)) = listening.next(accept).await {
            listening.greet_user(&daemon, stream, place);
        }
    }

    /// Serves the address for reading until the daemon ends.
    pub async fn web(self, listener: TcpListener, router: Router) {
        let listening = self.listening(WEB, OF_WEB, router);
        listening.serve_web(&listener).await;
    }
}

impl Listening {
    /// The next connection, and a place for it; `None` where the daemon ends.
    async fn next<S, F: Future<Output = std::io::Result<S>>>(
        &self,
        accept: impl Fn() -> F,
    ) -> Option<(FreePlace, S)> {
        let place = self.connections.unless_over(self.quota.free()).await??;
        loop {
            match self.connections.unless_over(accept()).await? {
                Ok(stream) => return Some((place, stream)),
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "a connection cannot be accepted");
                    // Most likely the daemon is out of descriptors, and only time brings one back: without a pause this
                    // would be a busy loop.
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn greet_user(&self, daemon: &Daemon, stream: UnixStream, place: FreePlace) {
        let peer = match stream.peer_cred() {
            Ok(peer) => peer,
            Err(error) => {
                tracing::warn!(error = %chain(&error), "a caller cannot be identified");
                return;
            }
        };
        let (uid, gid) = (peer.uid(), peer.gid());
        if !daemon.allowed.admits(uid, gid, stream.as_fd()) {
            daemon.metrics.turned_away();
            let text = format!("user {uid} (process {:?}) may not call", peer.pid());
            daemon
                .events
                .tell(EventKind::CallerRefused, None, Some(text));
            self.refuse(stream, Fault::Forbidden(uid));
            return;
        }
        let owner = uid == 0 || uid == geteuid().as_raw();
        let peer = if owner { Peer::Owner } else { Peer::User(uid) };
        match self.quota.take(place, peer) {
            Some(place) => self.serve(stream, Caller::User(uid), place),
            None => self.refuse(stream, Fault::TooManyConnections),
        }
    }

    async fn serve_web(&self, listener: &TcpListener) {
        let accept = || async {
            let (stream, peer) = listener.accept().await?;
            // Of a connection that has been closed already, there is no address.
            let local = stream.local_addr().map(|local| local.ip());
            Ok((stream, peer.ip(), local))
        };
        while let Some((place, (stream, peer, local))) = self.next(accept).await {
            if let Ok(local) = local {
                self.greet_reader(stream, peer, local, place);
            }
        }
    }

    fn greet_reader(&self, stream: TcpStream, peer: IpAddr, local: IpAddr, place: FreePlace) {
        match self.quota.take(place, Peer::at(peer)) {
            Some(place) => self.serve(stream, Caller::Web(local), place),
            None => self.refuse(stream, Fault::TooManyConnections),
        }
    }

    fn builder(&self) -> http1::Builder {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(self.timeouts.head)
            .max_buf_size(BUFFER);
        builder
    }

    /// The proof that a connection is being served, for the end of the daemon.
    fn served(&self) -> Option<OwnedSemaphorePermit> {
        self.connections.served.clone().try_acquire_owned().ok()
    }

    fn serve(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        caller: Caller,
        place: Place,
    ) {
        let mut over = self.connections.over.clone();
        let (served, timeouts) = (self.served(), self.timeouts);
        let (builder, router) = (self.builder(), self.router.clone());
        tokio::spawn(async move {
            let _served = served;
            let upgraded = Upgraded::default();
            let stream = Connection::new(stream, timeouts.write, upgraded.clone(), place);
            let router = TowerToHyperService::new(router);
            let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
                request.extensions_mut().insert(caller);
                let request =
                    request.map(|body| axum::body::Body::new(TimedBody::new(body, timeouts.body)));
                let response = hyper::service::Service::call(&router, request);
                let upgraded = upgraded.clone();
                async move {
                    let response = response.await?;
                    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                        upgraded.set();
                    }
                    Ok::<_, Infallible>(response)
                }
            });
            let connection = builder
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

    /// Refuses the first request of a connection that gets no place, and closes it: with a short deadline, and a limit,
    /// as there may be any number of them.
    fn refuse(&self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, fault: Fault) {
        let Ok(refused) = self.refused.clone().try_acquire_owned() else {
            return;
        };
        let (served, mut builder) = (self.served(), self.builder());
        tokio::spawn(async move {
            let _permits = (refused, served);
            let refusal = parking_lot::Mutex::new(Some(fault));
            let refuse = service_fn(move |_: Request<hyper::body::Incoming>| {
                // There is one request, as the connection is not kept.
                let fault = refusal.lock().take().unwrap_or(Fault::TooManyConnections);
                async move { Ok::<_, Infallible>(fault.into_response()) }
            });
            let connection = builder
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), refuse);
            let _ = timeout(FINISH, connection).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, Bytes};
    use axum::routing::{get, post};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::runtime::Builder;

    use super::*;

    const SHORT: Timeouts = Timeouts {
        head: Duration::from_millis(200),
        body: Duration::from_millis(200),
        write: Duration::from_millis(200),
    };

    fn router() -> Router {
        Router::new()
            .route("/", get(async || "here"))
            .route("/much", get(async || vec![b'x'; 64 << 20]))
            .route(
                "/endless",
                get(async || {
                    let chunks = futures_util::stream::repeat(Bytes::from(vec![b'x'; 1 << 16]));
                    Body::from_stream(futures_util::StreamExt::map(chunks, Ok::<_, Infallible>))
                }),
            )
            .route(
                "/late",
                get(async || {
                    sleep(Duration::from_millis(600)).await;
                    "late"
                }),
            )
            .route("/take", post(async |body: Bytes| body.len().to_string()))
    }

    /// Runs a client against a listener, and gives the quota that the listener has then.
    fn with_listener<T>(
        most: Most,
        client: impl AsyncFn(std::net::SocketAddr, Arc<Quota>) -> T,
    ) -> T {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (connections, _over) = Connections::new();
            let listening = connections.listening(most, SHORT, router());
            let quota = listening.quota.clone();
            tokio::spawn(async move { listening.serve_web(&listener).await });
            let done = timeout(Duration::from_secs(30), client(address, quota)).await;
            done.expect("a connection that is not closed")
        })
    }

    async fn connect(address: std::net::SocketAddr, text: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        stream
    }

    async fn rest(mut stream: TcpStream) -> String {
        let mut text = Vec::new();
        // A connection that is reset has ended, too.
        let _ = stream.read_to_end(&mut text).await;
        String::from_utf8_lossy(&text).into_owned()
    }

    #[test]
    fn a_peer_that_says_nothing_or_half_of_it_or_nothing_more_is_cut_off() {
        with_listener(WEB, async |address, _| {
            for text in ["", "GET / HT", "GET / HTTP/1.1\r\nHost: l\r\nX: "] {
                assert_eq!(rest(connect(address, text).await).await, "", "{text}");
            }
            let served = rest(connect(address, "GET / HTTP/1.1\r\nHost: l\r\n\r\n").await).await;
            assert!(served.ends_with("here"), "idle afterwards: {served}");
            let half = "POST /take HTTP/1.1\r\nHost: l\r\nContent-Length: 9\r\n\r\nhalf";
            let refused = rest(connect(address, half).await).await;
            assert!(refused.starts_with("HTTP/1.1 4"), "{refused}");
            let whole = "POST /take HTTP/1.1\r\nHost: l\r\nContent-Length: 4\r\n\r\nhalf";
            let taken = rest(connect(address, whole).await).await;
            assert!(taken.ends_with('4'), "{taken}");
        });
    }

    #[test]
    fn a_response_that_comes_late_is_not_cut_off() {
        with_listener(WEB, async |address, _| {
            let late = rest(connect(address, "GET /late HTTP/1.1\r\nHost: l\r\n\r\n").await).await;
            assert!(late.ends_with("late"), "{late}");
        });
    }

    #[test]
    fn a_peer_that_takes_no_response_loses_its_place() {
        let most = Most { each: 2, ..WEB };
        with_listener(most, async |address, _| {
            let mut stuck = Vec::new();
            for path in ["much", "endless"] {
                let text = format!("GET /{path} HTTP/1.1\r\nHost: l\r\n\r\n");
                stuck.push(connect(address, &text).await);
            }
            loop {
                let next = connect(address, "GET / HTTP/1.1\r\nHost: l\r\n\r\n").await;
                if rest(next).await.ends_with("here") {
                    break;
                }
                sleep(Duration::from_millis(50)).await;
            }
            drop(stuck);
        });
    }

    #[test]
    fn a_peer_with_too_many_connections_is_told_so_and_has_its_others() {
        let most = Most { each: 3, ..WEB };
        with_listener(most, async |address, _| {
            let mut idle = Vec::new();
            for _ in 0..3 {
                idle.push(connect(address, "").await);
            }
            let request = "GET / HTTP/1.1\r\nHost: l\r\n\r\n";
            let refused = rest(connect(address, request).await).await;
            assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
            let mut first = idle.remove(0);
            first.write_all(request.as_bytes()).await.unwrap();
            assert!(rest(first).await.ends_with("here"));
        });
    }
}
