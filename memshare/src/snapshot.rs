//! What of a guest's memory a snapshot has to hold, and memory that begins as that of one.
//!
//! The *base* is what the memory was when the guest was last the same as its snapshot: each page was that of a file, or zeros. A page that still is needs
//! not be saved again; the host's page tables tell, so that nothing has to be logged while the guest runs.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::file::SharedFile;
use crate::memory::{Base, Region, SharedMemory, State};
use crate::stats::add;
use crate::table::{Table, alike};
use crate::window::{PAGE_SIZE, PageKind};

/// What a page is to a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros, and nothing in the host's memory.
    Zeros,
    /// As it is in the base.
    Base,
    /// Bytes that have to be read.
    Bytes,
}

/// What the pages of a region are, in order.
fn contents(state: &State, base: Option<&Table>, region: &Region) -> io::Result<Vec<Content>> {
    let kinds = region.window.page_kinds(0, region.window.len())?;
    let gfns = region.gfns();
    let untouched = match base {
        Some(_) => Content::Base,
        None if matches!(state.base, Base::Unknown) => Content::Bytes,
        None => Content::Zeros,
    };
    let mut contents = vec![untouched; kinds.len()];
    let mut fill = |part: Range<u64>, content| {
        let range = (part.start - gfns.start) as usize..(part.end - gfns.start) as usize;
        if let Some(pages) = contents.get_mut(range) {
            pages.fill(content);
        }
    };
    // Where the base has a page that is not mapped any more, the guest gave it back: a reader would take a hole for the base's page, so that these
    // zeros have to be there.
    for run in base.into_iter().flat_map(|base| base.within(gfns.clone())) {
        fill(run.gfns(), Content::Bytes);
    }
    for run in state.mapped.within(gfns.clone()) {
        fill(run.gfns(), Content::Bytes);
    }
    for run in base.into_iter().flat_map(|base| base.within(gfns.clone())) {
        for now in state.mapped.within(run.gfns()) {
            if run.backing.leads_to(now.gfn - run.gfn, &now.backing) {
                fill(now.gfns(), Content::Base);
            }
        }
    }
    for (content, kind) in contents.iter_mut().zip(kinds) {
        if kind == PageKind::Private {
            *content = Content::Bytes;
        }
    }
    Ok(contents)
}

impl SharedMemory {
    /// As [`SharedMemory::map`], and makes what is mapped the base of the pages.
    ///
    /// # Errors
    /// As [`SharedMemory::map`].
    pub fn map_base(
        &self,
        address: u64,
        len: u64,
        file: &Arc<SharedFile>,
        offset: u64,
    ) -> io::Result<()> {
        let mut state = self.state();
        let run = self.map_locked(&mut state, address, len, file, offset)?;
        add(&self.stats().booted, run.pages);
        state.base.insert(run);
        Ok(())
    }

    /// Says that pages which nobody has touched are not zeros: another process gives them when they are (`userfaultfd`). So they are read for a
    /// snapshot.
    pub fn untouched_is_unknown(&self) {
        self.state().base = Base::Unknown;
    }

    /// Puts the pages of `file`, which holds the regions of the memory one behind the other just as they are, in place of all pages, and makes them the
    /// base. The guest stands still, and no device writes to its memory.
    ///
    /// # Errors
    /// As [`SharedMemory::map`]; then some regions may be mapped, with the same bytes as before.
    pub fn rebase(&self, file: &Arc<SharedFile>) -> io::Result<()> {
        if file.len() < self.bytes() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut offset = 0;
        // All of it under the lock: nobody exchanges a page meanwhile.
        let mut state = self.state();
        for region in &self.regions {
            let len = region.window.len();
            let run = self.map_locked(&mut state, region.start, len, file, offset)?;
            state.base.insert(run);
            offset += len;
        }
        state.exhausted = false;
        Ok(())
    }

    /// What the pages of a region are: offsets in bytes from its start, in order, without gaps. Beside `against_base`, no page is [`Content::Base`]. The
    /// guest stands still.
    ///
    /// # Errors
    /// Where `/proc` is not to be had.
    pub fn contents(
        &self,
        region: &Region,
        against_base: bool,
    ) -> io::Result<Vec<(Range<u64>, Content)>> {
        let state = self.state();
        let base = state.base.files().filter(|_| against_base);
        let contents = contents(&state, base, region)?;
        let pages = 0..contents.len() as u64;
        let runs = alike(pages, |page| contents.get(page as usize).copied());
        let in_bytes = |(pages, content): (Range<u64>, Option<Content>)| {
            content.map(|content| (pages.start * PAGE_SIZE..pages.end * PAGE_SIZE, content))
        };
        Ok(runs.into_iter().filter_map(in_bytes).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::policy::Limits;
    use crate::window::Window;

    fn memory(pages: u64) -> SharedMemory {
        let region = Region {
            start: 0,
            window: Window::reserve(pages * PAGE_SIZE).unwrap(),
        };
        SharedMemory::new(vec![region], Limits::of_host(5, false))
    }

    fn file(memory: &SharedMemory, pages: &[u8]) -> Arc<SharedFile> {
        let mut file = tempfile::tempfile().unwrap();
        for byte in pages {
            file.write_all(&[*byte; PAGE_SIZE as usize]).unwrap();
        }
        memory.files().share(&Arc::new(file)).unwrap()
    }

    fn contents(memory: &SharedMemory, against_base: bool) -> Vec<(Range<u64>, Content)> {
        let contents = memory.contents(&memory.regions()[0], against_base);
        let in_pages = |(bytes, content): (Range<u64>, Content)| {
            (bytes.start / PAGE_SIZE..bytes.end / PAGE_SIZE, content)
        };
        contents.unwrap().into_iter().map(in_pages).collect()
    }

    #[test]
    fn all_but_untouched_pages_are_bytes_without_a_base() {
        let memory = memory(6);
        memory
            .map(2 * PAGE_SIZE, PAGE_SIZE, &file(&memory, &[7]), 0)
            .unwrap();
        memory.regions()[0].window.write(4 * PAGE_SIZE, &[1]);
        let expected = [
            (0..2, Content::Zeros),
            (2..3, Content::Bytes),
            (3..4, Content::Zeros),
            (4..5, Content::Bytes),
            (5..6, Content::Zeros),
        ];
        assert_eq!(contents(&memory, false), expected);
        assert!(memory.state().base.files().is_none());
        assert_eq!(contents(&memory, true), expected);
    }

    #[test]
    fn what_another_process_gives_is_bytes_until_a_file_has_taken_its_place() {
        let memory = memory(2);
        memory.untouched_is_unknown();
        assert_eq!(contents(&memory, false), [(0..2, Content::Bytes)]);
        memory.rebase(&file(&memory, &[1, 2])).unwrap();
        memory.give_back(PAGE_SIZE, PAGE_SIZE).unwrap();
        let expected = [(0..1, Content::Bytes), (1..2, Content::Zeros)];
        assert_eq!(contents(&memory, false), expected);
    }

    #[test]
    fn against_a_base_only_changes_are_bytes_and_what_was_given_back_is_a_change() {
        let memory = memory(8);
        let base = file(&memory, &[1; 6]);
        memory.map_base(0, 6 * PAGE_SIZE, &base, 0).unwrap();
        assert_eq!(contents(&memory, true), [(0..8, Content::Base)]);
        let window = &memory.regions()[0].window;
        window.write(PAGE_SIZE, &[9]);
        window.write(7 * PAGE_SIZE, &[9]);
        memory.give_back(3 * PAGE_SIZE, PAGE_SIZE).unwrap();
        // Another file's page is a change; the base's own page in another place is one, too.
        memory
            .map(4 * PAGE_SIZE, PAGE_SIZE, &file(&memory, &[2]), 0)
            .unwrap();
        memory.map(5 * PAGE_SIZE, PAGE_SIZE, &base, 0).unwrap();
        let expected = [
            (0..1, Content::Base),
            (1..2, Content::Bytes),
            (2..3, Content::Base),
            (3..6, Content::Bytes),
            (6..7, Content::Base),
            (7..8, Content::Bytes),
        ];
        assert_eq!(contents(&memory, true), expected);
    }

    #[test]
    fn a_new_base_changes_no_byte_and_holds_no_memory() {
        let memory = memory(4);
        let window = &memory.regions()[0].window;
        window.write(PAGE_SIZE, &[5; PAGE_SIZE as usize]);
        memory
            .map(2 * PAGE_SIZE, PAGE_SIZE, &file(&memory, &[6]), 0)
            .unwrap();
        memory.rebase(&file(&memory, &[0, 5, 6, 0])).unwrap();
        assert_eq!(contents(&memory, true), [(0..4, Content::Base)]);
        assert_eq!(memory.usage().unwrap().private, 0);
        for (page, byte) in (0..).zip([0, 5, 6, 0]) {
            assert!(window.holds(page * PAGE_SIZE, &[byte; PAGE_SIZE as usize]));
        }
        window.write(3 * PAGE_SIZE, &[1]);
        let expected = [(0..3, Content::Base), (3..4, Content::Bytes)];
        assert_eq!(contents(&memory, true), expected);
    }
}
