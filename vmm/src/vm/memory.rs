//! Guest RAM: anonymous private memory, with a hole below 4 GiB for devices.

use devices::GuestMemory;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use super::VmError;
use crate::layout::{HIGH_RAM_START, MMIO_HOLE_END, MMIO_HOLE_START};

/// RAM is given in whole pages.
const PAGE_SIZE: u64 = 4096;
/// Least RAM: the boot structures and tables take the first MiB.
const MIN_SIZE: u64 = 2 * HIGH_RAM_START;
/// Most RAM: more than any host has, little enough that no address computation overflows.
const MAX_SIZE: u64 = 1 << 44;

/// Whether guest RAM may be backed by transparent huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// Never: a guest is charged for the 4 KiB pages that it touches. With huge pages, a host set to "always" rounds
    /// each touched page up to 2 MiB, which costs an idle small guest more RAM than it uses.
    #[default]
    Never,
    /// As the host is set: fewer faults and TLB misses, for guests that use most of their RAM. The guest's own page tables gain from it
    /// where the host aligns large mappings (Linux 6.7).
    HostPolicy,
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
    let mut regions = Vec::new();
    for (start, len) in ranges(size) {
        regions.push(
            region(start, len, huge_pages).map_err(|source| VmError::MapMemory { size, source })?,
        );
    }
    GuestMemory::from_regions(regions).map_err(|error| VmError::MapMemory {
        size,
        source: std::io::Error::other(error.to_string()),
    })
}

fn region(
    start: GuestAddress,
    len: u64,
    huge_pages: HugePages,
) -> std::io::Result<GuestRegionMmap> {
    let len = usize::try_from(len).map_err(std::io::Error::other)?;
    let mapping = MmapRegion::build(
        None,
        len,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
    )
    .map_err(std::io::Error::other)?;
    match huge_pages {
        HugePages::Never => no_huge_pages(&mapping),
        HugePages::HostPolicy => {}
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
        tracing::debug!(%error, "madvise(MADV_NOHUGEPAGE)");
    }
}

/// Gives guest RAM back to the host: it reads as zeros from now on, and takes a page again when it is touched. The range is made of whole pages.
///
/// # Errors
/// Where the range is not in guest RAM, or not made of whole pages; else what the host says.
pub(crate) fn give_back(
    memory: &GuestMemory,
    address: GuestAddress,
    len: u64,
) -> std::io::Result<()> {
    // The kernel would go on to the end of the last page.
    if !len.is_multiple_of(PAGE_SIZE) {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    let len = usize::try_from(len).map_err(std::io::Error::other)?;
    // The regions begin and end with a page.
    for slice in GuestMemoryBackend::get_slices(memory, address, len) {
        let slice = slice.map_err(std::io::Error::other)?;
        // SAFETY: the slice lies in a mapping that `memory` keeps, private and anonymous, and the kernel refuses an address that is not the
        // start of a page. Its bytes become zeros, as if the guest had written them: guest memory is only accessed through raw,
        // volatile accesses and by the guest itself, and no Rust reference into it exists.
        unsafe {
            rustix::mm::madvise(
                slice.ptr_guard_mut().as_ptr().cast(),
                slice.len(),
                rustix::mm::Advice::LinuxDontNeed,
            )
        }?;
    }
    Ok(())
}

/// The regions of `memory` as KVM wants them: slot, guest address, length, host address.
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
    use vm_memory::Bytes;

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
    fn what_is_given_back_reads_as_zeros_and_nothing_else_does() {
        let memory = map(1 << 32, HugePages::Never).unwrap();
        let (first, last) = (MMIO_HOLE_START - 4096, MMIO_HOLE_END);
        for address in [0, 4096, 8192, 12288, first, last] {
            memory.write_obj(7u8, GuestAddress(address)).unwrap();
        }
        give_back(&memory, GuestAddress(4096), 8192).unwrap();
        let byte = |address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!([0, 4096, 8192, 12288].map(byte), [7, 0, 0, 7]);
        for (address, len) in [
            (MMIO_HOLE_START, 4096),
            (first, 8192),
            (1 << 50, 4096),
            (u64::MAX - 4095, 4096),
            (1, 4096),
            (0, 1),
        ] {
            give_back(&memory, GuestAddress(address), len).unwrap_err();
        }
        assert_eq!([0, 12288, last].map(byte), [7; 3]);
    }

    #[test]
    fn ram_is_reserved_and_not_yet_taken() {
        let memory = map(64 << 30, HugePages::Never).unwrap();
        let total: u64 = slots(&memory).map(|(_, _, len, _)| len).sum();
        assert_eq!(total, 64 << 30);
    }
}
