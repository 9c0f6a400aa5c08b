//! hyper on a socket and one thread: the little that it needs of a runtime.

use std::cell::Cell;
use std::future::Future;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context as TaskContext, Poll, Wake, Waker};

use host::report::chain;
use hyper::rt::ReadBufCursor;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

const CHUNK: usize = 4096;

/// The events that the future waits for: its stream sets them, and its executor polls for them.
pub(super) type Interest = Rc<Cell<PollFlags>>;

/// A socket that records in its [`Interest`] what it would wait for, instead of waiting.
pub(super) struct Stream {
    socket: UnixStream,
    interest: Interest,
}

impl Stream {
    /// Of a socket that does not block.
    pub(super) fn new(socket: UnixStream) -> (Self, Interest) {
        let interest = Interest::new(Cell::new(PollFlags::empty()));
        let stream = Self {
            socket,
            interest: interest.clone(),
        };
        (stream, interest)
    }

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

/// Runs `future` to its end, and waits between its steps for the events that its stream is interested in. `None` where
/// the other end was idle for too long. The value that `busy` returns lives as long as a step.
pub(super) fn run<T, B>(
    future: impl Future<Output = T>,
    socket: BorrowedFd<'_>,
    interest: &Interest,
    idle: &Timespec,
    busy: impl Fn() -> B,
) -> Option<T> {
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(woken.clone());
    let mut context = TaskContext::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        {
            let _busy = busy();
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
            Some(idle),
        ) {
            Ok(0) => return None,
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::warn!(error = %chain(&error), "a REST connection cannot be waited for");
                return None;
            }
        }
    }
}
