//! The thread that merges, and how much of the CPU it takes.
//!
//! Where there is nothing to do it sleeps, and looks at the files every few seconds. While the guest is at work, what there is to do waits for some time, as each exchange costs
//! the guest a moment at a standstill and a fault when it comes back to the page. Its CPU time is a token bucket: full at the start, so that what a guest has read while it booted is
//! shared soon, and then filled with a share of the time that goes by.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::memory::{SharedMemory, StandStill};
use crate::merge::Progress;
use crate::stats::add;

/// A merger compares and maps, and little else.
const STACK_SIZE: usize = 64 << 10;
/// The least time between two looks, and the least age of a copy that is compared.
const PACE: Duration = Duration::from_millis(200);
/// When the guest's own pages are compared with files, and zeros are looked for, in seconds after the start: often while it boots and soon after,
/// as nobody says when that is over, and then never again.
const LOOKS: [u64; 20] = [
    1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 45, 60,
];

/// The same for a guest that goes on from a snapshot: it does at once most of what it does.
const LOOKS_LOADED: [u64; 4] = [2, 10, 30, 60];

/// A guest whose vCPUs have used less than this CPU time since the last look has changed too little for another.
const IDLE: Duration = Duration::from_millis(20);

/// How long work waits at most for a guest that does not rest.
const PATIENCE: Duration = Duration::from_secs(5);
/// A guest rests while its vCPUs use less than this share of a core, in percent.
const RESTING: u32 = 25;

/// How often the files are looked at, a `stat` of each, when there is nothing else to do. A vCPU that touches a page that its file has lost may never
/// tell: KVM takes it for one that is still to come from the disk, and has the vCPU wait and try again without end (`kvm_setup_async_pf` of Linux
/// 6.1, where the guest has interrupts enabled).
const FILES: Duration = Duration::from_secs(5);

/// CPU time that the merger may use: a token bucket.
#[derive(Debug)]
struct CpuBudget {
    left: Duration,
    most: Duration,
    percent: u8,
    filled: Instant,
}

impl CpuBudget {
    fn new(percent: u8, burst: Duration, now: Instant) -> Self {
        Self {
            left: burst,
            most: burst,
            percent,
            filled: now,
        }
    }

    /// Takes what was used, and returns how long to wait before more is.
    fn take(&mut self, used: Duration, now: Instant) -> Duration {
        let share = f64::from(self.percent) / 100.0;
        let earned = now.duration_since(self.filled).mul_f64(share);
        self.filled = now;
        let available = (self.left + earned).min(self.most);
        self.left = available.saturating_sub(used);
        // What is missing is earned while nothing is done.
        let missing = used.saturating_sub(available);
        let wait = missing.div_f64(share.max(0.001));
        self.filled = now + wait;
        wait
    }
}

/// Lets the merger work once the guest is idle, or the work has waited for long.
#[derive(Debug, Default)]
struct IdleGate {
    /// Since when there is something to do.
    since: Option<Instant>,
    /// The guest's CPU time when it was last looked at, and when that was.
    last: Option<(Instant, Duration)>,
}

impl IdleGate {
    /// Whether what there is to do may be done. `cpu_time` is the guest's until now.
    fn is_time(&mut self, now: Instant, cpu_time: Duration) -> bool {
        let since = *self.since.get_or_insert(now);
        let rests = self.last.is_some_and(|(at, before)| {
            cpu_time.saturating_sub(before) * 100 < now.saturating_duration_since(at) * RESTING
        });
        self.last = Some((now, cpu_time));
        let is_time = rests || now.saturating_duration_since(since) >= PATIENCE;
        if is_time {
            self.forget();
        }
        is_time
    }

    /// Nothing is to be done now: the next time has to be found anew.
    fn forget(&mut self) {
        *self = Self::default();
    }
}

/// Which of the [looks](LOOKS) is next.
#[derive(Debug)]
struct Looks {
    started: Instant,
    /// Seconds after that.
    times: &'static [u64],
    next: usize,
    /// The guest's CPU time when it was last looked at.
    last: Option<Duration>,
    /// Files that it was compared with.
    files: usize,
}

impl Looks {
    fn new(started: Instant, times: &'static [u64]) -> Self {
        Self {
            started,
            times,
            next: 0,
            last: None,
            files: 0,
        }
    }

    /// Whether the guest is to be looked at, as it is time for it, or as there are more `files` than it was compared with. `cpu_time` is the guest's until
    /// now.
    fn is_due(&mut self, now: Instant, cpu_time: Duration, files: usize) -> bool {
        if self.left(now) == Some(Duration::ZERO) {
            let used = self.last.map(|before| cpu_time.saturating_sub(before));
            if used.is_none_or(|used| used >= IDLE) {
                return true;
            }
            self.pass(now);
        }
        files > self.files
    }

    /// The guest has been looked at.
    fn done(&mut self, now: Instant, cpu_time: Duration, files: usize) {
        self.pass(now);
        self.last = Some(cpu_time);
        self.files = files;
    }

    /// The looks until now are over.
    fn pass(&mut self, now: Instant) {
        while self.left(now) == Some(Duration::ZERO) {
            self.next += 1;
        }
    }

    /// How long it is to the next, if there is one.
    fn left(&self, now: Instant) -> Option<Duration> {
        let next = self.times.get(self.next)?;
        Some((self.started + Duration::from_secs(*next)).saturating_duration_since(now))
    }
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// A running merger. Dropping it ends its thread.
#[derive(Debug)]
pub struct Merger {
    memory: Arc<SharedMemory>,
    thread: Option<JoinHandle<()>>,
}

impl Merger {
    /// Starts the thread, called `share`, that merges in `memory`; it has `still` hold the guest.
    ///
    /// # Errors
    /// Where the host starts no more threads.
    pub fn start(memory: Arc<SharedMemory>, still: Arc<dyn StandStill>) -> io::Result<Self> {
        let thread = std::thread::Builder::new()
            .name("share".into())
            .stack_size(STACK_SIZE)
            .spawn({
                let memory = memory.clone();
                move || run(&memory, &*still)
            })?;
        Ok(Self {
            memory,
            thread: Some(thread),
        })
    }
}

impl Drop for Merger {
    fn drop(&mut self) {
        self.memory.end_merger();
        if let Some(thread) = self.thread.take() {
            // A merger that has panicked has been told by the panic hook; the guest goes on unshared.
            let _ = thread.join();
        }
    }
}

fn run(memory: &SharedMemory, still: &dyn StandStill) {
    let started = Instant::now();
    let limits = *memory.limits();
    let mut budget = CpuBudget::new(limits.cpu_percent, limits.burst, started);
    let times: &[u64] = if limits.base { &LOOKS_LOADED } else { &LOOKS };
    let mut looks = Looks::new(started, times);
    let mut before = cpu_time();
    let mut gate = IdleGate::default();
    let mut are_scans_done = false;
    loop {
        memory.look_at_files();
        let (files, has_candidates) = {
            let state = memory.state();
            (state.compared.len(), !state.candidates.is_empty())
        };
        let looks_for = limits.zeros || limits.base || files > 0;
        let (now, guest_time) = (Instant::now(), still.cpu_time());
        let due = looks_for && looks.is_due(now, guest_time, files);
        if !due && !has_candidates {
            gate.forget();
        } else if !gate.is_time(now, guest_time) {
            memory.rest(PACE);
            if memory.state().ending {
                return;
            }
            continue;
        }
        if due {
            looks.done(now, guest_time, files);
            memory.note_compared();
        }
        // Time that is owed is waited for between batches.
        let mut owed = Duration::ZERO;
        let mut charge = || {
            let now = cpu_time();
            let used = now.saturating_sub(before);
            before = now;
            add(&memory.stats().cpu_nanoseconds, used.as_nanos() as u64);
            owed = budget.take(used, Instant::now());
            !owed.is_zero() || memory.state().ending
        };
        let progress = memory.merge(still, &mut charge);
        if due {
            memory.refresh();
            if limits.zeros && !limits.huge_pages {
                memory.give_zeros_back(still, &mut charge);
            }
        }
        charge();
        let next_look = looks.left(Instant::now());
        if next_look.is_none() {
            memory.forget_compared();
            looks.files = 0;
            if !std::mem::replace(&mut are_scans_done, true) {
                still.scans_done();
            }
        }
        let state = memory.state();
        if state.ending {
            return;
        }
        let next = next_look.filter(|_| looks_for).unwrap_or(FILES).min(FILES);
        let was_woken = match progress {
            Progress::Done => memory.wait(state, next),
            Progress::More => {
                drop(state);
                memory.rest(owed);
                false
            }
            Progress::Later(time) => memory.wait(state, next.min(time).max(PACE)),
        };
        if memory.state().ending {
            return;
        }
        if was_woken || due {
            // What was just read is too young; and what comes in meanwhile is seen without another wake-up.
            memory.rest(PACE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_the_long_run_no_more_than_the_share_is_used() {
        let start = Instant::now();
        let burst = Duration::from_millis(500);
        let mut budget = CpuBudget::new(5, burst, start);
        let (mut now, mut used) = (start, Duration::ZERO);
        while now < start + Duration::from_mins(2) {
            let slice = Duration::from_millis(7);
            used += slice;
            now += slice;
            now += budget.take(slice, now);
        }
        let allowed = burst + (now - start).mul_f64(0.05);
        assert!(
            used <= allowed + Duration::from_millis(8),
            "{used:?} of {allowed:?}"
        );
        assert!(used >= allowed.mul_f64(0.9), "{used:?} of {allowed:?}");
    }

    #[test]
    fn work_waits_for_the_guest_to_rest_but_not_for_ever() {
        let start = Instant::now();
        let mut gate = IdleGate::default();
        let (mut now, mut used) = (start, Duration::ZERO);
        let mut waited = |gate: &mut IdleGate, share: f64| {
            let from = now;
            loop {
                now += PACE;
                used += PACE.mul_f64(share);
                if gate.is_time(now, used) {
                    return now - from;
                }
            }
        };
        assert_eq!(waited(&mut gate, 0.1), 2 * PACE);
        assert_eq!(waited(&mut gate, 0.9), PACE + PATIENCE);
        assert_eq!(waited(&mut gate, 0.1), 2 * PACE);
    }

    #[test]
    fn a_guest_is_looked_at_while_it_boots_and_not_when_it_was_idle_since() {
        let started = Instant::now();
        let at = |seconds: u64| started + Duration::from_secs(seconds);
        let cpu = Duration::from_millis;
        let mut looks = Looks::new(started, &LOOKS);
        assert!(!looks.is_due(started, cpu(0), 0));
        assert!(looks.is_due(at(1), cpu(0), 0), "the first is unasked");
        looks.done(at(1), cpu(0), 0);
        assert!(!looks.is_due(at(1), cpu(900), 0), "it was a moment ago");
        assert!(looks.is_due(at(2), cpu(900), 0));
        looks.done(at(2), cpu(900), 0);
        assert!(!looks.is_due(at(4), cpu(910), 0), "it was idle");
        assert_eq!(looks.left(at(4)), Some(Duration::from_secs(1)));
        assert!(
            looks.is_due(at(5), cpu(920), 0),
            "it was idle each time, and not in all"
        );
        assert!(looks.is_due(at(4), cpu(910), 1), "a file has come");
        looks.done(at(4), cpu(910), 1);
        assert!(!looks.is_due(at(4), cpu(910), 1));
        looks.done(at(100), cpu(5000), 1);
        assert_eq!(looks.left(at(100)), None);
        assert!(!looks.is_due(at(200), cpu(90_000), 1));
    }

    #[test]
    fn a_merger_that_was_idle_has_its_burst_and_no_more() {
        let start = Instant::now();
        let mut budget = CpuBudget::new(5, Duration::from_secs(1), start);
        let later = start + Duration::from_hours(1);
        assert_eq!(budget.take(Duration::from_secs(1), later), Duration::ZERO);
        let wait = budget.take(Duration::from_millis(50), later);
        assert_eq!(wait, Duration::from_secs(1));
    }
}
