//! What a limiter has left, saved and restored.
//!
//! The time for which a guest is saved adds nothing: a bucket goes on with what it had. Its limits are part of the
//! configuration, by which the device is made again.

use serde::{Deserialize, Serialize};

use super::{RateLimiter, TokenBucket};
use crate::persist::{RestoreError, invalid};

/// What the buckets of a limiter have left. One that is absent is full, or is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterState {
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<BucketState>,
    /// Operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<BucketState>,
}

impl RateLimiterState {
    /// Whether there is nothing to save.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What a bucket has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BucketState {
    /// Tokens, without the burst.
    pub tokens: u64,
    /// How many tokens a request took beyond those that there were.
    pub debt: u64,
    /// What is left of the one-time burst.
    pub one_time_burst: u64,
}

impl RateLimiter {
    /// What its buckets have left.
    pub fn save_state(&self) -> RateLimiterState {
        let now = self.timer.as_ref().map(|timer| timer.now());
        let state = |bucket: &Option<TokenBucket>| {
            let (tokens, debt, one_time_burst) = bucket.as_ref()?.level(now?);
            Some(BucketState {
                tokens,
                debt,
                one_time_burst,
            })
        };
        RateLimiterState {
            bandwidth: state(&self.bandwidth),
            ops: state(&self.ops),
        }
    }

    /// Has its buckets go on with what they had. `device` is named in errors.
    ///
    /// # Errors
    /// `Invalid`; the limiter may have been changed then.
    pub fn restore_state(
        &mut self,
        device: &'static str,
        state: &RateLimiterState,
    ) -> Result<(), RestoreError> {
        let now = self.timer.as_ref().map(|timer| timer.now());
        for (bucket, state, field) in [
            (
                &mut self.bandwidth,
                state.bandwidth,
                "the tokens of the bandwidth limit",
            ),
            (
                &mut self.ops,
                state.ops,
                "the tokens of the operations limit",
            ),
        ] {
            let Some(state) = state else {
                continue;
            };
            let BucketState {
                tokens,
                debt,
                one_time_burst: burst,
            } = state;
            let Some((bucket, now)) = bucket.as_mut().zip(now) else {
                return Err(invalid(device, field, tokens, "there is no such limit"));
            };
            let limits = bucket.limits();
            if tokens > limits.size() {
                return Err(invalid(device, field, tokens, "the bucket holds less"));
            }
            if tokens != 0 && debt != 0 {
                let reason = "a bucket with a debt has none";
                return Err(invalid(device, field, tokens, reason));
            }
            if burst > limits.one_time_burst() {
                let reason = "the one-time burst was less";
                return Err(invalid(device, field, burst, reason));
            }
            bucket.set_level((tokens, debt, burst), now);
        }
        Ok(())
    }
}
