//! Signals as events: blocked in every thread, and read from a descriptor by the event loop.
//!
//! Nothing runs in a signal handler, so that the process restores the terminal, closes the disks and removes the socket
//! however it ends.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// The signals that end the process in good order.
const ENDING: [libc::c_int; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];

/// A descriptor from which signals are read.
pub struct Signals(OwnedFd);

fn set_of(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `set` is writable memory for one `sigset_t`, which sigemptyset initialises in full.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for &signal in signals {
        // SAFETY: `set` was initialised above. A number that is no signal is refused by an error.
        unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
    }
    // SAFETY: initialised by sigemptyset.
    unsafe { set.assume_init() }
}

impl Signals {
    /// Blocks `SIGHUP`, `SIGINT`, `SIGQUIT` and `SIGTERM` in this thread, and in all threads that it starts later: so
    /// it has to be called first. Blocks `SIGTTOU` as well, so that the terminal can be restored even where the process
    /// is in the background.
    ///
    /// # Errors
    /// Where the host has no descriptor left.
    pub fn block() -> io::Result<Self> {
        let ending = set_of(&ENDING);
        let mut blocked = ending;
        // SAFETY: `blocked` is an initialised set.
        unsafe { libc::sigaddset(&raw mut blocked, libc::SIGTTOU) };
        // SAFETY: the set is initialised and lives through the call; the old mask is not asked for.
        let error = unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const blocked, std::ptr::null_mut())
        };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: -1 asks for a new descriptor; the set is initialised and lives through the call.
        let fd = unsafe {
            libc::signalfd(
                -1,
                &raw const ending,
                libc::SFD_CLOEXEC | libc::SFD_NONBLOCK,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made the descriptor, and nobody else knows it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The number of the next pending signal; none where no signal is pending.
    pub fn next(&self) -> Option<u8> {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        let len = rustix::io::read(&self.0, &mut info).ok()?;
        // ssi_signo is the first field (signalfd(2)); the kernel writes whole structures.
        let number = info.get(..len)?.first_chunk::<4>()?;
        u8::try_from(u32::from_ne_bytes(*number)).ok()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Limits the C allocator to one arena, which all threads share: a running guest allocates so little that an arena for
/// each thread would cost more memory than it saves time. Large allocations are mappings of their own, which are given
/// back when they are freed: by default, the allocator takes later ones of that size from the heap, which then never
/// shrinks.
pub fn share_one_heap() {
    const LARGE: libc::c_int = 64 << 10;
    // SAFETY: mallopt(3) changes parameters of the allocator and no memory.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
        libc::mallopt(libc::M_TRIM_THRESHOLD, LARGE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocked_signal_is_read_once() {
        let signals = Signals::block().unwrap();
        assert_eq!(signals.next(), None);
        // SAFETY: a signal to this thread, in which it is blocked.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGTERM) };
        assert_eq!(signals.next(), Some(15));
        assert_eq!(signals.next(), None);
    }
}
