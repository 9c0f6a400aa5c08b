//! Token buckets: how many bytes and operations a second a device does for its guest.
//!
//! ```text
//!              consume: true                     consume: false
//! served  <───────────────── a request ──────────────────────────> stays in the ring
//!                                ^                                     │ the timer is armed
//!                                └────────── on_timer <────────────────┘ for when the tokens are there
//! ```
//!
//! A [`RateLimiter`] has a bucket for bytes, one for operations, both or none. Each is full at first and gets as many
//! tokens in its refill time as it can hold. A one-time burst is spent first, and does not come back. A request that
//! asks for more tokens than the bucket can hold waits for a full bucket and leaves it in debt, so that all that comes
//! after it waits for the rest. Tokens are counted in integers, with the part of a token that is under way, so that no
//! time is lost or counted twice: over any time `t` no more than burst + size (or the largest request, where that is
//! more) + rate x `t` passes, and no less than rate x `t` where requests wait.
//!
//! A limiter that refuses is blocked, and refuses all until its timer ends: the device takes the request back, does not
//! look at its rings again, and sleeps. The timer ends once, at the nanosecond at which the refused request passes.
//! Without buckets there is neither a timer nor a descriptor, and `consume` is one comparison.
//!
//! A device has its events watched by [`RateLimiter::watch`], both when it is registered with the event loop and
//! whenever it is woken, since an update may have made the timer only then. After an update it looks at its rings.

mod bucket;
mod limits;
#[cfg(test)]
pub(crate) mod mock;
mod persist;
#[cfg(test)]
mod tests;
mod timer;

use std::io;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events};

pub use self::bucket::TokenBucket;
pub use self::limits::{BucketLimits, BucketUpdate, LimitsUpdate, RateLimits};
pub use self::persist::{BucketState, RateLimiterState};
use self::timer::{HostTimer, Timer};

/// The time of the host's monotonic clock, by which buckets fill.
pub fn monotonic_now() -> Duration {
    timer::monotonic_now()
}

/// What limits a device. The default limits nothing.
#[derive(Default)]
pub struct RateLimiter {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
    /// Made for the first bucket, and kept for later ones.
    timer: Option<Box<dyn Timer>>,
    /// Whether the event loop watches the timer.
    is_watched: bool,
    /// Whether a request waits for the timer.
    is_blocked: bool,
}

impl RateLimiter {
    /// A limiter with full buckets.
    ///
    /// # Errors
    /// Where the host has no descriptor left for the timer.
    pub fn new(limits: RateLimits) -> io::Result<Self> {
        let mut limiter = Self::default();
        limiter.update(limits.into())?;
        Ok(limiter)
    }

    /// A limiter with full buckets, and a timer that is the test's.
    #[cfg(test)]
    pub(crate) fn with_timer(limits: RateLimits, timer: impl Timer + 'static) -> Self {
        let mut limiter = Self {
            timer: Some(Box::new(timer)),
            ..Self::default()
        };
        limiter.update(limits.into()).unwrap();
        limiter
    }

    /// Whether it has a bucket.
    pub fn is_limited(&self) -> bool {
        self.bandwidth.is_some() || self.ops.is_some()
    }

    /// Whether a request was refused, and the time at which it passes has not come.
    pub fn is_blocked(&self) -> bool {
        self.is_blocked
    }

    /// Takes the tokens of a request. Where this is false, none were taken, and the limiter is blocked.
    #[must_use]
    pub fn consume(&mut self, bytes: u64, ops: u64) -> bool {
        if !self.is_limited() {
            return true;
        }
        if self.is_blocked {
            return false;
        }
        let Some(timer) = &mut self.timer else {
            return true;
        };
        let now = timer.now();
        let wait = |bucket: &mut Option<TokenBucket>, tokens| {
            let wait = bucket.as_mut().map(|bucket| bucket.wait(tokens, now));
            wait.unwrap_or_default()
        };
        let wait = wait(&mut self.bandwidth, bytes).max(wait(&mut self.ops, ops));
        if !wait.is_zero() {
            match timer.arm(wait) {
                Ok(()) => {
                    self.is_blocked = true;
                    return false;
                }
                // A request that nothing wakes would wait forever.
                Err(error) => {
                    crate::limited!(error, error = %report::chain(&error), "the timer of a rate limiter; requests pass");
                }
            }
        }
        for (bucket, tokens) in [(&mut self.bandwidth, bytes), (&mut self.ops, ops)] {
            if let Some(bucket) = bucket {
                bucket.take(tokens);
            }
        }
        true
    }

    /// Takes the tokens of what is done already, and was not known before. Where they are not there, what comes next
    /// waits until they are paid.
    pub fn charge(&mut self, bytes: u64, ops: u64) {
        let Some(now) = self.timer.as_ref().map(|timer| timer.now()) else {
            return;
        };
        for (bucket, tokens) in [(&mut self.bandwidth, bytes), (&mut self.ops, ops)] {
            if let Some(bucket) = bucket {
                bucket.charge(tokens, now);
            }
        }
    }

    /// Gives back the tokens of a request that was not served after all.
    pub fn restore(&mut self, bytes: u64, ops: u64) {
        for (bucket, tokens) in [(&mut self.bandwidth, bytes), (&mut self.ops, ops)] {
            if let Some(bucket) = bucket {
                bucket.put_back(tokens);
            }
        }
    }

    /// The event of the timer came: whether the limiter is not blocked any more, so that the device has to look at its
    /// rings.
    pub fn on_timer(&mut self) -> bool {
        // The timer of a request that an update has let pass may have been about to end.
        let has_ended = self.timer.as_mut().is_some_and(|timer| timer.acknowledge());
        has_ended && std::mem::take(&mut self.is_blocked)
    }

    /// Changes buckets; one that is replaced is full, and has its burst again. Unblocks: the device has to look at its
    /// rings, on the device thread, which watches the timer.
    ///
    /// # Errors
    /// Where the host has no descriptor left for the timer. Then nothing is changed.
    pub fn update(&mut self, update: LimitsUpdate) -> io::Result<()> {
        let timer = match (&mut self.timer, update.sets_one()) {
            (Some(timer), _) => timer,
            (timer, true) => timer.insert(Box::new(HostTimer::new()?)),
            (None, false) => return Ok(()),
        };
        let now = timer.now();
        for (bucket, update) in [
            (&mut self.bandwidth, update.bandwidth),
            (&mut self.ops, update.ops),
        ] {
            match update {
                BucketUpdate::Keep => {}
                BucketUpdate::Remove => *bucket = None,
                BucketUpdate::Replace(limits) => *bucket = Some(TokenBucket::new(limits, now)),
            }
        }
        if std::mem::take(&mut self.is_blocked) {
            timer.disarm();
        }
        Ok(())
    }

    /// Has the event loop watch the timer, once there is one; its events have `data`.
    pub fn watch(&mut self, ops: &mut EventOps<'_>, data: u32) {
        if self.is_watched {
            return;
        }
        let Some(timer) = &self.timer else {
            return;
        };
        match ops.add(Events::with_data_raw(timer.fd(), data, EventSet::IN)) {
            Ok(()) => self.is_watched = true,
            Err(error) => {
                crate::limited!(error, ?error, "a rate limiter cannot wait for its timer");
            }
        }
    }
}
