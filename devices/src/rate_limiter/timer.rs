//! The clock that buckets fill by, and the event that ends a wait.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};

/// A clock with one alarm. Tests have one whose time they make.
pub(crate) trait Timer: Send {
    /// The time, which does not go backwards.
    fn now(&self) -> Duration;

    /// Ends once, `after` from now on, which is not 0; not when it was to end before.
    fn arm(&mut self, after: Duration) -> io::Result<()>;

    /// Does not end.
    fn disarm(&mut self);

    /// Whether it has ended since it was armed or this was called last.
    fn acknowledge(&mut self) -> bool;

    /// What is readable when it has ended.
    fn fd(&self) -> RawFd;
}

pub(super) fn monotonic_now() -> Duration {
    // The clock of `timerfd`: `Instant` does not say which it is. Its time is never negative.
    let now = clock_gettime(ClockId::Monotonic);
    Duration::try_from(now).unwrap_or_default()
}

/// A `timerfd`.
pub(super) struct HostTimer(OwnedFd);

impl HostTimer {
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    fn set(&self, after: Duration) -> io::Result<()> {
        let times = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: after.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: after.subsec_nanos().into(),
            },
        };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &times)?;
        Ok(())
    }
}

impl Timer for HostTimer {
    fn now(&self) -> Duration {
        monotonic_now()
    }

    fn arm(&mut self, after: Duration) -> io::Result<()> {
        self.set(after)
    }

    fn disarm(&mut self) {
        if let Err(error) = self.set(Duration::ZERO) {
            tracing::debug!(error = %report::chain(&error), "the timer of a rate limiter");
        }
    }

    fn acknowledge(&mut self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }

    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    fn is_readable(timer: &HostTimer, seconds: i64) -> bool {
        let timeout = Timespec {
            tv_sec: seconds,
            tv_nsec: 0,
        };
        poll(&mut [PollFd::new(&timer.0, PollFlags::IN)], Some(&timeout)).unwrap() == 1
    }

    #[test]
    fn a_timer_ends_once_and_no_earlier_than_it_was_armed_for() {
        let mut timer = HostTimer::new().unwrap();
        assert!(!timer.acknowledge());
        let (armed_at, wait) = (timer.now(), Duration::from_millis(3));
        timer.arm(wait).unwrap();
        assert!(is_readable(&timer, 60));
        assert!(timer.now() >= armed_at + wait);
        assert!(timer.acknowledge() && !timer.acknowledge() && !is_readable(&timer, 0));
    }

    #[test]
    fn a_timer_that_is_disarmed_does_not_end() {
        let mut timer = HostTimer::new().unwrap();
        timer.arm(Duration::from_nanos(1)).unwrap();
        assert!(is_readable(&timer, 60));
        timer.disarm();
        assert!(!timer.acknowledge() && !is_readable(&timer, 0));
    }
}
