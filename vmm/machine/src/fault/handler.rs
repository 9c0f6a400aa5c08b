//! The handler of `SIGBUS`.
//!
//! It is called where a thread reads or writes guest memory, and nowhere else: the kernel raises the signal for an
//! address, and one that is in guest memory. Such a thread is in none of the C library's functions that may not be
//! called again (signal-safety(7)): so the handler may do what could be done there.

use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use super::range::GuestRange;
use super::report::{end, report};
use kvm::layout::VIRTIO_GSIS;

/// RAM below and above the hole, and a window for each device at most.
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

    /// Never seen as more than what it was or is to be: it is empty in between.
    fn set(&self, address: u64, range: &Range<usize>) {
        self.end.store(0, Ordering::SeqCst);
        self.address.store(address, Ordering::SeqCst);
        self.start.store(range.start, Ordering::SeqCst);
        self.end.store(range.end, Ordering::SeqCst);
    }

    /// The range, where an address of the process is in it.
    fn holding(&self, host: usize) -> Option<GuestRange> {
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
/// Whether a thread ends the process.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Has the first thread that touches a lost page of `guest` end the process with a report, and others wait for that.
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

/// From here on every `SIGBUS` has its default meaning.
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
    // bytes that every signal has, and counts below only where the kernel raised it for an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // What a process sends has no address and a code of 0 or less.
    let mut ranges = GUEST.iter().filter_map(|range| range.holding(address));
    let Some(range) = ranges.next().filter(|_| code > 0) else {
        // By the default action, once this has returned.
        let _ = set_action(libc::SIG_DFL, 0);
        // SAFETY: any number may be raised; this one is blocked until the handler returns.
        unsafe { libc::raise(signal) };
        return;
    };
    if !ENDING.swap(true, Ordering::SeqCst) {
        end(&report(address, range));
    }
    loop {
        // SAFETY: waits for a signal; touches nothing.
        unsafe { libc::pause() };
    }
}
