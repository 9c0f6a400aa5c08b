//! System calls that query a feature of the kernel and change nothing.

use std::io;
use std::ptr;

/// `LANDLOCK_CREATE_RULESET_VERSION` (`linux/landlock.h`): return the ABI version instead of making a rule set.
const LANDLOCK_CREATE_RULESET_VERSION: libc::c_uint = 1;

/// The version of the Landlock ABI, 1 or more.
///
/// # Errors
/// `ENOSYS` where the kernel has no Landlock, `EOPNOTSUPP` where it is disabled at boot.
pub(super) fn landlock_abi() -> io::Result<i64> {
    // SAFETY: with this flag the call takes a null pointer and a size of zero, and makes nothing.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            ptr::null::<libc::c_void>(),
            0usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    succeeded(version)
}

/// Whether a seccomp filter can end the process (`SECCOMP_RET_KILL_PROCESS`).
///
/// # Errors
/// `ENOSYS` or `EINVAL` where the kernel has no seccomp filters, `EOPNOTSUPP` where they cannot do that.
pub(super) fn seccomp_can_kill() -> io::Result<()> {
    let action: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: the call reads the four bytes of `action` and changes nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_ACTION_AVAIL,
            0u32,
            &raw const action,
        )
    };
    succeeded(result).map(drop)
}

fn succeeded(result: i64) -> io::Result<i64> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
