//! A copy of this process, as a child of its parent.

use std::io;
use std::time::{Duration, Instant};

use rustix::process::Pid;

/// Copies this process. Returns `None` in the copy, which is a child of this process' parent.
///
/// `fork(3)` would make it a child of this process, and has no namespaces. What it does beside for the C library is to
/// update the thread's number, which the library keeps; here the kernel writes it to that place.
///
/// # Errors
/// Where this process has threads; the host's error.
pub(super) fn fork(own_processes: bool) -> io::Result<Option<Pid>> {
    be_alone()?;
    let number = number_place()?;
    let flags = libc::SIGCHLD
        | libc::CLONE_PARENT
        | libc::CLONE_CHILD_SETTID
        | libc::CLONE_CHILD_CLEARTID
        | if own_processes { libc::CLONE_NEWPID } else { 0 };
    // SAFETY: without CLONE_VM the copy has all memory for itself, and its stack where it is (a null stack). There is
    // no other thread, which could hold a lock of the copy's for ever. `number` is where the kernel has written this
    // thread's number before.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0, 0, number, 0) };
    match i32::try_from(pid) {
        Ok(0) => Ok(None),
        Ok(pid) if pid > 0 => Ok(Pid::from_raw(pid)),
        Ok(_) | Err(_) => Err(io::Error::last_os_error()),
    }
}

/// How long a thread that was joined may still be listed.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(1);

/// Waits until this is the only thread: one that was joined is still listed for a moment, while the kernel removes it.
fn be_alone() -> io::Result<()> {
    let begun = Instant::now();
    while std::fs::read_dir("/proc/self/task")?.count() != 1 {
        if begun.elapsed() > PATIENCE {
            return Err(io::Error::other("the zygote has threads"));
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// Where the C library keeps the number of this thread, an address that it has given the kernel (`set_tid_address(2)`).
fn number_place() -> io::Result<usize> {
    let mut place = 0usize;
    // SAFETY: the kernel writes one pointer to `place` (PR_GET_TID_ADDRESS of prctl(2)).
    let got = unsafe { libc::prctl(libc::PR_GET_TID_ADDRESS, &raw mut place) };
    if got == 0 && place != 0 {
        Ok(place)
    } else {
        Err(io::Error::last_os_error())
    }
}
