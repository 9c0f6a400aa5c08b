//! The header in front of each frame in the rings, which the tap has in the same form (VIRTIO 1.2, 5.1.6).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP, VIRTIO_NET_HDR_GSO_UDP_L4,
};
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::features::has;

/// `struct virtio_net_hdr` of virtio 1, where `num_buffers` is always there (5.1.6.1).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub(super) struct NetHeader {
    pub(super) flags: u8,
    pub(super) gso_type: u8,
    pub(super) hdr_len: U16,
    pub(super) gso_size: U16,
    pub(super) csum_start: U16,
    pub(super) csum_offset: U16,
    pub(super) num_buffers: U16,
}

/// Length of the header in bytes.
pub(super) const HEADER_LEN: usize = size_of::<NetHeader>();
/// Where `num_buffers` lies in the header.
pub(super) const NUM_BUFFERS: usize = 10;

/// The longest frame that a guest may send: a packet of 65,535 bytes, behind the header of Ethernet and the tag of a
/// VLAN.
pub(super) const LONGEST_SENT: usize = 65_535 + 14 + 4;
/// The longest frame to a guest that takes segments: what a buffer has room for behind a header (5.1.6.3.1).
pub(super) const LONGEST_RECEIVED: usize = 65_550;

/// A header that breaks a rule of 5.1.6.2.1, or uses a feature that was not agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadHeader;

impl NetHeader {
    /// The header of a frame of `len` bytes, as the tap may have it: checked against the features of the driver, with
    /// the fields that mean something on this way alone.
    pub(super) fn checked(self, len: usize, features: u64) -> Result<Self, BadHeader> {
        let needs_csum = self.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM as u8 != 0;
        if needs_csum {
            // The checksum has two bytes, in the frame.
            let end = usize::from(self.csum_start.get()) + usize::from(self.csum_offset.get()) + 2;
            if !has(features, VIRTIO_NET_F_CSUM) || end > len {
                return Err(BadHeader);
            }
        }
        let ecn = self.gso_type & VIRTIO_NET_HDR_GSO_ECN as u8 != 0;
        let gso = self.gso_type & !(VIRTIO_NET_HDR_GSO_ECN as u8);
        let tcp4 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
        let tcp6 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;
        let agreed = if gso == VIRTIO_NET_HDR_GSO_NONE as u8 {
            !ecn
        } else if gso == tcp4 {
            has(features, VIRTIO_NET_F_HOST_TSO4)
        } else if gso == tcp6 {
            has(features, VIRTIO_NET_F_HOST_TSO6)
        } else if gso == VIRTIO_NET_HDR_GSO_UDP as u8 {
            has(features, VIRTIO_NET_F_HOST_UFO)
        } else {
            gso == VIRTIO_NET_HDR_GSO_UDP_L4 as u8 && has(features, VIRTIO_NET_F_HOST_USO)
        };
        let is_tcp = gso == tcp4 || gso == tcp6;
        if !agreed || (ecn && !(is_tcp && has(features, VIRTIO_NET_F_HOST_ECN))) {
            return Err(BadHeader);
        }
        let segments = gso != VIRTIO_NET_HDR_GSO_NONE as u8;
        if segments && (!needs_csum || self.gso_size.get() == 0) {
            return Err(BadHeader);
        }
        let (csum_start, csum_offset) = if needs_csum {
            (self.csum_start, self.csum_offset)
        } else {
            (U16::ZERO, U16::ZERO)
        };
        Ok(Self {
            flags: self.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM as u8,
            gso_type: self.gso_type,
            // A hint, which the host's kernel refuses where it is longer than the frame (5.1.6.2.2 has the device
            // cope).
            hdr_len: U16::new(
                self.hdr_len
                    .get()
                    .min(len.min(usize::from(u16::MAX)) as u16),
            ),
            gso_size: if segments { self.gso_size } else { U16::ZERO },
            csum_start,
            csum_offset,
            num_buffers: U16::ZERO,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;

    fn header(flags: u8, gso_type: u8, gso_size: u16, start: u16, offset: u16) -> NetHeader {
        NetHeader {
            flags,
            gso_type,
            hdr_len: U16::new(54),
            gso_size: U16::new(gso_size),
            csum_start: U16::new(start),
            csum_offset: U16::new(offset),
            num_buffers: U16::new(7),
        }
    }

    #[test]
    fn what_was_not_agreed_on_is_refused() {
        let all = u64::MAX;
        let cases = [
            (header(0, 0, 0, 0, 0), 0),
            (header(CSUM, 0, 0, 34, 16), 1 << VIRTIO_NET_F_CSUM),
            (header(CSUM, 1, 1448, 34, 16), 1 << VIRTIO_NET_F_HOST_TSO4),
            (header(CSUM, 4, 1448, 54, 16), 1 << VIRTIO_NET_F_HOST_TSO6),
            (header(CSUM, 3, 1448, 34, 6), 1 << VIRTIO_NET_F_HOST_UFO),
            (header(CSUM, 5, 1448, 34, 6), 1 << VIRTIO_NET_F_HOST_USO),
            (header(CSUM, 0x81, 1448, 34, 16), 1 << VIRTIO_NET_F_HOST_ECN),
        ];
        for (header, feature) in cases {
            let checked = header.checked(1514, all).unwrap();
            assert_eq!(checked.num_buffers.get(), 0);
            assert_eq!(checked.gso_type, header.gso_type);
            if feature != 0 {
                assert_eq!(header.checked(1514, all & !feature), Err(BadHeader));
            }
        }
    }

    #[test]
    fn a_segment_size_of_zero_and_segments_without_a_checksum_are_refused() {
        assert_eq!(
            header(CSUM, 1, 0, 34, 16).checked(1514, u64::MAX),
            Err(BadHeader)
        );
        assert_eq!(
            header(0, 1, 1448, 34, 16).checked(1514, u64::MAX),
            Err(BadHeader)
        );
        // ECN alone, and of UDP.
        assert_eq!(
            header(CSUM, 0x80, 1448, 34, 16).checked(1514, u64::MAX),
            Err(BadHeader)
        );
        assert_eq!(
            header(CSUM, 0x83, 1448, 34, 16).checked(1514, u64::MAX),
            Err(BadHeader)
        );
    }

    #[test]
    fn a_checksum_outside_of_the_frame_is_refused() {
        for (start, offset, len, good) in [
            (34, 16, 52, true),
            (34, 16, 51, false),
            (u16::MAX, u16::MAX, 1514, false),
            (0, 0, 1, false),
        ] {
            let checked = header(CSUM, 0, 0, start, offset).checked(len, u64::MAX);
            assert_eq!(checked.is_ok(), good, "{start} {offset} {len}");
        }
        // Without the flag the fields mean nothing, and the tap does not get them.
        let checked = header(2, 0, 9, u16::MAX, u16::MAX).checked(60, 0).unwrap();
        assert_eq!((checked.flags, checked.csum_start.get()), (0, 0));
        assert_eq!(checked.gso_size.get(), 0);
    }

    proptest! {
        #[test]
        fn what_passes_is_within_the_frame_and_the_features(
            flags: u8, gso_type: u8, hdr_len: u16, gso_size: u16, start: u16, offset: u16, len in 14usize..2000,
            bits: u64,
        ) {
            let hostile = NetHeader { hdr_len: U16::new(hdr_len), ..header(flags, gso_type, gso_size, start, offset) };
            if let Ok(passed) = hostile.checked(len, bits) {
                prop_assert!(usize::from(passed.hdr_len.get()) <= len);
                if passed.flags != 0 {
                    prop_assert!(has(bits, VIRTIO_NET_F_CSUM));
                    prop_assert!(usize::from(passed.csum_start.get()) + usize::from(passed.csum_offset.get()) + 2 <= len);
                }
                if passed.gso_type != 0 {
                    prop_assert!(passed.flags == CSUM && passed.gso_size.get() > 0);
                }
            }
        }
    }
}
