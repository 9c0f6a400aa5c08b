//! Bus errors of threads of the host, which touch a lost page: a page of guest memory that is mapped from a file, and
//! that the file no longer has.
//!
//! The kernel stops the thread with `SIGBUS`. The thread cannot go on without the bytes, so the handler reports which
//! page of which file is lost, and ends the process, which is one guest.
//!
//! ```text
//! device, share or worker thread ── SIGBUS ─> handler: /proc/self/maps ─> terminal, report, exit code 1
//! ```
//!
//! The thread may hold any lock that is held where guest memory is touched, so the handler takes none of those. vCPUs
//! and system calls that meet a lost page get an error (`EFAULT`) and no signal: see [`crate::Machine`].

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

/// Ends the process with a report when a thread touches a lost page, for as long as this lives. A process has one.
#[derive(Debug)]
pub struct BusErrorWatch(());

impl BusErrorWatch {
    /// Begins to watch guest memory.
    ///
    /// # Errors
    /// Where the host takes no signal handler, or guest memory is in too many ranges.
    pub fn start(guest: &[GuestRange]) -> io::Result<Self> {
        handler::install(guest)?;
        Ok(Self(()))
    }
}

impl Drop for BusErrorWatch {
    fn drop(&mut self) {
        handler::forget();
    }
}
