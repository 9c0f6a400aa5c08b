//! Threads of the host that touch a lost page: a page of guest memory that is mapped from a file, and that the file has
//! no more.
//!
//! The kernel stops the thread with `SIGBUS`. What it was about to do cannot be done, so it says which page of which
//! file it was, and ends the process. That is one guest.
//!
//! ```text
//! device, share or worker thread ── SIGBUS ─> handler: /proc/self/maps ─> terminal, report, exit code 1
//! ```
//!
//! The thread may hold any lock that is held where guest memory is touched, and none of those is taken here. What vCPUs
//! and system calls meet is an error (`EFAULT`), and no signal: see [`crate::Machine`].

mod handler;
mod maps;
mod range;
mod report;
#[cfg(test)]
mod tests;

use std::io;

pub use range::GuestRange;
pub use report::ADVICE;
pub(crate) use report::end;

/// Ends the process with a report when a thread touches a lost page, as long as this lives. There is one in a process.
#[derive(Debug)]
pub struct FaultWatch(());

impl FaultWatch {
    /// Watches over guest memory.
    ///
    /// # Errors
    /// Where the host takes no signal handler, or guest memory is in too many ranges.
    pub fn start(guest: &[GuestRange]) -> io::Result<Self> {
        handler::install(guest)?;
        Ok(Self(()))
    }
}

impl Drop for FaultWatch {
    fn drop(&mut self) {
        handler::forget();
    }
}
