//! What a network device has done.

use std::sync::atomic::AtomicU64;

use crate::metrics::{Metric, Unit};

/// Counters since the device was made; only ever added to, and read from any thread.
#[derive(Debug, Default)]
pub struct NetMetrics {
    /// Frames to the guest.
    pub received_frames: AtomicU64,
    /// Bytes of frames to the guest, without headers of virtio.
    pub received_bytes: AtomicU64,
    /// Frames of the guest that the network has taken.
    pub sent_frames: AtomicU64,
    /// Bytes of those, without headers of virtio.
    pub sent_bytes: AtomicU64,
    /// Frames of the guest that were answered in this process.
    pub answered_frames: AtomicU64,
    /// Frames to the guest that its buffers had no room for.
    pub received_drops: AtomicU64,
    /// Frames of the guest that the network did not take.
    pub sent_drops: AtomicU64,
    /// Frames of the guest that break a rule.
    pub malformed_frames: AtomicU64,
    /// Turns of receiving that found no buffer of the guest.
    pub no_buffers: AtomicU64,
    /// How often a frame to the guest waited for its limiter.
    pub received_throttled: AtomicU64,
    /// How often a frame of the guest waited for its limiter.
    pub sent_throttled: AtomicU64,
    /// Rings that broke.
    pub failures: AtomicU64,
}

impl NetMetrics {
    /// The values at this moment.
    pub fn describe(&self) -> Vec<Metric> {
        let frames = |to, counter, field| {
            let help = "Frames to the guest, and of it to the network";
            Metric::counter("net_frames", help, counter)
                .label("to", to)
                .field(field)
        };
        let bytes = |to, counter, field| {
            let help = "Bytes of frames to the guest, and of it to the network";
            let metric = Metric::counter("net", help, counter).unit(Unit::Bytes);
            metric.label("to", to).field(field)
        };
        let drops = |to, counter, field| {
            let help = "Frames that the guest had no room for, and that the network did not take";
            Metric::counter("net_drops", help, counter)
                .label("to", to)
                .field(field)
        };
        let throttled = |to, counter, field| {
            let help = "How often frames waited for a rate limiter";
            let metric = Metric::counter("net_throttled", help, counter);
            metric.label("to", to).field(field)
        };
        vec![
            throttled(
                "guest",
                &self.received_throttled,
                "rx_rate_limiter_throttled",
            ),
            throttled("network", &self.sent_throttled, "tx_rate_limiter_throttled"),
            frames("guest", &self.received_frames, "rx_packets_count"),
            frames("network", &self.sent_frames, "tx_packets_count"),
            bytes("guest", &self.received_bytes, "rx_bytes_count"),
            bytes("network", &self.sent_bytes, "tx_bytes_count"),
            drops("guest", &self.received_drops, "rx_fails"),
            drops("network", &self.sent_drops, "tx_fails"),
            Metric::counter(
                "net_answered_frames",
                "Frames of the guest that were answered in its process",
                &self.answered_frames,
            )
            .field("tx_answered_frames"),
            Metric::counter(
                "net_malformed_frames",
                "Frames of the guest that break a rule, and were dropped",
                &self.malformed_frames,
            )
            .field("tx_malformed_frames"),
            Metric::counter(
                "net_no_buffers",
                "Turns of receiving that found no buffer of the guest",
                &self.no_buffers,
            )
            .field("no_rx_avail_buffer"),
            Metric::counter("net_failures", "Rings that broke", &self.failures)
                .field("event_fails"),
        ]
    }
}
