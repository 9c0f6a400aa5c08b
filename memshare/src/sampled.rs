//! A file whose pages are known by samples, so that the pages of a guest that may be copies of them are found without a
//! comparison of each with all.

use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use crate::file::{FileIdentity, SharedFile, data_range};
use crate::page::is_zero;
use crate::window::PAGE_SIZE;

/// Bytes between two words of a sample; the last is the last of its page.
const STRIDE: usize = 272;
const WORD: usize = 8;
/// Pages of a file that are looked for, 256 MiB of them: more, and the guest would pay for their samples.
const MAX_PAGES: usize = 1 << 16;

/// Which pages of the guest a file's may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The ones whose guest physical address is their offset.
    AtAddress,
    /// Any.
    Anywhere,
}

/// A file, and what its pages are known by.
#[derive(Debug)]
pub(crate) struct SampledFile {
    pub(crate) file: Arc<SharedFile>,
    place: Place,
    /// Page and sample, by page; or sample and page, by sample. Taken when they are first needed.
    pages: OnceLock<Vec<(u32, u32)>>,
}

/// The sample of a page, of which `read` reads eight bytes at an offset.
pub(crate) fn sample(mut read: impl FnMut(usize, &mut [u8; WORD])) -> u32 {
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
                Ok(page) if pages.len() < MAX_PAGES => pages.push((page, of_page)),
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

impl SampledFile {
    pub(crate) fn new(file: Arc<SharedFile>, place: Place) -> Self {
        let pages = OnceLock::new();
        Self { file, place, pages }
    }

    /// Whether its pages are those of `file`.
    pub(crate) fn is_of(&self, file: FileIdentity) -> bool {
        self.file.identity() == file
    }

    fn pages(&self) -> &[(u32, u32)] {
        self.pages.get_or_init(|| {
            let found = samples(&self.file).unwrap_or_else(|error| {
                tracing::warn!(file = %self.file.path().display(), error = %report::chain(&error), "guests' pages are not compared with it");
                Vec::new()
            });
            if self.place == Place::AtAddress {
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
    pub(crate) fn find(&self, gfn: u64, sample: u32) -> Option<u64> {
        let pages = self.pages();
        let page = match self.place {
            Place::AtAddress => {
                let gfn = u32::try_from(gfn).ok()?;
                let at = pages.binary_search_by_key(&gfn, |(page, _)| *page).ok()?;
                let (page, of_page) = pages.get(at)?;
                (*of_page == sample).then_some(*page)?
            }
            Place::Anywhere => {
                let at = pages.binary_search_by_key(&sample, |(sample, _)| *sample);
                pages.get(at.ok()?)?.1
            }
        };
        Some(u64::from(page) * PAGE_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::FileRegistry;

    const PAGE: usize = PAGE_SIZE as usize;

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

    #[test]
    fn a_page_is_found_by_its_sample_and_zeros_are_not() {
        let file = FileRegistry::default()
            .share(&file(0, &[1, 0, 2, 1]))
            .unwrap();
        let unpacked = SampledFile::new(file, Place::Anywhere);
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
}
