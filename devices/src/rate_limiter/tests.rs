use proptest::collection::vec;
use proptest::prelude::*;

use super::mock::{VirtualTimer, bucket, limiter};
use super::*;
use crate::persist::{RestoreError, through_json};

const MS: Duration = Duration::from_millis(1);

/// The rules of the module, counted in parts of a token, and without anything being carried.
struct Model {
    size: i128,
    refill: i128,
    /// In parts of 1 / refill of a token.
    parts: i128,
    burst: i128,
    now: Duration,
}

impl Model {
    fn new(size: u64, burst: u64, refill_time: u64, now: Duration) -> Self {
        let refill = i128::from(refill_time) * 1_000_000;
        let size = i128::from(size);
        Self {
            size,
            refill,
            parts: size * refill,
            burst: burst.into(),
            now,
        }
    }

    fn passes(&mut self, tokens: u64, now: Duration) -> bool {
        let elapsed = i128::try_from(now.saturating_sub(self.now).as_nanos()).unwrap();
        self.now = now;
        self.parts = (self.parts + elapsed * self.size).min(self.size * self.refill);
        let beyond = (i128::from(tokens) - self.burst).max(0);
        if self.parts < beyond.min(self.size) * self.refill {
            return false;
        }
        self.burst -= i128::from(tokens) - beyond;
        self.parts -= beyond * self.refill;
        true
    }
}

fn some_bucket() -> impl Strategy<Value = (u64, u64, u64)> {
    (
        1..100_000u64,
        prop_oneof![Just(0), 1..100_000u64],
        1..5_000u64,
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_request_passes_when_the_model_lets_it_and_at_no_other_time(
        (size, burst, refill_time) in some_bucket(),
        requests in vec((0..200_000u64, 0..50_000_000u64), 1..100),
    ) {
        let mut now = Duration::from_secs(7);
        let limits = bucket(size, burst, refill_time).unwrap();
        let mut tested = TokenBucket::new(limits, now);
        let mut model = Model::new(size, burst, refill_time, now);
        for (tokens, pause) in requests {
            now += Duration::from_nanos(pause);
            let wait = tested.wait(tokens, now);
            if !wait.is_zero() {
                let early = now + wait.saturating_sub(Duration::from_nanos(1));
                prop_assert!(!model.passes(tokens, early), "{wait:?}");
                prop_assert!(!tested.try_take(tokens, early));
            }
            now += wait;
            prop_assert!(model.passes(tokens, now), "{wait:?}");
            prop_assert!(tested.try_take(tokens, now));
        }
    }

    #[test]
    fn the_rate_is_kept_over_a_long_time_whatever_requests_come(
        (size, burst, refill_time) in some_bucket(),
        ops in proptest::option::of((1..1000u64, 1..5_000u64)),
        sizes in vec(0..200_000u64, 1..20),
    ) {
        let of_ops = ops.and_then(|(ops, refill)| bucket(ops, 0, refill));
        let (mut limiter, timer) = limiter(bucket(size, burst, refill_time), of_ops);
        let (mut bytes, mut requests) = (0u64, 0u64);
        let largest = sizes.iter().copied().max().unwrap().max(size);
        let (mut wake_ups, mut last_wait) = (0u64, Duration::ZERO);
        for len in sizes.iter().cycle().take(3000) {
            if !limiter.consume(*len, 1) {
                prop_assert!(limiter.is_blocked() && timer.is_armed());
                prop_assert!(!limiter.on_timer(), "before it is time");
                last_wait = timer.advance_to_end().unwrap();
                wake_ups += 1;
                prop_assert!(limiter.on_timer());
                prop_assert!(limiter.consume(*len, 1), "one wake-up is enough");
            }
            bytes += len;
            requests += 1;
        }
        prop_assert_eq!(timer.armed(), wake_ups, "none in vain");
        let elapsed = timer.now().as_nanos();
        let waited = elapsed - last_wait.as_nanos();
        let parts = |used: u64, refill: u64| u128::from(used) * u128::from(refill) * 1_000_000;
        let used = parts(bytes, refill_time);
        prop_assert!(used <= parts(burst + largest, refill_time) + elapsed * u128::from(size), "too much");
        match ops {
            Some((ops, refill)) => {
                let used = parts(requests, refill);
                prop_assert!(used <= parts(ops, refill) + elapsed * u128::from(ops), "too many");
            }
            // Of two limits, neither may be what all requests waited for.
            None => prop_assert!(100 * used >= 95 * waited * u128::from(size), "too little"),
        }
    }

    #[test]
    fn no_size_time_or_request_is_too_large(
        size in 1..=u64::MAX,
        burst in any::<u64>(),
        refill_time in 1..=u64::MAX,
        steps in vec((any::<u64>(), any::<u64>(), any::<bool>()), 1..50),
    ) {
        let mut now = Duration::ZERO;
        let mut tested = TokenBucket::new(bucket(size, burst, refill_time).unwrap(), now);
        for (tokens, pause, is_given_up) in steps {
            now += Duration::from_nanos(pause);
            if tested.try_take(tokens, now) && is_given_up {
                tested.put_back(tokens);
            }
            let (level, debt, left) = tested.level(now);
            prop_assert!(level <= size && left <= burst && (level == 0 || debt == 0));
        }
    }

    #[test]
    fn what_is_given_back_was_never_taken(
        (size, burst, refill_time) in some_bucket(),
        taken in vec((0..200_000u64, any::<bool>()), 1..30),
    ) {
        let limits = bucket(size, burst, refill_time).unwrap();
        let (mut tested, mut other) = (TokenBucket::new(limits, MS), TokenBucket::new(limits, MS));
        for (tokens, is_given_up) in taken {
            if tested.try_take(tokens, MS) {
                if is_given_up {
                    tested.put_back(tokens);
                } else {
                    prop_assert!(other.try_take(tokens, MS));
                }
            }
            let total = |bucket: &TokenBucket| {
                let (tokens, debt, burst) = bucket.level(MS);
                i128::from(tokens) + i128::from(burst) - i128::from(debt)
            };
            prop_assert_eq!(total(&tested), total(&other));
        }
    }
}

#[test]
fn a_tenth_of_a_token_each_millisecond_is_a_token_every_ten() {
    let mut bucket = TokenBucket::new(bucket(1, 0, 10).unwrap(), Duration::ZERO);
    assert!(bucket.try_take(1, Duration::ZERO));
    let mut taken = 0;
    // At the pace of one call for each third of a millisecond, nothing is lost to rounding.
    for step in 1..=30_000u32 {
        taken += u32::from(bucket.try_take(1, step * MS / 3));
    }
    assert_eq!(taken, 1000);
}

#[test]
fn a_request_larger_than_the_bucket_passes_once_and_the_next_waits_for_all_of_it() {
    let (mut limiter, timer) = limiter(bucket(100, 0, 1000), None);
    assert!(limiter.consume(1000, 1));
    assert!(!limiter.consume(1, 1));
    // 900 of debt and one more, at 100 a second.
    assert_eq!(timer.advance_to_end(), Some(9010 * MS));
    assert!(limiter.on_timer() && limiter.consume(1, 1));
    assert!(!limiter.consume(1000, 1));
    assert_eq!(timer.advance_to_end(), Some(1000 * MS), "a full bucket");
    assert!(limiter.on_timer() && limiter.consume(1000, 1));
}

#[test]
fn the_burst_is_spent_first_and_does_not_come_back() {
    let (mut limiter, timer) = limiter(bucket(10, 50, 1000), None);
    assert!(limiter.consume(60, 1) && !limiter.consume(1, 1));
    timer.advance(3600 * 1000 * MS);
    assert!(limiter.on_timer());
    assert!(limiter.consume(10, 1) && !limiter.consume(1, 1));
}

#[test]
fn a_bucket_that_refuses_leaves_the_other_as_it_was() {
    let (mut limiter, timer) = limiter(bucket(100, 0, 1000), bucket(10, 0, 1000));
    assert!(limiter.consume(100, 1));
    for _ in 0..3 {
        assert!(!limiter.consume(50, 1));
        assert_eq!(timer.armed(), 1, "armed once");
    }
    timer.advance_to_end();
    assert!(limiter.on_timer() && limiter.consume(50, 1));
    let state = limiter.save_state();
    assert_eq!(
        (state.bandwidth.unwrap().tokens, state.ops.unwrap().tokens),
        (0, 10 - 1)
    );
}

#[test]
fn a_debt_is_paid_before_anything_passes() {
    let (mut limiter, timer) = limiter(bucket(100, 0, 1000), bucket(10, 0, 1000));
    assert!(limiter.consume(1000, 1) && !limiter.consume(0, 1));
    assert_eq!(timer.advance_to_end(), Some(9000 * MS));
    assert!(limiter.on_timer() && limiter.consume(0, 1));
}

#[test]
fn what_is_done_already_is_charged_and_what_comes_next_waits() {
    let (mut limiter, timer) = limiter(bucket(100, 0, 1000), None);
    timer.advance(3600 * 1000 * MS);
    limiter.charge(500, 1);
    assert!(!limiter.consume(0, 1));
    assert_eq!(timer.advance_to_end(), Some(4000 * MS));
    assert!(limiter.on_timer() && limiter.consume(0, 1));
    RateLimiter::default().charge(u64::MAX, 1);
}

#[test]
fn no_bucket_is_no_timer_and_no_limit() {
    let mut limiter = RateLimiter::new(RateLimits::default()).unwrap();
    assert!(limiter.timer.is_none() && !limiter.is_limited());
    assert!(limiter.consume(u64::MAX, u64::MAX) && !limiter.is_blocked());
    limiter.update(LimitsUpdate::default()).unwrap();
    let none = LimitsUpdate {
        bandwidth: BucketUpdate::Remove,
        ops: BucketUpdate::Remove,
    };
    limiter.update(none).unwrap();
    assert!(limiter.timer.is_none() && !limiter.on_timer());
    assert!(limiter.save_state().is_empty());
    for (size, refill_time) in [(0, 100), (100, 0), (0, 0)] {
        assert_eq!(bucket(size, 5, refill_time), None);
    }
}

#[test]
fn an_update_fills_what_it_replaces_keeps_what_it_does_not_name_and_unblocks() {
    let (mut limiter, timer) = limiter(bucket(100, 0, 1000), bucket(10, 0, 1000));
    assert!(limiter.consume(1000, 10) && !limiter.consume(1, 1));
    let wider = LimitsUpdate {
        bandwidth: bucket(5000, 7, 1000).into(),
        ..LimitsUpdate::default()
    };
    limiter.update(wider).unwrap();
    assert!(!limiter.is_blocked() && !timer.is_armed());
    assert!(
        !limiter.consume(5007, 1),
        "operations are limited as before"
    );
    assert_eq!(timer.advance_to_end(), Some(100 * MS));
    assert!(limiter.on_timer() && limiter.consume(5007, 1));
    assert!(!limiter.consume(1, 1));
    let none = LimitsUpdate {
        bandwidth: BucketUpdate::Remove,
        ops: BucketUpdate::Remove,
    };
    limiter.update(none).unwrap();
    assert!(!limiter.is_limited() && !limiter.is_blocked() && limiter.consume(u64::MAX, 1));
    assert!(!timer.is_armed());
}

#[test]
fn what_is_left_survives_a_snapshot_and_the_time_meanwhile_adds_nothing() {
    let limits = (bucket(100, 50, 1000), bucket(10, 0, 1000));
    let (mut saved, _) = limiter(limits.0, limits.1);
    assert!(saved.consume(30, 4));
    let state = through_json(&saved.save_state());
    let (mut restored, timer) = limiter(limits.0, limits.1);
    timer.advance(3_600_000 * MS);
    restored.restore_state("a device", &state).unwrap();
    assert_eq!(restored.save_state(), state);
    assert!(
        restored.consume(20 + 500, 6),
        "what is left of the burst, and all of the size"
    );
    let in_debt = through_json(&restored.save_state());
    let bandwidth = BucketState {
        tokens: 0,
        debt: 400,
        one_time_burst: 0,
    };
    assert_eq!(in_debt.bandwidth, Some(bandwidth));
    let (mut again, timer) = limiter(limits.0, limits.1);
    again.restore_state("a device", &in_debt).unwrap();
    assert!(!again.consume(1, 0));
    assert_eq!(timer.advance_to_end(), Some(4010 * MS));
}

#[test]
fn a_state_that_no_bucket_can_have_is_refused() {
    let state = |tokens, debt, one_time_burst| {
        let bandwidth = BucketState {
            tokens,
            debt,
            one_time_burst,
        };
        RateLimiterState {
            bandwidth: Some(bandwidth),
            ops: None,
        }
    };
    let refused = |limits, state: &RateLimiterState| {
        let (mut limiter, _) = limiter(limits, None);
        matches!(
            limiter.restore_state("a device", state),
            Err(RestoreError::Invalid { .. })
        )
    };
    let limits = bucket(100, 50, 1000);
    assert!(refused(limits, &state(101, 0, 0)));
    assert!(refused(limits, &state(1, 1, 0)));
    assert!(refused(limits, &state(0, 0, 51)));
    assert!(refused(None, &state(0, 0, 0)));
    assert!(!refused(limits, &state(100, 0, 50)));
    let (mut limiter, timer) = limiter(limits, None);
    limiter
        .restore_state("a device", &state(0, u64::MAX, 0))
        .unwrap();
    assert!(!limiter.consume(1, 1));
    assert!(timer.advance_to_end().unwrap() > Duration::from_secs(1 << 40) / 100);
    // An old state knows of no limiter: its buckets are full.
    limiter
        .restore_state("a device", &RateLimiterState::default())
        .unwrap();
}

#[test]
fn an_event_of_a_timer_that_an_update_stopped_means_nothing() {
    let timer = VirtualTimer::default();
    let limits = RateLimits {
        bandwidth: bucket(1, 0, 1),
        ops: None,
    };
    let mut limiter = RateLimiter::with_timer(limits, timer.clone());
    assert!(limiter.consume(1, 1) && !limiter.consume(1, 1));
    timer.advance_to_end();
    limiter
        .update(LimitsUpdate {
            bandwidth: bucket(1, 0, 1000).into(),
            ..LimitsUpdate::default()
        })
        .unwrap();
    assert!(!limiter.on_timer());
    assert!(limiter.consume(1, 1) && !limiter.consume(1, 1));
    assert!(!limiter.on_timer() && limiter.is_blocked());
}
