//! Descriptors that whoever started this process has left it.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

/// The descriptor of a number, which belongs to the caller from then on, once.
///
/// # Errors
/// Where there is none that was inherited, or it was taken already; for standard input, output and error.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(io::Error::other("it is one of the standard descriptors"));
    }
    // SAFETY: it is borrowed for two calls that fail with EBADF where it is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl_getfd(borrowed)?;
    if flags.contains(FdFlags::CLOEXEC) {
        return Err(io::Error::other("this process was not started with it"));
    }
    fcntl_setfd(borrowed, flags | FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and nobody else owns it: whatever this process opens is closed on exec, and what was taken
    // here before is, too, so one that is not was inherited and not taken.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, IntoRawFd};

    use super::*;

    #[test]
    fn a_descriptor_is_taken_once_and_only_where_it_was_inherited() {
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let inherited = rustix::io::dup(&reader).unwrap();
        let number = inherited.into_raw_fd();
        let taken = take(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        take(number).unwrap_err();
        let own = rustix::io::fcntl_dupfd_cloexec(&reader, 3).unwrap();
        take(own.as_raw_fd()).unwrap_err();
        for number in [-1, 0, 1, 2, 100_000] {
            take(number).unwrap_err();
        }
    }
}
