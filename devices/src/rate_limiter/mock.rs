//! A timer whose time a test makes.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use super::timer::Timer;
use super::{BucketLimits, RateLimiter, RateLimits};

#[derive(Debug)]
struct Clock {
    now: Duration,
    end: Option<Duration>,
    armed: u64,
    /// Readable when it has ended.
    event: EventFd,
}

/// A clock that stands until it is moved, and its alarm; clones are the same clock.
#[derive(Clone, Debug)]
pub(crate) struct VirtualTimer(Arc<Mutex<Clock>>);

impl Default for VirtualTimer {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Clock {
            now: Duration::ZERO,
            end: None,
            armed: 0,
            event: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        })))
    }
}

impl VirtualTimer {
    pub(crate) fn advance(&self, by: Duration) {
        let mut clock = self.0.lock();
        clock.now += by;
        if clock.end.is_some_and(|end| end <= clock.now) {
            clock.event.write(1).unwrap();
        }
    }

    /// Goes to when it ends; how long that is, `None` where it is not armed.
    pub(crate) fn advance_to_end(&self) -> Option<Duration> {
        let wait = {
            let clock = self.0.lock();
            clock.end?.saturating_sub(clock.now)
        };
        self.advance(wait);
        Some(wait)
    }

    pub(crate) fn is_armed(&self) -> bool {
        self.0.lock().end.is_some()
    }

    /// Milliseconds since the clock was made.
    pub(crate) fn elapsed_ms(&self) -> u64 {
        self.0.lock().now.as_millis() as u64
    }

    /// The time since it was made.
    pub(crate) fn elapsed(&self) -> Duration {
        self.0.lock().now
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
        self.disarm();
        let mut clock = self.0.lock();
        clock.end = Some(clock.now.saturating_add(after));
        clock.armed += 1;
        Ok(())
    }

    fn disarm(&mut self) {
        let mut clock = self.0.lock();
        clock.end = None;
        let _ = clock.event.read();
    }

    fn acknowledge(&mut self) -> bool {
        let has_ended = self.0.lock().event.read().is_ok();
        if has_ended {
            self.disarm();
        }
        has_ended
    }

    fn fd(&self) -> RawFd {
        self.0.lock().event.as_raw_fd()
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
