//! From the host's end to the guest.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use rustix::io::Errno;
use virtio_queue::Error;
use vm_memory::Bytes;

use super::super::RingPosition;
use super::super::chain::{self, Segment};
use super::features::Offloads;
use super::header::{HEADER_LEN, LONGEST_RECEIVED, NUM_BUFFERS};
use super::rx_ring::{RxRing, Taken};
use super::scatter::Scatter;
use super::station::LONGEST;
use super::{Active, VirtioNet};
use crate::GuestMemory;
use crate::metrics::add;

/// Ethernet's header and the tag of a VLAN, which are not counted in an MTU.
const AROUND_MTU: usize = 14 + 4;
const ETHERNET_MTU: u16 = 1500;

/// A buffer of the guest.
struct Buffer {
    head: u16,
    len: usize,
    segments: Vec<Segment>,
}

/// The receiving side of a pair.
pub(super) struct Rx {
    ring: RxRing,
    /// Whether a frame may take several buffers.
    mergeable: bool,
    /// A frame that waits for more buffers of the guest, or for its turn.
    waiting: Option<Waiting>,
}

struct Waiting {
    /// Header first.
    bytes: Vec<u8>,
    /// Whether it takes tokens of the limiter yet: frames of the station do not.
    is_limited: bool,
}

/// What became of a frame.
enum Outcome {
    Done,
    /// The guest has too few buffers for it.
    NoRoom,
    /// The limiter has too few tokens for it.
    Throttled,
}

impl Rx {
    pub(super) fn new(ring: RxRing, mergeable: bool) -> Self {
        Self {
            ring,
            mergeable,
            waiting: None,
        }
    }

    pub(super) fn position(&self) -> RingPosition {
        self.ring.position()
    }

    /// Takes buffers until those that were taken have `len` bytes, or the guest has no more. Whether they have.
    fn gather(
        &mut self,
        memory: &GuestMemory,
        buffers: &mut VecDeque<Buffer>,
        len: usize,
    ) -> Result<bool, Error> {
        loop {
            let have: usize = buffers.iter().map(|buffer| buffer.len).sum();
            if have >= len {
                return Ok(true);
            }
            if !self.mergeable && !buffers.is_empty() {
                return Ok(false);
            }
            let Some(Taken { head, chain }) = self.ring.take(memory)? else {
                return Ok(false);
            };
            let segments = chain.map(|chain| chain.writable).unwrap_or_default();
            let len =
                usize::try_from(chain::total_len(&segments)).map_err(|_| Error::InvalidChain)?;
            // A buffer has room for the header at least (5.1.6.3.1).
            if len < HEADER_LEN {
                return Err(Error::InvalidChain);
            }
            buffers.push_back(Buffer {
                head,
                len,
                segments,
            });
        }
    }

    /// Gives the driver the buffers that a frame of `len` bytes lies in.
    fn deliver(
        &mut self,
        memory: &GuestMemory,
        buffers: &mut VecDeque<Buffer>,
        len: usize,
    ) -> Result<(), Error> {
        let mut used = Vec::with_capacity(1);
        let (mut left, mut header) = (len, None);
        while left > 0 {
            let Some(buffer) = buffers.pop_front() else {
                return Err(Error::InvalidChain);
            };
            let part = left.min(buffer.len);
            left -= part;
            used.push((buffer.head, part as u32));
            header.get_or_insert(buffer.segments);
        }
        // The tap leaves the field as it was.
        let mut segments = header.unwrap_or_default();
        let count = (used.len() as u16).to_le_bytes();
        let written = chain::split_front(&mut segments, NUM_BUFFERS as u32)
            .and_then(|_| chain::write(memory, &segments, &count).ok());
        if written != Some(count.len() as u32) {
            return Err(Error::InvalidChain);
        }
        self.ring.use_all(memory, &used)
    }

    /// Copies the frame that waits into the guest's buffers.
    fn deliver_waiting(
        &mut self,
        memory: &GuestMemory,
        buffers: &mut VecDeque<Buffer>,
    ) -> Result<Outcome, Error> {
        let Some(waiting) = self.waiting.take() else {
            return Ok(Outcome::Done);
        };
        let frame = &waiting.bytes;
        if !self.gather(memory, buffers, frame.len())? {
            let never = if self.mergeable {
                buffers.len() >= usize::from(self.ring.size())
            } else {
                !buffers.is_empty()
            };
            if !never {
                self.waiting = Some(waiting);
            }
            return Ok(Outcome::NoRoom);
        }
        let mut rest: &[u8] = frame;
        for segment in buffers.iter().flat_map(|buffer| &buffer.segments) {
            let (part, behind) = rest.split_at(rest.len().min(segment.len as usize));
            memory
                .write_slice(part, segment.address)
                .map_err(Error::GuestMemory)?;
            rest = behind;
            if rest.is_empty() {
                break;
            }
        }
        self.deliver(memory, buffers, frame.len())?;
        Ok(Outcome::Done)
    }
}

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
