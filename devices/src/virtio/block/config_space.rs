//! The configuration space and the features that go with it (VIRTIO 1.2, 5.2.3 and 5.2.4).

use storage::Geometry;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::super::{RING_FEATURES, read_config_bytes};

/// The unit of every sector number in the protocol, whatever the disk's own sectors are (5.2.6).
pub(super) const SECTOR: u64 = 512;
/// Most bytes of one segment.
pub(super) const SIZE_MAX: u32 = 1 << 20;
/// Most segments of one discard or write-zeroes request.
pub(super) const MAX_RANGES: u32 = 16;
/// Most sectors of one range to discard: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Most sectors of one range to zero, 64 MiB: the host may have to write them.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 17;

/// `struct virtio_blk_config` up to the fields of features that the device lacks.
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct ConfigSpace {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    cylinders: U16,
    heads: u8,
    sectors: u8,
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

/// Most data segments of a request, with a descriptor each for header and status.
pub(super) fn seg_max(queue_size: u16) -> u32 {
    u32::from(queue_size.saturating_sub(2)).max(1)
}

impl ConfigSpace {
    pub(super) fn new(geometry: &Geometry, queues: u16, queue_size: u16) -> Self {
        let logical = geometry.logical_sector.bytes();
        let physical = geometry.physical_sector.bytes().max(logical);
        Self {
            capacity: (geometry.size / SECTOR).into(),
            size_max: SIZE_MAX.into(),
            seg_max: seg_max(queue_size).into(),
            blk_size: logical.into(),
            physical_block_exp: (physical / logical).ilog2() as u8,
            min_io_size: U16::new((physical / logical) as u16),
            num_queues: queues.into(),
            max_discard_sectors: MAX_DISCARD_SECTORS.into(),
            max_discard_seg: MAX_RANGES.into(),
            discard_sector_alignment: (geometry.discard_granularity / SECTOR as u32).max(1).into(),
            max_write_zeroes_sectors: MAX_WRITE_ZEROES_SECTORS.into(),
            max_write_zeroes_seg: MAX_RANGES.into(),
            write_zeroes_may_unmap: 1,
            ..Self::default()
        }
    }

    /// Size of the disk in sectors of 512 bytes, as the driver sees it.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity.get()
    }

    /// Fills `data` with the bytes from `offset`; those past the end are zero.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(self.as_bytes(), offset, data);
    }
}

/// What a device on such a disk offers. Without `VIRTIO_BLK_F_CONFIG_WCE` the driver chooses the cache's mode by
/// accepting `VIRTIO_BLK_F_FLUSH` or not (5.2.6.2).
pub(super) fn features(read_only: bool, queues: u16) -> u64 {
    let mut features = RING_FEATURES
        | bit(VIRTIO_BLK_F_SIZE_MAX)
        | bit(VIRTIO_BLK_F_SEG_MAX)
        | bit(VIRTIO_BLK_F_BLK_SIZE)
        | bit(VIRTIO_BLK_F_TOPOLOGY)
        | bit(VIRTIO_BLK_F_FLUSH);
    if read_only {
        features |= bit(VIRTIO_BLK_F_RO);
    } else {
        features |= bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES);
    }
    if queues > 1 {
        features |= bit(VIRTIO_BLK_F_MQ);
    }
    features
}

/// The bit of a feature.
pub(super) const fn bit(feature: u32) -> u64 {
    1 << feature
}
