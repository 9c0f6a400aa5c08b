//! The handler of `SIGSYS`. It uses nothing but atomics, and system calls that are safe in a signal handler
//! (signal-safety(7)).

use std::ffi::c_int;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use super::tables::NAMES;
use host::exit;
use host::terminal::restore_terminal;

/// `si_code` of a signal that a filter raised (Linux, `include/uapi/asm-generic/siginfo.h`).
const SYS_SECCOMP: c_int = 1;
/// Where `si_syscall` is in a `siginfo_t`: behind three numbers, four bytes of padding and `si_call_addr`.
const SI_SYSCALL: usize = 24;
/// Bytes of a thread's name with its zero (`TASK_COMM_LEN`).
const NAME_LEN: usize = 16;

/// The file of the log, where there is one.
static LOG: AtomicI32 = AtomicI32::new(-1);

/// Sets a descriptor that a stopped system call is also written to. The descriptor has to stay open.
pub fn log_to(fd: RawFd) {
    LOG.store(fd, Ordering::SeqCst);
}

/// Installs the handler, so that a system call that a filter stops ends the process.
pub(super) fn install() -> io::Result<()> {
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_stopped;
    // SAFETY: all zeros are a value of `sigaction`: no signal blocked, no flags.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: `action` is initialised and lives through the call, and the handler is safe in any context that the
    // signal may come in; the old action is not asked for.
    let set = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A line of text in a buffer of its own, as a signal handler must not allocate.
struct Line {
    bytes: [u8; 160],
    len: usize,
}

impl Line {
    fn add(&mut self, bytes: &[u8]) {
        let free = self.bytes.get_mut(self.len..).unwrap_or_default();
        let len = bytes.len().min(free.len());
        free[..len].copy_from_slice(&bytes[..len]);
        self.len += len;
    }

    fn add_number(&mut self, number: u32) {
        let mut digits = [0; 10];
        let (mut at, mut left) = (digits.len(), number);
        loop {
            at -= 1;
            digits[at] = b'0' + (left % 10) as u8;
            left /= 10;
            if left == 0 {
                break;
            }
        }
        self.add(&digits[at..]);
    }

    fn write(&self, fd: RawFd) {
        // SAFETY: the bytes are `len` initialised ones of the line. A descriptor that is closed refuses.
        unsafe { libc::write(fd, self.bytes.as_ptr().cast(), self.len) };
    }
}

fn line(thread: &[u8], number: u32) -> Line {
    let mut line = Line {
        bytes: [0; 160],
        len: 0,
    };
    let name = NAMES.get(number as usize).filter(|name| !name.is_empty());
    line.add(b"coppice: thread ");
    line.add(thread);
    line.add(b": the seccomp filter stopped system call ");
    line.add(name.unwrap_or(&"of no name").as_bytes());
    line.add(b" (");
    line.add_number(number);
    line.add(b")\n");
    line
}

extern "C" fn on_stopped(signal: c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a `siginfo_t` of 128 bytes that is valid until the handler returns. Its
    // bytes at `SI_SYSCALL` are initialised whatever raised the signal; they are used only where a filter raised it.
    let (code, number) = unsafe {
        (
            (*info).si_code,
            info.cast::<u8>().add(SI_SYSCALL).cast::<[u8; 4]>().read(),
        )
    };
    let number = u32::from_ne_bytes(number);
    if code == SYS_SECCOMP {
        let mut name = [0u8; NAME_LEN];
        // SAFETY: PR_GET_NAME writes `TASK_COMM_LEN` bytes, which `name` has.
        unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        // Restoring the terminal is one ioctl. Where another thread is restoring it, this one does not wait for that.
        restore_terminal();
        let line = line(name, number);
        line.write(libc::STDERR_FILENO);
        let log = LOG.load(Ordering::SeqCst);
        if log >= 0 {
            line.write(log);
        }
        // SAFETY: `_exit` takes any number and does not return.
        unsafe { libc::_exit(exit::SECCOMP.into()) };
    }
    // The signal was sent by a process, so it ends this process, as it does by default. SAFETY: `_exit` takes any
    // number and does not return.
    unsafe { libc::_exit(c_int::from(exit::SIGNAL_BASE) + signal) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(thread: &str, number: u32) -> String {
        let line = line(thread.as_bytes(), number);
        String::from_utf8(line.bytes[..line.len].to_vec()).unwrap()
    }

    #[test]
    fn a_system_call_is_named_with_its_thread_and_number() {
        let call = libc::SYS_ptrace as u32;
        let expected =
            "coppice: thread vcpu0: the seccomp filter stopped system call ptrace (101)\n";
        assert_eq!(text("vcpu0", call), expected);
        assert!(text("api", u32::MAX).contains("of no name (4294967295)"));
    }

    #[test]
    fn names_are_those_of_the_c_library() {
        for (number, name) in [
            (libc::SYS_read, "read"),
            (libc::SYS_execve, "execve"),
            (libc::SYS_io_uring_setup, "io_uring_setup"),
            (libc::SYS_clone3, "clone3"),
            (libc::SYS_landlock_restrict_self, "landlock_restrict_self"),
        ] {
            assert_eq!(NAMES[usize::try_from(number).unwrap()], name);
        }
    }
}
