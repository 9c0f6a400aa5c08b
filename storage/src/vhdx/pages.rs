//! The pages of metadata that are in memory: of the BAT, and of sector bitmaps. A page is named by its file offset.
//!
//! A page that differs from the file stays until it is committed, and one that a write in flight will change until that
//! is over; of the others a few are kept. Memory grows with what is touched between two commits, not with the disk.

use std::collections::HashMap;

use super::bat::{ENTRY, PAGE};

/// Pages kept beyond those that have to be: with blocks of 2 MiB they describe 64 GiB.
const KEPT: usize = 64;

/// The bytes of a page.
pub(super) type Bytes = Box<[u8; PAGE as usize]>;

/// A page of zeros.
pub(super) fn blank() -> Bytes {
    Box::new([0; PAGE as usize])
}

#[derive(Debug)]
struct Page {
    bytes: Bytes,
    /// Changed since it was last taken for a commit.
    dirty: bool,
    /// Taken for a commit that is not over.
    committing: bool,
    /// Names a new sector bitmap that entries on other pages count on.
    first: bool,
    /// Writes in flight that will change it.
    pins: u32,
    last_used: u64,
}

/// Where a page lies and what it holds, taken for a commit.
pub(super) struct Taken {
    pub offset: u64,
    pub bytes: Bytes,
    first: bool,
}

/// The cache. The caller locks.
#[derive(Debug, Default)]
pub(super) struct Pages {
    by_offset: HashMap<u64, Page>,
    clock: u64,
    evictions: u64,
    dirty: usize,
    committing: usize,
}

/// The page that holds a byte of the file.
pub(super) fn page_of(offset: u64) -> u64 {
    offset / PAGE * PAGE
}

impl Pages {
    /// Whether a page is here.
    pub(super) fn has(&self, page: u64) -> bool {
        self.by_offset.contains_key(&page)
    }

    /// Counts the pages that were dropped. A page that was read while the count moved may be stale.
    pub(super) fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Adds a page that was read from the file, unless it is here. Another may be dropped.
    pub(super) fn insert(&mut self, page: u64, bytes: Bytes) {
        self.clock += 1;
        let last_used = self.clock;
        self.by_offset.entry(page).or_insert(Page {
            bytes,
            dirty: false,
            committing: false,
            first: false,
            pins: 0,
            last_used,
        });
        if self.by_offset.len() <= KEPT {
            return;
        }
        let oldest = self
            .by_offset
            .iter()
            .filter(|(offset, held)| {
                !held.dirty && !held.committing && held.pins == 0 && **offset != page
            })
            .min_by_key(|(_, held)| held.last_used)
            .map(|(offset, _)| *offset);
        if let Some(oldest) = oldest {
            self.by_offset.remove(&oldest);
            self.evictions += 1;
        }
    }

    /// Forgets pages that say the same as the file, as after the file was changed past them.
    pub(super) fn forget_clean(&mut self) {
        self.by_offset
            .retain(|_, page| page.dirty || page.committing || page.pins > 0);
        self.evictions += 1;
    }

    /// Forgets the pages of a range of the file, which has come to be something else.
    pub(super) fn forget(&mut self, range: std::ops::Range<u64>) {
        debug_assert!(
            self.by_offset
                .iter()
                .all(|(offset, page)| !range.contains(offset)
                    || !(page.dirty || page.committing || page.pins > 0)),
            "nothing waits for what the range was"
        );
        self.by_offset.retain(|offset, _| !range.contains(offset));
        self.evictions += 1;
    }

    /// The bytes of a page that is here.
    pub(super) fn bytes(&mut self, page: u64) -> Option<&[u8; PAGE as usize]> {
        self.clock += 1;
        let held = self.by_offset.get_mut(&page)?;
        held.last_used = self.clock;
        Some(&held.bytes)
    }

    /// Changes a page that is here.
    pub(super) fn change(&mut self, page: u64, change: impl FnOnce(&mut [u8; PAGE as usize])) {
        if let Some(held) = self.by_offset.get_mut(&page) {
            change(&mut held.bytes);
            self.dirty += usize::from(!held.dirty);
            held.dirty = true;
        }
    }

    /// The BAT entry at a file offset, if its page is here.
    pub(super) fn entry(&mut self, offset: u64) -> Option<u64> {
        let at = (offset % PAGE) as usize;
        let bytes = self.bytes(page_of(offset))?[at..].first_chunk()?;
        Some(u64::from_le_bytes(*bytes))
    }

    /// Changes the BAT entry at a file offset, whose page is here.
    pub(super) fn set_entry(&mut self, offset: u64, raw: u64) {
        let at = (offset % PAGE) as usize;
        self.change(page_of(offset), |bytes| {
            bytes[at..at + ENTRY as usize].copy_from_slice(&raw.to_le_bytes());
        });
    }

    /// Lets a page be committed before those that are not of this kind.
    pub(super) fn commit_first(&mut self, page: u64) {
        if let Some(held) = self.by_offset.get_mut(&page) {
            held.first = true;
        }
    }

    /// Keeps a page that is here.
    pub(super) fn pin(&mut self, page: u64) {
        if let Some(held) = self.by_offset.get_mut(&page) {
            held.pins += 1;
        }
    }

    /// Ends a [`Pages::pin`].
    pub(super) fn unpin(&mut self, page: u64) {
        if let Some(held) = self.by_offset.get_mut(&page) {
            held.pins = held.pins.saturating_sub(1);
        }
    }

    /// How many pages wait for a commit.
    pub(super) fn dirty(&self) -> usize {
        self.dirty
    }

    /// Whether no page waits for a commit, or for the end of one.
    pub(super) fn is_idle(&self) -> bool {
        self.dirty == 0 && self.committing == 0
    }

    /// Copies all changed pages for a commit, in the order in which it has to describe them.
    pub(super) fn take_dirty(&mut self) -> Vec<Taken> {
        let mut taken: Vec<Taken> = self
            .by_offset
            .iter_mut()
            .filter(|(_, page)| page.dirty)
            .map(|(offset, page)| {
                page.dirty = false;
                page.committing = true;
                Taken {
                    offset: *offset,
                    bytes: page.bytes.clone(),
                    first: std::mem::take(&mut page.first),
                }
            })
            .collect();
        self.dirty = 0;
        self.committing = taken.len();
        taken.sort_unstable_by_key(|taken| (!taken.first, taken.offset));
        taken
    }

    /// Ends the commit of pages that were taken; where it failed they wait for the next.
    pub(super) fn committed(&mut self, taken: &[Taken], ok: bool) {
        for taken in taken {
            if let Some(page) = self.by_offset.get_mut(&taken.offset) {
                page.committing = false;
                if !ok {
                    self.dirty += usize::from(!page.dirty);
                    page.dirty = true;
                    page.first |= taken.first;
                }
            }
        }
        self.committing = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(pages: &mut Pages) {
        (1..200).for_each(|page| pages.insert(page * PAGE, blank()));
    }

    #[test]
    fn changed_and_pinned_pages_stay() {
        let mut pages = Pages::default();
        pages.insert(0, blank());
        pages.set_entry(24, 42);
        filled(&mut pages);
        assert_eq!(pages.entry(24), Some(42));
        let taken = pages.take_dirty();
        assert_eq!((taken.len(), pages.dirty(), pages.is_idle()), (1, 0, false));
        filled(&mut pages);
        assert_eq!(pages.entry(24), Some(42));
        pages.pin(0);
        pages.committed(&taken, true);
        assert!(pages.is_idle());
        filled(&mut pages);
        assert_eq!(pages.entry(24), Some(42));
        pages.unpin(0);
        filled(&mut pages);
        assert_eq!(pages.entry(24), None);
        assert!(pages.by_offset.len() <= KEPT);
    }

    #[test]
    fn a_page_changed_during_its_commit_or_whose_commit_failed_waits_for_the_next() {
        let mut pages = Pages::default();
        pages.insert(0, blank());
        pages.set_entry(0, 1);
        let taken = pages.take_dirty();
        pages.set_entry(8, 2);
        pages.committed(&taken, true);
        let again = pages.take_dirty();
        assert_eq!(again.len(), 1);
        assert_eq!(again[0].bytes[8], 2);
        pages.committed(&again, false);
        assert_eq!(pages.dirty(), 1);
        assert_eq!(pages.take_dirty().len(), 1);
    }

    #[test]
    fn a_page_in_memory_is_not_replaced_by_an_older_one_from_the_file() {
        let mut pages = Pages::default();
        pages.insert(0, blank());
        pages.set_entry(0, 1);
        pages.insert(0, blank());
        assert_eq!(pages.entry(0), Some(1));
    }

    #[test]
    fn pages_that_others_count_on_come_first() {
        let mut pages = Pages::default();
        for page in 0..4 {
            pages.insert(page * PAGE, blank());
            pages.set_entry(page * PAGE, 1);
        }
        pages.commit_first(2 * PAGE);
        let order: Vec<u64> = pages
            .take_dirty()
            .iter()
            .map(|taken| taken.offset / PAGE)
            .collect();
        assert_eq!(order, [2, 0, 1, 3]);
    }
}
