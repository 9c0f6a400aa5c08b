//! What wakes the device thread: kicks of the queues and completions of the disk.

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::VirtioBlock;

/// The event's data for a completion; a kick has the number of its queue.
const COMPLETION: u32 = u32::MAX;

impl MutEventSubscriber for VirtioBlock {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
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
