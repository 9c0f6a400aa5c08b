//! The handler of `SIGBUS`, and what it may touch: atomics, and system calls that are safe in a signal handler (signal-safety(7)).

use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use crate::layout::VIRTIO_GSIS;

/// RAM below and above the hole, and a window for each device at most.
const MOST_RANGES: usize = 2 + VIRTIO_GSIS.len();

struct AtomicRange {
    start: AtomicUsize,
    end: AtomicUsize,
}

impl AtomicRange {
    const fn empty() -> Self {
        Self {
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
        }
    }

    /// Never seen as more than what it was or is to be: it is empty in between.
    fn set(&self, range: &Range<usize>) {
        self.end.store(0, Ordering::SeqCst);
        self.start.store(range.start, Ordering::SeqCst);
        self.end.store(range.end, Ordering::SeqCst);
    }

    fn contains(&self, address: usize) -> bool {
        let (start, end) = (&self.start, &self.end);
        (start.load(Ordering::SeqCst)..end.load(Ordering::SeqCst)).contains(&address)
    }
}

static GUEST: [AtomicRange; MOST_RANGES] = [const { AtomicRange::empty() }; MOST_RANGES];
/// The first address that was lost; no guest memory is at 0.
static FAULT: AtomicUsize = AtomicUsize::new(0);
/// Who is told.
static EVENT: AtomicI32 = AtomicI32::new(-1);

/// The first address in guest memory that a thread was stopped at.
pub(super) fn fault() -> Option<usize> {
    match FAULT.load(Ordering::SeqCst) {
        0 => None,
        address => Some(address),
    }
}

/// Parks threads that touch a lost page of `guest`, and then writes to the eventfd `event`.
pub(super) fn install(guest: &[Range<usize>], event: RawFd) -> io::Result<()> {
    if guest.len() > MOST_RANGES {
        return Err(io::Error::other("guest memory is in too many ranges"));
    }
    EVENT.store(event, Ordering::SeqCst);
    for (slot, range) in GUEST.iter().zip(guest) {
        slot.set(range);
    }
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_bus_error;
    set_action(handler as libc::sighandler_t, libc::SA_SIGINFO)
}

/// From here on every `SIGBUS` has its default meaning.
pub(super) fn forget() {
    for slot in &GUEST {
        slot.set(&(0..0));
    }
    EVENT.store(-1, Ordering::SeqCst);
}

/// Ends the process with no more than a system call, whatever its threads hold.
pub(super) fn exit_at_once(code: u8) -> ! {
    // SAFETY: `_exit` takes any number and does not return.
    unsafe { libc::_exit(code.into()) }
}

fn set_action(handler: libc::sighandler_t, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: all zeros are a value of `sigaction`: no signal blocked, no flags.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: `action` is initialised and lives through the call, and the handler is the default or `on_bus_error`, which is safe in
    // any context that a signal may come in; the old action is not asked for.
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
    // SAFETY: with SA_SIGINFO the kernel passes a `siginfo_t` that is valid until the handler returns; `si_addr` reads bytes that every
    // signal has, and counts below only where the kernel raised it for an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // What a process sends has no address and a code of 0 or less.
    if code <= 0 || !GUEST.iter().any(|range| range.contains(address)) {
        // By the default action, once this has returned.
        let _ = set_action(libc::SIG_DFL, 0);
        // SAFETY: any number may be raised; this one is blocked until the handler returns.
        unsafe { libc::raise(signal) };
        return;
    }
    let first = FAULT.compare_exchange(0, address, Ordering::SeqCst, Ordering::SeqCst);
    if first.is_ok() {
        let one = 1u64;
        // SAFETY: the eight bytes are those of `one`. A descriptor that is closed refuses.
        unsafe { libc::write(EVENT.load(Ordering::SeqCst), (&raw const one).cast(), 8) };
    }
    loop {
        // SAFETY: waits for a signal; touches nothing.
        unsafe { libc::pause() };
    }
}
