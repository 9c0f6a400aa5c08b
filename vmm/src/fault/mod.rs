//! Threads of the host that touch a lost page: a page of guest memory that is mapped from a file, and that the file has no more.
//!
//! The kernel stops the thread with `SIGBUS`. What it was about to do cannot be done, and it may hold any lock, so it stays where it is for good;
//! a thread that waits for nothing else says which page of which file it was, and ends the process. That is one guest.
//!
//! ```text
//! device, share or worker thread ── SIGBUS ─> handler: address, eventfd ── parked
//!                                                              └──> watcher: /proc/self/maps ─> terminal, report, exit code 1
//! ```
//!
//! Neither the handler nor the watcher takes a lock that a thread could hold while it touches guest memory. What vCPUs and system calls meet is an
//! error (`EFAULT`), and no signal: see [`crate::machine`].

mod handler;
mod maps;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use memshare::{FileChange, LostPage, PAGE_SIZE, Window};
use vmm_sys_util::eventfd::EventFd;

use crate::console::restore_terminal;
use crate::exit;

/// The watcher waits, and once makes a line of text.
const STACK_SIZE: usize = 64 << 10;

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

    /// The guest physical address of a page.
    fn page_of(&self, host: usize) -> Option<u64> {
        let offset = host.checked_sub(self.host)?;
        (offset < self.len).then(|| self.address + offset as u64 / PAGE_SIZE * PAGE_SIZE)
    }
}

/// Ends the process with a report when a thread touches a lost page, as long as this lives. There is one in a process.
#[derive(Debug)]
pub struct FaultWatch {
    event: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl FaultWatch {
    /// Watches over guest memory.
    ///
    /// # Errors
    /// Where the host has no descriptor, no thread or no signal handler left.
    pub fn start(guest: Vec<GuestRange>) -> io::Result<Self> {
        let event = Arc::new(EventFd::new(libc::EFD_CLOEXEC)?);
        let watched: Vec<_> = guest
            .iter()
            .map(|range| range.host..range.host + range.len)
            .collect();
        let thread = std::thread::Builder::new()
            .name("fault".into())
            .stack_size(STACK_SIZE)
            .spawn({
                let event = event.clone();
                move || watch(&event, &guest)
            })?;
        let this = Self {
            event,
            thread: Some(thread),
        };
        handler::install(&watched, this.event.as_raw_fd())?;
        Ok(this)
    }
}

impl Drop for FaultWatch {
    fn drop(&mut self) {
        handler::forget();
        if let Err(error) = self.event.write(1) {
            tracing::debug!(%error, "the watcher of guest memory waits on");
            return;
        }
        if let Some(thread) = self.thread.take() {
            // A panic has been told by the panic hook.
            let _ = thread.join();
        }
    }
}

fn watch(event: &EventFd, guest: &[GuestRange]) {
    while let Err(error) = event.read() {
        if error.kind() != io::ErrorKind::Interrupted {
            tracing::error!(%error, "nobody watches over guest memory");
            return;
        }
    }
    // Without a fault, the watch is over.
    if let Some(address) = handler::fault() {
        end(&report(address, guest));
    }
}

/// What is known of the page at an address of the process.
fn report(host: usize, guest: &[GuestRange]) -> String {
    let page = guest.iter().find_map(|range| range.page_of(host));
    let Some(address) = page else {
        return format!("the memory at {host:#x} cannot be read; {ADVICE}");
    };
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
