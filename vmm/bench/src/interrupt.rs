//! Signals amid a measurement: it ends with all guests gone and the host's settings as they were.

use std::io;
use std::time::{Duration, Instant};

use super::error::BenchError;
use host::signals::Signals;

/// How long a signal may go unnoticed.
pub(super) const TICK: Duration = Duration::from_millis(100);

/// The signals that end the benchmark.
pub(super) struct Interrupt(Signals);

impl Interrupt {
    /// Blocks the signals; first of all, as threads inherit that.
    pub(super) fn new() -> io::Result<Self> {
        Signals::block().map(Self)
    }

    /// Fails once a signal has come.
    pub(super) fn check(&self) -> Result<(), BenchError> {
        match self.0.next() {
            Some(signal) => Err(BenchError::Cancelled(signal)),
            None => Ok(()),
        }
    }

    /// Sleeps, unless a signal comes.
    pub(super) fn sleep(&self, time: Duration) -> Result<(), BenchError> {
        let end = Instant::now() + time;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(TICK));
        }
    }
}
