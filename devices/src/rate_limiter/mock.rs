//! A timer whose time a test makes.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::timer::Timer;
use super::{BucketLimits, RateLimiter, RateLimits};

#[derive(Debug, Default)]
struct Clock {
    now: Duration,
    end: Option<Duration>,
    armed: u64,
}

/// A clock that stands until it is moved, and its alarm; clones are the same clock.
#[derive(Clone, Debug, Default)]
pub(crate) struct VirtualTimer(Arc<Mutex<Clock>>);

impl VirtualTimer {
    pub(crate) fn advance(&self, by: Duration) {
        self.0.lock().now += by;
    }

    /// Goes to when it ends; how long that is, `None` where it is not armed.
    pub(crate) fn advance_to_end(&self) -> Option<Duration> {
        let mut clock = self.0.lock();
        let wait = clock.end?.saturating_sub(clock.now);
        clock.now += wait;
        Some(wait)
    }

    /// Milliseconds since the clock was made.
    pub(crate) fn elapsed_ms(&self) -> u64 {
        self.0.lock().now.as_millis() as u64
    }

    pub(crate) fn has_ended(&self) -> bool {
        let clock = self.0.lock();
        clock.end.is_some_and(|end| end <= clock.now)
    }

    pub(crate) fn is_armed(&self) -> bool {
        self.0.lock().end.is_some()
    }

    /// How often it was armed.
    pub(crate) fn armed(&self) -> u64 {
        self.0.lock().armed
    }
}

impl Timer for VirtualTimer {
    fn now(&self) -> Duration {
        self.0.lock().now
    }

    fn arm(&mut self, after: Duration) -> io::Result<()> {
        assert_ne!(after, Duration::ZERO, "that disarms a timerfd");
        let mut clock = self.0.lock();
        clock.end = Some(clock.now.saturating_add(after));
        clock.armed += 1;
        Ok(())
    }

    fn disarm(&mut self) {
        self.0.lock().end = None;
    }

    fn acknowledge(&mut self) -> bool {
        let has_ended = self.has_ended();
        if has_ended {
            self.disarm();
        }
        has_ended
    }

    fn fd(&self) -> RawFd {
        unreachable!("no event loop has it")
    }
}

/// A bucket: size, one-time burst, refill time in milliseconds.
pub(crate) fn bucket(size: u64, burst: u64, refill_time: u64) -> Option<BucketLimits> {
    BucketLimits::new(size, burst, refill_time)
}

/// A limiter and its time.
pub(crate) fn limiter(
    bandwidth: Option<BucketLimits>,
    ops: Option<BucketLimits>,
) -> (RateLimiter, VirtualTimer) {
    let timer = VirtualTimer::default();
    let limits = RateLimits { bandwidth, ops };
    (RateLimiter::with_timer(limits, timer.clone()), timer)
}
