//! The pages of the BAT that are in memory.
//!
//! A page that differs from the file stays until it is committed; of the others a few are kept.
//! Memory grows with what is touched between two commits, not with the disk.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

use super::bat::{ENTRIES_PER_PAGE, PAGE};

/// The entries of a page.
pub(super) type Entries = Box<[U64; ENTRIES_PER_PAGE as usize]>;

/// Pages kept beyond those that have to be: with blocks of 2 MiB they describe 64 GiB.
const KEPT: usize = 64;

#[derive(Debug)]
struct Page {
    entries: Entries,
    /// Changed since it was last taken for a commit.
    dirty: bool,
    /// Taken for a commit that is not over.
    committing: bool,
    last_used: u64,
}

/// A page's number and what it holds, taken for a commit.
pub(super) struct Taken {
    pub page: u64,
    pub bytes: Box<[u8; PAGE as usize]>,
}

/// The cache. The caller locks.
#[derive(Debug, Default)]
pub(super) struct Pages {
    by_number: HashMap<u64, Page>,
    clock: u64,
    evictions: u64,
}

impl Pages {
    /// Whether a page is here.
    pub(super) fn has(&self, page: u64) -> bool {
        self.by_number.contains_key(&page)
    }

    /// Counts the pages that were dropped. A page that was read while the count moved may be stale.
    pub(super) fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Adds a page that was read from the file, unless it is here. Others than those of `wanted` may be dropped.
    pub(super) fn insert(&mut self, page: u64, entries: Entries, wanted: &RangeInclusive<u64>) {
        self.clock += 1;
        let last_used = self.clock;
        self.by_number.entry(page).or_insert(Page {
            entries,
            dirty: false,
            committing: false,
            last_used,
        });
        if self.by_number.len() <= KEPT {
            return;
        }
        let oldest = self
            .by_number
            .iter()
            .filter(|(number, page)| !page.dirty && !page.committing && !wanted.contains(number))
            .min_by_key(|(_, page)| page.last_used)
            .map(|(number, _)| *number);
        if let Some(oldest) = oldest {
            self.by_number.remove(&oldest);
            self.evictions += 1;
        }
    }

    /// The entry of an index, if its page is here.
    pub(super) fn get(&mut self, index: u64) -> Option<u64> {
        self.clock += 1;
        let page = self.by_number.get_mut(&(index / ENTRIES_PER_PAGE))?;
        page.last_used = self.clock;
        Some(page.entries[(index % ENTRIES_PER_PAGE) as usize].get())
    }

    /// Changes an entry whose page is here.
    pub(super) fn set(&mut self, index: u64, raw: u64) {
        if let Some(page) = self.by_number.get_mut(&(index / ENTRIES_PER_PAGE)) {
            page.entries[(index % ENTRIES_PER_PAGE) as usize] = raw.into();
            page.dirty = true;
        }
    }

    /// How many pages wait for a commit.
    pub(super) fn dirty(&self) -> usize {
        self.by_number.values().filter(|page| page.dirty).count()
    }

    /// Whether a page waits for a commit, or for the end of one.
    pub(super) fn is_settled(&self) -> bool {
        !self
            .by_number
            .values()
            .any(|page| page.dirty || page.committing)
    }

    /// Copies all changed pages for a commit, in order.
    pub(super) fn take_dirty(&mut self) -> Vec<Taken> {
        let mut taken: Vec<Taken> = self
            .by_number
            .iter_mut()
            .filter(|(_, page)| page.dirty)
            .map(|(number, page)| {
                page.dirty = false;
                page.committing = true;
                let mut bytes = Box::new([0; PAGE as usize]);
                bytes.copy_from_slice(page.entries.as_bytes());
                Taken {
                    page: *number,
                    bytes,
                }
            })
            .collect();
        taken.sort_unstable_by_key(|taken| taken.page);
        taken
    }

    /// Ends the commit of pages that were taken.
    pub(super) fn committed(&mut self, taken: &[Taken]) {
        for taken in taken {
            if let Some(page) = self.by_number.get_mut(&taken.page) {
                page.committing = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> Entries {
        Box::new([U64::ZERO; ENTRIES_PER_PAGE as usize])
    }

    #[test]
    fn changed_pages_stay_until_their_commit_is_over() {
        let mut pages = Pages::default();
        pages.insert(0, empty(), &(0..=0));
        pages.set(3, 42);
        let fill = |pages: &mut Pages| {
            (1..200).for_each(|page| pages.insert(page, empty(), &(page..=page)));
        };
        fill(&mut pages);
        assert_eq!(pages.get(3), Some(42));
        let taken = pages.take_dirty();
        assert_eq!(
            (taken.len(), pages.dirty(), pages.is_settled()),
            (1, 0, false)
        );
        fill(&mut pages);
        assert_eq!(pages.get(3), Some(42));
        pages.committed(&taken);
        assert!(pages.is_settled());
        fill(&mut pages);
        assert_eq!(pages.get(3), None);
        assert!(pages.by_number.len() <= KEPT);
    }

    #[test]
    fn a_page_changed_during_its_commit_waits_for_the_next() {
        let mut pages = Pages::default();
        pages.insert(0, empty(), &(0..=0));
        pages.set(0, 1);
        let taken = pages.take_dirty();
        pages.set(1, 2);
        pages.committed(&taken);
        let again = pages.take_dirty();
        assert_eq!(again.len(), 1);
        assert_eq!(again[0].bytes[8], 2);
    }

    #[test]
    fn a_page_in_memory_is_not_replaced_by_an_older_one_from_the_file() {
        let mut pages = Pages::default();
        pages.insert(0, empty(), &(0..=0));
        pages.set(0, 1);
        pages.insert(0, empty(), &(0..=0));
        assert_eq!(pages.get(0), Some(1));
    }
}
