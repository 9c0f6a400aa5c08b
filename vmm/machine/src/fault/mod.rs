//! Threads of the host that touch a lost page: a page of guest memory that is mapped from a file, and that the file has no more.
//!
//! The kernel stops the thread with `SIGBUS`. What it was about to do cannot be done, so it says which page of which file it was, and ends the process.
//! That is one guest.
//!
//! ```text
//! device, share or worker thread ── SIGBUS ─> handler: /proc/self/maps ─> terminal, report, exit code 1
//! ```
//!
//! The thread may hold any lock that is held where guest memory is touched, and none of those is taken here. What vCPUs and system calls meet is an
//! error (`EFAULT`), and no signal: see [`crate::machine`].

mod handler;
mod maps;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsFd;

use memshare::{FileChange, LostPage, PAGE_SIZE, Window};

use host::exit;
use host::terminal::restore_terminal;

/// What to do about a lost page, at the end of every report.
pub const ADVICE: &str =
    "the guest ends, as it cannot have those bytes; put the file back as it was, and start anew";

/// Where guest memory is in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// First guest physical address.
    pub address: u64,
    /// First address of the process.
    host: usize,
    /// Bytes.
    len: usize,
}

impl GuestRange {
    /// The memory of a window that the guest has at `address`.
    pub fn new(address: u64, window: &Window) -> Self {
        Self {
            address,
            host: window.as_ptr() as usize,
            // A window is a part of an address space.
            len: window.len() as usize,
        }
    }

    /// The guest physical address of a page of it.
    fn page_of(&self, host: usize) -> u64 {
        self.address + (host - self.host) as u64 / PAGE_SIZE * PAGE_SIZE
    }
}

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

/// What is known of the page at an address of the process.
fn report(host: usize, range: GuestRange) -> String {
    let address = range.page_of(host);
    match maps::of_process(host) {
        Some(mapping) => {
            let lost = LostPage {
                address,
                change: mapping
                    .file_len()
                    .filter(|len| *len < mapping.offset + PAGE_SIZE)
                    .map(|len| FileChange::Truncated { len }),
                file: mapping.path,
                offset: mapping.offset,
            };
            format!("{lost}; {ADVICE}")
        }
        None => format!("guest page {address:#x} cannot be read; {ADVICE}"),
    }
}

/// Ends the process without a lock: not even that of standard error, which a thread that writes to the log holds.
pub(crate) fn end(report: &str) -> ! {
    restore_terminal();
    let line = format!("coppice: {report}\n");
    let mut left = line.as_bytes();
    while !left.is_empty() {
        match rustix::io::write(io::stderr().as_fd(), left) {
            Ok(written) => left = left.get(written..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
    }
    handler::exit_at_once(exit::FAILURE)
}
