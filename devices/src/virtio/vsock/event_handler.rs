//! What wakes the device thread: kicks of the queues, and sockets of the host.

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::VirtioVsock;

/// The event's data for the sockets; a kick has the number of its queue.
const SOCKETS: u32 = u32::MAX;

impl MutEventSubscriber for VirtioVsock {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        if events.data() == SOCKETS {
            self.poll();
        } else if let Some(kick) = self.kicks.get(events.data() as usize) {
            // The counter says only that there was a kick. One that comes while the device is not active means nothing,
            // and one while it is paused is made up for by `resume`.
            let _ = kick.read();
        }
        self.serve();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let sockets = Events::with_data_raw(self.host.as_raw_fd(), SOCKETS, EventSet::IN);
        let kicks = (0..)
            .zip(&self.kicks)
            .map(|(queue, kick)| Events::with_data(kick, queue, EventSet::IN));
        for events in kicks.chain([sockets]) {
            if let Err(error) = ops.add(events) {
                crate::limited!(error, ?error, "virtio-vsock cannot wait for its events");
            }
        }
    }
}
