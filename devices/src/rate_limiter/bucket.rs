//! One bucket, which is given the time.

use std::time::Duration;

use super::BucketLimits;

/// Tokens that come back at a rate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBucket {
    limits: BucketLimits,
    /// At most the size. Below 0 it is a debt.
    tokens: i128,
    /// What there is of the next token, in parts of 1 / refill time in nanoseconds.
    fraction: u64,
    /// What is left of the one-time burst.
    burst: u64,
    /// The time up to which tokens have been added.
    updated: Duration,
}

impl TokenBucket {
    /// A full bucket. `now` is a time of a clock that does not go backwards, as in the other methods.
    pub fn new(limits: BucketLimits, now: Duration) -> Self {
        Self {
            limits,
            tokens: limits.size().into(),
            fraction: 0,
            burst: limits.one_time_burst(),
            updated: now,
        }
    }

    /// Its limits.
    pub fn limits(&self) -> BucketLimits {
        self.limits
    }

    /// Takes `tokens` if they are there.
    #[must_use]
    pub fn try_take(&mut self, tokens: u64, now: Duration) -> bool {
        let passes = self.wait(tokens, now).is_zero();
        if passes {
            self.take(tokens);
        }
        passes
    }

    /// How long a request of `tokens` has to wait from `now` on. It passes at that time and not a nanosecond earlier.
    /// In a debt, even one of no tokens waits.
    pub(super) fn wait(&mut self, tokens: u64, now: Duration) -> Duration {
        self.replenish(now);
        let beyond_burst = tokens.saturating_sub(self.burst);
        let needed = i128::from(beyond_burst.min(self.limits.size()));
        let Ok(missing) = u128::try_from(needed - self.tokens) else {
            return Duration::ZERO;
        };
        let refill = u128::from(self.limits.refill_nanos());
        let parts = missing
            .saturating_mul(refill)
            .saturating_sub(self.fraction.into());
        let nanos = parts.div_ceil(self.limits.size().into());
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes `tokens`, which need not wait.
    pub(super) fn take(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        self.tokens -= i128::from(tokens - from_burst);
    }

    /// Takes `tokens` whether they are there or not: it comes into debt where they are not.
    pub(super) fn charge(&mut self, tokens: u64, now: Duration) {
        // What it gets for the time until now may be more than it can hold.
        self.replenish(now);
        self.take(tokens);
    }

    /// Gives back `tokens` that were taken. What does not fit goes to the burst that they may be of.
    pub(super) fn put_back(&mut self, tokens: u64) {
        let room = i128::from(self.limits.size()) - self.tokens;
        let fits = i128::from(tokens).min(room);
        self.tokens += fits;
        let rest = u64::try_from(i128::from(tokens) - fits).unwrap_or_default();
        let burst = self.burst.saturating_add(rest);
        self.burst = burst.min(self.limits.one_time_burst());
    }

    /// Adds the tokens of the time since the last call.
    fn replenish(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.updated).as_nanos();
        if elapsed == 0 {
            return;
        }
        self.updated = now;
        let elapsed = u64::try_from(elapsed).unwrap_or(u64::MAX);
        // No more than (2^64 - 1)^2 + 2^64 - 1, which is less than 2^128.
        let parts =
            u128::from(elapsed) * u128::from(self.limits.size()) + u128::from(self.fraction);
        let refill = u128::from(self.limits.refill_nanos());
        let size = i128::from(self.limits.size());
        match i128::try_from(parts / refill) {
            Ok(more) if more < size - self.tokens => {
                self.tokens += more;
                self.fraction = (parts % refill) as u64;
            }
            _ => (self.tokens, self.fraction) = (size, 0),
        }
    }

    /// What it has at a time: tokens, debt, and what is left of the burst.
    pub(super) fn level(&self, now: Duration) -> (u64, u64, u64) {
        let mut level = self.clone();
        level.replenish(now);
        let tokens = u64::try_from(level.tokens).unwrap_or_default();
        let debt = u64::try_from(-level.tokens).unwrap_or_default();
        (tokens, debt, level.burst)
    }

    /// Has so much from `now` on: no more than its limits, and a debt only where there are no tokens.
    pub(super) fn set_level(&mut self, (tokens, debt, burst): (u64, u64, u64), now: Duration) {
        self.tokens = i128::from(tokens) - i128::from(debt);
        self.fraction = 0;
        self.burst = burst;
        self.updated = now;
    }
}
