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
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use crate::file::{FileIdentity, SharedFile, data_range};
use crate::memory::{MOST_STRIKES, SharedMemory};
use crate::merge::is_zero;
use crate::table::{Backing, PageState, Run};
use crate::window::{PAGE_SIZE, PageKind};

/// Bytes between two words of a sample; the last is the last of its page.
const STRIDE: usize = 272;
const WORD: usize = 8;
/// Pages of a file that are looked for, 256 MiB of them: more, and the guest would pay for their samples.
const MOST_PAGES: usize = 1 << 16;

/// Which pages of the guest a file's may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Where {
    /// The ones whose guest physical address is their offset.
    AtAddress,
    /// Any.
    Anywhere,
}

/// A file, and what its pages are known by.
#[derive(Debug)]
pub(crate) struct Compared {
    file: Arc<SharedFile>,
    place: Where,
    /// Page and sample, by page; or sample and page, by sample. Taken when they are first needed.
    pages: OnceLock<Vec<(u32, u32)>>,
}

/// The sample of a page, of which `read` reads eight bytes at an offset.
fn sample(mut read: impl FnMut(usize, &mut [u8; WORD])) -> u32 {
    let mut hasher = DefaultHasher::new();
    let mut word = [0; WORD];
    for offset in (WORD..PAGE_SIZE as usize).step_by(STRIDE) {
        read(offset, &mut word);
        hasher.write_u64(u64::from_ne_bytes(word));
    }
    // Half of it does: what is taken for the page and is not is compared in vain.
    hasher.finish() as u32
}

/// The pages of a file, but for holes and zeros, each with its sample.
fn samples(file: &SharedFile) -> io::Result<Vec<(u32, u32)>> {
    let mut pages = Vec::new();
    let mut bytes = [0; PAGE_SIZE as usize];
    let end = file.len() / PAGE_SIZE * PAGE_SIZE;
    let mut at = 0;
    while let Some(data) = data_range(file.file(), at, end)? {
        for page in data.start / PAGE_SIZE..data.end.div_ceil(PAGE_SIZE) {
            file.file().read_exact_at(&mut bytes, page * PAGE_SIZE)?;
            if is_zero(&bytes) {
                continue;
            }
            let of_page = sample(|offset, word| {
                let from = bytes.get(offset..).unwrap_or_default();
                *word = from.first_chunk().copied().unwrap_or_default();
            });
            match u32::try_from(page) {
                Ok(page) if pages.len() < MOST_PAGES => pages.push((page, of_page)),
                Ok(_) | Err(_) => {
                    tracing::warn!(file = %file.path().display(), "it has more pages than guests' pages are compared with");
                    return Ok(pages);
                }
            }
        }
        at = data.end.next_multiple_of(PAGE_SIZE);
    }
    Ok(pages)
}

impl Compared {
    fn new(file: Arc<SharedFile>, place: Where) -> Self {
        let pages = OnceLock::new();
        Self { file, place, pages }
    }

    /// Whether it is that file.
    pub(crate) fn is_with(&self, file: FileIdentity) -> bool {
        self.file.identity() == file
    }

    fn pages(&self) -> &[(u32, u32)] {
        self.pages.get_or_init(|| {
            let found = samples(&self.file).unwrap_or_else(|error| {
                tracing::warn!(file = %self.file.path().display(), %error, "guests' pages are not compared with it");
                Vec::new()
            });
            if self.place == Where::AtAddress {
                return found;
            }
            let mut found: Vec<_> = found.into_iter().map(|(page, of)| (of, page)).collect();
            found.sort_unstable();
            found.dedup_by_key(|(sample, _)| *sample);
            found.shrink_to_fit();
            found
        })
    }

    /// The offset in the file of the page that the guest's page with that sample may be.
    fn find(&self, gfn: u64, sample: u32) -> Option<u64> {
        let pages = self.pages();
        let page = match self.place {
            Where::AtAddress => {
                let gfn = u32::try_from(gfn).ok()?;
                let at = pages.binary_search_by_key(&gfn, |(page, _)| *page).ok()?;
                let (page, of_page) = pages.get(at)?;
                (*of_page == sample).then_some(*page)?
            }
            Where::Anywhere => {
                let at = pages.binary_search_by_key(&sample, |(sample, _)| *sample);
                pages.get(at.ok()?)?.1
            }
        };
        Some(u64::from(page) * PAGE_SIZE)
    }
}

impl SharedMemory {
    /// Gives the merger the memory of a guest that has booted the same kernel, in which offsets are guest physical addresses: pages of the guest are replaced
    /// by the file's at the same address where they are equal, while the guest boots and soon after. What is a hole there is nothing to the guest.
    ///
    /// # Errors
    /// Where the file cannot be examined, or its [domain](crate::FileRegistry::admit_by) is another.
    pub fn add_reference(&self, file: &Arc<File>) -> io::Result<()> {
        self.add_compared(file, Where::AtAddress)
    }

    /// Gives the merger a file whose pages the guest may have anywhere in its memory: those that are equal are replaced by the file's, while the guest boots
    /// and soon after.
    ///
    /// # Errors
    /// As [`SharedMemory::add_reference`].
    pub fn add_unpacked(&self, file: &Arc<File>) -> io::Result<()> {
        self.add_compared(file, Where::Anywhere)
    }

    fn add_compared(&self, file: &Arc<File>, place: Where) -> io::Result<()> {
        let compared = Compared::new(self.files().share(file)?, place);
        self.state().compared.push(Arc::new(compared));
        self.stir(false);
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
        // Where it was the file's page not long ago, the guest has written to it.
        let strikes = state.strikes(&(gfn..gfn + 1), now);
        if strikes > MOST_STRIKES {
            return;
        }
        state.candidates.insert(Run {
            gfn,
            pages: 1,
            backing: Backing {
                file: file.clone(),
                offset,
                state: PageState::Candidate { since: 0, strikes },
            },
        });
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::{FileRegistry, Limits, Region, Window};

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
    fn a_page_is_found_by_its_sample_and_zeros_are_not() {
        let file = FileRegistry::default()
            .share(&file(0, &[1, 0, 2, 1]))
            .unwrap();
        let unpacked = Compared::new(file, Where::Anywhere);
        let find = |seed: u8| unpacked.find(0, sample(|_, word| *word = [seed; WORD]));
        assert_eq!(find(1), Some(0));
        assert_eq!(find(2), Some(2 * PAGE_SIZE));
        assert_eq!(find(0), None);
        assert_eq!(find(3), None);
    }

    #[test]
    fn no_more_samples_are_kept_than_there_is_room_for() {
        // Not every file system has files of that size.
        let large = memfd_create("large", MemfdFlags::CLOEXEC).unwrap();
        let large = File::from(large);
        // Zeros that are no hole take no room; bytes beyond all pages are never reached.
        large.write_all_at(&[0; PAGE], 0).unwrap();
        large.write_all_at(&[1; PAGE], 1 << 45).unwrap();
        let file = FileRegistry::default().share(&Arc::new(large)).unwrap();
        assert!(samples(&file).unwrap().is_empty());
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
