//! What backs each page of a guest: the recorded mapping.
//!
//! Pages are numbered (guest frame numbers, GFN). The table holds runs of pages that are the same in everything but
//! their place, and joins what touches; a page that no run covers is the guest's own. It is a record, and changes no
//! memory by itself.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::file::{FileIdentity, SharedFile};
use crate::window::PAGE_SIZE;

/// Pages that were overwritten soon after they were shared so often are left alone.
pub(crate) const MAX_EARLY_WRITES: u8 = 4;

/// What is known of the pages of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// The guest was given a copy of the file's page, and it may still be one.
    Candidate {
        /// When, in tenths of a second of the manager's clock.
        since: u32,
        /// How often the page was shared and soon overwritten, up to now without a break.
        early_writes: u8,
    },
    /// The page is the file's, unless the guest has written to it since the host was last asked.
    Mapped {
        /// When it was mapped, in tenths of a second of the manager's clock.
        since: u32,
        /// As before.
        early_writes: u8,
    },
    /// The page was the file's, and the guest has written to it.
    Copied {
        /// As before.
        since: u32,
        /// As before.
        early_writes: u8,
    },
}

/// What backs a page, or the first page of a run.
#[derive(Clone, Debug)]
pub struct Backing {
    /// The file.
    pub file: Arc<SharedFile>,
    /// Where in it the page begins, in bytes.
    pub offset: u64,
    /// How it stands with the page.
    pub state: PageState,
}

impl Backing {
    /// The backing of the page that is `pages` further on in the run.
    fn advanced(&self, pages: u64) -> Self {
        Self {
            offset: self.offset + pages * PAGE_SIZE,
            ..self.clone()
        }
    }

    /// Whether the page that is `pages` further on is, in the file, that of `next`.
    pub(crate) fn leads_to(&self, pages: u64, next: &Self) -> bool {
        Arc::ptr_eq(&self.file, &next.file) && self.offset + pages * PAGE_SIZE == next.offset
    }

    fn goes_on_with(&self, pages: u64, next: &Self) -> bool {
        self.leads_to(pages, next) && self.state == next.state
    }
}

/// A run of pages.
#[derive(Clone, Debug)]
pub struct Run {
    /// First page.
    pub gfn: u64,
    /// Number of pages, never zero.
    pub pages: u64,
    /// What backs the first of them; the others follow in the file.
    pub backing: Backing,
}

impl Run {
    /// The page numbers.
    pub fn gfns(&self) -> Range<u64> {
        self.gfn..self.gfn + self.pages
    }

    /// The part of the run that lies in `gfns`; `None` where that is nothing.
    pub fn cut(&self, gfns: &Range<u64>) -> Option<Self> {
        let start = self.gfn.max(gfns.start);
        let end = (self.gfn + self.pages).min(gfns.end);
        (start < end).then(|| Self {
            gfn: start,
            pages: end - start,
            backing: self.backing.advanced(start - self.gfn),
        })
    }
}

/// The pages of `gfns`, in order, as ranges of pages for which `of_page` returns the same.
pub(crate) fn alike<T: PartialEq>(
    gfns: Range<u64>,
    of_page: impl Fn(u64) -> T,
) -> Vec<(Range<u64>, T)> {
    let mut ranges: Vec<(Range<u64>, T)> = Vec::new();
    for gfn in gfns {
        let what = of_page(gfn);
        match ranges.last_mut() {
            Some((range, same)) if *same == what => range.end += 1,
            Some(_) | None => ranges.push((gfn..gfn + 1, what)),
        }
    }
    ranges
}

/// The runs of a guest, by their first page, without overlap.
#[derive(Debug, Default)]
pub struct Table {
    runs: BTreeMap<u64, (u64, Backing)>,
}

impl Table {
    fn run((gfn, (pages, backing)): (&u64, &(u64, Backing))) -> Run {
        Run {
            gfn: *gfn,
            pages: *pages,
            backing: backing.clone(),
        }
    }

    /// The runs, in order.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.runs.iter().map(Self::run)
    }

    /// Number of runs.
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Whether nothing is known of any page.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The parts of runs that lie in `gfns`, in order.
    pub fn within(&self, gfns: Range<u64>) -> impl Iterator<Item = Run> + '_ {
        let first = self.runs.range(..gfns.start).next_back();
        let rest = self.runs.range(gfns.start..gfns.end.max(gfns.start));
        first
            .into_iter()
            .chain(rest)
            .filter_map(move |entry| Self::run(entry).cut(&gfns))
    }

    /// What backs a page; `None` where it is the guest's own.
    pub fn get(&self, gfn: u64) -> Option<Backing> {
        self.within(gfn..gfn + 1).next().map(|run| run.backing)
    }

    /// The pages that the page of a file at `offset` bytes backs, or may back.
    pub fn pages_of(&self, file: FileIdentity, offset: u64) -> impl Iterator<Item = u64> + '_ {
        self.runs().filter_map(move |run| {
            let into = offset.checked_sub(run.backing.offset)? / PAGE_SIZE;
            (run.backing.file.identity() == file && into < run.pages).then_some(run.gfn + into)
        })
    }

    /// Forgets what backs `gfns`, and returns what was known of them.
    pub fn remove(&mut self, gfns: Range<u64>) -> Vec<Run> {
        let removed: Vec<Run> = self.within(gfns.clone()).collect();
        for run in &removed {
            // The run may begin before the range, and go on behind it.
            let Some((&start, _)) = self.runs.range(..=run.gfn).next_back() else {
                continue;
            };
            let Some((pages, backing)) = self.runs.remove(&start) else {
                continue;
            };
            let (end, cut_end) = (start + pages, run.gfn + run.pages);
            if cut_end < end {
                let rest = (end - cut_end, backing.advanced(cut_end - start));
                self.runs.insert(cut_end, rest);
            }
            if start < run.gfn {
                self.runs.insert(start, (run.gfn - start, backing));
            }
        }
        removed
    }

    /// Records a run in place of whatever was known of its pages.
    pub fn insert(&mut self, run: Run) {
        if run.pages == 0 {
            return;
        }
        drop(self.remove(run.gfns()));
        let Run {
            mut gfn,
            mut pages,
            mut backing,
        } = run;
        if let Some((&start, (before, previous))) = self.runs.range(..gfn).next_back()
            && start + before == gfn
            && previous.goes_on_with(*before, &backing)
        {
            (gfn, pages, backing) = (start, pages + before, previous.clone());
        }
        if let Some((after, next)) = self.runs.get(&(gfn + pages))
            && backing.goes_on_with(pages, next)
        {
            let after = *after;
            self.runs.remove(&(gfn + pages));
            pages += after;
        }
        self.runs.insert(gfn, (pages, backing));
    }

    /// Gives the pages of a run another state.
    pub fn set_state(&mut self, run: Run, state: PageState) {
        self.insert(Run {
            backing: Backing {
                state,
                ..run.backing
            },
            ..run
        });
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::file::FileRegistry;

    fn files() -> [Arc<SharedFile>; 2] {
        let registry = FileRegistry::default();
        [(); 2].map(|()| {
            registry
                .share(&Arc::new(tempfile::tempfile().unwrap()))
                .unwrap()
        })
    }

    fn state(number: u8) -> PageState {
        match number % 3 {
            0 => PageState::Candidate {
                since: 0,
                early_writes: 0,
            },
            1 => PageState::Mapped {
                since: 1,
                early_writes: 0,
            },
            _ => PageState::Copied {
                since: 1,
                early_writes: 0,
            },
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u64, u64, usize, u64, u8),
        Remove(u64, u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let insert = (0..64u64, 0..16u64, 0..2usize, 0..8u64, any::<u8>()).prop_map(
            |(gfn, pages, file, offset, state)| Step::Insert(gfn, pages, file, offset, state),
        );
        let remove = (0..64u64, 0..32u64).prop_map(|(gfn, pages)| Step::Remove(gfn, pages));
        prop::collection::vec(prop_oneof![3 => insert, 1 => remove], 0..60)
    }

    proptest! {
        #[test]
        fn the_table_has_for_each_page_what_was_last_set(steps in steps()) {
            let files = files();
            let (mut table, mut model) = (Table::default(), HashMap::new());
            for step in steps {
                match step {
                    Step::Insert(gfn, pages, file, offset, number) => {
                        let backing = Backing {
                            file: files[file].clone(),
                            offset: offset * PAGE_SIZE,
                            state: state(number),
                        };
                        table.insert(Run { gfn, pages, backing });
                        for page in 0..pages {
                            model.insert(gfn + page, (file, offset + page, state(number)));
                        }
                    }
                    Step::Remove(gfn, pages) => {
                        let known = (gfn..gfn + pages).filter(|page| model.remove(page).is_some()).count();
                        let removed: u64 = table.remove(gfn..gfn + pages).iter().map(|run| run.pages).sum();
                        prop_assert_eq!(removed, known as u64);
                    }
                }
                for gfn in 0..96 {
                    let found = table.get(gfn).map(|backing| {
                        let file = usize::from(Arc::ptr_eq(&backing.file, &files[1]));
                        (file, backing.offset / PAGE_SIZE, backing.state)
                    });
                    prop_assert_eq!(found, model.get(&gfn).copied());
                }
                // What could be one run is one run.
                let runs: Vec<Run> = table.runs().collect();
                for pair in runs.windows(2) {
                    prop_assert!(pair[0].gfn + pair[0].pages <= pair[1].gfn);
                    prop_assert!(pair[0].gfn + pair[0].pages < pair[1].gfn
                        || !pair[0].backing.goes_on_with(pair[0].pages, &pair[1].backing));
                }
            }
            for (file, shared) in files.iter().enumerate() {
                for offset in 0..24 {
                    let mut found: Vec<u64> = table.pages_of(shared.identity(), offset * PAGE_SIZE).collect();
                    let mut expected: Vec<u64> = model
                        .iter()
                        .filter(|(_, (of, at, _))| (*of, *at) == (file, offset))
                        .map(|(gfn, _)| *gfn)
                        .collect();
                    found.sort_unstable();
                    expected.sort_unstable();
                    prop_assert_eq!(found, expected);
                }
            }
        }
    }
}
