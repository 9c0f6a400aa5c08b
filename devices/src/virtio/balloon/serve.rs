//! What a driver's buffers ask for.

use virtio_queue::{QueueOwnedT, QueueT};

use super::super::chain::{self, Chain, Segment};
use super::hinting::Command;
use super::queues::Role;
use super::{VirtioBalloon, pages};
use crate::GuestMemory;
use crate::metrics::add;

/// A turn of the device thread ends with the buffer that makes its work this much, in pages.
pub(super) const TURN: u64 = 4096;

/// How a turn has ended.
#[derive(Default)]
struct Turn {
    /// The driver wants to hear of the buffers it has got back.
    interrupt: bool,
    /// There may be more: the turn was over.
    more: bool,
}

impl VirtioBalloon {
    /// Takes what is in a queue, unless the device is paused.
    pub(super) fn serve(&mut self, queue: usize) {
        if self.paused {
            return;
        }
        match self.take(queue) {
            Ok(Turn { interrupt, more }) => {
                if interrupt {
                    self.interrupt.signal_used();
                }
                if more {
                    self.kick(queue);
                }
            }
            Err(error) => self.fail(&error),
        }
    }

    /// Takes what is in a queue, for a turn.
    fn take(&mut self, index: usize) -> Result<Turn, virtio_queue::Error> {
        let mut turn = Turn::default();
        let mut used = false;
        let mut work = 0;
        // The device is without its driver meanwhile; a ring that is broken leaves it so.
        let Some(mut active) = self.active.take() else {
            return Ok(turn);
        };
        let memory = &active.memory;
        if let Some((role, queue)) = active.queues.get_mut(index).and_then(Option::as_mut) {
            turn.more = true;
            for _ in 0..queue.size() {
                let Some(descriptors) = queue.iter(memory)?.next() else {
                    if queue.enable_notification(memory)? {
                        continue;
                    }
                    turn.more = false;
                    break;
                };
                let chain = Chain::walk(&descriptors, queue.size());
                let mut ended = Some(descriptors.head_index());
                work += self.handle(*role, memory, chain.ok().as_ref());
                if *role == Role::Statistics {
                    // It stays here until the next are wanted. A driver has one; if there are more, the others are of no use.
                    ended = std::mem::replace(&mut active.statistics_buffer, ended);
                }
                if let Some(head) = ended {
                    queue.add_used(memory, head, 0)?;
                    used = true;
                }
                if work >= TURN {
                    break;
                }
            }
            // A kick of an empty ring is no news to the driver.
            turn.interrupt = used && queue.needs_notification(memory)?;
        }
        self.active = Some(active);
        Ok(turn)
    }

    /// Does what a buffer asks for; `None` is one that cannot be understood, which goes back as it came. Returns how much work it was.
    fn handle(&mut self, role: Role, memory: &GuestMemory, chain: Option<&Chain>) -> u64 {
        let metrics = &self.metrics;
        match (role, chain) {
            (Role::Inflate, Some(chain)) => {
                add(&metrics.inflations, 1);
                pages::give_numbered(&self.give_back, memory, &chain.readable, &metrics.inflated)
            }
            (Role::Deflate, Some(_)) => {
                add(&metrics.deflations, 1);
                1
            }
            (Role::Statistics, Some(chain)) => {
                add(&metrics.statistics, 1);
                if !self.values.update(memory, &chain.readable) {
                    add(&metrics.statistics_failures, 1);
                }
                1
            }
            (Role::Hinting, Some(chain)) => self.hint(memory, chain),
            (Role::Reporting, Some(chain)) => {
                pages::give_segments(&self.give_back, &chain.writable, &metrics.reported)
            }
            (_, None) => {
                let counter = match role {
                    Role::Inflate => &metrics.inflated.failures,
                    Role::Deflate => &metrics.failures,
                    Role::Statistics => &metrics.statistics_failures,
                    Role::Hinting => &metrics.hinted.failures,
                    Role::Reporting => &metrics.reported.failures,
                };
                add(counter, 1);
                1
            }
        }
    }

    /// A command of the driver, or a block it hints.
    fn hint(&mut self, memory: &GuestMemory, chain: &Chain) -> u64 {
        if !chain.readable.is_empty() {
            match command(memory, &chain.readable) {
                Some(command) if self.hinting.heard(command) => self.tell_hinting(),
                Some(_) => {}
                None => add(&self.metrics.hinted.failures, 1),
            }
        }
        if self.hinting.takes_blocks() {
            pages::give_segments(&self.give_back, &chain.writable, &self.metrics.hinted)
        } else {
            1
        }
    }

    /// Gives the driver its statistics buffer back, upon which it sends another. Without a buffer, it has not answered yet.
    pub(super) fn ask_for_statistics(&mut self) {
        if self.paused {
            return;
        }
        if let Err(error) = self.return_statistics_buffer() {
            self.fail(&error);
        }
    }

    fn return_statistics_buffer(&mut self) -> Result<(), virtio_queue::Error> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let memory = &active.memory;
        let mut queues = active.queues.iter_mut().flatten();
        if let Some((_, queue)) = queues.find(|(role, _)| *role == Role::Statistics)
            && let Some(head) = active.statistics_buffer.take()
        {
            queue.add_used(memory, head, 0)?;
            if queue.needs_notification(memory)? {
                self.interrupt.signal_used();
            }
        }
        Ok(())
    }
}

/// The command in a buffer, which has to be as long as a command is (5.5.6.5.1).
fn command(memory: &GuestMemory, segments: &[Segment]) -> Option<Command> {
    let mut id = [0; 4];
    if chain::total_len(segments) != id.len() as u64 {
        return None;
    }
    chain::read(memory, segments, &mut id).ok()?;
    Some(u32::from_le_bytes(id).into())
}
