//! How long requests take, by powers of two.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The bound of the first bucket in ns; each next one is twice the one before.
const FIRST: u64 = 10_000;
/// Buckets with a bound, of which the last is 10.5 s.
const BOUNDED: usize = 21;
/// And one more, for what takes longer.
const BUCKETS: usize = BOUNDED + 1;

/// Durations since the device was made, in buckets from 10 µs to 10.5 s.
///
/// It stands on the path of every request: to record one is two additions to atomic counters, which the device alone writes to, without a lock,
/// a search or an allocation.
#[derive(Debug, Default)]
pub struct Latencies {
    buckets: [AtomicU64; BUCKETS],
    nanoseconds: AtomicU64,
}

/// What [`Latencies`] held at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LatencyReading {
    /// How many took no longer than the bound, and longer than the bound before; of the last, which has none, longer than any.
    pub buckets: [(Option<Duration>, u64); BUCKETS],
    /// All of them together.
    pub sum: Duration,
}

fn bucket(nanoseconds: u64) -> usize {
    // The bounds belong to the buckets below them.
    let multiple = nanoseconds.saturating_sub(1) / FIRST;
    ((u64::BITS - multiple.leading_zeros()) as usize).min(BOUNDED)
}

impl Latencies {
    /// Records a request.
    pub fn record(&self, took: Duration) {
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        if let Some(bucket) = self.buckets.get(bucket(nanoseconds)) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// What there is. A request that is recorded meanwhile may be in the buckets, and not yet in the sum.
    pub fn read(&self) -> LatencyReading {
        let mut buckets = [(None, 0); BUCKETS];
        for (at, (read, counter)) in buckets.iter_mut().zip(&self.buckets).enumerate() {
            let bound = (at < BOUNDED).then(|| Duration::from_nanos(FIRST << at));
            *read = (bound, counter.load(Ordering::Relaxed));
        }
        LatencyReading {
            buckets,
            sum: Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_bound_is_in_its_bucket_and_what_is_longer_in_the_next() {
        let latencies = Latencies::default();
        let bounds: Vec<_> = (0..BOUNDED as u32).map(|at| FIRST << at).collect();
        assert_eq!(bounds.first(), Some(&10_000));
        assert_eq!(bounds.last(), Some(&10_485_760_000));
        for bound in &bounds {
            latencies.record(Duration::from_nanos(*bound));
        }
        let reading = latencies.read();
        let expected: Vec<_> = bounds
            .iter()
            .map(|bound| (Some(Duration::from_nanos(*bound)), 1))
            .chain([(None, 0)])
            .collect();
        assert_eq!(reading.buckets.to_vec(), expected);
        assert_eq!(reading.sum, Duration::from_nanos(bounds.iter().sum()));
        latencies.record(Duration::from_nanos(10_485_760_001));
        latencies.record(Duration::MAX);
        assert_eq!(latencies.read().buckets[BOUNDED], (None, 2));
    }

    proptest! {
        #[test]
        fn every_duration_is_in_the_first_bucket_whose_bound_it_does_not_pass(nanoseconds: u64) {
            let first = (0..BOUNDED).find(|at| nanoseconds <= FIRST << at).unwrap_or(BOUNDED);
            prop_assert_eq!(bucket(nanoseconds), first);
        }
    }
}
