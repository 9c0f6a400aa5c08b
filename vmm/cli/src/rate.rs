//! The options of devices that limit them: `rate=SIZE`, bytes a second, and `ops=N`, operations a second.

use config::{Bytes, RateLimiterConfig, TokenBucketConfig};

/// What `rate` is to be, for messages.
pub(crate) const RATE: &str = "SIZE (bytes a second, such as 100M)";
/// What `ops` is to be, for messages.
pub(crate) const OPS: &str = "NUMBER (operations a second, at least 1)";

/// Bytes a second; `None` where the text is no size, or 0, which would be no limit.
pub(crate) fn parse_rate(text: &str) -> Option<u64> {
    let Bytes(rate) = text.parse().ok()?;
    (rate > 0).then_some(rate)
}

/// Operations a second; `None` where the text is no number, or 0.
pub(crate) fn parse_ops(text: &str) -> Option<u64> {
    text.parse().ok().filter(|ops| *ops > 0)
}

/// The limits of a device that was given these options. Its buckets hold what comes in a second.
pub(crate) fn limiter(rate: Option<u64>, ops: Option<u64>) -> Option<RateLimiterConfig> {
    let limiter = RateLimiterConfig {
        bandwidth: rate.map(TokenBucketConfig::per_second),
        ops: ops.map(TokenBucketConfig::per_second),
    };
    (limiter != RateLimiterConfig::default()).then_some(limiter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_size_and_neither_limit_is_0() {
        assert_eq!(parse_rate("100M"), Some(100 << 20));
        assert_eq!(parse_rate("512"), Some(512));
        for text in ["0", "0M", "", "-1", "1M/s", "fast"] {
            assert_eq!(parse_rate(text), None, "{text}");
        }
        assert_eq!(parse_ops("5"), Some(5));
        for text in ["0", "", "-1", "1.5", "1k"] {
            assert_eq!(parse_ops(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_not_given_is_not_limited() {
        assert_eq!(limiter(None, None), None);
        let ops = limiter(None, Some(5)).unwrap();
        assert_eq!(ops.bandwidth, None);
        assert_eq!(ops.ops, Some(TokenBucketConfig::per_second(5)));
    }
}
