//! Pages that a guest has made of a file that it was given, wherever it has put them.
//!
//! A guest unpacks its initrd into pages of its choice, so that neither a device nor an address tells which are which. What a page may be is known from a
//! sample of its bytes, for all pages of the file beforehand; whether it is, the merger finds out as for any candidate. The
//! guest has the file: that one of its pages is the file's tells it nothing of anybody else.

use std::fs::File;
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::file::SharedFile;
use crate::memory::SharedMemory;
use crate::merge::is_zero;
use crate::window::{PAGE_SIZE, PageKind};

/// Bytes between two words of a sample; the last is the last of its page.
const STRIDE: usize = 272;
const WORD: usize = 8;
/// Larger files are left alone: the guest would pay for their samples.
const MOST_PAGES: u64 = (64 << 20) / PAGE_SIZE;

/// A file, and what its pages are known by.
#[derive(Debug)]
pub(crate) struct Unpacked {
    file: Arc<SharedFile>,
    /// By sample, each once: the page with it.
    pages: Vec<(u32, u32)>,
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

impl Unpacked {
    /// Of the whole pages of a file, but for those of zeros.
    fn new(file: Arc<SharedFile>) -> io::Result<Self> {
        let count = file.len() / PAGE_SIZE;
        if count > MOST_PAGES {
            let error = format!("{count} pages are more than are looked for");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, error));
        }
        let mut pages = Vec::new();
        let mut bytes = [0; PAGE_SIZE as usize];
        for page in 0..count as u32 {
            file.file()
                .read_exact_at(&mut bytes, u64::from(page) * PAGE_SIZE)?;
            if !is_zero(&bytes) {
                let of_page = sample(|offset, word| {
                    let from = bytes.get(offset..).unwrap_or_default();
                    *word = from.first_chunk().copied().unwrap_or_default();
                });
                pages.push((of_page, page));
            }
        }
        pages.sort_unstable();
        pages.dedup_by_key(|(sample, _)| *sample);
        pages.shrink_to_fit();
        Ok(Self { file, pages })
    }

    /// The offset in the file of the page that may be the one with the sample.
    fn find(&self, sample: u32) -> Option<u64> {
        let found = self
            .pages
            .binary_search_by_key(&sample, |(sample, _)| *sample);
        let (_, page) = self.pages.get(found.ok()?)?;
        Some(u64::from(*page) * PAGE_SIZE)
    }
}

impl SharedMemory {
    /// Gives the merger a file whose pages the guest may have anywhere in its memory while it boots: those that are equal are replaced by the file's.
    ///
    /// # Errors
    /// Where the file cannot be read, or is larger than 64 MiB.
    pub fn add_unpacked(&self, file: &Arc<File>) -> io::Result<()> {
        let unpacked = Unpacked::new(self.files().share(file)?)?;
        self.state().unpacked.push(Arc::new(unpacked));
        self.stir(false);
        Ok(())
    }

    /// Nobody will look for the files' pages any more.
    pub(crate) fn forget_unpacked(&self) {
        self.state().unpacked = Vec::new();
    }

    /// Notes the guest's own pages that may be a file's which it has unpacked.
    pub(crate) fn note_unpacked(&self) {
        let files = self.state().unpacked.clone();
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
                    .find_map(|file| Some((file.find(sample)?, &file.file)));
                if let Some((offset, file)) = found {
                    self.note_page(gfn, file, offset);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FileRegistry, Limits, Region, Window};

    const PAGE: usize = PAGE_SIZE as usize;

    fn file(pages: &[u8]) -> Arc<File> {
        let file = tempfile::tempfile().unwrap();
        for (index, seed) in pages.iter().enumerate() {
            let bytes = [*seed; PAGE];
            file.write_all_at(&bytes, (index * PAGE) as u64).unwrap();
        }
        Arc::new(file)
    }

    #[test]
    fn a_page_is_found_by_its_sample_and_zeros_are_not() {
        let file = FileRegistry::default().share(&file(&[1, 0, 2, 1])).unwrap();
        let unpacked = Unpacked::new(file).unwrap();
        let of = |seed: u8| sample(|_, word| *word = [seed; WORD]);
        assert_eq!(unpacked.find(of(1)), Some(0));
        assert_eq!(unpacked.find(of(2)), Some(2 * PAGE_SIZE));
        assert_eq!(unpacked.find(of(0)), None);
        assert_eq!(unpacked.find(of(3)), None);
    }

    #[test]
    fn a_large_file_is_left_alone() {
        let large = tempfile::tempfile().unwrap();
        large.set_len((MOST_PAGES + 1) * PAGE_SIZE).unwrap();
        let error = memory().add_unpacked(&Arc::new(large)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }

    fn memory() -> SharedMemory {
        let window = Window::reserve(8 * PAGE_SIZE).unwrap();
        let start = 0x10_0000;
        SharedMemory::new(vec![Region { start, window }], Limits::of_host(5, false))
    }

    #[test]
    fn pages_that_may_be_the_files_are_candidates_wherever_they_are() {
        let memory = memory();
        memory.add_unpacked(&file(&[1, 2])).unwrap();
        let window = &memory.regions()[0].window;
        for (page, seed) in [(1, 2), (3, 9), (5, 1), (6, 2)] {
            window.write(page * PAGE_SIZE, &[seed; PAGE]);
        }
        memory.note_unpacked();
        let found = memory
            .candidates()
            .into_iter()
            .map(|run| (run.gfn - 0x100, run.pages, run.backing.offset));
        let expected = [(1, 1, PAGE_SIZE), (5, 2, 0)];
        assert!(found.eq(expected), "{:?}", memory.candidates());
        memory.forget_unpacked();
        window.write(0, &[1; PAGE]);
        memory.note_unpacked();
        assert!(memory.state().candidates.get(0x100).is_none());
    }
}
