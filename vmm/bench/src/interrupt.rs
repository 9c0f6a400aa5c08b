//! Signals during a measurement: they end it, with all guests ended and the host's settings restored.

use std::io;
use std::time::{Duration, Instant};

use super::error::BenchError;
use host::signals::Signals;

/// How often a wait checks for a signal.
pub(super) const TICK: Duration = Duration::from_millis(100);

/// The signals that end the benchmark.
pub(super) struct Interrupt(Signals);

impl Interrupt {
    /// Blocks the signals. To be called first, because threads inherit the mask.
    pub(super) fn new() -> io::Result<Self> {
        Signals::block().map(Self)
    }

    /// Fails once a signal was received.
    pub(super) fn check(&self) -> Result<(), BenchError> {
        match self.0.next() {
            Some(signal) => Err(BenchError::Cancelled(signal)),
            None => Ok(()),
        }
    }

    /// Sleeps, and fails at a signal.
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
