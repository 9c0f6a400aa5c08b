//! The features of the device (VIRTIO 1.2, 5.1.3; those of USO are of 1.3), and what the host's side has to do for
//! them.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};

use super::super::RING_FEATURES;

/// Whether a set of features has a bit.
pub(super) const fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// What the guest takes of the network: what may stand in the header of a frame that it receives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is a feature of its own"
)]
pub struct Offloads {
    /// Checksums that are to be computed yet.
    pub csum: bool,
    /// Segments of TCP over IPv4 in one frame.
    pub tso4: bool,
    /// Segments of TCP over IPv6 in one frame.
    pub tso6: bool,
    /// Such segments with congestion notified (`CWR`).
    pub ecn: bool,
    /// Fragments of a UDP datagram in one frame.
    pub ufo: bool,
    /// Segments of UDP over IPv4 in one frame.
    pub uso4: bool,
    /// Segments of UDP over IPv6 in one frame.
    pub uso6: bool,
}

/// The features that mean offloads of what the guest receives. All others need the first (5.1.3.1).
pub(super) const GUEST_OFFLOADS: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_GUEST_UFO
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;

impl Offloads {
    /// Those of a set of features.
    pub(super) fn of(features: u64) -> Self {
        let csum = has(features, VIRTIO_NET_F_GUEST_CSUM);
        let is_on = |bit| csum && has(features, bit);
        let (tso4, tso6) = (
            is_on(VIRTIO_NET_F_GUEST_TSO4),
            is_on(VIRTIO_NET_F_GUEST_TSO6),
        );
        Self {
            csum,
            tso4,
            tso6,
            ecn: (tso4 || tso6) && is_on(VIRTIO_NET_F_GUEST_ECN),
            ufo: is_on(VIRTIO_NET_F_GUEST_UFO),
            // A tap has them only together.
            uso4: is_on(VIRTIO_NET_F_GUEST_USO4) && is_on(VIRTIO_NET_F_GUEST_USO6),
            uso6: is_on(VIRTIO_NET_F_GUEST_USO4) && is_on(VIRTIO_NET_F_GUEST_USO6),
        }
    }

    /// Whether a frame can be longer than the MTU.
    pub(super) fn segments(self) -> bool {
        self.tso4 || self.tso6 || self.ufo || self.uso4 || self.uso6
    }
}

/// What a device offers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offered {
    pub(super) mtu: bool,
    pub(super) several_pairs: bool,
    /// Whether the host segments UDP.
    pub(super) uso: bool,
}

impl Offered {
    pub(super) fn features(self) -> u64 {
        let bit = |is_on: bool, bit: u32| u64::from(is_on) << bit;
        RING_FEATURES
            | GUEST_OFFLOADS & !(1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6)
            | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
            | 1 << VIRTIO_NET_F_HOST_ECN
            | 1 << VIRTIO_NET_F_HOST_UFO
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_CTRL_VQ
            | 1 << VIRTIO_NET_F_CTRL_RX
            | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
            | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
            | bit(self.mtu, VIRTIO_NET_F_MTU)
            | bit(self.several_pairs, VIRTIO_NET_F_MQ)
            | bit(self.uso, VIRTIO_NET_F_GUEST_USO4)
            | bit(self.uso, VIRTIO_NET_F_GUEST_USO6)
            | bit(self.uso, VIRTIO_NET_F_HOST_USO)
    }
}
