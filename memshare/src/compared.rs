//! Files that a guest's own pages are compared with, though no device has read them: what the guest has made itself, and the file holds all the same.
//!
//! There are two kinds. A *reference* is the memory of a guest that has booted the same kernel before, page for page at its address. A file that the guest
//! was given and *unpacks*, its initrd, becomes pages of the guest's choice, so that neither a device nor an address tells which are which.
//!
//! What a page may be is known from a sample of its bytes, taken of all pages of the file once; whether it is, the merger finds out as for any candidate. A
//! reference is of a guest in which nothing ran, and the other file the guest has: that a page is equal tells a guest nothing of anybody else.
//!
//! A guest that was loaded from a snapshot has pages of its own that are as they were there: a processor that walks the guest's page tables has written to
//! each of them for KVM, and much of what a kernel changes it changes back. It is compared with that snapshot, by the table of what was mapped.

use std::fs::File;
use std::io;
use std::sync::Arc;

use crate::file::SharedFile;
use crate::memory::SharedMemory;
use crate::sampled::{Place, SampledFile, sample};
use crate::table::{Backing, MAX_EARLY_WRITES, PageState, Run};
use crate::window::{PAGE_SIZE, PageKind};

impl SharedMemory {
    /// Gives the merger the memory of a guest that has booted the same kernel, in which offsets are guest physical addresses: pages of the guest are replaced
    /// by the file's at the same address where they are equal, while the guest boots and soon after. What is a hole there is nothing to the guest.
    ///
    /// # Errors
    /// Place the file cannot be examined, or its [domain](crate::FileRegistry::admit_by) is another.
    pub fn add_reference(&self, file: &Arc<File>) -> io::Result<()> {
        self.add_compared(file, Place::AtAddress)
    }

    /// Gives the merger a file whose pages the guest may have anywhere in its memory: those that are equal are replaced by the file's, while the guest boots
    /// and soon after.
    ///
    /// # Errors
    /// As [`SharedMemory::add_reference`].
    pub fn add_unpacked(&self, file: &Arc<File>) -> io::Result<()> {
        self.add_compared(file, Place::Anywhere)
    }

    fn add_compared(&self, file: &Arc<File>, place: Place) -> io::Result<()> {
        let compared = SampledFile::new(self.files().share(file)?, place);
        self.state().compared.push(Arc::new(compared));
        self.wake_merger();
        Ok(())
    }

    /// Nothing will be compared any more unasked.
    pub(crate) fn forget_compared(&self) {
        self.state().compared = Vec::new();
    }

    /// Notes the guest's own pages that may be pages of the files that they are compared with.
    pub(crate) fn note_compared(&self) {
        if self.limits().base {
            self.note_base();
        }
        let files = self.state().compared.clone();
        if files.is_empty() {
            return;
        }
        for region in self.regions() {
            let window = &region.window;
            let Ok(kinds) = window.page_kinds(0, window.len()) else {
                continue;
            };
            for (gfn, kind) in region.gfns().zip(kinds) {
                if kind != PageKind::Private {
                    continue;
                }
                let at = gfn * PAGE_SIZE - region.start;
                let sample = sample(|offset, word| window.read(at + offset as u64, word));
                let found = files
                    .iter()
                    .find_map(|file| Some((file.find(gfn, sample)?, &file.file)));
                if let Some((offset, file)) = found {
                    self.note_page(gfn, file, offset);
                }
            }
        }
    }

    /// Notes the guest's own pages that were a snapshot's.
    fn note_base(&self) {
        for region in self.regions() {
            let Ok(kinds) = region.window.page_kinds(0, region.window.len()) else {
                continue;
            };
            let own = region.gfns().zip(kinds);
            for (gfn, _) in own.filter(|(_, kind)| *kind == PageKind::Private) {
                let base = match self.state().base.files() {
                    Some(base) => base.get(gfn),
                    None => return,
                };
                if let Some(base) = base {
                    self.note_page(gfn, &base.file, base.offset);
                }
            }
        }
    }

    /// Notes that a page of the guest's own may be the file's at `offset`, where nothing else is known of it.
    fn note_page(&self, gfn: u64, file: &Arc<SharedFile>, offset: u64) {
        let now = self.now();
        let mut state = self.state();
        if state.candidates.get(gfn).is_some() {
            return;
        }
        // Place it was the file's page not long ago, the guest has written to it.
        let early_writes = state.early_writes(&(gfn..gfn + 1), now);
        if early_writes > MAX_EARLY_WRITES {
            return;
        }
        state.candidates.insert(Run {
            gfn,
            pages: 1,
            backing: Backing {
                file: file.clone(),
                offset,
                state: PageState::Candidate {
                    since: 0,
                    early_writes,
                },
            },
        });
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::{Limits, Region, Window};

    const PAGE: usize = PAGE_SIZE as usize;
    const START: u64 = 0x10_0000;
    const FIRST: u64 = START / PAGE_SIZE;

    /// A page of each byte from a page of the file on; zeros are holes.
    fn file(first: u64, pages: &[u8]) -> Arc<File> {
        let file = tempfile::tempfile().unwrap();
        for (page, seed) in (first..).zip(pages) {
            if *seed != 0 {
                file.write_all_at(&[*seed; PAGE], page * PAGE_SIZE).unwrap();
            }
        }
        Arc::new(file)
    }

    fn memory() -> SharedMemory {
        let window = Window::reserve(8 * PAGE_SIZE).unwrap();
        let start = START;
        SharedMemory::new(vec![Region { start, window }], Limits::of_host(5, false))
    }

    fn candidates(memory: &SharedMemory) -> Vec<(u64, u64, u64)> {
        let runs = memory.candidates().into_iter();
        runs.map(|run| (run.gfn - FIRST, run.pages, run.backing.offset))
            .collect()
    }

    #[test]
    fn pages_that_a_guest_unpacked_are_candidates_wherever_they_are() {
        let memory = memory();
        memory.add_unpacked(&file(0, &[1, 2])).unwrap();
        let window = &memory.regions()[0].window;
        for (page, seed) in [(1, 2), (3, 9), (5, 1), (6, 2)] {
            window.write(page * PAGE_SIZE, &[seed; PAGE]);
        }
        memory.note_compared();
        assert_eq!(candidates(&memory), [(1, 1, PAGE_SIZE), (5, 2, 0)]);
        memory.forget_compared();
        window.write(0, &[1; PAGE]);
        memory.note_compared();
        assert_eq!(candidates(&memory), [(1, 1, PAGE_SIZE), (5, 2, 0)]);
    }

    #[test]
    fn pages_of_a_reference_are_candidates_at_their_addresses_alone() {
        let memory = memory();
        let reference = file(FIRST, &[1, 2, 0, 4]);
        memory.add_reference(&reference).unwrap();
        let window = &memory.regions()[0].window;
        for (page, seed) in [(0, 2), (1, 2), (2, 3), (3, 4), (5, 1)] {
            window.write(page * PAGE_SIZE, &[seed; PAGE]);
        }
        memory.note_compared();
        let at = |page| (page, 1, START + page * PAGE_SIZE);
        assert_eq!(candidates(&memory), [at(1), at(3)]);
    }
}
