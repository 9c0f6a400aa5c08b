//! Where new blocks go: past the end of everything, into space that was never anything but zeros.

use std::io;

use super::format::MIB;
use crate::medium::Medium;

/// The least by which the file grows, so that few writes pay for growing.
const STEP: u64 = 8 * MIB;
/// The least number of blocks by which the file grows.
const STEP_BLOCKS: u64 = 8;

/// The end of the file. What lies past `next` is free.
#[derive(Clone, Copy, Debug)]
pub(super) struct Space {
    next: u64,
    /// The file reads as zeros from `next` up to here. What may lie behind was not made here and is cut off before the file
    /// grows: it can be the payload of writes whose allocation was lost in a cut.
    zeroed: u64,
}

impl Space {
    /// The space of a file whose blocks and regions end at `end`.
    pub(super) fn after(end: u64) -> Self {
        let next = end.next_multiple_of(MIB);
        Self { next, zeroed: next }
    }

    /// End of all that is allocated.
    pub(super) fn end(self) -> u64 {
        self.next
    }

    /// Whether `len` bytes can be taken without growing the file.
    pub(super) fn has(self, len: u64) -> bool {
        self.zeroed - self.next >= len
    }

    /// Takes `len` bytes that are there.
    pub(super) fn take(&mut self, len: u64) -> u64 {
        let taken = self.next;
        self.next += len;
        debug_assert!(self.next <= self.zeroed);
        taken
    }

    /// Makes `len` bytes of a disk with blocks of `block_size` available; the file does not change when this fails.
    /// Nobody else may do this at the time; taking may go on.
    pub(super) fn grown(self, medium: &dyn Medium, len: u64, block_size: u64) -> io::Result<Grown> {
        if medium.len()? > self.zeroed {
            medium.set_len(self.zeroed)?;
        }
        let too_long = || io::Error::from(io::ErrorKind::FileTooLarge);
        let needed = self.next.checked_add(len).ok_or_else(too_long)?;
        let roomy = needed
            .checked_add(STEP.max(STEP_BLOCKS * block_size))
            .ok_or_else(too_long)?;
        // A file system at its limit may still take what is needed.
        let zeroed = match medium.set_len(roomy) {
            Ok(()) => roomy,
            Err(_) => medium.set_len(needed).map(|()| needed)?,
        };
        Ok(Grown { zeroed })
    }

    /// Takes note that the file has grown.
    pub(super) fn adopt(&mut self, grown: &Grown) {
        self.zeroed = self.zeroed.max(grown.zeroed);
    }

    /// Gives up what is not taken; the length that the file is to be cut to, if that changes anything.
    pub(super) fn give_up(&mut self) -> Option<u64> {
        let surplus = self.zeroed > self.next;
        self.zeroed = self.next;
        surplus.then_some(self.next)
    }
}

/// A file that has grown.
#[derive(Debug)]
pub(super) struct Grown {
    zeroed: u64,
}
