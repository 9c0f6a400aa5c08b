//! What wakes the device thread: kicks of the queue, the end of a flush, and the timer of the rate
//! limiter.

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::VirtioPmem;
use super::flusher::Flusher;
use crate::metrics::add;

const KICK: u32 = 0;
const FLUSHED: u32 = 1;
const TIMER: u32 = 2;

impl MutEventSubscriber for VirtioPmem {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        self.limiter.watch(ops, TIMER);
        if events.data() == TIMER {
            if self.limiter.on_timer() {
                add(&self.metrics.limiter_events, 1);
                self.serve();
            }
            return;
        }
        if events.data() == FLUSHED {
            // A pause may have waited for this flush, and ended its requests.
            if let Some(outcome) = self.flusher.as_mut().and_then(Flusher::reap) {
                self.finish(outcome);
                self.start_flush();
            }
            return;
        }
        // The counter says only that there was a kick.
        let _ = self.kick[0].read();
        self.serve();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.limiter.watch(ops, TIMER);
        let kick = Events::with_data(&self.kick[0], KICK, EventSet::IN);
        let flushed = self
            .flusher
            .as_ref()
            .map(|flusher| Events::with_data(flusher.event(), FLUSHED, EventSet::IN));
        for events in [Some(kick), flushed].into_iter().flatten() {
            if let Err(error) = ops.add(events) {
                crate::limited!(error, ?error, "virtio-pmem cannot wait for its events");
            }
        }
    }
}
