//! A thread that notices the end of a page-fault handler. Every other thread may be waiting for a page, and so could
//! not notice it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use host::report::chain;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::bus_error;

/// Enough for a thread that waits, and formats one line of text.
const STACK_SIZE: usize = 64 << 10;
/// How long the guest may take to end in order. It never does where a thread waits for a page while it holds a lock.
const GRACE: Duration = Duration::from_secs(3);

/// Watches for the other end of a socket to close, for as long as this lives.
#[derive(Debug)]
pub(super) struct Watch {
    over: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts to watch the handler that was reached at `path`.
    pub(super) fn start(
        socket: UnixStream,
        path: &Path,
        on_lost: Box<dyn Fn(String) + Send>,
    ) -> io::Result<Self> {
        let over = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let thread = std::thread::Builder::new()
            .name("uffd".into())
            .stack_size(STACK_SIZE)
            .spawn({
                let (over, path) = (over.clone(), path.to_owned());
                move || watch(&socket, &over, &path, &*on_lost)
            })?;
        Ok(Self {
            over,
            thread: Some(thread),
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Err(error) = rustix::io::write(&*self.over, &1u64.to_ne_bytes()) {
            tracing::debug!(error = %chain(&error), "the watcher of the page-fault handler waits on");
            return;
        }
        if let Some(thread) = self.thread.take() {
            // The panic hook has reported a panic of the thread.
            let _ = thread.join();
        }
    }
}

fn watch(socket: &UnixStream, over: &OwnedFd, path: &Path, on_lost: &dyn Fn(String)) {
    // poll(2) always reports hangups and errors. What a handler may write is not read.
    let hangup = PollFd::new(socket, PollFlags::empty());
    let end = PollFd::new(over, PollFlags::IN);
    let mut both = [hangup, end];
    loop {
        match poll(&mut both, None) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!(error = %chain(&error), "nobody watches over the page-fault handler");
                return;
            }
        }
    }
    let [_, end] = &both;
    if !end.revents().is_empty() {
        return;
    }
    let report = format!(
        "the page-fault handler at {} has closed its connection: the guest ends, as nobody gives it the pages that it has not touched yet; start the handler anew, and load the snapshot again",
        path.display()
    );
    on_lost(report.clone());
    if !is_over(over) {
        bus_error::end(&report);
    }
}

/// Whether the guest ends by itself within the grace period.
fn is_over(over: &OwnedFd) -> bool {
    let grace = Timespec::try_from(GRACE).ok();
    loop {
        match poll(&mut [PollFd::new(over, PollFlags::IN)], grace.as_ref()) {
            Ok(ready) => return ready > 0,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}
