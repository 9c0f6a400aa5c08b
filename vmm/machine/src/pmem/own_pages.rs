//! Which pages of a mapped disk are the guest's own, as it has written to them: for a guest that is saved, and back
//! again for one that is loaded.
//!
//! The host's page tables tell where the guest may have written: the page is no file's any more. Many such pages still
//! are as the disk has them, like those that were copied when the disk was mapped, so each is compared with the disk.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use memshare::{Backing, PAGE_SIZE, PageKind, PageState, Run, SharedFile};
use storage::{Disk, DiskError, blocking};

use super::map::MappedDisk;

/// Bytes whose page tables are looked at together: bounds what the answer takes.
const PIECE: u64 = 1 << 30;
/// Bytes of the disk that are read at once.
const STEP: u64 = 256 << 10;

/// Why it is not known which pages are the guest's own.
#[derive(Debug, thiserror::Error)]
pub enum OwnPagesError {
    /// The page tables are not to be seen.
    #[error("the host does not say which pages were written")]
    PageTables(#[from] io::Error),
    /// The disk does not say what it has there.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// What the disk holds from `at` on, and zeros past its end.
fn read_disk(disk: &dyn Disk, bytes: &mut [u8], at: u64) -> Result<(), DiskError> {
    let left = disk.geometry().size.saturating_sub(at);
    let (held, rest) = bytes.split_at_mut(left.min(bytes.len() as u64) as usize);
    rest.fill(0);
    if held.is_empty() {
        return Ok(());
    }
    blocking::read_at(disk, held, at)
}

impl MappedDisk {
    /// Runs of pages that are not as the disk has them: offsets in bytes from the first of the window, in order. The
    /// guest stands still, and nobody writes to the disk.
    pub(super) fn own_pages(&self) -> Result<Vec<Range<u64>>, OwnPagesError> {
        let mut own: Vec<Range<u64>> = Vec::new();
        let window = self.window();
        for piece in (0..window.len()).step_by(PIECE as usize) {
            let kinds = window.page_kinds(piece, PIECE.min(window.len() - piece))?;
            let laid = self.laid().lock();
            let is_candidate = |(page, kind): (u64, &PageKind)| {
                *kind == PageKind::Private || laid.get(page).is_some()
            };
            let first = piece / PAGE_SIZE;
            let candidates: Vec<u64> = (first..)
                .zip(&kinds)
                .filter(|candidate| is_candidate(*candidate))
                .map(|(page, _)| page)
                .collect();
            drop(laid);
            for run in candidates.chunk_by(|page, next| page + 1 == *next) {
                let (Some(first), Some(last)) = (run.first(), run.last()) else {
                    continue;
                };
                self.compare(first * PAGE_SIZE..(last + 1) * PAGE_SIZE, &mut own)?;
            }
        }
        Ok(own)
    }

    /// Adds the pages of a range that differ from the disk's.
    fn compare(&self, range: Range<u64>, own: &mut Vec<Range<u64>>) -> Result<(), DiskError> {
        let disk = self.disk();
        let mut buffer = vec![0; STEP.min(range.end - range.start) as usize];
        for step in range.clone().step_by(STEP as usize) {
            let held = buffer
                .get_mut(..STEP.min(range.end - step) as usize)
                .unwrap_or_default();
            read_disk(&*disk, held, step)?;
            let pages = (step..).step_by(PAGE_SIZE as usize);
            for (at, page) in pages.zip(held.chunks(PAGE_SIZE as usize)) {
                if self.window().holds(at, page) {
                    continue;
                }
                match own.last_mut() {
                    Some(last) if last.end == at => last.end += PAGE_SIZE,
                    Some(_) | None => own.push(at..at + PAGE_SIZE),
                }
            }
        }
        Ok(())
    }

    /// Maps pages of `file` over the disk's, private as those are: the guest's own from when it was saved.
    ///
    /// # Errors
    /// Where the range is outside the window or not made of whole pages, and what the host says; then nothing is
    /// changed.
    pub(super) fn lay(
        &self,
        at: u64,
        len: u64,
        file: &Arc<SharedFile>,
        offset: u64,
    ) -> io::Result<()> {
        let mut laid = self.laid().lock();
        self.window().map_file(at, len, file.file(), offset)?;
        laid.insert(Run {
            gfn: at / PAGE_SIZE,
            pages: len / PAGE_SIZE,
            backing: Backing {
                file: file.clone(),
                offset,
                state: PageState::Mapped {
                    since: 0,
                    early_writes: 0,
                },
            },
        });
        Ok(())
    }
}
