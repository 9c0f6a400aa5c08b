//! `struct virtio_net_config` (VIRTIO 1.2, 5.1.4).

use virtio_bindings::virtio_net::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};
use zerocopy::little_endian::U16;
use zerocopy::{Immutable, IntoBytes};

#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct ConfigSpace {
    pub(super) mac: [u8; 6],
    status: U16,
    max_virtqueue_pairs: U16,
    pub(super) mtu: U16,
}

impl ConfigSpace {
    pub(super) fn new(mac: [u8; 6], pairs: u16, mtu: Option<u16>) -> Self {
        Self {
            mac,
            status: U16::new(VIRTIO_NET_S_LINK_UP as u16),
            max_virtqueue_pairs: U16::new(pairs),
            // Means nothing where the feature is not offered.
            mtu: U16::new(mtu.unwrap_or_default()),
        }
    }

    pub(super) fn announces(&self) -> bool {
        self.status.get() & VIRTIO_NET_S_ANNOUNCE as u16 != 0
    }

    /// Asks the driver to tell the network where the guest is (5.1.6.5.4), or no more.
    pub(super) fn set_announces(&mut self, announces: bool) {
        let bit = if announces { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        self.status = U16::new((VIRTIO_NET_S_LINK_UP | bit) as u16);
    }
}
