//! Where blocks go: the space of the file, described or not.
//!
//! ```text
//!   a block's ──freed──> Freed ──commit durable──> Draining ──no request in flight──> (anchored|free), stale
//!       ^                                                                                      │ punched or zeroed
//!       │                                                                                      v
//!       └────────── taken ────────── zero  <──────────── sync ──────────── Scrubbed <──────────┘
//! ```
//!
//! Space is handed out only when it durably reads as zeros and nothing durable names it, so that the entry of a new
//! block may become durable before its data, and no block ever shows what another held. An unmapped block may keep its
//! space as an *anchor* that it takes back when it is written again; under need anchors are dropped.

use std::collections::BTreeMap;
use std::io;

use super::bat::{Found, MAX_ANCHORS};
use super::format::MIB;
use super::runs::Runs;
use crate::medium::Medium;

/// The least by which the file grows, so that few writes pay for growing.
const STEP: u64 = 8 * MIB;
/// The least number of blocks by which the file grows.
pub(super) const STEP_BLOCKS: u64 = 8;

/// What space goes to once it can be used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Destination {
    /// To the next block that needs some.
    Free,
    /// Back to the unmapped block that still names it.
    Anchor,
}

/// How far freed space is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The change that freed it is not durable; it goes out with the commit of this number.
    Freed { commit: u64 },
    /// Requests of this epoch may still use it.
    Draining { epoch: u64 },
    /// No block and no request has it; none may take it, as it holds old bytes.
    Stale,
    /// Zeroed in this round, which no sync has made durable.
    Scrubbed { round: u64 },
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    len: u64,
    to: Destination,
    stage: Stage,
}

/// The space of an open file. The caller locks.
#[derive(Debug)]
pub(super) struct Space {
    /// End of all that is described or free; the tail begins here.
    next: u64,
    /// The file reads as zeros from `next` up to here. What may lie behind was not made here and is cut off before the
    /// file grows: it can be the payload of writes whose allocation was lost in a cut.
    zeroed: u64,
    /// Free space that durably reads as zeros.
    zero: Runs,
    pending: BTreeMap<u64, Pending>,
    /// Space of unmapped blocks: the block and whether it durably reads as zeros, by offset.
    anchors: BTreeMap<u64, (u64, bool)>,
    /// The commit that takes what is freed now.
    commit: u64,
    /// The present round of scrubbing.
    round: u64,
}

impl Space {
    /// The space of a file whose table was found sound.
    pub(super) fn of(found: &Found) -> Self {
        let stale = |(offset, len): &(u64, u64)| {
            (
                *offset,
                Pending {
                    len: *len,
                    to: Destination::Free,
                    stage: Stage::Stale,
                },
            )
        };
        Self {
            next: found.end,
            zeroed: found.end,
            zero: Runs::default(),
            pending: found.free.iter().map(stale).collect(),
            anchors: found
                .anchors
                .iter()
                .map(|(offset, block)| (*offset, (*block, false)))
                .collect(),
            commit: 0,
            round: 0,
        }
    }

    /// End of all that is allocated.
    pub(super) fn end(&self) -> u64 {
        self.next
    }

    /// Takes `len` bytes that read as zeros, if there are any without growing the file.
    pub(super) fn take(&mut self, len: u64) -> Option<u64> {
        if let Some(taken) = self.zero.take(len) {
            return Some(taken);
        }
        if self.zeroed - self.next < len {
            return None;
        }
        let taken = self.next;
        self.next += len;
        Some(taken)
    }

    /// Whether `len` bytes can be taken without growing the file.
    pub(super) fn has(&self, len: u64) -> bool {
        self.zero.lowest(len, u64::MAX).is_some() || self.zeroed - self.next >= len
    }

    /// Takes `len` zeros below `end`, for what is to be moved there.
    pub(super) fn take_below(&mut self, len: u64, end: u64) -> Option<u64> {
        let offset = self.zero.lowest(len, end)?;
        self.zero.remove(offset, len).then_some(offset)
    }

    /// Takes an anchor back for its block; `None` where the block may not have it, or where it holds old bytes.
    pub(super) fn take_anchor(&mut self, block: u64, offset: u64) -> Option<u64> {
        if self.anchors.get(&offset) != Some(&(block, true)) {
            return None;
        }
        self.anchors.remove(&offset);
        Some(offset)
    }

    /// Frees a block's space, when the change that does so is made.
    pub(super) fn free(&mut self, offset: u64, len: u64, to: Destination) {
        let stage = Stage::Freed {
            commit: self.commit,
        };
        self.pending.insert(offset, Pending { len, to, stage });
    }

    /// Frees what an unmapped block named, as its entry is about to name it no more. Space that the block never had to
    /// itself is left alone.
    pub(super) fn drop_anchor(&mut self, block: u64, offset: u64, len: u64) {
        if let Some((owner, _)) = self.anchors.get(&offset)
            && *owner == block
        {
            self.anchors.remove(&offset);
            self.free(offset, len, Destination::Free);
        }
    }

    /// Whether one more unmapped block may keep its space.
    pub(super) fn has_room_for_anchor(&self) -> bool {
        self.anchors.len() + self.pending.len() < MAX_ANCHORS
    }

    /// How many unmapped blocks keep their space.
    pub(super) fn anchored(&self) -> u64 {
        self.anchors.len() as u64
    }

    /// Blocks whose anchors can be dropped, with their offsets.
    pub(super) fn anchors(&self) -> Vec<(u64, u64)> {
        self.anchors
            .iter()
            .map(|(offset, (block, _))| (*block, *offset))
            .collect()
    }

    /// A commit takes all changes up to now; gives its number.
    pub(super) fn commit_taken(&mut self) -> u64 {
        self.commit += 1;
        self.commit - 1
    }

    /// A commit and all before it are durable: what they freed waits for the requests of `epoch`.
    pub(super) fn committed(&mut self, number: u64, epoch: u64) {
        for pending in self.pending.values_mut() {
            if let Stage::Freed { commit } = pending.stage
                && commit <= number
            {
                pending.stage = Stage::Draining { epoch };
            }
        }
    }

    /// Looks which space has no more requests on it, then gives what is to be scrubbed: offsets and lengths. Where
    /// `all` is not set, old bytes stay until there is need.
    pub(super) fn start_scrub(
        &mut self,
        is_over: impl Fn(u64) -> bool,
        all: bool,
    ) -> Vec<(u64, u64)> {
        for pending in self.pending.values_mut() {
            if let Stage::Draining { epoch } = pending.stage
                && is_over(epoch)
            {
                pending.stage = Stage::Stale;
            }
        }
        if !all {
            return Vec::new();
        }
        self.pending
            .iter()
            .filter(|(_, pending)| pending.stage == Stage::Stale)
            .map(|(offset, pending)| (*offset, pending.len))
            .collect()
    }

    /// Ranges have been zeroed.
    pub(super) fn scrubbed(&mut self, ranges: &[(u64, u64)]) {
        self.round += 1;
        for (offset, len) in ranges {
            if let Some(pending) = self.pending.get_mut(offset)
                && pending.stage == Stage::Stale
                && pending.len == *len
            {
                pending.stage = Stage::Scrubbed { round: self.round };
            }
        }
    }

    /// The round of scrubbing that a sync which begins now makes durable.
    pub(super) fn round(&self) -> u64 {
        self.round
    }

    /// A sync has made a round of scrubbing durable.
    pub(super) fn synced(&mut self, round: u64) {
        let (zero, anchors) = (&mut self.zero, &mut self.anchors);
        self.pending.retain(|offset, pending| {
            let Stage::Scrubbed { round: scrubbed } = pending.stage else {
                return true;
            };
            if scrubbed > round {
                return true;
            }
            match pending.to {
                Destination::Free => zero.add(*offset, pending.len),
                Destination::Anchor => {
                    if let Some(anchor) = anchors.get_mut(offset) {
                        anchor.1 = true;
                    }
                }
            }
            false
        });
    }

    /// An unmapped block keeps its space while that is on its way back to it.
    pub(super) fn anchor(&mut self, block: u64, offset: u64, len: u64) {
        self.anchors.insert(offset, (block, false));
        self.free(offset, len, Destination::Anchor);
    }

    /// Free space that a commit and syncs would make usable: what waits for a commit, and what does not.
    pub(super) fn reclaimable(&self) -> (u64, u64) {
        let mut waits = (0, 0);
        for pending in self.pending.values() {
            match (pending.to, pending.stage) {
                (Destination::Anchor, _) => {}
                (Destination::Free, Stage::Freed { .. }) => waits.0 += pending.len,
                (
                    Destination::Free,
                    Stage::Draining { .. } | Stage::Stale | Stage::Scrubbed { .. },
                ) => waits.1 += pending.len,
            }
        }
        waits
    }

    /// Whether anything is on its way that a flush would bring further.
    pub(super) fn is_idle(&self) -> bool {
        !self
            .pending
            .values()
            .any(|pending| matches!(pending.stage, Stage::Freed { .. } | Stage::Scrubbed { .. }))
    }

    /// What a growth has to know.
    pub(super) fn tail(&self) -> Tail {
        Tail {
            next: self.next,
            zeroed: self.zeroed,
        }
    }

    /// Takes note that the file has grown.
    pub(super) fn adopt(&mut self, zeroed: u64) {
        self.zeroed = self.zeroed.max(zeroed);
    }

    /// Gives up what lies free at the end; the length that the file is to be cut to.
    pub(super) fn give_up(&mut self) -> u64 {
        loop {
            let last = self.pending.range(..self.next).next_back();
            if let Some((offset, pending)) = last
                && offset + pending.len == self.next
                && pending.to == Destination::Free
                && matches!(pending.stage, Stage::Stale | Stage::Scrubbed { .. })
            {
                self.next = *offset;
                self.pending.remove(&self.next);
            } else if let Some(offset) = self.zero.take_last(self.next) {
                self.next = offset;
            } else {
                break;
            }
        }
        self.zeroed = self.next;
        self.next
    }
}

/// The end of the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tail {
    next: u64,
    zeroed: u64,
}

impl Tail {
    /// Makes `len` bytes of a disk with blocks of `block_size` available; gives where the zeros end then. The file does
    /// not change when this fails. One caller at a time; taking may go on meanwhile.
    pub(super) fn grown(self, medium: &dyn Medium, len: u64, block_size: u64) -> io::Result<u64> {
        if medium.len()? > self.zeroed {
            medium.set_len(self.zeroed)?;
            // Or a cut could keep the growth and lose this, and what was cut off would show.
            medium.sync_data()?;
        }
        let too_long = || io::Error::from(io::ErrorKind::FileTooLarge);
        let needed = self.next.checked_add(len).ok_or_else(too_long)?;
        let roomy = needed
            .checked_add(STEP.max(STEP_BLOCKS * block_size))
            .ok_or_else(too_long)?;
        // A file system at its limit may still take what is needed.
        match medium.set_len(roomy) {
            Ok(()) => Ok(roomy),
            Err(_) => medium.set_len(needed).map(|()| needed),
        }
    }

    /// Where what is described ends, in bytes.
    pub(super) fn end(self) -> u64 {
        self.next
    }
}
