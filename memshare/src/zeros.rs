//! Pages of zeros that a guest holds after boot, given back.
//!
//! A kernel clears memory that it never writes to: lists of free pages that a CPU keeps, tables that stay empty.
//! Whether a page is zero is known from its first word for all but few, so that it is cheap to look, a few times while
//! a guest boots and soon after. A page of zeros is no secret, so nothing can be learnt from its being exchanged.

use std::ops::Range;
use std::time::Instant;

use crate::memory::{SharedMemory, StandStill};
use crate::merge::LONGEST_HOLD;
use crate::stats::add;
use crate::table::alike;
use crate::window::{PAGE_SIZE, PageKind};

/// Pages that are given back while the guest is held once, at most.
const BATCH: u64 = 256;
static ZEROS: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

impl SharedMemory {
    /// Runs of the guest's own pages that are zero at this moment, in pieces of at most a batch.
    fn zero_runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for region in self.regions() {
            let first = region.start / PAGE_SIZE;
            let Ok(kinds) = region.window.page_kinds(0, region.window.len()) else {
                continue;
            };
            for (index, kind) in (0..).zip(kinds) {
                if kind != PageKind::Private || !region.window.holds(index * PAGE_SIZE, &ZEROS) {
                    continue;
                }
                let gfn = first + index;
                match runs.last_mut() {
                    Some(last) if last.end == gfn && last.end - last.start < BATCH => last.end += 1,
                    Some(_) | None => runs.push(gfn..gfn + 1),
                }
            }
        }
        runs
    }

    /// Gives back the pages of zeros that the guest holds, until `enough` is true; it is called between batches. What
    /// cannot be done at once stays as it is, for another look.
    pub(crate) fn give_zeros_back(&self, still: &dyn StandStill, mut enough: impl FnMut() -> bool) {
        let mut runs = self.zero_runs().into_iter().peekable();
        while runs.peek().is_some() && !enough() {
            let (mut batch, mut pages) = (Vec::new(), 0);
            while let Some(run) =
                runs.next_if(|run| batch.is_empty() || pages + (run.end - run.start) <= BATCH)
            {
                pages += run.end - run.start;
                batch.push(run);
            }
            let held = still.hold(&mut |is_busy| {
                let started = Instant::now();
                for run in &batch {
                    if started.elapsed() > LONGEST_HOLD {
                        break;
                    }
                    let (address, len) = (run.start * PAGE_SIZE, (run.end - run.start) * PAGE_SIZE);
                    if !is_busy(address, len) {
                        self.give_zero_run_back(run);
                    }
                }
                self.stats().hold(started.elapsed());
            });
            if !held {
                return;
            }
        }
    }

    /// The second half, with the guest at a standstill: what is still zero goes.
    fn give_zero_run_back(&self, run: &Range<u64>) {
        let Some((window, at)) = self.locate(run) else {
            return;
        };
        let offset_of = |gfn: u64| at + (gfn - run.start) * PAGE_SIZE;
        let is_zero = |gfn| window.holds(offset_of(gfn), &ZEROS);
        let zeros = alike(run.clone(), is_zero).into_iter();
        let mut state = self.state();
        for (gfns, _) in zeros.filter(|(_, is_zero)| *is_zero) {
            let cleared = self.clear_locked(&mut state, window, offset_of(gfns.start), &gfns);
            if cleared.is_ok() {
                add(&self.stats().zeroed, gfns.end - gfns.start);
            }
        }
    }
}
