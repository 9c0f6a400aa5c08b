//! Rate limits of devices.

use devices::rate_limiter::{BucketLimits, BucketUpdate, LimitsUpdate, RateLimits};
use serde::{Deserialize, Serialize};

/// Firecracker's rate limiter: a token bucket for bytes and one for operations.
///
/// In an update, a bucket that is absent or `null` stays as it is, one of size 0 removes the limit, and any other takes
/// the place of the present one, full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Limits bytes; not limited where absent.
    #[serde(default, deserialize_with = "crate::object::optional")]
    pub bandwidth: Option<TokenBucketConfig>,
    /// Limits operations; not limited where absent.
    #[serde(default, deserialize_with = "crate::object::optional")]
    pub ops: Option<TokenBucketConfig>,
}

/// Firecracker's token bucket. A request takes a token for each byte, or one for the operation, and waits until they
/// are there; one that is larger than the bucket waits until that is full, and those after it wait for the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenBucketConfig {
    /// How many tokens the bucket can hold; 0 is no limit.
    pub size: u64,
    /// How many tokens there are beyond `size` at first; they are spent before those, and do not come back.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket becomes full: the rate is `size` in that time. 0 is no limit.
    pub refill_time: u64,
}

impl TokenBucketConfig {
    /// So many tokens a second.
    pub fn per_second(rate: u64) -> Self {
        Self {
            size: rate,
            one_time_burst: None,
            refill_time: 1000,
        }
    }

    /// What the bucket is made of; `None` where it is no limit.
    pub fn limits(&self) -> Option<BucketLimits> {
        BucketLimits::new(
            self.size,
            self.one_time_burst.unwrap_or_default(),
            self.refill_time,
        )
    }
}

impl RateLimiterConfig {
    /// What the limiter of a new device is made of.
    pub fn limits(&self) -> RateLimits {
        let limits = |bucket: Option<TokenBucketConfig>| bucket.and_then(|bucket| bucket.limits());
        RateLimits {
            bandwidth: limits(self.bandwidth),
            ops: limits(self.ops),
        }
    }

    /// What becomes of the limiter of a device, where this is an update.
    pub fn update(&self) -> LimitsUpdate {
        let update = |bucket: Option<TokenBucketConfig>| {
            bucket.map_or(BucketUpdate::Keep, |bucket| bucket.limits().into())
        };
        LimitsUpdate {
            bandwidth: update(self.bandwidth),
            ops: update(self.ops),
        }
    }

    /// The configuration of a device that had `present`, after this update.
    pub fn applied_to(&self, present: Option<Self>) -> Option<Self> {
        let present = present.unwrap_or_default();
        let limited = |bucket: &TokenBucketConfig| bucket.limits().is_some();
        let updated = Self {
            bandwidth: self.bandwidth.or(present.bandwidth).filter(limited),
            ops: self.ops.or(present.ops).filter(limited),
        };
        (updated != Self::default()).then_some(updated)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(value: serde_json::Value) -> Result<RateLimiterConfig, String> {
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    #[test]
    fn a_bucket_of_size_or_refill_time_0_is_no_limit() {
        let limiter = parse(json!({
            "bandwidth": {"size": 1 << 20, "one_time_burst": 4096, "refill_time": 100},
            "ops": {"size": 0, "one_time_burst": null, "refill_time": 100}
        }))
        .unwrap();
        let limits = RateLimits {
            bandwidth: BucketLimits::new(1 << 20, 4096, 100),
            ops: None,
        };
        assert!(limits.bandwidth.is_some());
        assert_eq!(limiter.limits(), limits);
        let none = parse(json!({"bandwidth": {"size": 7, "refill_time": 0}, "ops": null})).unwrap();
        assert_eq!(none.limits(), RateLimits::default());
        let largest = json!({"bandwidth": {"size": u64::MAX, "one_time_burst": u64::MAX, "refill_time": u64::MAX}});
        assert!(parse(largest).unwrap().limits().bandwidth.is_some());
    }

    #[test]
    fn what_is_no_bucket_is_refused_by_name() {
        for (value, named) in [
            (json!({"bandwidth": {"size": 1}}), "refill_time"),
            (json!({"ops": {"refill_time": 1}}), "size"),
            (json!({"ops": {"size": -1, "refill_time": 1}}), "-1"),
            (json!({"ops": {"size": 1.5, "refill_time": 1}}), "1.5"),
            (json!({"ops": {"size": "1", "refill_time": 1}}), "\"1\""),
            (
                json!({"ops": {"size": 1, "refill_time": 1, "burst": 1}}),
                "burst",
            ),
            (json!({"iops": {"size": 1, "refill_time": 1}}), "iops"),
        ] {
            let refused = parse(value).unwrap_err();
            assert!(refused.contains(named), "{refused}");
        }
    }

    #[test]
    fn an_update_keeps_what_is_absent_and_removes_what_is_0() {
        let present = parse(json!({
            "bandwidth": {"size": 100, "refill_time": 100}, "ops": {"size": 10, "refill_time": 100}
        }))
        .unwrap();
        let nothing = RateLimiterConfig::default();
        assert_eq!(nothing.applied_to(Some(present)), Some(present));
        assert_eq!(nothing.applied_to(None), None);
        assert_eq!(nothing.update(), LimitsUpdate::default());
        let removes_ops = parse(json!({"ops": {"size": 0, "refill_time": 0}})).unwrap();
        let updated = removes_ops.applied_to(Some(present)).unwrap();
        assert_eq!((updated.bandwidth, updated.ops), (present.bandwidth, None));
        let update = removes_ops.update();
        assert_eq!(
            (update.bandwidth, update.ops),
            (BucketUpdate::Keep, BucketUpdate::Remove)
        );
        let none = TokenBucketConfig::default();
        let removes_all = RateLimiterConfig {
            bandwidth: Some(none),
            ops: Some(none),
        };
        assert_eq!(removes_all.applied_to(Some(present)), None);
        let sets = RateLimiterConfig {
            ops: Some(TokenBucketConfig::per_second(5)),
            ..nothing
        };
        assert_eq!(sets.applied_to(None), Some(sets));
        assert_eq!(
            sets.update().ops,
            BucketUpdate::Replace(BucketLimits::new(5, 0, 1000).unwrap())
        );
    }
}
