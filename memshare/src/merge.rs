//! Candidates become shared: compared with the file, compared again while the guest stands still, and exchanged.
//!
//! Check and exchange are one step for the guest, as no vCPU runs and no device writes between them. What can be found
//! out before is: the file is read, and what differs is sorted out, while the guest runs, so that it is held for little
//! more than the second comparison. Long runs come before short ones: they take fewer mappings for the same gain.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use report::chain;

use crate::file::FileIdentity;
use crate::memory::{IsBusy, SharedMemory, StandStill};
use crate::page::is_zero;
use crate::stats::{Refusal, add};
use crate::table::{MAX_EARLY_WRITES, PageState, Run, alike};
use crate::window::PAGE_SIZE;

/// Pages that are compared and exchanged at once, at most: their bytes are all the memory that the merger takes.
const BATCH: u64 = 128;
/// Runs of them, at most.
const BATCH_RUNS: usize = 64;
/// Once the guest was held for so long, what is left of the batch waits for the next.
pub(crate) const LONGEST_HOLD: Duration = Duration::from_millis(2);
/// Runs of fewer pages are exchanged only while the guest has less than half of the runs that it may have.
const SHORT: u64 = 4;
/// Pages of a huge page.
const HUGE: u64 = 512;
/// How long a copy is left alone before it is compared, in tenths of a second: a page that is soon overwritten is not
/// worth the work.
const MIN_AGE: u32 = 2;

/// How far a [`SharedMemory::merge`] got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Nothing is left.
    Done,
    /// There is more to do at once.
    More,
    /// The guest could not be held, or what is left is too young: not before that time has gone by.
    Later(Duration),
}

/// How old a candidate has to be before it is compared, in tenths of a second: four times as old for each early write.
fn min_age(early_writes: u8) -> u32 {
    MIN_AGE << (2 * early_writes.min(MAX_EARLY_WRITES))
}

/// A run with the bytes of its file.
struct Read<'a> {
    run: Run,
    bytes: &'a [u8],
}

impl Read<'_> {
    fn page(&self, gfn: u64) -> &[u8] {
        let at = ((gfn - self.run.gfn) * PAGE_SIZE) as usize;
        &self.bytes[at..at + PAGE_SIZE as usize]
    }
}

impl SharedMemory {
    /// Candidates that are old enough, joined where they touch, the longest first; and how long the first of the others
    /// has yet to wait.
    fn ready(&self) -> (Vec<Run>, Option<Duration>) {
        let now = self.now();
        let (mut ready, mut others): (Vec<Run>, Option<u32>) = (Vec::new(), None);
        let state = self.state();
        for run in state.candidates.runs() {
            let PageState::Candidate {
                since,
                early_writes,
            } = run.backing.state
            else {
                continue;
            };
            let left = min_age(early_writes).saturating_sub(now.saturating_sub(since));
            if since > 0 && left > 0 {
                others = Some(others.unwrap_or(left).min(left));
                continue;
            }
            if let Some(last) = ready.last_mut()
                && last.gfn + last.pages == run.gfn
                && last.backing.leads_to(last.pages, &run.backing)
            {
                last.pages += run.pages;
            } else {
                ready.push(run);
            }
        }
        drop(state);
        ready.sort_by_key(|run| std::cmp::Reverse(run.pages));
        let tenths = |tenths: u32| Duration::from_millis(u64::from(tenths) * 100);
        (ready, others.map(tenths))
    }

    /// Exchanges what can be, until nothing is left or `enough` is true; it is called between batches.
    pub(crate) fn merge(
        &self,
        still: &dyn StandStill,
        mut enough: impl FnMut() -> bool,
    ) -> Progress {
        let (ready, mut later) = self.ready();
        let mut buffer = Vec::new();
        let mut left = ready.into_iter().flat_map(pieces).peekable();
        while left.peek().is_some() {
            if enough() {
                return Progress::More;
            }
            let (mut batch, mut pages) = (Vec::new(), 0);
            while let Some(run) = left.next_if(|run| {
                batch.len() < BATCH_RUNS && (batch.is_empty() || pages + run.pages <= BATCH)
            }) {
                pages += run.pages;
                batch.push(run);
            }
            if !self.merge_batch(batch, &mut buffer, still) {
                later = Some(Duration::ZERO);
            }
        }
        later.map_or(Progress::Done, Progress::Later)
    }

    /// Exchanges the pages of a batch, or refuses them; false where some are as they were.
    fn merge_batch(&self, batch: Vec<Run>, buffer: &mut Vec<u8>, still: &dyn StandStill) -> bool {
        let (mut runs, mut room, mut checked) = (Vec::new(), self.room(), None);
        buffer.resize((BATCH * PAGE_SIZE) as usize, 0);
        let mut left = &mut buffer[..];
        for run in batch {
            let (bytes, rest) = left.split_at_mut((run.pages * PAGE_SIZE) as usize);
            left = rest;
            let admitted = self.admit(&run, &mut room, &mut checked);
            match admitted.and_then(|()| read(&run, bytes)) {
                Ok(()) => runs.push(Read { run, bytes }),
                Err(why) => self.refuse(&run, why),
            }
        }
        let mut equal = Vec::new();
        for read in &runs {
            self.sort_out(read, &mut equal);
        }
        if equal.is_empty() {
            return true;
        }
        let mut complete = true;
        let held = still.hold(&mut |is_busy| {
            let started = Instant::now();
            for read in &equal {
                if started.elapsed() > LONGEST_HOLD {
                    complete = false;
                    break;
                }
                complete &= self.exchange(read, is_busy);
            }
            self.stats().hold(started.elapsed());
        });
        held && complete
    }

    /// How many runs more the guest may have.
    fn room(&self) -> usize {
        let state = self.state();
        if state.exhausted {
            return 0;
        }
        self.limits().runs.saturating_sub(state.mapped.len())
    }

    /// Whether a run may be exchanged at all. `checked` is the file that was looked at last in this batch.
    fn admit(
        &self,
        run: &Run,
        room: &mut usize,
        checked: &mut Option<FileIdentity>,
    ) -> Result<(), Refusal> {
        let limits = self.limits();
        if limits.huge_pages && run.pages < HUGE {
            return Err(Refusal::HugePage);
        }
        if *room == 0 || run.pages < SHORT && *room <= limits.runs / 2 {
            return Err(Refusal::MapLimit);
        }
        let file = &run.backing.file;
        if *checked != Some(file.identity()) {
            file.check().map_err(|change| {
                self.report_change(file, change);
                Refusal::FileChanged
            })?;
            *checked = Some(file.identity());
        }
        *room -= 1;
        Ok(())
    }

    /// Takes the pages that differ off the list of candidates, and gathers the others.
    fn sort_out<'a>(&self, read: &Read<'a>, equal: &mut Vec<Read<'a>>) {
        let Some((window, at)) = self.locate(&read.run.gfns()) else {
            return self.refuse(&read.run, Refusal::Differs);
        };
        let is_equal =
            |gfn: u64| window.holds(at + (gfn - read.run.gfn) * PAGE_SIZE, read.page(gfn));
        for (gfns, is_equal) in alike(read.run.gfns(), is_equal) {
            let Some(run) = read.run.cut(&gfns) else {
                continue;
            };
            if is_equal {
                let start = ((run.gfn - read.run.gfn) * PAGE_SIZE) as usize;
                let bytes = &read.bytes[start..start + (run.pages * PAGE_SIZE) as usize];
                equal.push(Read { run, bytes });
            } else {
                self.refuse(&run, Refusal::Differs);
            }
        }
    }

    /// The second half: with the guest at a standstill. False where a device is at work on the pages, which then are as
    /// they were.
    fn exchange(&self, read: &Read<'_>, is_busy: &IsBusy<'_>) -> bool {
        let Some((window, at)) = self.locate(&read.run.gfns()) else {
            return true;
        };
        if is_busy(read.run.gfn * PAGE_SIZE, read.run.pages * PAGE_SIZE) {
            return false;
        }
        let since = self.now();
        let mut state = self.state();
        // What has become of the candidates since they were chosen.
        let still: Vec<Run> = state
            .candidates
            .within(read.run.gfns())
            .filter(|run| is_part(run, &read.run))
            .collect();
        for run in still {
            let PageState::Candidate { early_writes, .. } = run.backing.state else {
                continue;
            };
            let offset_of = |gfn: u64| at + (gfn - read.run.gfn) * PAGE_SIZE;
            let of_page = |gfn| {
                let bytes = read.page(gfn);
                (window.holds(offset_of(gfn), bytes), is_zero(bytes))
            };
            for (gfns, (is_equal, is_zero)) in alike(run.gfns(), of_page) {
                let Some(part) = run.cut(&gfns) else {
                    continue;
                };
                let (first, count) = (part.gfn, part.pages);
                drop(state.candidates.remove(gfns.clone()));
                if !is_equal {
                    self.stats().refuse(Refusal::Differs, count);
                    continue;
                }
                let below = state.mapped.within(gfns.clone());
                let below = below.filter(|run| is_part(run, &part));
                if below.map(|run| run.pages).sum::<u64>() == count {
                    // Under its copy: what is mapped needs no change.
                    if window.forget(offset_of(first), count * PAGE_SIZE).is_ok() {
                        add(&self.stats().merged, count);
                        state.mapped.set_state(
                            part,
                            PageState::Mapped {
                                since,
                                early_writes,
                            },
                        );
                    }
                    continue;
                }
                if is_zero {
                    // Zeros take no page of the file, nor of anybody.
                    if self
                        .clear_locked(&mut state, window, offset_of(first), &gfns)
                        .is_ok()
                    {
                        add(&self.stats().zeroed, count);
                    }
                    continue;
                }
                let (file, offset) = (part.backing.file.file(), part.backing.offset);
                let mapped = window.map_file(offset_of(first), count * PAGE_SIZE, file, offset);
                if let Err(error) = mapped {
                    tracing::warn!(error = %chain(&error), "the host maps no more of a file into the guest, which goes on unshared");
                    state.exhausted = true;
                    self.stats().refuse(Refusal::MapLimit, count);
                    continue;
                }
                add(&self.stats().merged, count);
                state.mapped.set_state(
                    part,
                    PageState::Mapped {
                        since,
                        early_writes,
                    },
                );
            }
        }
        true
    }

    /// Takes what is still a candidate of a run off the list.
    fn refuse(&self, run: &Run, why: Refusal) {
        let mut state = self.state();
        let candidates: Vec<Run> = state
            .candidates
            .within(run.gfns())
            .filter(|part| is_part(part, run))
            .collect();
        for part in candidates {
            self.stats().refuse(why, part.pages);
            drop(state.candidates.remove(part.gfns()));
        }
    }
}

/// Whether `part` is backed as `run` is.
fn is_part(part: &Run, run: &Run) -> bool {
    run.backing.leads_to(part.gfn - run.gfn, &part.backing)
}

/// A run as runs of at most a batch each.
fn pieces(run: Run) -> impl Iterator<Item = Run> {
    let gfns = run.gfns();
    gfns.clone()
        .step_by(BATCH as usize)
        .filter_map(move |first| run.cut(&(first..gfns.end.min(first + BATCH))))
}

fn read(run: &Run, bytes: &mut [u8]) -> Result<(), Refusal> {
    let file = &run.backing.file;
    file.file()
        .read_exact_at(bytes, run.backing.offset)
        .map_err(|error| {
            tracing::warn!(file = %file.path().display(), error = %chain(&error), "a shared file cannot be read");
            Refusal::Unreadable
        })
}
