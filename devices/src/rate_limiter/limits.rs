//! What a limiter is made of, and how it changes.

use std::num::NonZeroU64;

const NANOS_PER_MILLI: u64 = 1_000_000;

/// The limits of a bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BucketLimits {
    size: NonZeroU64,
    one_time_burst: u64,
    refill_nanos: NonZeroU64,
}

impl BucketLimits {
    /// A bucket that holds `size` tokens and gets that many in `refill_time` milliseconds, with `one_time_burst` more
    /// at first. `None`, which is no limit, where `size` or `refill_time` is 0, as with Firecracker. A refill time of
    /// more than 584 years, which is what 64 bits of nanoseconds come to, is as good as that.
    pub fn new(size: u64, one_time_burst: u64, refill_time: u64) -> Option<Self> {
        let nanos = refill_time.saturating_mul(NANOS_PER_MILLI);
        let (size, refill_nanos) = NonZeroU64::new(size).zip(NonZeroU64::new(nanos))?;
        Some(Self {
            size,
            one_time_burst,
            refill_nanos,
        })
    }

    /// How many tokens it holds, beside the burst.
    pub fn size(self) -> u64 {
        self.size.get()
    }

    /// How many tokens it has beyond its size, once.
    pub fn one_time_burst(self) -> u64 {
        self.one_time_burst
    }

    /// The time in which an empty bucket becomes full, in nanoseconds.
    pub(super) fn refill_nanos(self) -> u64 {
        self.refill_nanos.get()
    }
}

/// The buckets of a limiter; one that is absent limits nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Bytes.
    pub bandwidth: Option<BucketLimits>,
    /// Operations.
    pub ops: Option<BucketLimits>,
}

/// What becomes of a bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BucketUpdate {
    /// It stays, with the tokens that it has.
    #[default]
    Keep,
    /// There is no limit.
    Remove,
    /// Another takes its place.
    Replace(BucketLimits),
}

impl From<Option<BucketLimits>> for BucketUpdate {
    fn from(limits: Option<BucketLimits>) -> Self {
        limits.map_or(Self::Remove, Self::Replace)
    }
}

/// What becomes of the buckets of a limiter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitsUpdate {
    /// Bytes.
    pub bandwidth: BucketUpdate,
    /// Operations.
    pub ops: BucketUpdate,
}

impl LimitsUpdate {
    /// Whether a bucket is set.
    pub(super) fn sets_one(&self) -> bool {
        [self.bandwidth, self.ops]
            .iter()
            .any(|update| matches!(update, BucketUpdate::Replace(_)))
    }
}

impl From<RateLimits> for LimitsUpdate {
    fn from(limits: RateLimits) -> Self {
        Self {
            bandwidth: limits.bandwidth.into(),
            ops: limits.ops.into(),
        }
    }
}
