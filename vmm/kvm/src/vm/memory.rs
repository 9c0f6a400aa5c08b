//! Guest RAM: anonymous private memory, with a hole below 4 GiB for devices.

use std::sync::Arc;

use devices::GuestMemory;
use memshare::{Limits, Region, SharedMemory, Window};
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use vm_memory::mmap::MmapRegionError;

use super::error::VmError;
use config::HugePageConfig;

use crate::layout::{HIGH_RAM_START, HUGETLBFS_PAGE, MMIO_HOLE_END, MMIO_HOLE_START};

/// The size of RAM is a multiple of this, in bytes.
const PAGE_SIZE: u64 = 4096;
/// The smallest RAM: the boot structures and tables take the first MiB.
const MIN_SIZE: u64 = 2 * HIGH_RAM_START;
/// The largest RAM: more than any host has, and small enough that no address computation overflows.
const MAX_SIZE: u64 = 1 << 44;

/// Whether guest RAM is backed by huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// Never: a guest is charged for the 4 KiB pages that it touches. With huge pages, a host set to "always" rounds
    /// each touched page up to 2 MiB, which costs an idle small guest more RAM than it uses.
    #[default]
    Never,
    /// As the host is configured. A guest that uses most of its RAM then has fewer faults and TLB misses, and gains
    /// from it in its own page tables where the host aligns large mappings (Linux 6.7).
    HostPolicy,
    /// Huge pages of 2 MiB that the host has reserved (hugetlbfs): all are set aside for the guest when it is made, and
    /// taken when it touches them.
    Hugetlbfs,
}

impl From<HugePageConfig> for HugePages {
    fn from(config: HugePageConfig) -> Self {
        match config {
            HugePageConfig::Transparent => Self::HostPolicy,
            HugePageConfig::Hugetlbfs2M => Self::Hugetlbfs,
            HugePageConfig::None => Self::Never,
        }
    }
}

/// The ranges of RAM for `size` bytes: start and length, by address.
fn ranges(size: u64) -> Vec<(GuestAddress, u64)> {
    let low = size.min(MMIO_HOLE_START);
    let mut ranges = vec![(GuestAddress(0), low)];
    if size > low {
        ranges.push((GuestAddress(MMIO_HOLE_END), size - low));
    }
    ranges
}

/// Maps `size` bytes of guest RAM. Pages are taken from the host when the guest touches them.
pub(super) fn map(size: u64, huge_pages: HugePages) -> Result<GuestMemory, VmError> {
    if !(MIN_SIZE..=MAX_SIZE).contains(&size) || !size.is_multiple_of(PAGE_SIZE) {
        return Err(VmError::MemorySize {
            size,
            min: MIN_SIZE,
            max: MAX_SIZE,
        });
    }
    if huge_pages == HugePages::Hugetlbfs && !size.is_multiple_of(HUGETLBFS_PAGE) {
        return Err(VmError::HugePageSize { size });
    }
    let mut regions = Vec::new();
    for (start, len) in ranges(size) {
        regions.push(
            region(start, len, huge_pages).map_err(|source| match huge_pages {
                HugePages::Hugetlbfs => VmError::MapHugePages { size, source },
                HugePages::Never | HugePages::HostPolicy => VmError::MapMemory { size, source },
            })?,
        );
    }
    GuestMemory::from_regions(regions).map_err(|error| VmError::MapMemory {
        size,
        source: std::io::Error::other(error),
    })
}

fn region(
    start: GuestAddress,
    len: u64,
    huge_pages: HugePages,
) -> std::io::Result<GuestRegionMmap> {
    let len = usize::try_from(len).map_err(std::io::Error::other)?;
    let how = match huge_pages {
        HugePages::Never | HugePages::HostPolicy => libc::MAP_NORESERVE,
        // Without MAP_NORESERVE the host sets the pages aside or refuses them now; otherwise the guest would end by a
        // bus error when it touches one that there is not.
        HugePages::Hugetlbfs => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
    };
    let mapping = MmapRegion::build(
        None,
        len,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | how,
    )
    .map_err(|error| match error {
        MmapRegionError::Mmap(error) => error,
        other => std::io::Error::other(other),
    })?;
    match huge_pages {
        HugePages::Never => no_huge_pages(&mapping),
        HugePages::HostPolicy | HugePages::Hugetlbfs => {}
    }
    GuestRegionMmap::new(mapping, start)
        .ok_or_else(|| std::io::Error::other("the region passes the end of the address space"))
}

fn no_huge_pages(mapping: &MmapRegion) {
    // SAFETY: the range is exactly a mapping that `mapping` owns; the advice changes no content and no permission.
    let advised = unsafe {
        rustix::mm::madvise(
            mapping.as_ptr().cast(),
            mapping.size(),
            rustix::mm::Advice::LinuxNoHugepage,
        )
    };
    if let Err(error) = advised {
        // A kernel built without huge pages refuses the advice, and needs none.
        tracing::debug!(error = %host::report::chain(&error), "madvise(MADV_NOHUGEPAGE)");
    }
}

/// Guest RAM as [`SharedMemory`], so that its pages can be shared.
pub(crate) fn shared(memory: &GuestMemory, limits: Limits) -> SharedMemory {
    let regions = memory.iter().map(|region| {
        // SAFETY: the range is the whole mapping of a region of RAM, anonymous and private as `region` made it, of
        // whole pages as `map` checked, and mapped as long as the clone of `memory` lives. Guest memory is accessed
        // through raw pointers and system calls alone, so that no reference is affected by what is mapped there.
        let window =
            unsafe { Window::over(region.as_ptr(), region.len(), Arc::new(memory.clone())) };
        Region {
            start: region.start_addr().raw_value(),
            window,
        }
    });
    SharedMemory::new(regions.collect(), limits)
}

/// The regions of `memory` as arguments of KVM: slot, guest address, length, host address.
pub(super) fn slots(memory: &GuestMemory) -> impl Iterator<Item = (u32, u64, u64, u64)> + '_ {
    memory.iter().zip(0..).map(|(region, slot)| {
        (
            slot,
            region.start_addr().raw_value(),
            region.len(),
            region.as_ptr() as u64,
        )
    })
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn ram_leaves_the_hole_below_4_gib_free() {
        assert_eq!(ranges(128 << 20), [(GuestAddress(0), 128 << 20)]);
        assert_eq!(ranges(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(
            ranges(5 << 30),
            [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]
        );
    }

    #[test]
    fn sizes_that_make_no_guest_are_refused() {
        for size in [
            0,
            4096,
            MIN_SIZE - 4096,
            MIN_SIZE + 1,
            MAX_SIZE + 4096,
            u64::MAX,
        ] {
            assert!(
                matches!(map(size, HugePages::Never), Err(VmError::MemorySize { .. })),
                "{size:#x}"
            );
        }
    }

    #[test]
    fn ram_is_reserved_and_not_yet_taken() {
        let memory = map(64 << 30, HugePages::Never).unwrap();
        let total: u64 = slots(&memory).map(|(_, _, len, _)| len).sum();
        assert_eq!(total, 64 << 30);
    }
}
