//! Reports a lost page, and ends the process.

use std::io;
use std::os::fd::AsFd;

use memshare::{FileChange, LostPage, PAGE_SIZE};

use super::maps;
use super::range::GuestRange;
use host::exit;
use host::terminal::restore_terminal;

/// What to do about a lost page, at the end of every report.
pub const ADVICE: &str =
    "the guest ends, as it cannot have those bytes; put the file back as it was, and start anew";

/// What is known of the page at an address of the process.
pub(super) fn report(host: usize, range: GuestRange) -> String {
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

/// Prints a report, and ends the process. Takes no lock, not even that of standard error: a thread that writes to the
/// log may hold it.
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
    exit_at_once(exit::FAILURE)
}

/// Ends the process by a system call alone, whatever locks its threads hold.
fn exit_at_once(code: u8) -> ! {
    // SAFETY: `_exit` takes any number and does not return.
    unsafe { libc::_exit(code.into()) }
}
