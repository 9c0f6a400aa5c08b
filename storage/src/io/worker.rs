//! A thread for what blocks.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use super::transfer::{Failure, Transfer};

/// The jobs are a few system calls deep.
const STACK_SIZE: usize = 128 << 10;

/// What the worker does.
pub(super) enum Job<R> {
    /// A transfer, where there is no `io_uring`.
    Transfer(Transfer),
    /// Anything else that blocks.
    Call(Box<dyn FnOnce() -> R + Send>),
}

/// What came of a job.
pub(super) enum Outcome<R> {
    Transfer(Result<(), Failure>),
    Call(R),
}

/// The thread and its jobs, which it does one after the other.
pub(super) struct Worker<R> {
    /// `None` only while the worker is dropped.
    jobs: Option<Sender<(usize, Job<R>)>>,
    outcomes: Receiver<(usize, Outcome<R>)>,
    thread: Option<JoinHandle<()>>,
    in_flight: usize,
}

impl<R: Send + 'static> Worker<R> {
    /// Starts the thread, which signals `event` after each job.
    ///
    /// # Errors
    /// Where the host starts no more threads or has no file descriptor left.
    pub(super) fn start(event: &EventFd) -> io::Result<Self> {
        let event = event.try_clone()?;
        let (jobs, todo) = channel::<(usize, Job<R>)>();
        let (done, outcomes) = channel();
        let thread = std::thread::Builder::new()
            .name("disk".into())
            .stack_size(STACK_SIZE)
            .spawn(move || {
                for (token, job) in todo {
                    let outcome = match job {
                        Job::Transfer(transfer) => Outcome::Transfer(transfer.run()),
                        Job::Call(call) => Outcome::Call(call()),
                    };
                    if done.send((token, outcome)).is_err() {
                        return;
                    }
                    if let Err(error) = event.write(1) {
                        tracing::debug!(error = %report::chain(&error), "completion event");
                    }
                }
            })?;
        Ok(Self {
            jobs: Some(jobs),
            outcomes,
            thread: Some(thread),
            in_flight: 0,
        })
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Gives the thread a job.
    ///
    /// # Errors
    /// Where the thread has died.
    pub(super) fn push(&mut self, token: usize, job: Job<R>) -> io::Result<()> {
        let sent = self
            .jobs
            .as_ref()
            .map(|jobs| jobs.send((token, job)).is_ok());
        if sent == Some(true) {
            self.in_flight += 1;
            Ok(())
        } else {
            Err(io::Error::other("the worker thread has ended"))
        }
    }

    /// Hands what is done to `finish`.
    pub(super) fn reap(&mut self, mut finish: impl FnMut(usize, Outcome<R>)) {
        while let Ok((token, outcome)) = self.outcomes.try_recv() {
            self.in_flight -= 1;
            finish(token, outcome);
        }
    }
}

impl<R> Drop for Worker<R> {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the disk worker thread panicked");
        }
    }
}
