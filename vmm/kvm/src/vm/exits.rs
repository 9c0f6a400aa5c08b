//! Counters of the exits of vCPUs to this program. Exits that KVM handles itself (halts, the irqchip, kicks of virtio
//! queues) are not counted.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a vCPU left the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// It read a port.
    IoIn,
    /// It wrote to a port.
    IoOut,
    /// It read from a device's memory.
    MmioRead,
    /// It wrote to a device's memory.
    MmioWrite,
    /// This program took it out of the guest.
    Interrupted,
    /// It could not go on, or the guest has ended.
    Ended,
}

impl ExitKind {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::IoIn,
        Self::IoOut,
        Self::MmioRead,
        Self::MmioWrite,
        Self::Interrupted,
        Self::Ended,
    ];

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::IoIn => "io_in",
            Self::IoOut => "io_out",
            Self::MmioRead => "mmio_read",
            Self::MmioWrite => "mmio_write",
            Self::Interrupted => "interrupted",
            Self::Ended => "ended",
        }
    }
}

/// The exits of one vCPU. Only its own thread writes to them, so that vCPUs do not write to each other's cache lines.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ExitCounters([AtomicU64; ExitKind::ALL.len()]);

impl ExitCounters {
    fn of(&self, kind: ExitKind) -> &AtomicU64 {
        let [io_in, io_out, mmio_read, mmio_write, interrupted, ended] = &self.0;
        match kind {
            ExitKind::IoIn => io_in,
            ExitKind::IoOut => io_out,
            ExitKind::MmioRead => mmio_read,
            ExitKind::MmioWrite => mmio_write,
            ExitKind::Interrupted => interrupted,
            ExitKind::Ended => ended,
        }
    }

    /// Counts one more.
    pub fn count(&self, kind: ExitKind) {
        self.of(kind).fetch_add(1, Ordering::Relaxed);
    }

    /// The number of exits of a kind.
    pub fn get(&self, kind: ExitKind) -> u64 {
        self.of(kind).load(Ordering::Relaxed)
    }
}
