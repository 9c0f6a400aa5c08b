//! From the guest to the host's end.

use std::time::Instant;

use virtio_queue::{Error, QueueOwnedT, QueueT};
use zerocopy::{FromZeros, IntoBytes};

use super::super::chain::{self, Chain};
use super::header::{HEADER_LEN, LONGEST_SENT, NetHeader};
use super::scatter::Scatter;
use super::station::{HEAD, LONGEST_TAKEN};
use super::{Active, VirtioNet};
use crate::GuestMemory;
use crate::metrics::add;

/// The shortest frame: the header of Ethernet.
const MIN_FRAME: usize = 14;

/// Why a frame does not go.
enum Dropped {
    /// It breaks a rule.
    Malformed,
    /// The network refused it.
    Refused,
    /// The limiter has too few tokens for it yet.
    Throttled,
}

impl VirtioNet {
    /// Sends the frames of a pair, a ring's worth at most. Whether one was for the station.
    pub(super) fn send(&mut self, pair: u16) -> Result<bool, Error> {
        let Some(mut active) = self.active.take() else {
            return Ok(false);
        };
        let sent = self.send_from(pair, &mut active);
        self.active = Some(active);
        let (more, answered) = sent?;
        if more {
            self.kick(usize::from(pair) * 2 + 1);
        }
        Ok(answered)
    }

    /// Whether there may be more, and whether a frame was for the station.
    fn send_from(&mut self, pair: u16, active: &mut Active) -> Result<(bool, bool), Error> {
        let Active {
            memory,
            features,
            pairs,
            ..
        } = active;
        let memory = &*memory;
        let Some(Some(queues)) = pairs.get_mut(usize::from(pair)) else {
            return Ok((false, false));
        };
        let queue = &mut queues.tx;
        let (mut used, mut more, mut answered) = (false, true, false);
        let mut scatter = Scatter::new(memory);
        queue.disable_notification(memory)?;
        for _ in 0..queue.size() {
            let Some(descriptors) = queue.iter(memory)?.next() else {
                if queue.enable_notification(memory)? {
                    continue;
                }
                more = false;
                break;
            };
            let head = descriptors.head_index();
            scatter.clear();
            let chain = Chain::walk(&descriptors, queue.size());
            let chain = chain.map_err(|_| Dropped::Malformed);
            let sent =
                chain.and_then(|chain| self.send_one(pair, chain, memory, *features, &mut scatter));
            match sent {
                Ok(by_station) => answered |= by_station,
                Err(Dropped::Malformed) => add(&self.metrics.malformed_frames, 1),
                Err(Dropped::Refused) => add(&self.metrics.sent_drops, 1),
                Err(Dropped::Throttled) => {
                    // It stays in the ring, as do those behind it.
                    queue.set_next_avail(queue.next_avail().wrapping_sub(1));
                    more = false;
                    break;
                }
            }
            queue.add_used(memory, head, 0)?;
            used = true;
        }
        if used && queue.needs_notification(memory)? {
            self.interrupt.signal_used();
        }
        Ok((more, answered))
    }

    /// Sends a frame. Whether it was for the station.
    fn send_one(
        &mut self,
        pair: u16,
        chain: Chain,
        memory: &GuestMemory,
        features: u64,
        scatter: &mut Scatter<'_>,
    ) -> Result<bool, Dropped> {
        let Chain {
            mut readable,
            writable,
            ..
        } = chain;
        let header_segments = chain::split_front(&mut readable, HEADER_LEN as u32);
        let header_segments = header_segments.filter(|_| writable.is_empty());
        let header_segments = header_segments.ok_or(Dropped::Malformed)?;
        // The driver may change the header while it is looked at: what is checked is what is sent.
        let mut header = NetHeader::new_zeroed();
        chain::read(memory, &header_segments, header.as_mut_bytes())
            .map_err(|_| Dropped::Malformed)?;
        let len = chain::total_len(&readable);
        let len = usize::try_from(len).map_err(|_| Dropped::Malformed)?;
        if !(MIN_FRAME..=LONGEST_SENT).contains(&len) {
            return Err(Dropped::Malformed);
        }
        let header = header
            .checked(len, features)
            .map_err(|_| Dropped::Malformed)?;
        if let Some(answers) = &mut self.answers {
            let mut head = [0; HEAD];
            let head = head.get_mut(..HEAD.min(len)).unwrap_or_default();
            chain::read(memory, &readable, head).map_err(|_| Dropped::Malformed)?;
            if answers.station.takes(head) {
                if len > LONGEST_TAKEN {
                    return Err(Dropped::Refused);
                }
                let mut frame = vec![0; len];
                chain::read(memory, &readable, &mut frame).map_err(|_| Dropped::Malformed)?;
                answers.station.receive(&frame, Instant::now());
                add(&self.metrics.answered_frames, 1);
                return Ok(true);
            }
        }
        scatter.push(&readable).map_err(|_| Dropped::Malformed)?;
        if !self.limiters.tx.consume(len as u64, 1) {
            add(&self.metrics.sent_throttled, 1);
            return Err(Dropped::Throttled);
        }
        let queue = self.link.queue(pair).ok_or(Dropped::Refused)?;
        match scatter.send(&header, queue) {
            Ok(()) => {
                add(&self.metrics.sent_frames, 1);
                add(&self.metrics.sent_bytes, len as u64);
                Ok(false)
            }
            Err(error) => {
                self.fault(&error);
                crate::limited!(debug, error = %report::chain(&error), "virtio-net: the tap refuses a frame");
                Err(Dropped::Refused)
            }
        }
    }
}
