//! How exactly a rate limiter keeps its rate by the clock of the host, in an event loop as a device's. Unit: rate by
//! limit, and wake-ups a request.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use devices::rate_limiter::{BucketLimits, RateLimiter, RateLimits};
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};

const TIME: Duration = Duration::from_secs(5);
const TIMER: u32 = 0;

/// A device whose driver always has another request of a size.
struct Source {
    limiter: RateLimiter,
    request: u64,
    served: u64,
    wake_ups: u64,
}

impl Source {
    fn serve(&mut self) {
        while self.limiter.consume(self.request, 1) {
            self.served += 1;
        }
    }
}

impl MutEventSubscriber for Source {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        self.wake_ups += 1;
        if self.limiter.on_timer() {
            self.serve();
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.limiter.watch(ops, TIMER);
    }
}

#[allow(clippy::cast_precision_loss, reason = "figures for people")]
fn measure(name: &str, limits: RateLimits, request: u64, expected: f64) {
    let limiter = RateLimiter::new(limits).expect("a descriptor for the timer");
    let source = Arc::new(Mutex::new(Source {
        limiter,
        request,
        served: 0,
        wake_ups: 0,
    }));
    let mut events = EventManager::new().expect("an event loop");
    events.add_subscriber(source.clone());
    // What the bucket holds at first is not part of the rate.
    source.lock().expect("no panic").serve();
    let before = source.lock().expect("no panic").served;
    let begun = Instant::now();
    while begun.elapsed() < TIME {
        events.run_with_timeout(100).expect("the event loop runs");
    }
    let elapsed = begun.elapsed().as_secs_f64();
    let source = source.lock().expect("no panic");
    let served = (source.served - before) as f64;
    println!(
        "{name}: {:.4} of the limit, {:.2} wake-ups a request",
        served / elapsed / expected,
        source.wake_ups as f64 / served
    );
}

fn main() {
    let bytes = |size, refill_time| RateLimits {
        bandwidth: BucketLimits::new(size, 0, refill_time),
        ops: None,
    };
    let ops = |size, refill_time| RateLimits {
        bandwidth: None,
        ops: BucketLimits::new(size, 0, refill_time),
    };
    measure(
        "100 MB/s, 64 KiB",
        bytes(10_000_000, 100),
        65_536,
        1e8 / 65_536.0,
    );
    measure("1 MB/s, 4 KiB", bytes(1_000_000, 1000), 4096, 1e6 / 4096.0);
    measure(
        "1 MB/s, of twice the bucket",
        bytes(10_000, 10),
        20_000,
        50.0,
    );
    measure("100 operations/s", ops(100, 1000), 1, 100.0);
    measure("10,000 operations/s", ops(1000, 100), 1, 10_000.0);
}
