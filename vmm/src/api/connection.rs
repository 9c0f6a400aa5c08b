//! One connection on its thread: hyper, and the little that it needs of a runtime.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::Future;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context as TaskContext, Poll, Wake, Waker};

use hyper::rt::ReadBufCursor;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::{Admitted, Context, routes};

/// How long a client may say nothing.
const IDLE: Timespec = Timespec {
    tv_sec: 60,
    tv_nsec: 0,
};
/// Most bytes of a request's head, and least that hyper takes.
const BUFFER: usize = 8192;
const CHUNK: usize = 4096;

/// What the future waits for, told by its stream to its executor.
type Interest = Rc<Cell<PollFlags>>;

/// A socket that says what it waits for instead of waiting.
struct Stream {
    socket: UnixStream,
    interest: Interest,
}

impl Stream {
    fn ready<T>(&self, result: io::Result<T>, waits_for: PollFlags) -> Poll<io::Result<T>> {
        match result {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.interest.set(self.interest.get() | waits_for);
                Poll::Pending
            }
            result => Poll::Ready(result),
        }
    }
}

fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

impl hyper::rt::Read for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut TaskContext<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let mut chunk = [0; CHUNK];
        let room = chunk.len().min(buffer.remaining());
        let read = retry(|| (&self.socket).read(&mut chunk[..room]));
        self.ready(read, PollFlags::IN)
            .map_ok(|len| buffer.put_slice(&chunk[..len]))
    }
}

impl hyper::rt::Write for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut TaskContext<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.ready(retry(|| (&self.socket).write(bytes)), PollFlags::OUT)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.socket.shutdown(Shutdown::Write))
    }
}

/// Set when the future wants to be polled again although nothing has happened outside.
#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Runs `future` to its end; between its steps waits for what its stream is interested in. `None` where the client was idle
/// for too long.
fn run<T>(
    future: impl Future<Output = T>,
    socket: BorrowedFd<'_>,
    interest: &Interest,
    place: &Admitted,
) -> Option<T> {
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(woken.clone());
    let mut context = TaskContext::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        {
            let _busy = place.busy();
            loop {
                interest.set(PollFlags::empty());
                if let Poll::Ready(end) = future.as_mut().poll(&mut context) {
                    return Some(end);
                }
                if !woken.0.swap(false, Ordering::SeqCst) {
                    break;
                }
            }
        }
        match poll(
            &mut [PollFd::from_borrowed_fd(socket, interest.get())],
            Some(&IDLE),
        ) {
            Ok(0) => return None,
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::warn!(%error, "a REST connection cannot be waited for");
                return None;
            }
        }
    }
}

/// Serves a client until it goes.
pub(super) fn serve(socket: UnixStream, context: &Context, place: &Admitted) {
    let waiting = match socket
        .set_nonblocking(true)
        .and_then(|()| socket.try_clone())
    {
        Ok(waiting) => waiting,
        Err(error) => {
            tracing::warn!(%error, "a REST connection cannot be served");
            return;
        }
    };
    let interest = Interest::new(Cell::new(PollFlags::empty()));
    let stream = Stream {
        socket,
        interest: interest.clone(),
    };
    let answer =
        service_fn(|request| async { Ok::<_, Infallible>(routes::answer(context, request).await) });
    // A client that has said all may close its side and still read the answer.
    let connection = http1::Builder::new()
        .half_close(true)
        .max_buf_size(BUFFER)
        .serve_connection(stream, answer);
    match run(connection, waiting.as_fd(), &interest, place) {
        Some(Ok(())) => {}
        Some(Err(error)) => tracing::info!(%error, "a REST connection ended"),
        None => tracing::info!("an idle REST connection was closed"),
    }
}
