//! The configuration space and the features that go with it (VIRTIO 1.2, 5.5.3 and 5.5.4).

use zerocopy::little_endian::U32;
use zerocopy::{Immutable, IntoBytes};

use super::super::{RING_FEATURES, read_config_bytes};
use super::config::BalloonConfig;

/// There is a statistics queue.
pub(super) const F_STATS_VQ: u32 = 1;
/// The guest takes pages out of the balloon rather than run out of memory.
pub(super) const F_DEFLATE_ON_OOM: u32 = 2;
/// There is a queue for hints of free pages.
pub(super) const F_FREE_PAGE_HINT: u32 = 3;
/// There is a queue for reports of free pages.
pub(super) const F_REPORTING: u32 = 5;

/// The bytes of `actual`, the only field that the driver writes.
const ACTUAL: std::ops::Range<u64> = 4..8;

/// `struct virtio_balloon_config` up to the fields of features that the device lacks. Pages are of 4 KiB.
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct ConfigSpace {
    /// Pages that the balloon is to have.
    pub(super) num_pages: U32,
    /// Pages that it has, as the driver says.
    pub(super) actual: U32,
    pub(super) free_page_hint_cmd_id: U32,
}

impl ConfigSpace {
    /// Fills `data` with the bytes from `offset`; those past the end are zero.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(self.as_bytes(), offset, data);
    }

    /// Takes what of `data` lies in `actual`.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let mut actual = self.actual.get().to_le_bytes();
        for (at, to) in ACTUAL.zip(&mut actual) {
            let from = at
                .checked_sub(offset)
                .and_then(|index| data.get(usize::try_from(index).ok()?));
            if let Some(from) = from {
                *to = *from;
            }
        }
        self.actual = u32::from_le_bytes(actual).into();
    }
}

/// What a device offers.
///
/// `VIRTIO_BALLOON_F_PAGE_POISON` is not among it: what was given back reads as zeros, or as a file that is mapped
/// there, so no device here could promise a guest that a page comes back as the guest has filled it. A Linux guest that
/// fills its free pages, with a pattern or with zeros, does not report them then, and rightly so.
///
/// Neither is `VIRTIO_BALLOON_F_MUST_TELL_HOST`: a page is given back before the driver hears that it is in the
/// balloon, and may be used again at any time after that.
pub(super) fn features(config: &BalloonConfig) -> u64 {
    let optional = [
        (config.statistics_interval > 0, F_STATS_VQ),
        (config.deflate_on_oom, F_DEFLATE_ON_OOM),
        (config.hinting, F_FREE_PAGE_HINT),
        (config.reporting, F_REPORTING),
    ];
    optional
        .into_iter()
        .filter(|(is_wanted, _)| *is_wanted)
        .fold(RING_FEATURES, |features, (_, feature)| {
            features | bit(feature)
        })
}

/// The bit of a feature.
pub(super) const fn bit(feature: u32) -> u64 {
    1 << feature
}
