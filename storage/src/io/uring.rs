//! Transfers through `io_uring`.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::transfer::{Failure, Kind, Progress, Transfer};

/// Entries of the submission ring, and the most transfers that the kernel works on at once: the completion ring, which
/// is twice as long, then never overflows. A longer burst waits here for its turn.
const ENTRIES: u32 = 64;

/// A ring and the transfers that were given to it.
pub(super) struct Uring {
    ring: IoUring,
    /// By the number that the kernel gives back; holds what a transfer's entry points to.
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    /// Slots that are in use, but not in the ring yet, oldest first.
    waiting: VecDeque<usize>,
    /// Entries in the ring or at work in the kernel.
    entered: u32,
    /// Whether the ring has entries that have not been submitted.
    unsubmitted: bool,
}

struct Slot {
    token: usize,
    transfer: Transfer,
}

impl Uring {
    /// A ring that signals `event` at completions.
    ///
    /// # Errors
    /// Where the kernel has no `io_uring` or forbids it.
    pub(super) fn new(event: &EventFd) -> io::Result<Self> {
        let ring = restricted(event)?;
        Ok(Self {
            ring,
            slots: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            entered: 0,
            unsubmitted: false,
        })
    }

    /// Transfers that have not come to their end.
    pub(super) fn in_flight(&self) -> usize {
        self.waiting.len() + self.entered as usize
    }

    /// Takes a transfer; [`Uring::submit`] makes the kernel look.
    pub(super) fn push(&mut self, token: usize, transfer: Transfer) {
        let taken = Some(Slot { token, transfer });
        let slot = if let Some(slot) = self.free.pop() {
            self.slots[slot] = taken;
            slot
        } else {
            self.slots.push(taken);
            self.slots.len() - 1
        };
        self.waiting.push_back(slot);
        self.enter();
    }

    /// Moves waiting transfers into the ring while there is room.
    fn enter(&mut self) {
        while self.entered < ENTRIES
            && let Some(&slot) = self.waiting.front()
        {
            let Some(Slot { transfer, .. }) = self.slots.get(slot).and_then(Option::as_ref) else {
                self.waiting.pop_front();
                continue;
            };
            let entry = entry(transfer).user_data(slot as u64);
            // SAFETY: the entry points to the heap allocation of the transfer's ranges and names its file. The transfer
            // stays in its slot until its completion has been taken from the ring; the memory behind the ranges belongs
            // to a buffer that its owner keeps as long.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                return;
            }
            self.waiting.pop_front();
            self.entered += 1;
            self.unsubmitted = true;
        }
    }

    /// Tells the kernel of what was pushed.
    ///
    /// # Errors
    /// Where the kernel took nothing, for want of memory; the entries stay in the ring for the next call.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        while self.unsubmitted {
            match self.ring.submit() {
                Ok(_) => self.unsubmitted = !self.ring.submission().is_empty(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Hands finished transfers to `finish`, and goes on with those that were short and those that waited.
    pub(super) fn reap(&mut self, mut finish: impl FnMut(usize, Result<(), Failure>)) {
        loop {
            let Some(completion) = self.ring.completion().next() else {
                break;
            };
            let slot = completion.user_data() as usize;
            let Some(Slot { token, transfer }) = self.slots.get_mut(slot).and_then(Option::take)
            else {
                continue;
            };
            self.free.push(slot);
            self.entered -= 1;
            match transfer.advance(completion.result()) {
                Progress::Finished => finish(token, Ok(())),
                Progress::Failed(error) => finish(token, Err(error)),
                Progress::Again(left) => self.push(token, left),
            }
        }
        self.enter();
    }
}

/// A ring that signals `event`, and does nothing but what [`entry`] asks for: code that takes over this process cannot
/// open a file or a socket with it, of which no filter of system calls would know.
fn restricted(event: &EventFd) -> io::Result<IoUring> {
    let ring = IoUring::builder().setup_r_disabled().build(ENTRIES);
    let ring = match ring {
        // Before Linux 5.10.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let ring = IoUring::new(ENTRIES)?;
            ring.submitter().register_eventfd(event.as_raw_fd())?;
            return Ok(ring);
        }
        made => made?,
    };
    let submitter = ring.submitter();
    submitter.register_eventfd(event.as_raw_fd())?;
    let operations = [
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
    ];
    submitter.register_restrictions(&mut operations.map(Restriction::sqe_op))?;
    submitter.register_enable_rings()?;
    Ok(ring)
}

fn entry(transfer: &Transfer) -> squeue::Entry {
    let fd = types::Fd(transfer.file.as_raw_fd());
    let ranges = transfer.iovecs();
    let (pointer, count) = (ranges.as_ptr(), ranges.len() as u32);
    match transfer.kind {
        Kind::Read => opcode::Readv::new(fd, pointer, count)
            .offset(transfer.offset)
            .build(),
        Kind::Write => opcode::Writev::new(fd, pointer, count)
            .offset(transfer.offset)
            .build(),
        Kind::Sync => opcode::Fsync::new(fd)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_does_what_disks_need_and_nothing_else() {
        let event = EventFd::new(0).unwrap();
        let mut ring = match restricted(&event) {
            Ok(ring) => ring,
            Err(error) => {
                return skip::because(&format!("the host allows no restricted io_uring: {error}"));
            }
        };
        let file = tempfile::tempfile().unwrap();
        let fd = types::Fd(file.as_raw_fd());
        let path = c"/etc/passwd";
        let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).build();
        let mut result = |entry: squeue::Entry| {
            // SAFETY: what the entries point to lives to the end of the test, and none is under way after it was waited
            // for.
            unsafe { ring.submission().push(&entry) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            ring.completion().next().unwrap().result()
        };
        assert_eq!(result(opcode::Fsync::new(fd).build()), 0);
        assert_eq!(result(open), -libc::EACCES);
        assert_eq!(result(opcode::Socket::new(1, 1, 0).build()), -libc::EACCES);
    }
}
