//! What the manager has done.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Why pages are not shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Guest memory and file do not lie at the same place within their pages.
    Unaligned,
    /// A read, or a part of it, of less than a page.
    Partial,
    /// The bytes of one page come from several places, as where a sector bitmap splits a block over layers; counted for
    /// each seam.
    Split,
    /// The file is one that is written to.
    Mutable,
    /// The guest had changed the page when it was compared.
    Differs,
    /// Pages like it were overwritten soon after they were shared, again and again.
    Rewritten,
    /// It would split a huge page.
    HugePage,
    /// The guest has as many runs as it may have, or the host allows no more mappings.
    MapLimit,
    /// The file has changed under the guest.
    FileChanged,
    /// The file could not be read.
    Unreadable,
    /// Guests of another domain have the file.
    Domain,
}

impl Refusal {
    /// All, with the names they have in metrics.
    pub const NAMES: [(Self, &str); 11] = [
        (Self::Unaligned, "unaligned"),
        (Self::Partial, "partial"),
        (Self::Split, "split"),
        (Self::Mutable, "mutable"),
        (Self::Differs, "differs"),
        (Self::Rewritten, "rewritten"),
        (Self::HugePage, "huge_page"),
        (Self::MapLimit, "map_limit"),
        (Self::FileChanged, "file_changed"),
        (Self::Unreadable, "unreadable"),
        (Self::Domain, "domain"),
    ];
}

/// Fewer pages than these say nothing of how a disk is laid out: a boot sector, a table of partitions, superblocks.
const FEW_PAGES: u64 = 1000;

/// Counters since the start; only ever added to, and read from any thread.
#[derive(Debug, Default)]
pub struct Stats {
    /// Pages mapped at boot.
    pub booted: AtomicU64,
    /// Pages noted as copies of a file's page.
    pub noted: AtomicU64,
    /// Pages that were compared, and replaced by the file's page.
    pub merged: AtomicU64,
    /// Pages that a read put in place without a copy.
    pub placed: AtomicU64,
    /// Pages of zeros that were read, or that the guest held, and that take no memory any more.
    pub zeroed: AtomicU64,
    /// Pages that were the file's, and that the guest has written to.
    pub copied: AtomicU64,
    /// Bytes that the guest has given back.
    pub given_back: AtomicU64,
    /// Times that the guest was held.
    pub holds: AtomicU64,
    /// Time for which it was held, in nanoseconds.
    pub held_nanoseconds: AtomicU64,
    /// The longest of those times, in nanoseconds.
    pub longest_hold_nanoseconds: AtomicU64,
    /// Files that have changed under the guest.
    pub changed_files: AtomicU64,
    /// CPU time of the merger, in nanoseconds.
    pub cpu_nanoseconds: AtomicU64,
    refused: [AtomicU64; Refusal::NAMES.len()],
}

/// Counters are independent of each other: nothing is ordered by them.
pub(crate) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

impl Stats {
    /// Counts that the guest was held for so long.
    pub(crate) fn hold(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        add(&self.holds, 1);
        add(&self.held_nanoseconds, nanoseconds);
        self.longest_hold_nanoseconds
            .fetch_max(nanoseconds, Ordering::Relaxed);
    }

    /// Counts pages that are not shared; a part of a page is one.
    pub fn refuse(&self, why: Refusal, pages: u64) {
        if let Some(counter) = self.refused.get(why as usize) {
            add(counter, pages);
        }
    }

    /// Whether most of the pages that were read from files that can be shared were not aligned as the file is, so that
    /// sharing does little for this guest. False as long as few pages were read.
    ///
    /// This is so for a file system with blocks of less than a page, and in a partition that does not begin at a
    /// multiple of a page.
    pub fn is_mostly_unaligned(&self) -> bool {
        let unaligned = self.refused(Refusal::Unaligned);
        let refused =
            [Refusal::Partial, Refusal::Split, Refusal::Domain].map(|why| self.refused(why));
        let taken = [&self.noted, &self.placed].map(|counter| counter.load(Ordering::Relaxed));
        let read = unaligned + refused.iter().chain(&taken).sum::<u64>();
        read >= FEW_PAGES && unaligned > read / 2
    }

    /// Pages that were not shared for this reason.
    pub fn refused(&self, why: Refusal) -> u64 {
        self.refused
            .get(why as usize)
            .map_or(0, |counter| counter.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_mostly_unaligned_where_more_than_half_of_many_pages_are() {
        let stats = Stats::default();
        stats.refuse(Refusal::Unaligned, FEW_PAGES - 1);
        assert!(!stats.is_mostly_unaligned(), "too few to say");
        add(&stats.noted, 1);
        assert!(stats.is_mostly_unaligned());
        add(&stats.placed, FEW_PAGES - 3);
        assert!(stats.is_mostly_unaligned());
        stats.refuse(Refusal::Partial, 1);
        assert!(!stats.is_mostly_unaligned(), "half of them are aligned");
    }
}
