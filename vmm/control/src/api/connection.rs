//! One connection on its thread.

use std::convert::Infallible;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use rustix::event::Timespec;

use super::connections::OpenConnection;
use super::context::Context;
use super::polled::{self, Stream};
use super::routes;
use host::report::chain;

/// How long a client may say nothing.
const IDLE: Timespec = Timespec {
    tv_sec: 60,
    tv_nsec: 0,
};
/// Most bytes of a request's head, and least that hyper takes.
const BUFFER: usize = 8192;

/// Serves a client until it goes.
pub(super) fn serve(socket: UnixStream, context: &Context, open: &OpenConnection) {
    let waiting = match socket
        .set_nonblocking(true)
        .and_then(|()| socket.try_clone())
    {
        Ok(waiting) => waiting,
        Err(error) => {
            tracing::warn!(error = %chain(&error), "a REST connection cannot be served");
            return;
        }
    };
    let (stream, interest) = Stream::new(socket);
    let service = service_fn(|request| async {
        Ok::<_, Infallible>(routes::respond(context, request).await)
    });
    // A client that has said all may close its side and still read the answer.
    let connection = http1::Builder::new()
        .half_close(true)
        .max_buf_size(BUFFER)
        .serve_connection(stream, service);
    let busy = || open.busy();
    match polled::run(connection, waiting.as_fd(), &interest, &IDLE, busy) {
        Some(Ok(())) => {}
        Some(Err(error)) => tracing::info!(error = %chain(&error), "a REST connection ended"),
        None => tracing::info!("an idle REST connection was closed"),
    }
}
