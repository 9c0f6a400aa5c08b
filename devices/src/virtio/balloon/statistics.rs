//! What the driver says of the guest's memory (VIRTIO 1.2, 5.5.6.3 and 5.5.6.4), and when it is asked.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::super::chain::{self, Segment};
use crate::GuestMemory;

/// What is known, by tag (`VIRTIO_BALLOON_S_SWAP_IN` is 0); in Firecracker's names. The last six came with Linux 6.12.
pub const STATISTICS: [&str; 16] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kill",
    "alloc_stall",
    "async_scan",
    "direct_scan",
    "async_reclaim",
    "direct_reclaim",
];

/// Most entries that are looked at in one buffer.
const MAX_ENTRIES: usize = 256;

/// `struct virtio_balloon_stat`.
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Entry {
    tag: U16,
    value: U64,
}

/// The values that the driver has sent last, by tag, as in [`STATISTICS`]. The guest can send anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Values(pub [Option<u64>; STATISTICS.len()]);

impl Values {
    /// Takes what is known of the entries in `segments`; what is not there stays as it was. False where that is not
    /// made of entries.
    pub(super) fn update(&mut self, memory: &GuestMemory, segments: &[Segment]) -> bool {
        let size = size_of::<Entry>();
        let len = chain::total_len(segments);
        let taken = (len / size as u64).min(MAX_ENTRIES as u64) as usize;
        let mut bytes = vec![0; taken * size];
        if chain::read(memory, segments, &mut bytes).is_err() {
            return false;
        }
        for entry in bytes
            .chunks_exact(size)
            .filter_map(|entry| Entry::read_from_bytes(entry).ok())
        {
            if let Some(value) = self.0.get_mut(usize::from(entry.tag.get())) {
                *value = Some(entry.value.get());
            }
        }
        bytes.len() as u64 == len
    }
}

/// Becomes readable when it is time to ask again.
#[derive(Debug)]
pub(super) struct Timer(OwnedFd);

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Timer {
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Asks every so many seconds from now on; never, where that is 0.
    pub(super) fn set(&self, seconds: u16) {
        let every = Timespec {
            tv_sec: seconds.into(),
            tv_nsec: 0,
        };
        let times = Itimerspec {
            it_interval: every,
            it_value: every,
        };
        if let Err(error) = timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &times) {
            crate::limited!(warn, error = %report::chain(&error), "the timer of the balloon's statistics");
        }
    }

    /// Is not readable any more, until it is time again.
    pub(super) fn acknowledge(&self) {
        // The number of times says nothing more, and there may be none.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}
