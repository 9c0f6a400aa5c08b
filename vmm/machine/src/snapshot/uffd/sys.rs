//! The kernel's interface: `userfaultfd` (Linux, Documentation/admin-guide/mm/userfaultfd.rst,
//! include/uapi/linux/userfaultfd.h).
//!
//! The crate `userfaultfd` is not used, because its build needs libclang, and only three requests are needed here.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use memshare::Window;
use rustix::mm::{UserfaultfdFlags, userfaultfd};

const DEVICE: &str = "/dev/userfaultfd";
/// `UFFD_API`.
const API: u64 = 0xaa;
/// `UFFD_FEATURE_EVENT_REMOVE`: the kernel reports to the handler the pages that are given back, which read as zeros
/// from then on.
const EVENT_REMOVE: u64 = 1 << 3;
/// `UFFDIO_REGISTER_MODE_MISSING`.
const MISSING: u64 = 1;
/// `_UFFDIO_COPY` in the `ioctls` that `UFFDIO_REGISTER` returns.
const CAN_COPY: u64 = 1 << 3;

const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;

/// `struct uffdio_api`.
#[repr(C)]
struct ApiRequest {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct RegisterRequest {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// Why there is no descriptor.
#[derive(Debug)]
pub(super) enum OpenFailure {
    /// The process may not have a descriptor.
    Refused {
        /// The error of userfaultfd(2).
        call: io::Error,
        /// The error of `/dev/userfaultfd`.
        device: io::Error,
    },
    /// The kernel's userfaultfd lacks a feature.
    Features(io::Error),
}

/// A descriptor that reports missing pages of this process that are touched, by a thread or by the kernel on its
/// behalf, as KVM does for a guest.
#[derive(Debug)]
pub(super) struct Userfault(OwnedFd);

impl Userfault {
    /// Opens a descriptor that reports the kernel's faults, by either of two ways: the system call takes
    /// `CAP_SYS_PTRACE` or `vm.unprivileged_userfaultfd`, the device the rights of its file.
    pub(super) fn open() -> Result<Self, OpenFailure> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: the new descriptor has no memory registered yet, so it changes the behaviour of none.
        let opened = match unsafe { userfaultfd(flags) } {
            Ok(fd) => fd,
            Err(call) => from_device().map_err(|device| OpenFailure::Refused {
                call: call.into(),
                device,
            })?,
        };
        let this = Self(opened);
        this.negotiate().map_err(OpenFailure::Features)?;
        Ok(this)
    }

    /// The handshake (`UFFDIO_API`), without which nothing can be registered.
    fn negotiate(&self) -> io::Result<()> {
        let mut request = ApiRequest {
            api: API,
            features: EVENT_REMOVE,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_API reads and writes an `ApiRequest`, which lives through the call.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_API, &raw mut request) };
        check_result(done)
    }

    /// Registers a window. From here on, a thread that touches a missing page of it waits until whoever has the
    /// descriptor provides the page.
    pub(super) fn register(&self, window: &Window) -> io::Result<()> {
        let mut request = RegisterRequest {
            start: window.as_ptr() as u64,
            len: window.len(),
            mode: MISSING,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER reads and writes a `RegisterRequest`, which lives through the call. The range is a
        // whole window, which is guest memory: its contract allows that its bytes change at any time.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &raw mut request) };
        check_result(done)?;
        if request.ioctls & CAN_COPY == 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(())
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn check_result(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn from_device() -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open(DEVICE)?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: USERFAULTFD_IOC_NEW takes a number and touches no memory.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
    check_result(fd)?;
    // SAFETY: the kernel has just made the descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
