//! What wakes the device thread: kicks of the queue and the end of a flush.

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::VirtioPmem;
use super::flusher::Flusher;

const KICK: u32 = 0;
const FLUSHED: u32 = 1;

impl MutEventSubscriber for VirtioPmem {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
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
