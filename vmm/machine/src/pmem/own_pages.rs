//! The pages of a mapped disk that the guest has written to, and that are its own: they are found for a snapshot, and
//! mapped again when it is loaded.
//!
//! The host's page tables show where the guest may have written: such a page is no longer a file's. Many of these pages
//! still equal the disk's, such as those that were copied when the disk was mapped, so each is compared with the disk.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use memshare::{Backing, PAGE_SIZE, PageKind, PageState, Run, SharedFile};
use storage::{Disk, DiskError, blocking};

use super::map::MappedDisk;

/// Bytes whose page tables are read at once. It bounds the memory that their entries take.
const PIECE: u64 = 1 << 30;
/// Bytes of the disk that are read at once.
const STEP: u64 = 256 << 10;

/// Why it is not known which pages are the guest's own.
#[derive(Debug, thiserror::Error)]
pub enum OwnPagesError {
    /// The page tables cannot be read.
    #[error("the host does not say which pages were written")]
    PageTables(#[from] io::Error),
    /// The disk cannot be read.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// Reads the disk from `at` on, and zeros past its end.
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
    /// Runs of pages that differ from the disk: offsets in bytes from the first of the window, in order. The guest is
    /// paused, and nobody writes to the disk.
    pub(super) fn own_pages(&self) -> Result<Vec<Range<u64>>, OwnPagesError> {
        let mut own: Vec<Range<u64>> = Vec::new();
        let window = self.window();
        for piece in (0..window.len()).step_by(PIECE as usize) {
            let kinds = window.page_kinds(piece, PIECE.min(window.len() - piece))?;
            let overlay = self.overlay().lock();
            let is_candidate = |(page, kind): (u64, &PageKind)| {
                *kind == PageKind::Private || overlay.get(page).is_some()
            };
            let first = piece / PAGE_SIZE;
            let candidates: Vec<u64> = (first..)
                .zip(&kinds)
                .filter(|candidate| is_candidate(*candidate))
                .map(|(page, _)| page)
                .collect();
            drop(overlay);
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

    /// Maps pages of `file` over the disk's, and private as those are. They are the guest's own pages of when it was
    /// saved.
    ///
    /// # Errors
    /// Where the range is outside the window or not made of whole pages, and the host's error; then nothing is changed.
    pub(super) fn map_over(
        &self,
        at: u64,
        len: u64,
        file: &Arc<SharedFile>,
        offset: u64,
    ) -> io::Result<()> {
        let mut overlay = self.overlay().lock();
        self.window().map_file(at, len, file.file(), offset)?;
        overlay.insert(Run {
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
