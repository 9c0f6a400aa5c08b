//! A device under a rate limiter, whose clock the test moves.

use std::time::Duration;

use super::*;
use crate::lifecycle::Device;
use crate::persist::through_json;
use crate::rate_limiter::RateLimits;
use crate::rate_limiter::mock::{VirtualTimer, bucket};

/// What a flush of [`Counting`] writes.
const WRITTEN: u64 = 4096;
const SECOND: Duration = Duration::from_secs(1);

fn limited(backing: Option<Arc<dyn Backing>>, limits: RateLimits) -> (VirtioPmem, VirtualTimer) {
    let timer = VirtualTimer::default();
    let mut device = device(backing);
    device.limiter = RateLimiter::with_timer(limits, timer.clone());
    (device, timer)
}

/// Lets the event loop do all that there is to do, flushes as well; how many events that were.
fn settle(driver: &mut Driver<'_>) -> usize {
    let mut all = 0;
    loop {
        let count = driver.events.run_with_timeout(0).unwrap();
        driver.device().drain();
        all += count;
        if count == 0 {
            return all;
        }
    }
}

#[test]
fn what_a_flush_wrote_is_paid_before_the_next_one_begins() {
    let memory = memory();
    let backing = Arc::new(Counting::default());
    let limits = RateLimits {
        bandwidth: bucket(WRITTEN / 4, 0, 1000),
        ops: None,
    };
    let (device, timer) = limited(Some(backing.clone()), limits);
    let mut driver = Driver::new(&memory, device);
    let flushes = || backing.flushes.load(Ordering::SeqCst);
    driver.request(0, 0);
    driver.turn();
    settle(&mut driver);
    assert_eq!((driver.used(), flushes()), (1, 1));
    driver.request(1, 0);
    driver.request(2, 0);
    driver.turn();
    settle(&mut driver);
    assert_eq!((driver.used(), flushes()), (1, 1), "three seconds of debt");
    for _ in 0..3 {
        driver.device().kick();
        assert_eq!(
            settle(&mut driver),
            1,
            "nothing but the notification wakes it"
        );
    }
    assert_eq!(timer.advance_to_end(), Some(3 * SECOND));
    settle(&mut driver);
    assert_eq!((driver.used(), flushes()), (3, 2), "both share one");
    let metrics = driver.device().metrics.clone();
    assert_eq!(metrics.throttled.load(Ordering::Relaxed), 1);
    assert_eq!(metrics.limiter_events.load(Ordering::Relaxed), 1);
}

#[test]
fn flushes_are_counted_and_so_are_those_of_memory_that_keeps_nothing() {
    for backing in [
        None,
        Some(Arc::new(Counting::default()) as Arc<dyn Backing>),
    ] {
        let memory = memory();
        let limits = RateLimits {
            bandwidth: None,
            ops: bucket(2, 0, 2000),
        };
        let (device, timer) = limited(backing, limits);
        let mut driver = Driver::new(&memory, device);
        for number in 0..5 {
            driver.request(number, 0);
            driver.turn();
            settle(&mut driver);
        }
        assert_eq!(driver.used(), 2);
        assert_eq!(timer.advance_to_end(), Some(SECOND));
        settle(&mut driver);
        assert!(driver.used() > 2);
        while driver.used() < 5 {
            assert_eq!(timer.advance_to_end(), Some(SECOND));
            settle(&mut driver);
        }
        assert!((0..5).all(|number| driver.response(number) == 0));
    }
}

#[test]
fn what_waits_is_in_the_ring_of_a_saved_device_and_the_next_one_serves_it_in_time() {
    let memory = memory();
    let limits = RateLimits {
        bandwidth: None,
        ops: bucket(1, 0, 1000),
    };
    let (device, timer) = limited(None, limits);
    let mut driver = Driver::new(&memory, device);
    driver.request(0, 0);
    driver.request(1, 0);
    driver.turn();
    driver.device().pause();
    assert_eq!((driver.used(), driver.response(1)), (1, UNTOUCHED));
    let (state, position) = {
        let device = driver.device();
        (
            through_json(&device.save_state()),
            device.ring_positions()[0].unwrap(),
        )
    };
    assert_eq!((position.next_avail, position.next_used), (1, 1));
    timer.advance(SECOND / 2);
    driver.device().resume();
    settle(&mut driver);
    assert_eq!(driver.used(), 1, "a pause is no way round the limit");

    let (mut next, timer) = limited(None, limits);
    next.restore_state(&state).unwrap();
    let mut queue: Queue = driver.ring.create_queue().unwrap();
    position.set(&mut queue);
    activate(&mut next, &memory, queue);
    driver.device = Arc::new(Mutex::new(next));
    driver.events = EventManager::new().unwrap();
    driver.events.add_subscriber(driver.device.clone());
    driver.device().resume();
    settle(&mut driver);
    assert_eq!(
        driver.used(),
        1,
        "the time that it was saved for adds nothing"
    );
    assert_eq!(timer.advance_to_end(), Some(SECOND));
    settle(&mut driver);
    assert_eq!((driver.used(), driver.response(1)), (2, 0));

    let mut hostile = state;
    hostile.rate_limiter.ops.as_mut().unwrap().tokens = 2;
    let (mut refusing, _) = limited(None, limits);
    refusing.restore_state(&hostile).unwrap_err();
    let old: PmemState =
        serde_json::from_value(serde_json::json!({"start": START, "size": SIZE})).unwrap();
    limited(None, limits).0.restore_state(&old).unwrap();
}
