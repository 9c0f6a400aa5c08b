//! The handler of `SIGBUS`.
//!
//! The kernel raises the signal for an address. The handler acts only on an address in guest memory, so the thread was
//! reading or writing guest memory when it was stopped. Such a thread is not inside one of the C library's functions
//! that must not be called again (signal-safety(7)), so the handler may call them.

use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use super::range::GuestRange;
use super::report::{end, report};
use kvm::layout::VIRTIO_GSIS;

/// RAM below and above the hole for devices, and a window for each device at most.
const MOST_RANGES: usize = 2 + VIRTIO_GSIS.len();

struct AtomicRange {
    /// First guest physical address.
    address: AtomicU64,
    start: AtomicUsize,
    end: AtomicUsize,
}

impl AtomicRange {
    const fn empty() -> Self {
        Self {
            address: AtomicU64::new(0),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
        }
    }

    /// Changes the range. The handler can run at any moment in between, and sees the old range, no range or the new
    /// one: the range is empty while its fields change.
    fn set(&self, address: u64, range: &Range<usize>) {
        self.end.store(0, Ordering::SeqCst);
        self.address.store(address, Ordering::SeqCst);
        self.start.store(range.start, Ordering::SeqCst);
        self.end.store(range.end, Ordering::SeqCst);
    }

    /// The range, where it contains an address of the process.
    fn containing(&self, host: usize) -> Option<GuestRange> {
        let (start, end) = (
            self.start.load(Ordering::SeqCst),
            self.end.load(Ordering::SeqCst),
        );
        (start..end).contains(&host).then(|| GuestRange {
            address: self.address.load(Ordering::SeqCst),
            host: start,
            len: end - start,
        })
    }
}

static GUEST: [AtomicRange; MOST_RANGES] = [const { AtomicRange::empty() }; MOST_RANGES];
/// Whether a thread is ending the process.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Installs the handler. The first thread that touches a lost page of `guest` ends the process with a report, and the
/// others wait for that.
pub(super) fn install(guest: &[GuestRange]) -> io::Result<()> {
    if guest.len() > MOST_RANGES {
        return Err(io::Error::other("guest memory is in too many ranges"));
    }
    for (slot, range) in GUEST.iter().zip(guest) {
        slot.set(range.address, &(range.host..range.host + range.len));
    }
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_bus_error;
    set_action(handler as libc::sighandler_t, libc::SA_SIGINFO)
}

/// Forgets guest memory. From here on every `SIGBUS` has its default meaning.
pub(super) fn forget() {
    for slot in &GUEST {
        slot.set(0, &(0..0));
    }
}

fn set_action(handler: libc::sighandler_t, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: all zeros are a value of `sigaction`: no signal blocked, no flags.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: `action` is initialised and lives through the call, and the handler is the default or `on_bus_error`,
    // which is safe in any context that a signal may come in; the old action is not asked for.
    let set = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

extern "C" fn on_bus_error(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: with SA_SIGINFO the kernel passes a `siginfo_t` that is valid until the handler returns; `si_addr` reads
    // bytes that every signal has, and is used below only where the kernel raised the signal for an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // A signal that a process has sent has no address, and a code of 0 or less.
    let mut ranges = GUEST.iter().filter_map(|range| range.containing(address));
    let Some(range) = ranges.next().filter(|_| code > 0) else {
        // The signal is delivered by its default action once this handler has returned.
        let _ = set_action(libc::SIG_DFL, 0);
        // SAFETY: any number may be raised; this one is blocked until the handler returns.
        unsafe { libc::raise(signal) };
        return;
    };
    if !ENDING.swap(true, Ordering::SeqCst) {
        end(&report(address, range));
    }
    loop {
        // SAFETY: `pause` waits for a signal, and touches no memory.
        unsafe { libc::pause() };
    }
}
