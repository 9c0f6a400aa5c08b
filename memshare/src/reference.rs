//! A guest's kernel is compared with one that has booted before.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::file::SharedFile;
use crate::memory::{MOST_STRIKES, SharedMemory, whole_pages};
use crate::table::{Backing, PageState, Run};
use crate::window::{PAGE_SIZE, PageKind};

/// A kernel as it stands after boot: pages of the guest are compared with it.
#[derive(Clone, Debug)]
pub(crate) struct Reference {
    pub gfns: Range<u64>,
    pub file: Arc<SharedFile>,
}

impl SharedMemory {
    /// Gives the merger a kernel as it stands after boot, in `file` from its start: pages of the guest from the guest physical
    /// `address` on are replaced by the file's where they are equal.
    ///
    /// # Errors
    /// Where the file cannot be examined.
    pub fn add_reference(&self, address: u64, len: u64, file: &Arc<File>) -> io::Result<()> {
        let file = self.files().share(file)?;
        let gfns = whole_pages(address, len.min(file.len()));
        self.state().references.push(Reference { gfns, file });
        self.stir(false);
        Ok(())
    }

    /// Notes the guest's own pages that a reference may be the same as.
    pub(crate) fn note_references(&self) {
        let references = self.state().references.clone();
        for Reference { gfns, file } in references {
            let Some((window, at)) = self.locate(&gfns) else {
                continue;
            };
            let Ok(kinds) = window.page_kinds(at, (gfns.end - gfns.start) * PAGE_SIZE) else {
                continue;
            };
            for (gfn, kind) in gfns.clone().zip(kinds) {
                if kind == PageKind::Private {
                    self.note_page(gfn, &file, (gfn - gfns.start) * PAGE_SIZE);
                }
            }
        }
    }

    /// Notes that a page of the guest's own may be the file's at `offset`, where nothing else is known of it.
    pub(crate) fn note_page(&self, gfn: u64, file: &Arc<SharedFile>, offset: u64) {
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
