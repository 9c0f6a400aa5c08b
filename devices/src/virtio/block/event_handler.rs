//! What wakes the device thread: kicks of the queues, completions of the disk, and the timer of the rate limiter.

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::VirtioBlock;

/// The event's data for a completion; a kick has the number of its queue.
const COMPLETION: u32 = u32::MAX;
/// The event's data for the timer.
const TIMER: u32 = u32::MAX - 1;

impl MutEventSubscriber for VirtioBlock {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        self.limiter.watch(ops, TIMER);
        if events.data() == TIMER {
            self.serve_throttled();
            return;
        }
        if events.data() == COMPLETION {
            self.disk.acknowledge();
            self.finish();
            return;
        }
        let queue = events.data() as usize;
        if let Some(kick) = self.kicks.get(queue) {
            // The counter says only that there was a kick. One that comes while the device is not active means nothing,
            // and one while it is paused is made up for by `resume`.
            let _ = kick.read();
            self.serve(queue);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.limiter.watch(ops, TIMER);
        let completion = Events::with_data(&self.disk, COMPLETION, EventSet::IN);
        let kicks = (0..)
            .zip(&self.kicks)
            .map(|(queue, kick)| Events::with_data(kick, queue, EventSet::IN));
        for events in kicks.chain([completion]) {
            if let Err(error) = ops.add(events) {
                crate::limited!(error, ?error, "virtio-blk cannot wait for its events");
            }
        }
    }
}
