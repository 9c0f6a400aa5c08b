//! The memory of one guest, and which of its pages are files'.
//!
//! ```text
//!            map, place                       merge: compare, hold, compare, map
//! (own) ───────────────────────> Mapped <────────────────────────────────────── Candidate <── note_read ── (own)
//!   ^                              │ the guest writes (found out later)
//!   └── give_back, unshare ────────┴──> Copied
//! ```
//!
//! Two tables record what was last done to a page: one what is mapped there, one the candidates. A [`Window`] changes
//! the mappings. All change together, under one lock. [`StandStill`] keeps devices from writing to guest memory on
//! behalf of a request while a page is exchanged.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::file::{FileIdentity, FileRegistry, OnChange, ShareError, SharedFile};
use crate::policy::Limits;
use crate::sampled::SampledFile;
use crate::stats::{Refusal, Stats, add};
use crate::table::{Backing, MAX_EARLY_WRITES, PageState, Run, Table, alike};
use crate::window::{PAGE_SIZE, PageKind, Window};

/// A shared page that is overwritten within this time, in tenths of a second, was not worth it.
const SOON: u32 = 100;

/// A range of guest memory, in one window.
#[derive(Debug)]
pub struct Region {
    /// First guest physical address.
    pub start: u64,
    /// The memory.
    pub window: Window,
}

impl Region {
    pub(crate) fn gfns(&self) -> Range<u64> {
        let first = self.start / PAGE_SIZE;
        first..first + self.window.len() / PAGE_SIZE
    }
}

/// Whether a request that a device has under way will write to a range of guest physical memory: first address, length
/// in bytes.
pub type IsBusy<'a> = dyn Fn(u64, u64) -> bool + 'a;

/// Brings the guest to a standstill: no vCPU runs, and no device writes to guest memory.
pub trait StandStill: Send + Sync {
    /// Calls `work` meanwhile. False, without a call, where that cannot be had at this moment. `work` takes the time
    /// that the guest loses.
    fn hold(&self, work: &mut dyn FnMut(&IsBusy<'_>)) -> bool;

    /// CPU time that the guest's vCPUs have used so far: by that the merger knows when the guest rests.
    fn cpu_time(&self) -> Duration;

    /// The merger has scanned the guest's memory for the last time: what the scans have taken of the heap can be given
    /// back.
    fn scans_done(&self) {}
}

/// What pages hold that were never touched.
#[derive(Debug, Default)]
pub(crate) enum Base {
    /// Zeros.
    #[default]
    Zeros,
    /// What another process gives when they are.
    Unknown,
    /// What the memory was when it was last that of a snapshot: a file's pages, and zeros else.
    Files(Table),
}

impl Base {
    pub(crate) fn files(&self) -> Option<&Table> {
        match self {
            Self::Files(table) => Some(table),
            Self::Zeros | Self::Unknown => None,
        }
    }

    /// Adds a run of a file's pages; what is of no file is zeros then.
    pub(crate) fn insert(&mut self, run: Run) {
        if let Self::Files(table) = self {
            table.insert(run);
        } else {
            let mut table = Table::default();
            table.insert(run);
            *self = Self::Files(table);
        }
    }
}

/// What changes under the lock.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Pages whose mapping is a file's, whatever the guest has written there since.
    pub mapped: Table,
    /// Pages that may be copies of a file's page, whatever is mapped there.
    pub candidates: Table,
    /// Files that the guest's own pages are compared with unasked.
    pub compared: Vec<Arc<SampledFile>>,
    pub base: Base,
    /// Files that back other memory of the guest.
    pub others: Vec<Arc<SharedFile>>,
    /// The merger is to look for work.
    pub woken: bool,
    /// The merger is to end.
    pub ending: bool,
    /// The host refused another mapping: none is asked for before one has gone.
    pub exhausted: bool,
}

impl State {
    /// The count of early writes of these pages, if they are overwritten now.
    pub(crate) fn early_writes(&self, gfns: &Range<u64>, now: u32) -> u8 {
        let mapped = self.mapped.within(gfns.clone());
        let candidates = self.candidates.within(gfns.clone());
        let early_writes = mapped.chain(candidates).map(|run| match run.backing.state {
            PageState::Candidate { early_writes, .. } => early_writes,
            PageState::Mapped {
                since,
                early_writes,
            }
            | PageState::Copied {
                since,
                early_writes,
            } => {
                if is_recent(since, now) {
                    early_writes + 1
                } else {
                    0
                }
            }
        });
        early_writes.max().unwrap_or(0)
    }
}

/// Where the memory of a guest is, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The guest's own, in the host's memory.
    pub private: u64,
    /// Files' pages that the process has mapped and looked at.
    pub shared: u64,
    /// Nothing.
    pub absent: u64,
}

/// The memory of a guest.
pub struct SharedMemory {
    pub(crate) regions: Vec<Region>,
    files: FileRegistry,
    limits: Limits,
    stats: Stats,
    /// The log has it already that the guest's reads are mostly unaligned.
    warned_of_unaligned: AtomicBool,
    started: Instant,
    state: Mutex<State>,
    wake_up: Condvar,
    pub(crate) on_change: OnceLock<Box<OnChange>>,
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedMemory")
            .field("regions", &self.regions)
            .field("limits", &self.limits)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// What was mapped before the guest ran was mapped long ago.
fn is_recent(since: u32, now: u32) -> bool {
    since > 0 && now.saturating_sub(since) < SOON
}

fn whole_pages(address: u64, len: u64) -> Range<u64> {
    let end = address.saturating_add(len) / PAGE_SIZE;
    let start = address.div_ceil(PAGE_SIZE);
    start..end.max(start)
}

impl SharedMemory {
    /// Memory of which no page is shared yet.
    pub fn new(regions: Vec<Region>, limits: Limits) -> Self {
        Self {
            regions,
            files: FileRegistry::default(),
            limits,
            stats: Stats::default(),
            warned_of_unaligned: AtomicBool::new(false),
            started: Instant::now(),
            state: Mutex::default(),
            wake_up: Condvar::new(),
            on_change: OnceLock::new(),
        }
    }

    /// The counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Where the memory is.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Bytes of all regions.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.window.len()).sum()
    }

    /// The bounds of the work.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The files of this guest.
    pub fn files(&self) -> &FileRegistry {
        &self.files
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// The merger waits for its [wake-up](SharedMemory::wake_merger), at most so long; whether there was one.
    pub(crate) fn wait(&self, mut state: MutexGuard<'_, State>, at_most: Duration) -> bool {
        let idle = |state: &mut State| !state.woken && !state.ending;
        self.wake_up.wait_while_for(&mut state, idle, at_most);
        std::mem::take(&mut state.woken)
    }

    /// The merger waits for so long, or until it is to end.
    pub(crate) fn rest(&self, time: Duration) {
        let resting = |state: &mut State| !state.ending;
        let mut state = self.state();
        self.wake_up.wait_while_for(&mut state, resting, time);
    }

    /// Makes the merger look for work.
    pub(crate) fn wake_merger(&self) {
        self.state().woken = true;
        self.wake_up.notify_all();
    }

    /// Makes the merger end.
    pub(crate) fn end_merger(&self) {
        self.state().ending = true;
        self.wake_up.notify_all();
    }

    /// The manager's clock, in tenths of a second.
    pub(crate) fn now(&self) -> u32 {
        u32::try_from(self.started.elapsed().as_millis() / 100 + 1).unwrap_or(u32::MAX)
    }

    /// The region that holds all of a range of pages, and the offset of the first in its window.
    pub(crate) fn locate(&self, gfns: &Range<u64>) -> Option<(&Window, u64)> {
        self.regions.iter().find_map(|region| {
            let all = region.gfns();
            (all.start <= gfns.start && gfns.end <= all.end)
                .then(|| (&region.window, (gfns.start - all.start) * PAGE_SIZE))
        })
    }

    /// The parts of a range of pages that lie in guest memory.
    fn in_memory(&self, gfns: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        self.regions.iter().filter_map(move |region| {
            let all = region.gfns();
            let part = gfns.start.max(all.start)..gfns.end.min(all.end);
            (part.start < part.end).then_some(part)
        })
    }

    /// Maps the pages of a file at the guest physical `address`; all are multiples of the page size. The guest does not
    /// run yet.
    ///
    /// # Errors
    /// `InvalidInput` where that is not guest memory, or not inside the file; else the error of the host.
    pub fn map(
        &self,
        address: u64,
        len: u64,
        file: &Arc<SharedFile>,
        offset: u64,
    ) -> io::Result<()> {
        self.map_locked(&mut self.state(), address, len, file, offset)?;
        add(&self.stats.booted, len / PAGE_SIZE);
        Ok(())
    }

    /// As [`SharedMemory::map`], also of a guest that stands still: whatever was known of the pages is forgotten.
    /// Returns the run of them.
    pub(crate) fn map_locked(
        &self,
        state: &mut State,
        address: u64,
        len: u64,
        file: &Arc<SharedFile>,
        offset: u64,
    ) -> io::Result<Run> {
        let pages = whole_pages(address, len);
        let inside = offset.checked_add(len).is_some_and(|end| end <= file.len());
        let at = self.locate(&pages).filter(|_| inside);
        let (window, at) = at.ok_or(io::ErrorKind::InvalidInput)?;
        let run = Run {
            gfn: pages.start,
            pages: pages.end - pages.start,
            backing: Backing {
                file: file.clone(),
                offset,
                state: PageState::Mapped {
                    since: 0,
                    early_writes: 0,
                },
            },
        };
        window.map_file(at, len, file.file(), offset)?;
        drop(state.candidates.remove(pages));
        state.mapped.insert(run.clone());
        Ok(run)
    }

    /// Notes that a read has filled guest memory with bytes of a file that does not change. Only whole pages, at the
    /// same place within their pages on both sides, can come to be shared.
    pub fn note_read(&self, address: u64, len: u64, file: &Arc<File>, offset: u64) {
        if address % PAGE_SIZE != offset % PAGE_SIZE {
            return self.refuse_unaligned(len.div_ceil(PAGE_SIZE));
        }
        let pages = whole_pages(address, len);
        let count = pages.end - pages.start;
        if count * PAGE_SIZE < len {
            let parts = u64::from(!address.is_multiple_of(PAGE_SIZE))
                + u64::from(!(address + len).is_multiple_of(PAGE_SIZE));
            self.stats.refuse(Refusal::Partial, parts);
        }
        if count == 0 {
            return;
        }
        let file = match self.files.share(file) {
            Ok(file) => file,
            Err(ShareError::Foreign) => return self.stats.refuse(Refusal::Domain, count),
            Err(ShareError::Host(_)) => return self.stats.refuse(Refusal::Unreadable, count),
        };
        let now = self.now();
        let mut state = self.state();
        let early_writes = state.early_writes(&pages, now);
        if early_writes > MAX_EARLY_WRITES {
            drop(state.candidates.remove(pages));
            return self.stats.refuse(Refusal::Rewritten, count);
        }
        add(&self.stats.noted, count);
        let first_offset = offset + (pages.start * PAGE_SIZE - address);
        state.candidates.insert(Run {
            gfn: pages.start,
            pages: count,
            backing: Backing {
                file,
                offset: first_offset,
                state: PageState::Candidate {
                    since: now,
                    early_writes,
                },
            },
        });
        let is_first = !std::mem::replace(&mut state.woken, true);
        drop(state);
        if is_first {
            self.wake_up.notify_all();
        }
    }

    fn refuse_unaligned(&self, pages: u64) {
        self.stats.refuse(Refusal::Unaligned, pages);
        if self.stats.is_mostly_unaligned()
            && !self.warned_of_unaligned.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(
                "most of what the guest reads cannot be shared, as it is not aligned to pages of 4 KiB: a file system has \
                 blocks of less than 4 KiB, or a partition does not begin at a multiple of 4 KiB; \
                 `coppice disk info` says which"
            );
        }
    }

    /// Puts a file's pages where a read wants its bytes, without moving any: guest physical `address` and `offset` in
    /// the file are multiples of the page size, and so is `len`. False, with nothing changed, where that cannot be, so
    /// that the bytes have to be read.
    ///
    /// The guest has given the memory away until its request ends: it is not held.
    pub fn place(&self, address: u64, len: u64, file: &Arc<File>, offset: u64) -> bool {
        let pages = whole_pages(address, len);
        let count = pages.end - pages.start;
        if count * PAGE_SIZE != len || !offset.is_multiple_of(PAGE_SIZE) {
            return false;
        }
        let (Some((window, at)), Ok(file)) = (self.locate(&pages), self.files.share(file)) else {
            return false;
        };
        let inside = offset.checked_add(len).is_some_and(|end| end <= file.len());
        let mut state = self.state();
        if !inside || state.exhausted || state.mapped.len() >= self.limits.runs {
            return false;
        }
        if window.map_file(at, len, file.file(), offset).is_err() {
            state.exhausted = true;
            return false;
        }
        add(&self.stats.placed, count);
        let since = self.now();
        drop(state.candidates.remove(pages.clone()));
        state.mapped.insert(Run {
            gfn: pages.start,
            pages: count,
            backing: Backing {
                file,
                offset,
                state: PageState::Mapped {
                    since,
                    early_writes: 0,
                },
            },
        });
        true
    }

    /// Makes whole pages of a range that a read is to fill with zeros read as zeros, without memory; returns the pages'
    /// range of guest physical addresses. The guest has given the memory away until its request ends.
    pub fn zero(&self, address: u64, len: u64) -> Range<u64> {
        let pages = whole_pages(address, len);
        let count = pages.end - pages.start;
        if count == 0 || self.clear(&pages).is_err() {
            return address..address;
        }
        add(&self.stats.zeroed, count);
        pages.start * PAGE_SIZE..pages.end * PAGE_SIZE
    }

    /// Gives the memory of the whole pages of a range back to the host, as the guest has no use for it: what it reads
    /// there next is of no meaning to it. What of the range is no guest memory is left out.
    ///
    /// # Errors
    /// The error of the host.
    pub fn give_back(&self, address: u64, len: u64) -> io::Result<()> {
        for pages in self.in_memory(whole_pages(address, len)) {
            self.clear(&pages)?;
            add(
                &self.stats.given_back,
                (pages.end - pages.start) * PAGE_SIZE,
            );
        }
        Ok(())
    }

    /// Makes pages read as zeros and hold no memory.
    fn clear(&self, pages: &Range<u64>) -> io::Result<()> {
        let (window, at) = self.locate(pages).ok_or(io::ErrorKind::InvalidInput)?;
        self.clear_locked(&mut self.state(), window, at, pages)
    }

    /// As `clear`, for pages at `at` in `window`.
    pub(crate) fn clear_locked(
        &self,
        state: &mut State,
        window: &Window,
        at: u64,
        pages: &Range<u64>,
    ) -> io::Result<()> {
        // What is no file's page, which is all but a few of what a guest gives back, needs no change of mappings.
        window.forget(at, (pages.end - pages.start) * PAGE_SIZE)?;
        drop(state.candidates.remove(pages.clone()));
        for run in state.mapped.remove(pages.clone()) {
            state.exhausted = false;
            let offset = at + (run.gfn - pages.start) * PAGE_SIZE;
            self.map_own(window, offset, run.pages * PAGE_SIZE)?;
        }
        Ok(())
    }

    fn map_own(&self, window: &Window, offset: u64, len: u64) -> io::Result<()> {
        window.map_zeros(offset, len)?;
        self.keep_small(window, offset, len);
        Ok(())
    }

    fn keep_small(&self, window: &Window, offset: u64, len: u64) {
        if !self.limits.huge_pages
            && let Err(error) = window.keep_small_pages(offset, len)
        {
            tracing::debug!(error = %report::chain(&error), "MADV_NOHUGEPAGE");
        }
    }

    /// Makes every page of a file the guest's own, as the file is about to change, and forgets the file. The guest is
    /// held meanwhile.
    ///
    /// # Errors
    /// The error of the host; then some pages are still the file's. `WouldBlock` where the guest cannot be held.
    pub fn unshare(&self, file: FileIdentity, still: &dyn StandStill) -> io::Result<()> {
        let mut done = Ok(());
        let held = still.hold(&mut |_| done = self.unshare_held(file));
        if held {
            done
        } else {
            Err(io::ErrorKind::WouldBlock.into())
        }
    }

    fn unshare_held(&self, file: FileIdentity) -> io::Result<()> {
        let mut state = self.state();
        state.compared.retain(|compared| !compared.is_of(file));
        let of_file = |run: &Run| run.backing.file.identity() == file;
        let candidates: Vec<Run> = state.candidates.runs().filter(of_file).collect();
        for run in candidates {
            drop(state.candidates.remove(run.gfns()));
        }
        let mapped: Vec<Run> = state.mapped.runs().filter(of_file).collect();
        for run in mapped {
            let (window, at) = self
                .locate(&run.gfns())
                .ok_or(io::ErrorKind::InvalidInput)?;
            let len = run.pages * PAGE_SIZE;
            window.make_private(at, len)?;
            self.keep_small(window, at, len);
            drop(state.mapped.remove(run.gfns()));
        }
        Ok(())
    }

    /// Finds out which of the files' pages the guest has written to since, and forgets when what was mapped long ago
    /// was mapped.
    pub fn refresh(&self) {
        let now = self.now();
        let mut state = self.state();
        for region in &self.regions {
            let gfns = region.gfns();
            let runs: Vec<Run> = state
                .mapped
                .within(gfns.clone())
                .filter(|run| matches!(run.backing.state, PageState::Mapped { .. }))
                .collect();
            if runs.is_empty() {
                continue;
            }
            let Ok(kinds) = region.window.page_kinds(0, region.window.len()) else {
                continue;
            };
            for run in runs {
                self.refresh_run(&mut state, &run, now, |gfn| {
                    kinds.get((gfn - gfns.start) as usize) == Some(&PageKind::Private)
                });
            }
        }
    }

    fn refresh_run(
        &self,
        state: &mut State,
        run: &Run,
        now: u32,
        is_private: impl Fn(u64) -> bool,
    ) {
        let aged = match run.backing.state {
            PageState::Mapped { since, .. } if !is_recent(since, now) => PageState::Mapped {
                since: 0,
                early_writes: 0,
            },
            state => state,
        };
        if aged != run.backing.state {
            state.mapped.set_state(run.clone(), aged);
        }
        let private = alike(run.gfns(), is_private).into_iter();
        for (gfns, _) in private.filter(|(_, is_private)| *is_private) {
            if let (
                PageState::Mapped {
                    since,
                    early_writes,
                },
                Some(part),
            ) = (aged, run.cut(&gfns))
            {
                add(&self.stats.copied, part.pages);
                let copied = PageState::Copied {
                    since,
                    early_writes,
                };
                state.mapped.set_state(part, copied);
            }
        }
    }

    /// What backs the page of a guest physical address, or may come to back it; `None` where it is the guest's own.
    pub fn backing(&self, address: u64) -> Option<Backing> {
        let (state, gfn) = (self.state(), address / PAGE_SIZE);
        let candidate = state.candidates.get(gfn);
        candidate.or_else(|| state.mapped.get(gfn))
    }

    /// Guest physical addresses of the pages that the page of a file at `offset` bytes backs, or may come to back.
    pub fn pages_of(&self, file: FileIdentity, offset: u64) -> Vec<u64> {
        let state = self.state();
        let mapped = state.mapped.pages_of(file, offset);
        let gfns = mapped.chain(state.candidates.pages_of(file, offset));
        gfns.map(|gfn| gfn * PAGE_SIZE).collect()
    }

    /// The runs of pages that are mapped from files, as it is now.
    pub fn mapped(&self) -> Vec<Run> {
        self.state().mapped.runs().collect()
    }

    /// The runs of pages that may be copies of files' pages, as it is now.
    pub fn candidates(&self) -> Vec<Run> {
        self.state().candidates.runs().collect()
    }

    /// Where the guest's memory is, as the host's kernel has it.
    ///
    /// # Errors
    /// Where `/proc` is not to be had.
    pub fn usage(&self) -> io::Result<Usage> {
        let mut usage = Usage::default();
        for region in &self.regions {
            for kind in region.window.page_kinds(0, region.window.len())? {
                match kind {
                    PageKind::Private => usage.private += 1,
                    PageKind::File => usage.shared += 1,
                    PageKind::Absent => usage.absent += 1,
                }
            }
        }
        Ok(usage)
    }

    /// Calls `tell` for each page of a range that is the guest's own, and not a file's: its guest physical address and
    /// its bytes. The guest stands still.
    ///
    /// # Errors
    /// `InvalidInput` where the range is not guest memory; else where `/proc` is not to be had.
    pub fn own_pages(
        &self,
        address: u64,
        len: u64,
        mut tell: impl FnMut(u64, &[u8]),
    ) -> io::Result<()> {
        let gfns = whole_pages(address, len);
        let (window, at) = self.locate(&gfns).ok_or(io::ErrorKind::InvalidInput)?;
        let kinds = window.page_kinds(at, (gfns.end - gfns.start) * PAGE_SIZE)?;
        let mut page = vec![0; PAGE_SIZE as usize];
        for (index, kind) in (0..).zip(kinds) {
            if kind == PageKind::Private {
                window.read(at + index * PAGE_SIZE, &mut page);
                tell((gfns.start + index) * PAGE_SIZE, &page);
            }
        }
        Ok(())
    }

    /// Makes the pages of a range the guest's own now, as it is known that it will write to them: each that is a file's
    /// is copied, for less than the fault costs that would do it later. What of the range is no guest memory is left
    /// out.
    ///
    /// # Errors
    /// The error of the host; pages that were not copied are copied when they are written to.
    pub fn copy_ahead(&self, address: u64, len: u64) -> io::Result<()> {
        for pages in self.in_memory(whole_pages(address, len)) {
            if let Some((window, at)) = self.locate(&pages) {
                window.copy_ahead(at, (pages.end - pages.start) * PAGE_SIZE)?;
            }
        }
        Ok(())
    }
}
