//! CPU time of processes and threads, by `/proc/PID/stat`.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{ProcError, failed};

/// The thread of Coppice that makes guests share what they have read.
const MERGER: &str = "share";

/// User and system time in a `stat` file (proc(5): fields 14 and 15). The name before them is in parentheses and may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut words = rest.split_whitespace().skip(11);
    let mut next = || words.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

/// When a process started, by its `stat` file (field 22), in ticks since boot.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

fn duration(ticks: u64) -> Duration {
    let second = rustix::param::clock_ticks_per_second().max(1);
    Duration::from_micros(ticks.saturating_mul(1_000_000) / second)
}

/// When a process started, since boot. With its number, this tells it from every other process.
///
/// # Errors
/// `Read`, `Malformed`.
pub fn start_of(pid: u32) -> Result<Duration, ProcError> {
    let stat = super::read(pid, "stat")?;
    let ticks = start_ticks(&stat).ok_or_else(|| ProcError::Malformed {
        path: format!("/proc/{pid}/stat").into(),
        expected: "a time as the 22nd field",
    })?;
    Ok(duration(ticks))
}

fn time_of(path: &Path) -> Result<Duration, ProcError> {
    let stat = fs::read_to_string(path).map_err(failed(path))?;
    let ticks = ticks(&stat).ok_or_else(|| ProcError::Malformed {
        path: path.to_owned(),
        expected: "CPU times as the 14th and 15th fields",
    })?;
    Ok(duration(ticks))
}

/// CPU time so far of a process, with all its threads.
///
/// # Errors
/// `Read`, `Malformed`.
pub fn of_process(pid: u32) -> Result<Duration, ProcError> {
    time_of(Path::new(&format!("/proc/{pid}/stat")))
}

/// CPU time so far of the merger of a guest; zero where it has none.
///
/// # Errors
/// `Read`, `Malformed`.
pub fn of_merger(pid: u32) -> Result<Duration, ProcError> {
    let folder = PathBuf::from(format!("/proc/{pid}/task"));
    let tasks = fs::read_dir(&folder).map_err(failed(&folder))?;
    let mut sum = Duration::ZERO;
    for task in tasks.filter_map(Result::ok) {
        // A thread may end at any time.
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if name.trim_end() == MERGER {
            sum += time_of(&task.path().join("stat"))?;
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn names_may_hold_spaces_and_parentheses() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194304 10 0 0 0 170 30 5 6 20 0 1 0 100 1000 1";
        assert_eq!(ticks(stat), Some(200));
        assert_eq!(start_ticks(stat), Some(100));
        assert_eq!(ticks("42 (sh) S 1"), None);
        assert_eq!(ticks(""), None);
    }

    #[test]
    fn only_the_merger_is_counted_as_one() {
        let pid = std::process::id();
        let busy = |name: &str| {
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || {
                    let end = Instant::now() + Duration::from_millis(400);
                    let mut sums = [Duration::ZERO; 2];
                    // On a busy machine it may take longer until there is something to count.
                    while Instant::now() < end || sums[1].is_zero() {
                        sums = [of_merger(pid).unwrap(), of_process(pid).unwrap()];
                    }
                    sums
                })
        };
        let [merger, process] = busy("shared").unwrap().join().unwrap();
        assert!(merger.is_zero() && process > Duration::ZERO);
        let [merger, process] = busy(MERGER).unwrap().join().unwrap();
        assert!(merger > Duration::ZERO && merger <= process);
    }
}
