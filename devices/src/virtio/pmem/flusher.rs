//! The thread that calls the backing of the memory, one flush at a time.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

/// A flush is a few system calls deep.
const STACK_SIZE: usize = 128 << 10;

/// Why a flush failed.
pub type FlushError = Box<dyn std::error::Error + Send + Sync>;

/// What a flush came to: bytes written.
pub(super) type Outcome = Result<u64, FlushError>;

/// Keeps what a guest writes to the memory.
pub trait Backing: Send + Sync {
    /// Makes durable all that the guest had written when this was called; returns how many bytes that took. Blocks.
    ///
    /// # Errors
    /// Where any of it may not be durable. The next call tries all of that again.
    fn flush(&self) -> Outcome;
}

struct Thread {
    jobs: Sender<()>,
    outcomes: Receiver<Outcome>,
    handle: JoinHandle<()>,
}

/// A backing, and the thread that calls it, one flush at a time.
pub(super) struct Flusher {
    backing: Arc<dyn Backing>,
    /// Readable when a flush has ended.
    event: EventFd,
    /// Started for the first flush: many guests never write.
    thread: Option<Thread>,
    is_running: bool,
}

impl Flusher {
    pub(super) fn new(backing: Arc<dyn Backing>) -> io::Result<Self> {
        Ok(Self {
            backing,
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            thread: None,
            is_running: false,
        })
    }

    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Whether a flush has begun whose outcome was not taken.
    pub(super) fn is_running(&self) -> bool {
        self.is_running
    }

    fn start(&self) -> io::Result<Thread> {
        let (jobs, todo) = channel::<()>();
        let (done, outcomes) = channel();
        let (backing, event) = (self.backing.clone(), self.event.try_clone()?);
        let handle = std::thread::Builder::new()
            .name("pmem".into())
            .stack_size(STACK_SIZE)
            .spawn(move || {
                for () in todo {
                    if done.send(backing.flush()).is_err() {
                        return;
                    }
                    if let Err(error) = event.write(1) {
                        tracing::debug!(error = %report::chain(&error), "flush event");
                    }
                }
            })?;
        Ok(Thread {
            jobs,
            outcomes,
            handle,
        })
    }

    /// Begins a flush; none is under way.
    ///
    /// # Errors
    /// Where the host starts no more threads.
    pub(super) fn begin(&mut self) -> io::Result<()> {
        let thread = match self.thread.take() {
            Some(thread) => thread,
            None => self.start()?,
        };
        let sent = thread.jobs.send(());
        self.thread = Some(thread);
        self.is_running = sent.is_ok();
        sent.map_err(|_| io::Error::other("the flusher thread has ended"))
    }

    /// The outcome of a flush that has ended.
    pub(super) fn reap(&mut self) -> Option<Outcome> {
        // The counter says only that some flush has ended.
        let _ = self.event.read();
        let outcome = self.thread.as_ref()?.outcomes.try_recv().ok()?;
        self.is_running = false;
        Some(outcome)
    }

    /// Waits for the flush under way, if there is one.
    pub(super) fn wait(&mut self) -> Option<Outcome> {
        if !std::mem::take(&mut self.is_running) {
            return None;
        }
        let outcome = self.thread.as_ref()?.outcomes.recv();
        Some(outcome.unwrap_or_else(|_| Err("the flusher thread has ended".into())))
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        drop(thread.jobs);
        if thread.handle.join().is_err() {
            tracing::error!("the flusher thread panicked");
        }
    }
}
