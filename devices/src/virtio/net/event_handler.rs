//! What wakes the device thread: kicks of the queues, frames of the network, and the time of the station.

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::time::{Duration, Instant};

use super::{Answers, VirtioNet};

/// The event's data for the station's timer.
const TIMER: u32 = u32::MAX;
/// The event's data for the limiters' timers.
const RX_LIMITER: u32 = u32::MAX - 1;
const TX_LIMITER: u32 = u32::MAX - 2;
/// The event's data for a frame of the first pair; for a kick it is the number of the queue.
const FRAMES: u32 = 1 << 16;

impl Answers {
    pub(super) fn disarm(&mut self) {
        if std::mem::take(&mut self.is_armed)
            && let Err(error) = self.timer.clear()
        {
            tracing::debug!(error = %report::chain(&error), "virtio-net timer");
        }
    }

    /// Sets the timer for when the station wants to send.
    fn arm(&mut self) {
        let Some(wait) = self.station.wait(Instant::now()) else {
            return self.disarm();
        };
        // A timer of no time at all never ends.
        let wait = wait.max(Duration::from_millis(1));
        self.is_armed = true;
        if let Err(error) = self.timer.reset(wait, None) {
            crate::limited!(warn, error = %report::chain(&error), "virtio-net cannot set its timer");
        }
    }
}

impl VirtioNet {
    fn watch_limiters(&mut self, ops: &mut EventOps<'_>) {
        self.limiters.rx.watch(ops, RX_LIMITER);
        self.limiters.tx.watch(ops, TX_LIMITER);
    }

    pub(super) fn arm(&mut self) {
        if let Some(answers) = &mut self.answers {
            answers.arm();
        }
    }
}

impl MutEventSubscriber for VirtioNet {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        self.watch_limiters(ops);
        match events.data() {
            RX_LIMITER => {
                if self.limiters.rx.on_timer() {
                    for pair in 0..self.link.pairs() {
                        self.serve(usize::from(pair) * 2);
                    }
                }
            }
            TX_LIMITER => {
                if self.limiters.tx.on_timer() {
                    for pair in 0..self.link.pairs() {
                        self.serve(usize::from(pair) * 2 + 1);
                    }
                }
            }
            TIMER => {
                if let Some(answers) = &mut self.answers {
                    answers.is_armed = false;
                    // It says only that the time has come.
                    let _ = answers.timer.wait();
                }
                self.serve(0);
            }
            data if data >= FRAMES => self.serve((data - FRAMES) as usize * 2),
            queue => {
                let queue = queue as usize;
                if let Some(kick) = self.kicks.get(queue) {
                    // The counter says only that there was a kick.
                    let _ = kick.read();
                    self.serve(queue);
                }
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.watch_limiters(ops);
        let kicks = (0..)
            .zip(&self.kicks)
            .map(|(queue, kick)| Events::with_data(kick, queue, EventSet::IN));
        let frames = (0..self.link.pairs()).filter_map(|pair| {
            let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let queue = self.link.queue(pair)?;
            Some(Events::with_data(&queue, FRAMES + u32::from(pair), edges))
        });
        let timer = self.answers.iter();
        let timer = timer.map(|answers| Events::with_data(&answers.timer, TIMER, EventSet::IN));
        for events in kicks.chain(frames).chain(timer) {
            if let Err(error) = ops.add(events) {
                crate::limited!(error, ?error, "virtio-net cannot wait for its events");
            }
        }
    }
}
