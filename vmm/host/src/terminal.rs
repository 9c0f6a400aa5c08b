//! Puts the terminal into raw mode, and restores it.
//!
//! A process has one terminal, so the original mode is in a static: the panic hook has to find it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, MutexGuard};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

static RAW: AtomicBool = AtomicBool::new(false);
static ORIGINAL: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);

/// The terminal is in raw mode for as long as this lives.
#[must_use = "the terminal is restored when this is dropped"]
pub struct RawMode(());

impl RawMode {
    /// Makes `input` raw, so that every key reaches the guest, if it is a terminal; `None` if it is not.
    /// A panic restores the terminal before it is reported.
    ///
    /// # Errors
    /// Where the terminal refuses.
    pub fn enter(input: impl AsFd) -> io::Result<Option<Self>> {
        let input = input.as_fd();
        if !isatty(input) {
            return Ok(None);
        }
        let original = tcgetattr(input)?;
        let mut raw = original.clone();
        raw.make_raw();
        let kept = rustix::io::fcntl_dupfd_cloexec(input, 0)?;
        *ORIGINAL.lock() = Some((kept, original));
        let guard = Self(());
        tcsetattr(input, OptionalActions::Now, &raw)?;
        RAW.store(true, Ordering::Relaxed);
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            report(info);
        }));
        Ok(Some(guard))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether a line on the terminal needs a carriage return of its own.
pub fn is_raw() -> bool {
    // No other memory is ordered by this flag. A line that is printed during the change may be out of place.
    RAW.load(Ordering::Relaxed)
}

/// Restores the terminal from any thread, at the very end of the process. Does nothing if another thread is restoring
/// it.
pub fn restore_terminal() {
    if let Some(original) = ORIGINAL.try_lock() {
        put_back(original);
    }
}

fn restore() {
    put_back(ORIGINAL.lock());
}

fn put_back(mut original: MutexGuard<'_, Option<(OwnedFd, Termios)>>) {
    let original = original.take();
    if let Some((terminal, original)) = original {
        // A terminal that is gone (after SIGHUP) has no mode to restore. The mode is set without waiting for pending
        // output, because output that nobody reads must not keep the process from ending.
        let _ = tcsetattr(terminal, OptionalActions::Now, &original);
    }
    RAW.store(false, Ordering::Relaxed);
}
