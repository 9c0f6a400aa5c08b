//! What wakes the device thread: kicks of the queues, and the time to ask for statistics.

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::VirtioBalloon;

/// The event's data for the timer; a kick has the number of its queue.
const TIMER: u32 = u32::MAX;

impl MutEventSubscriber for VirtioBalloon {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        if events.data() == TIMER {
            self.timer.acknowledge();
            self.ask_for_statistics();
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
        let timer = Events::with_data(&self.timer, TIMER, EventSet::IN);
        let kicks = (0..)
            .zip(&self.kicks)
            .map(|(queue, kick)| Events::with_data(kick, queue, EventSet::IN));
        for events in kicks.chain([timer]) {
            if let Err(error) = ops.add(events) {
                crate::limited!(error, ?error, "virtio-balloon cannot wait for its events");
            }
        }
    }
}
