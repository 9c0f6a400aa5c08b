//! From the host's end to the guest.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use rustix::io::Errno;
use virtio_queue::Error;

use super::super::chain;
use super::features::Offloads;
use super::header::{HEADER_LEN, LONGEST_RECEIVED};
use super::rx::{Buffer, Outcome, Rx, Waiting};
use super::scatter::Scatter;
use super::station::LONGEST;
use super::{Active, VirtioNet};
use crate::GuestMemory;
use crate::metrics::add;

/// Ethernet's header and the tag of a VLAN, which are not counted in an MTU.
const AROUND_MTU: usize = 14 + 4;
const ETHERNET_MTU: u16 = 1500;

/// The longest frame that the network may have for the guest, header included.
fn longest(offloads: Offloads, mtu: Option<u16>) -> usize {
    if offloads.segments() {
        HEADER_LEN + LONGEST_RECEIVED
    } else {
        HEADER_LEN + usize::from(mtu.unwrap_or(ETHERNET_MTU)) + AROUND_MTU
    }
}

impl VirtioNet {
    /// Gives the guest frames, of the station and of the network: a ring's worth at most.
    pub(super) fn receive(&mut self, pair: u16) -> Result<(), Error> {
        let Some(mut active) = self.active.take() else {
            return Ok(());
        };
        let received = self.receive_from(pair, &mut active);
        self.active = Some(active);
        if received? {
            self.kick(usize::from(pair) * 2);
        }
        self.arm();
        Ok(())
    }

    /// Whether there may be more.
    fn receive_from(&mut self, pair: u16, active: &mut Active) -> Result<bool, Error> {
        let longest = longest(Offloads::of(active.offloads), self.mtu);
        let is_serving = pair < active.serving;
        let memory = &active.memory;
        let Some(Some(queues)) = active.pairs.get_mut(usize::from(pair)) else {
            return Ok(false);
        };
        if !is_serving {
            return Ok(false);
        }
        let rx = &mut queues.rx;
        rx.ring.disable_notification(memory)?;
        let mut buffers = VecDeque::new();
        let mut more = true;
        let mut left = rx.ring.size();
        while left > 0 {
            left -= 1;
            let outcome = if rx.waiting.is_some() {
                self.deliver_kept(rx, memory, &mut buffers)?
            } else if let Some(bytes) = self.next_answer(pair) {
                let is_limited = false;
                rx.waiting = Some(Waiting { bytes, is_limited });
                self.deliver_kept(rx, memory, &mut buffers)?
            } else {
                let received = self.receive_one(pair, rx, memory, &mut buffers, longest)?;
                let Some(outcome) = received else {
                    more = false;
                    break;
                };
                outcome
            };
            if let Outcome::Throttled = outcome {
                more = false;
                break;
            }
            if let Outcome::NoRoom = outcome {
                add(&self.metrics.no_buffers, 1);
                // Otherwise some came in between.
                if !rx.ring.enable_notification(memory)? {
                    more = false;
                    break;
                }
                rx.ring.disable_notification(memory)?;
            }
        }
        // No buffer is kept, so that nothing is in flight.
        rx.ring.put_back(buffers.len() as u16);
        if rx.ring.needs_notification(memory)? {
            self.interrupt.signal_used();
        }
        Ok(more)
    }

    fn deliver_kept(
        &mut self,
        rx: &mut Rx,
        memory: &GuestMemory,
        buffers: &mut VecDeque<Buffer>,
    ) -> Result<Outcome, Error> {
        let Some(waiting) = &mut rx.waiting else {
            return Ok(Outcome::Done);
        };
        let len = waiting.bytes.len();
        if waiting.is_limited {
            if !self.may_receive(len) {
                return Ok(Outcome::Throttled);
            }
            waiting.is_limited = false;
        }
        let outcome = rx.deliver_waiting(memory, buffers)?;
        match outcome {
            Outcome::Done => self.count_received(len),
            // It will never fit, and is lost.
            Outcome::NoRoom if rx.waiting.is_none() => add(&self.metrics.received_drops, 1),
            Outcome::NoRoom | Outcome::Throttled => {}
        }
        Ok(outcome)
    }

    /// Whether the limiter lets a frame of `len` bytes, header included, pass now.
    fn may_receive(&mut self, len: usize) -> bool {
        let passes = self
            .limiters
            .rx
            .consume((len - HEADER_LEN.min(len)) as u64, 1);
        if !passes {
            add(&self.metrics.received_throttled, 1);
        }
        passes
    }

    fn count_received(&self, len: usize) {
        add(&self.metrics.received_frames, 1);
        add(
            &self.metrics.received_bytes,
            (len - HEADER_LEN.min(len)) as u64,
        );
    }

    /// Moves one frame of the network; `None` where there is none.
    fn receive_one(
        &mut self,
        pair: u16,
        rx: &mut Rx,
        memory: &GuestMemory,
        buffers: &mut VecDeque<Buffer>,
        longest: usize,
    ) -> Result<Option<Outcome>, Error> {
        // The frame that waits is looked at first, so there is none that a blocked limiter has not seen.
        if self.limiters.rx.is_blocked() {
            return Ok(Some(Outcome::Throttled));
        }
        let mut scatter = Scatter::new(memory);
        let fits = rx.gather(memory, buffers, longest)?
            && buffers
                .iter()
                .all(|buffer| scatter.push(&buffer.segments).is_ok());
        let Some(queue) = self.link.queue(pair) else {
            return Ok(None);
        };
        let received = if fits {
            scatter.receive(queue)
        } else if buffers.is_empty() {
            return Ok(Some(Outcome::NoRoom));
        } else {
            // It may be too long for the buffers that there are.
            let mut frame = vec![0; HEADER_LEN + LONGEST_RECEIVED + 1];
            let read = rustix::io::read(queue, &mut *frame).map_err(io::Error::from);
            match read {
                Ok(len) if (HEADER_LEN..frame.len()).contains(&len) => {
                    frame.truncate(len);
                    frame.shrink_to_fit();
                    rx.waiting = Some(Waiting {
                        bytes: frame,
                        is_limited: true,
                    });
                    return self.deliver_kept(rx, memory, buffers).map(Some);
                }
                read => read.map(|_| None),
            }
        };
        match received {
            Ok(Some(len)) if len > HEADER_LEN => {
                if !self.may_receive(len) {
                    // The guest has not been given the buffers, and may do with them what it likes meanwhile.
                    let mut bytes = vec![0; len];
                    let segments = buffers
                        .iter()
                        .flat_map(|buffer| buffer.segments.iter().copied());
                    chain::read(memory, &segments.collect::<Vec<_>>(), &mut bytes)
                        .map_err(|_| Error::InvalidChain)?;
                    let is_limited = true;
                    rx.waiting = Some(Waiting { bytes, is_limited });
                    return Ok(Some(Outcome::Throttled));
                }
                rx.deliver(memory, buffers, len)?;
                self.count_received(len);
                Ok(Some(Outcome::Done))
            }
            // A frame of another length than it can have, or one that was cut.
            Ok(_) => {
                add(&self.metrics.received_drops, 1);
                Ok(Some(Outcome::Done))
            }
            Err(error) if error.raw_os_error() == Some(Errno::AGAIN.raw_os_error()) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Some(Outcome::Done)),
            Err(error) => {
                self.fault(&error);
                add(&self.metrics.received_drops, 1);
                crate::limited!(warn, error = %report::chain(&error), "virtio-net: a frame cannot be received");
                // A tap that is gone has no frames, and others may have.
                let is_lost = error.raw_os_error() == Some(libc::EFAULT);
                Ok(is_lost.then_some(Outcome::Done))
            }
        }
    }

    /// The next frame of the station for the guest, behind a header that asks for nothing. The station is at the first
    /// pair.
    fn next_answer(&mut self, pair: u16) -> Option<Vec<u8>> {
        if pair != 0 {
            return None;
        }
        let station = &mut self.answers.as_mut()?.station;
        let mut frame = vec![0; HEADER_LEN + LONGEST];
        let len = station.send(frame.get_mut(HEADER_LEN..)?, Instant::now())?;
        frame.truncate(HEADER_LEN + len.min(LONGEST));
        Some(frame)
    }
}
