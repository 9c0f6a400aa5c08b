//! Which way transfers go: `io_uring`, or the worker thread.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use report::chain;
use vmm_sys_util::eventfd::EventFd;

use super::transfer::Transfer;
use super::uring::Uring;
use super::worker::{Job, Outcome, Worker};
use crate::DiskError;

/// How transfers are to be made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// By `io_uring` where the kernel allows it, else by a worker thread.
    #[default]
    Auto,
    /// By `io_uring`, or not at all.
    IoUring,
    /// By a worker thread.
    Worker,
}

type CallResult = Result<(), DiskError>;

/// Moves bytes and makes blocking calls; signals completions by one eventfd.
pub(super) struct Engine {
    event: EventFd,
    uring: Option<Uring>,
    worker: Option<Worker<CallResult>>,
}

/// What an operation came to.
pub(super) type Outcomes = Vec<(usize, Outcome<CallResult>)>;

impl Engine {
    pub(super) fn new(kind: EngineKind) -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let uring = match kind {
            EngineKind::Worker => None,
            EngineKind::IoUring => Some(Uring::new(&event)?),
            EngineKind::Auto => Uring::new(&event)
                .inspect_err(|error| tracing::info!(error = %chain(error), "io_uring is not to be had: disks use a worker thread"))
                .ok(),
        };
        tracing::info!(
            engine = if uring.is_some() {
                "io_uring"
            } else {
                "worker thread"
            },
            "disk I/O"
        );
        Ok(Self {
            event,
            uring,
            worker: None,
        })
    }

    /// The eventfd that is readable when there may be outcomes.
    pub(super) fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    fn worker(&mut self) -> io::Result<&mut Worker<CallResult>> {
        match &mut self.worker {
            Some(worker) => Ok(worker),
            none => Ok(none.insert(Worker::start(&self.event)?)),
        }
    }

    /// Starts a transfer. The memory of its ranges has to outlive it.
    pub(super) fn transfer(&mut self, token: usize, transfer: Transfer) -> io::Result<()> {
        match &mut self.uring {
            Some(uring) => {
                uring.push(token, transfer);
                Ok(())
            }
            None => self.worker()?.push(token, Job::Transfer(transfer)),
        }
    }

    /// Starts a blocking call.
    pub(super) fn call(
        &mut self,
        token: usize,
        call: impl FnOnce() -> CallResult + Send + 'static,
    ) -> io::Result<()> {
        self.worker()?.push(token, Job::Call(Box::new(call)))
    }

    /// Lets the kernel see what was started.
    pub(super) fn submit(&mut self) {
        if let Some(uring) = &mut self.uring
            && let Err(error) = uring.submit()
        {
            // The kernel is short of memory: the event brings its owner back here, to try again.
            tracing::debug!(error = %chain(&error), "io_uring_enter");
            self.signal();
        }
    }

    fn signal(&self) {
        if let Err(error) = self.event.write(1) {
            // Only a counter that is full refuses, and then the event is readable already.
            tracing::debug!(error = %chain(&error), "completion event");
        }
    }

    /// Makes the event unreadable until something else comes to its end. Comes before [`Engine::reap`], or an outcome
    /// would be missed.
    pub(super) fn acknowledge(&self) {
        // The counter says only that there is something.
        let _ = self.event.read();
    }

    /// What has come to its end. New work may result, so [`Engine::submit`] comes after.
    pub(super) fn reap(&mut self) -> Outcomes {
        let mut outcomes = Outcomes::new();
        if let Some(uring) = &mut self.uring {
            uring.reap(|token, result| outcomes.push((token, Outcome::Transfer(result))));
        }
        if let Some(worker) = &mut self.worker {
            worker.reap(|token, outcome| outcomes.push((token, outcome)));
        }
        outcomes
    }

    /// Operations that have not come to their end.
    pub(super) fn in_flight(&self) -> usize {
        self.uring.as_ref().map_or(0, Uring::in_flight)
            + self.worker.as_ref().map_or(0, Worker::in_flight)
    }

    /// Waits until [`Engine::reap`] may have something.
    pub(super) fn wait(&self) {
        use rustix::event::{PollFd, PollFlags, poll};
        // SAFETY: the descriptor is that of `self.event`, which is open as long as `self` is borrowed.
        let fd = unsafe { rustix::fd::BorrowedFd::borrow_raw(self.event_fd()) };
        let _ = poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], None);
    }
}
