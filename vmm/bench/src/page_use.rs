//! What a guest uses each page of its RAM for, by its own `/proc/kpageflags`, and where the host has that page.
//!
//! The guest writes its flags, as of shortly before it idles, to a disk that has no other purpose. Nothing relies on
//! that they are right: each page is counted once, whatever its flags are.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use memshare::PageKind;
use serde::{Deserialize, Serialize};

use super::error::BenchError;
use super::kernel_map::Part;
use super::pagemap::{ENTRY, PAGE};
use kvm::layout::MMIO_HOLE_START;

/// Bits of `kpageflags` (Linux, include/uapi/linux/kernel-page-flags.h).
const REFERENCED: u64 = 1 << 2;
const UPTODATE: u64 = 1 << 3;
const LRU: u64 = 1 << 5;
const SLAB: u64 = 1 << 7;
const BUDDY: u64 = 1 << 10;
const MMAP: u64 = 1 << 11;
const ANON: u64 = 1 << 12;
const SWAPBACKED: u64 = 1 << 14;
const COMPOUND_HEAD: u64 = 1 << 15;
const COMPOUND_TAIL: u64 = 1 << 16;
const NOPAGE: u64 = 1 << 20;
/// Given to the host by the balloon.
const OFFLINE: u64 = 1 << 23;
const PGTABLE: u64 = 1 << 26;
/// This flag is not part of the stable interface: include/linux/kernel-page-flags.h.
const RESERVED: u64 = 1 << 32;

/// Pages that a guest uses for one thing, in KiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Use {
    /// What it uses them for.
    pub name: String,
    /// Private pages of the guest's process.
    pub private_kib: u64,
    /// Private pages that hold only zeros.
    pub zero_kib: u64,
    /// Pages of a file.
    pub file_kib: u64,
    /// Absent pages: never touched, or given back.
    pub absent_kib: u64,
}

/// What the guest's kernel uses a page for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Free,
    Slab,
    PageTables,
    Reserved,
    Balloon,
    NoPage,
    Anonymous,
    Shmem,
    PageCache,
    OtherKernel,
}

impl Kind {
    fn of(flags: u64) -> Self {
        let has = |bits| flags & bits == bits;
        if has(BUDDY) {
            Self::Free
        } else if has(SLAB) {
            Self::Slab
        } else if has(PGTABLE) {
            Self::PageTables
        } else if has(RESERVED) {
            Self::Reserved
        } else if has(OFFLINE) {
            Self::Balloon
        } else if has(NOPAGE) {
            Self::NoPage
        } else if has(ANON) {
            Self::Anonymous
        } else if has(SWAPBACKED) {
            // Shared memory is backed by swap, and is not anonymous memory.
            Self::Shmem
        } else if has(LRU) || has(UPTODATE) || has(REFERENCED | MMAP) {
            Self::PageCache
        } else {
            Self::OtherKernel
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Slab => "slab",
            Self::PageTables => "page tables",
            Self::Reserved => "reserved: struct pages, boot allocations",
            Self::Balloon => "balloon",
            Self::NoPage => "no RAM to the guest",
            Self::Anonymous => "anonymous",
            Self::Shmem => "shmem, rootfs",
            Self::PageCache => "page cache of files",
            Self::OtherKernel => "other kernel allocations",
        }
    }
}

/// The length in bytes of the flags for so many MiB of guest RAM.
pub(super) fn flags_len(mebibytes: u32) -> u64 {
    (u64::from(mebibytes) << 20) / PAGE * ENTRY
}

/// Makes the disk for a guest's flags. `None` for a guest with RAM above the hole, where numbers of page frames and
/// offsets in RAM differ.
pub(super) fn disk(mebibytes: u32) -> Result<Option<tempfile::NamedTempFile>, BenchError> {
    if u64::from(mebibytes) << 20 > MMIO_HOLE_START {
        return Ok(None);
    }
    let new = || -> std::io::Result<_> {
        let disk = tempfile::NamedTempFile::new()?;
        let len = flags_len(mebibytes).next_multiple_of(1 << 20);
        disk.as_file().set_len(len)?;
        Ok(Some(disk))
    };
    new().map_err(BenchError::io("make a disk for a guest's page flags"))
}

/// The flags that the guest has written; `None` where its kernel has no `kpageflags`.
pub(super) fn flags(disk: &File, mebibytes: u32) -> Result<Option<Vec<u64>>, BenchError> {
    let mut bytes = vec![0; flags_len(mebibytes) as usize];
    disk.read_exact_at(&mut bytes, 0)
        .map_err(BenchError::io("read a guest's page flags"))?;
    let (entries, _) = bytes.as_chunks();
    let flags: Vec<_> = entries
        .iter()
        .map(|entry| u64::from_le_bytes(*entry))
        .collect();
    Ok(flags.iter().any(|flags| *flags != 0).then_some(flags))
}

/// Guest RAM in the memory of its process.
pub(super) struct Ram {
    memory: File,
    path: String,
    range: Range<u64>,
}

impl Ram {
    /// The addresses `range` of a process.
    pub(super) fn of(pid: u32, range: Range<u64>) -> Result<Self, BenchError> {
        let path = format!("/proc/{pid}/mem");
        let memory = File::open(&path).map_err(BenchError::io(format!("open {path}")))?;
        Ok(Self {
            memory,
            path,
            range,
        })
    }

    /// Whether a page holds only zeros. Reading an absent page does not make it present.
    pub(super) fn is_zero(&self, page: u64) -> Result<bool, BenchError> {
        let mut bytes = [0; PAGE as usize];
        self.memory
            .read_exact_at(&mut bytes, self.range.start + page * PAGE)
            .map_err(BenchError::io(format!("read {}", self.path)))?;
        Ok(bytes.iter().all(|byte| *byte == 0))
    }
}

/// Counts the pages of guest RAM, which starts at guest address 0, by what the guest uses them for; the use with the
/// most private pages is first. A reserved page gets the name of the one of `parts` that is there, which distinguishes
/// the kernel's image from other reserved memory. `is_zero` is called for private pages.
pub(super) fn uses(
    flags: &[u64],
    entries: &[u64],
    parts: &[Part],
    is_zero: impl Fn(u64) -> Result<bool, BenchError>,
) -> Result<Vec<Use>, BenchError> {
    let mut uses: Vec<Use> = Vec::new();
    let mut head = 0;
    for (page, entry) in (0..).zip(entries) {
        let mut own = flags.get(page as usize).copied().unwrap_or(NOPAGE);
        // Some kernels set the flags for the use of an allocation only on its first page.
        if own & COMPOUND_TAIL != 0 {
            own |= head;
        } else {
            head = if own & COMPOUND_HEAD != 0 { own } else { 0 };
        }
        let kind = Kind::of(own);
        let part = parts
            .iter()
            .find(|part| part.range.contains(&(page * PAGE)))
            .filter(|_| kind == Kind::Reserved);
        let name = part.map_or(kind.name(), |part| &part.name);
        let index = uses
            .iter()
            .position(|known| known.name == name)
            .unwrap_or(uses.len());
        if index == uses.len() {
            uses.push(Use {
                name: name.to_owned(),
                private_kib: 0,
                zero_kib: 0,
                file_kib: 0,
                absent_kib: 0,
            });
        }
        let counted = &mut uses[index];
        match PageKind::of(*entry) {
            PageKind::Private => {
                counted.private_kib += PAGE / 1024;
                if is_zero(page)? {
                    counted.zero_kib += PAGE / 1024;
                }
            }
            PageKind::File => counted.file_kib += PAGE / 1024,
            PageKind::Absent => counted.absent_kib += PAGE / 1024,
        }
    }
    uses.sort_by(|one, other| {
        let key = |row: &Use| (row.private_kib, row.file_kib, row.absent_kib);
        key(other).cmp(&key(one))
    });
    Ok(uses)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::explain::tests::{FILE_PAGE, PRIVATE_PAGE, part};
    use super::*;

    #[test]
    fn flags_say_what_a_page_is_for() {
        for (flags, kind) in [
            (BUDDY, Kind::Free),
            (SLAB, Kind::Slab),
            (PGTABLE | MMAP, Kind::PageTables),
            (RESERVED, Kind::Reserved),
            (OFFLINE, Kind::Balloon),
            (NOPAGE, Kind::NoPage),
            (ANON | MMAP | LRU | UPTODATE | SWAPBACKED, Kind::Anonymous),
            (UPTODATE | LRU | SWAPBACKED, Kind::Shmem),
            (LRU, Kind::PageCache),
            (UPTODATE, Kind::PageCache),
            (REFERENCED | MMAP, Kind::PageCache),
            (REFERENCED, Kind::OtherKernel),
            (COMPOUND_HEAD, Kind::OtherKernel),
            (0, Kind::OtherKernel),
        ] {
            assert_eq!(Kind::of(flags), kind, "{flags:#x}");
        }
    }

    #[test]
    fn pages_are_counted_by_use_and_by_where_the_host_has_them() {
        let flags = [RESERVED, RESERVED, BUDDY, SLAB, SLAB, SLAB, BUDDY];
        let entries = [
            PRIVATE_PAGE,
            FILE_PAGE,
            0,
            PRIVATE_PAGE,
            PRIVATE_PAGE,
            FILE_PAGE,
            0,
        ];
        let parts = [part("kernel text", PAGE..3 * PAGE)];
        let uses = uses(&flags, &entries, &parts, |page| Ok(page == 4)).unwrap();
        let figures: Vec<_> = uses
            .iter()
            .map(|row| {
                (
                    row.name.as_str(),
                    [row.private_kib, row.zero_kib, row.file_kib, row.absent_kib],
                )
            })
            .collect();
        // A free page inside the kernel's image counts as free.
        assert_eq!(
            figures,
            [
                ("slab", [8, 4, 4, 0]),
                ("reserved: struct pages, boot allocations", [4, 0, 0, 0]),
                ("kernel text", [0, 0, 4, 0]),
                ("free", [0, 0, 0, 8]),
            ]
        );
    }

    #[test]
    fn an_allocation_of_many_pages_is_used_as_its_first() {
        let flags = [
            SLAB | COMPOUND_HEAD,
            COMPOUND_TAIL,
            COMPOUND_HEAD,
            COMPOUND_TAIL,
        ];
        let uses = uses(&flags, &[0; 4], &[], |_| Ok(false)).unwrap();
        let figures: Vec<_> = uses
            .iter()
            .map(|row| (row.name.as_str(), row.absent_kib))
            .collect();
        assert_eq!(figures, [("slab", 8), ("other kernel allocations", 8)]);
    }

    #[test]
    fn pages_without_flags_are_no_ram_to_the_guest() {
        let uses = uses(&[], &[PRIVATE_PAGE], &[], |_| Ok(false)).unwrap();
        assert_eq!(uses[0].name, Kind::NoPage.name());
        assert_eq!(uses[0].private_kib, 4);
    }

    #[test]
    fn only_private_pages_are_looked_at() {
        let seen = std::cell::RefCell::new(Vec::new());
        let entries = [0, FILE_PAGE, PRIVATE_PAGE];
        uses(&[0; 3], &entries, &[], |page| {
            seen.borrow_mut().push(page);
            Ok(false)
        })
        .unwrap();
        assert_eq!(*seen.borrow(), [2]);
    }

    #[test]
    fn a_disk_has_room_for_all_flags_and_an_unwritten_one_has_none() {
        let mut disk = disk(513).unwrap().unwrap();
        assert_eq!(disk.as_file().metadata().unwrap().len(), 2 << 20);
        assert_eq!(flags(disk.as_file(), 513).unwrap(), None);
        disk.write_all(&[0, 4]).unwrap();
        let flags = flags(disk.as_file(), 513).unwrap().unwrap();
        assert_eq!((flags.len(), flags[0], flags[1]), (513 * 256, BUDDY, 0));
    }

    #[test]
    fn there_is_no_disk_for_ram_beyond_the_hole() {
        assert!(disk(3072).unwrap().is_some());
        assert!(disk(3073).unwrap().is_none());
    }

    #[test]
    fn zeros_are_seen_in_the_memory_of_a_process() {
        let pages = vec![0u8; 4 * PAGE as usize];
        let start = (pages.as_ptr() as u64).next_multiple_of(PAGE);
        let mut pages = pages;
        let second = (start - pages.as_ptr() as u64 + 2 * PAGE - 1) as usize;
        pages[second] = 1;
        let ram = Ram::of(std::process::id(), start..start + 2 * PAGE).unwrap();
        assert!(ram.is_zero(0).unwrap() && !ram.is_zero(1).unwrap());
        assert_eq!(pages[second], 1);
    }
}
