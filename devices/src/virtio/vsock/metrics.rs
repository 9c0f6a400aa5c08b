//! What a vsock device has done.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::metrics::{Metric, Unit};

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

impl VsockMetrics {
    /// The values at this moment.
    pub fn describe(&self) -> Vec<Metric> {
        let packets = |to, counter, field| {
            let help = "Packets to the guest, and to the host";
            let metric = Metric::counter("vsock_packets", help, counter);
            metric.label("to", to).field(field)
        };
        let bytes = |to, counter, field| {
            let help = "What programs sent to the guest, and what they took of it";
            let metric = Metric::counter("vsock", help, counter).unit(Unit::Bytes);
            metric.label("to", to).field(field)
        };
        let open = self.connections.load(Ordering::Relaxed);
        vec![
            packets("guest", &self.received_packets, "rx_packets_count"),
            packets("host", &self.sent_packets, "tx_packets_count"),
            bytes("guest", &self.received_bytes, "rx_bytes_count"),
            bytes("host", &self.sent_bytes, "tx_bytes_count"),
            Metric::gauge("vsock_connections", "Connections that there are", open)
                .field("conns_open"),
            Metric::counter(
                "vsock_opened",
                "Connections that were opened, by either side",
                &self.opened,
            )
            .field("conns_added"),
            Metric::counter(
                "vsock_resets",
                "Connections and packets that were refused",
                &self.resets,
            )
            .field("conns_killed"),
            Metric::counter(
                "vsock_failures",
                "Buffers that hold no packet, packets that are nobody's, and rings that broke",
                &self.failures,
            )
            .field("event_fails"),
        ]
    }
}
