//! Firecracker's REST API on a Unix socket.
//!
//! ```text
//! socket ── accept (a thread) ──> connection (a thread each, 8 at most) ── hyper ──> routes ──> operations ──> Control
//! ```
//!
//! The socket is seldom used and its requests wait for each other anyway, so a thread for each connection does, and there is no async
//! runtime: a connection polls its own descriptor (`polled`). Connections beyond the limit wait in the socket's backlog; one that
//! is idle for a minute is closed. Where no socket was asked for, none of this exists.

mod client;
mod connection;
mod operations;
mod polled;
mod routes;

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::control::{Control, Guest, LaunchError, Origin};
use crate::metrics::ApiMetrics;
use config::VmConfig;
use host::socket::ApiSocket;

pub use client::{ClientError, get};
pub use routes::parse_object;

/// What a client of the host daemon asks to upgrade to (`Upgrade:`), for its connection to become the line of a guest's serial console.
pub const CONSOLE_PROTOCOL: &str = "coppice-console";
/// Connections that are served at the same time.
const MAX_CONNECTIONS: usize = 8;
/// Stack of a thread here in bytes: the state of a snapshot is read there, which takes more than 256 KiB where nothing is optimized. Only what is
/// touched of it takes memory.
const STACK: usize = 1 << 20;
/// How long the end of the process waits for answers to be written.
const FINISH: Duration = Duration::from_secs(1);

/// Builds a guest, and lets it run if it is new; on any thread but that of the event loop.
pub type Launch =
    Arc<dyn Fn(&VmConfig, Origin) -> Result<Box<dyn Guest>, LaunchError> + Send + Sync>;

/// What requests act on.
#[derive(Clone)]
struct Context {
    control: Arc<Mutex<Control>>,
    metrics: Arc<ApiMetrics>,
    launch: Launch,
}

#[derive(Default)]
struct Counts {
    open: usize,
    busy: usize,
}

/// How many connections there are, and how many of them have a request in hand.
#[derive(Default)]
struct Connections {
    counts: Mutex<Counts>,
    changed: Condvar,
}

impl Connections {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock()
    }

    fn change(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.counts());
        self.changed.notify_all();
    }

    /// Waits for a connection less where there are too many.
    fn admit(self: &Arc<Self>) -> Admitted {
        let full = |counts: &mut Counts| counts.open >= MAX_CONNECTIONS;
        let mut counts = self.counts();
        self.changed.wait_while(&mut counts, full);
        counts.open += 1;
        Admitted(self.clone())
    }
}

/// The place of an open connection.
struct Admitted(Arc<Connections>);

impl Admitted {
    /// The connection has something to do as long as the answer lives.
    fn busy(&self) -> Busy<'_> {
        self.0.change(|counts| counts.busy += 1);
        Busy(&self.0)
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.0.change(|counts| counts.open -= 1);
    }
}

struct Busy<'a>(&'a Connections);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.change(|counts| counts.busy -= 1);
    }
}

/// A server that listens until the process ends.
pub struct ApiServer(Arc<Connections>);

impl ApiServer {
    /// Starts to serve `socket`.
    ///
    /// # Errors
    /// Where the host starts no more threads.
    pub fn start(
        socket: &ApiSocket,
        control: Arc<Mutex<Control>>,
        metrics: Arc<ApiMetrics>,
        launch: Launch,
    ) -> io::Result<Self> {
        let connections = Arc::new(Connections::default());
        let listener = socket.listener()?;
        let context = Context {
            control,
            metrics,
            launch,
        };
        let accepting = connections.clone();
        thread::Builder::new()
            .name("api".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                loop {
                    let place = accepting.admit();
                    match listener.accept() {
                        Ok((stream, _)) => {
                            let context = context.clone();
                            let serve = move || connection::serve(stream, &context, &place);
                            let started = thread::Builder::new()
                                .name("api client".to_owned())
                                .stack_size(STACK)
                                .spawn(serve);
                            if let Err(error) = started {
                                tracing::warn!(%error, "no thread for a REST connection");
                            }
                        }
                        Err(error) => {
                            tracing::warn!(%error, "a REST connection cannot be accepted");
                            // Most likely there is no descriptor left: it takes time for one to come back.
                            thread::sleep(Duration::from_millis(100));
                        }
                    }
                }
            })?;
        Ok(Self(connections))
    }

    /// Waits, but not for long, until the requests in hand have been answered.
    pub fn finish(&self) {
        let busy = |counts: &mut Counts| counts.busy > 0;
        let mut counts = self.0.counts();
        let waited = self.0.changed.wait_while_for(&mut counts, busy, FINISH);
        if waited.timed_out() {
            tracing::warn!("a REST request was left without an answer");
        }
    }
}

#[cfg(test)]
mod tests;
