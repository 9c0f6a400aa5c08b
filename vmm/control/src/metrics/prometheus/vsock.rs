//! Counters of the vsock device.

use std::fmt;

use devices::virtio::vsock::VsockMetrics;
use prometheus_client::registry::Unit;

use super::{Writer, get};

impl Writer<'_> {
    pub(super) fn vsock(&mut self, vsock: &VsockMetrics) -> fmt::Result {
        let way = |way, counter| (("to", way), get(counter));
        self.counters(
            "vsock_packets",
            None,
            "Packets to the guest, and to the host",
            [
                way("guest", &vsock.received_packets),
                way("host", &vsock.sent_packets),
            ],
        )?;
        self.counters(
            "vsock",
            Some(&Unit::Bytes),
            "What programs sent to the guest, and what they took of it",
            [
                way("guest", &vsock.received_bytes),
                way("host", &vsock.sent_bytes),
            ],
        )?;
        self.gauge(
            "vsock_connections",
            None,
            "Connections that there are",
            get(&vsock.connections),
        )?;
        let counters = [
            (
                "opened",
                &vsock.opened,
                "Connections that were opened, by either side",
            ),
            (
                "resets",
                &vsock.resets,
                "Connections and packets that were refused",
            ),
            (
                "failures",
                &vsock.failures,
                "Buffers that hold no packet, packets that are nobody's, and rings that broke",
            ),
        ];
        for (name, value, help) in counters {
            self.counter(&format!("vsock_{name}"), None, help, get(value))?;
        }
        Ok(())
    }
}
