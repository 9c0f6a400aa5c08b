//! Firecracker's REST API on a Unix socket.
//!
//! ```text
//! socket ── accept (a thread) ──> connection (a thread each, 8 at most) ── hyper ──> routes ──> operations ──> Control
//! ```
//!
//! The socket is seldom used and its requests wait for each other anyway, so a thread for each connection does, and
//! there is no async runtime: a connection polls its own descriptor (`polled`). Connections beyond the limit wait in
//! the socket's backlog; one that is idle for a minute is closed. Where no socket was asked for, none of this exists.

mod client;
mod connection;
mod connections;
mod context;
mod description;
mod handler;
mod keep;
mod operation;
mod operations;
mod polled;
mod response;
mod routes;

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;

use crate::control::Control;
use crate::metrics::ApiMetrics;
use host::report::chain;
use host::socket::ApiSocket;

use connections::Connections;
use context::Context;

pub use client::{ClientError, get};
pub use context::Launch;
pub use description::{Answer, RequestBody, Schema};
pub use keep::{GuestSettings, SettingsError};
pub use operation::{DiskEffect, GuestOperation, LifeEffect, RequestMethod, Reservation};
pub use operations::{GUEST_OPERATIONS, find_operation};
pub use response::parse_object;

/// What a client of the host daemon asks to upgrade to (`Upgrade:`), for its connection to become the line of a guest's
/// serial console.
pub const CONSOLE_PROTOCOL: &str = "coppice-console";
/// Stack of a thread here in bytes: the state of a snapshot is read there, which takes more than 256 KiB where nothing
/// is optimized. Only what is touched of it takes memory.
const STACK: usize = 1 << 20;
/// How long the end of the process waits for answers to be written.
const FINISH: Duration = Duration::from_secs(1);

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
        let longest_body = control.lock().longest_body();
        let context = Context {
            control,
            metrics,
            launch,
            longest_body,
        };
        let accepting = connections.clone();
        thread::Builder::new()
            .name("api".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                loop {
                    let open = accepting.admit();
                    match listener.accept() {
                        Ok((stream, _)) => {
                            let context = context.clone();
                            let serve = move || connection::serve(stream, &context, &open);
                            let started = thread::Builder::new()
                                .name("api client".to_owned())
                                .stack_size(STACK)
                                .spawn(serve);
                            if let Err(error) = started {
                                tracing::warn!(error = %chain(&error), "no thread for a REST connection");
                            }
                        }
                        Err(error) => {
                            tracing::warn!(error = %chain(&error), "a REST connection cannot be accepted");
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
        if !self.0.wait_until_idle(FINISH) {
            tracing::warn!("a REST request was left without an answer");
        }
    }
}

#[cfg(test)]
mod tests;
