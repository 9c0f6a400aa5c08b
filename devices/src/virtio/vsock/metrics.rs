//! What a vsock device has done.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters since the device was made; only ever added to, but for `connections`, and read from any thread.
#[derive(Debug, Default)]
pub struct VsockMetrics {
    /// Packets to the guest.
    pub received_packets: AtomicU64,
    /// Bytes of payload to the guest.
    pub received_bytes: AtomicU64,
    /// Packets of the guest.
    pub sent_packets: AtomicU64,
    /// Bytes of payload of the guest that the host has taken.
    pub sent_bytes: AtomicU64,
    /// Connections that were opened, by either side.
    pub opened: AtomicU64,
    /// Connections that there are.
    pub connections: AtomicU64,
    /// Connections and packets that were refused with a reset.
    pub resets: AtomicU64,
    /// Buffers that hold no packet, packets that are nobody's, and rings that broke.
    pub failures: AtomicU64,
}

/// Counters are independent of each other: nothing is ordered by them.
pub(super) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}
